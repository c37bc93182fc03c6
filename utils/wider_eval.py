"""The official WIDER FACE evaluation (Yang, Luo, Loy, Tang, CVPR 2016), vectorised.

Scores are scaled to [0, 1] over the whole set; in each image predictions, best first, are matched to faces at an IoU
of 0.5 or more, counting pixels; a match to a face outside the subset is neither right nor wrong; precision and recall
are pooled over the set at 1,000 score thresholds, and the average precision is the area under the interpolated curve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from config import UserError

SUBSETS = ("easy", "medium", "hard")
_IOU_THRESHOLD = 0.5
_THRESHOLDS = 1000


@dataclass(frozen=True)
class GroundTruth:
    """The faces of one validation image.

    Attributes:
        name: `event/image`, without a suffix.
        boxes: (N, 4) x, y, width, height in pixels.
        subsets: for each of `SUBSETS`, (N,) bool: the faces that count in it.
    """

    name: str
    boxes: np.ndarray
    subsets: Mapping[str, np.ndarray]


def load_ground_truth(folder: Path) -> list[GroundTruth]:
    """Read `wider_face_val.mat` and the `.mat` of the three subsets.

    Raises:
        UserError: a file is missing or is no such file.
    """
    try:
        faces = loadmat(str(folder / "wider_face_val.mat"))
        kept = {subset: loadmat(str(folder / f"wider_{subset}_val.mat"))["gt_list"] for subset in SUBSETS}
        truths = []
        for e, event in enumerate(faces["event_list"][:, 0]):
            for i, image in enumerate(faces["file_list"][e, 0][:, 0]):
                boxes = faces["face_bbx_list"][e, 0][i, 0].astype(np.float64).reshape(-1, 4)
                subsets = {}
                for subset in SUBSETS:
                    subsets[subset] = np.zeros(len(boxes), bool)
                    subsets[subset][kept[subset][e, 0][i, 0].ravel().astype(int) - 1] = True  # Matlab counts from 1
                truths.append(GroundTruth(f"{event[0]}/{image[0]}", boxes, subsets))
    except (OSError, KeyError, IndexError, ValueError) as error:
        raise UserError(f"{folder}: not the official ground truth of WIDER FACE val ({error})") from None
    return truths


def evaluate(predictions: Mapping[str, np.ndarray], truths: Sequence[GroundTruth]) -> dict[str, float]:
    """Average precision of each subset.

    Args:
        predictions: for each `GroundTruth.name`, (N, 5) x, y, width, height, score; absent is the same as empty.
        truths: as `load_ground_truth` gives them.
    """
    scores = np.concatenate([np.zeros(0), *(rows[:, 4] for rows in predictions.values())])
    lowest, span = (scores.min(), np.ptp(scores)) if len(scores) else (0.0, 0.0)
    thresholds = 1 - np.arange(1, _THRESHOLDS + 1) / _THRESHOLDS
    proposals = {subset: np.zeros(_THRESHOLDS) for subset in SUBSETS}
    found = {subset: np.zeros(_THRESHOLDS) for subset in SUBSETS}
    for truth in truths:
        rows = predictions.get(truth.name)
        if rows is None or len(rows) == 0 or len(truth.boxes) == 0:
            continue
        rows = rows[np.argsort(-rows[:, 4], kind="stable")]
        scaled = (rows[:, 4] - lowest) / span if span else np.ones(len(rows))
        overlaps = _pixel_iou(rows[:, :4], truth.boxes)
        best_face = overlaps.argmax(axis=1)
        hit = overlaps.max(axis=1) >= _IOU_THRESHOLD
        # A face is found by the first prediction that hits it.
        first = np.zeros(len(rows), bool)
        hits = np.flatnonzero(hit)
        first[hits[np.unique(best_face[hits], return_index=True)[1]]] = True
        # How many predictions, best first, pass each threshold.
        passing = np.searchsorted(-scaled, -thresholds, side="right")
        for subset in SUBSETS:
            counts = truth.subsets[subset][best_face]
            proposals[subset] += _sums_of_first(~hit | counts, passing)
            found[subset] += _sums_of_first(first & counts, passing)
    faces = {subset: sum(int(truth.subsets[subset].sum()) for truth in truths) for subset in SUBSETS}
    return {subset: _average_precision(proposals[subset], found[subset], faces[subset]) for subset in SUBSETS}


def _sums_of_first(flags: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """For each of `counts`, how many of the first so many flags are set."""
    return np.concatenate([[0], np.cumsum(flags)])[counts]


def _pixel_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of (N, 4) with (M, 4), x, y, width, height, where x + width is the last pixel."""
    top_left = np.maximum(boxes[:, None, :2], others[None, :, :2])
    ends = [rows[:, :2] + rows[:, 2:] for rows in (boxes, others)]
    bottom_right = np.minimum(ends[0][:, None], ends[1][None])
    overlap = np.clip(bottom_right - top_left + 1, 0, None).prod(axis=2)
    areas = [(rows[:, 2:] + 1).prod(axis=1) for rows in (boxes, others)]
    return overlap / (areas[0][:, None] + areas[1][None] - overlap)


def _average_precision(proposals: np.ndarray, found: np.ndarray, faces: int) -> float:
    precision = np.divide(found, proposals, out=np.zeros_like(found), where=proposals > 0)
    recall = np.concatenate([[0.0], found / max(faces, 1), [1.0]])
    envelope = np.maximum.accumulate(np.concatenate([[0.0], precision, [0.0]])[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope[1:]))
