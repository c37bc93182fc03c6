"""The official WIDER FACE evaluation (Yang, Luo, Loy, Tang, CVPR 2016), vectorised.

Scores are scaled to [0, 1] over the whole set. In each image, predictions are matched with faces in descending order of
score, at an IoU of at least 0.5 with inclusive pixel coordinates. A prediction that matches a face outside the subset
counts neither as true nor as false positive. Precision and recall are pooled over the set at 1,000 score thresholds,
and the average precision is the area under the interpolated curve.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from utils.errors import UserError

SUBSETS = ("easy", "medium", "hard")
_IOU_THRESHOLD = 0.5
_THRESHOLDS = 1 - np.arange(1, 1001) / 1000
_OVERLAPS_AT_ONCE = 2_000_000  # pairs of a prediction and a face; bounds the memory in crowds


@dataclass(frozen=True)
class GroundTruth:
    """The faces of one validation image.

    Attributes:
        name: `event/image`, without a suffix.
        boxes: (N, 4) x, y, width, height in pixels.
        subsets: (N,) bool, which faces count, by the name of the subset.
    """

    name: str
    boxes: np.ndarray
    subsets: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Curve:
    """Precision and recall of one subset, from the highest to the lowest score threshold.

    Attributes:
        precision: (1000,); 0 where no prediction passes the threshold.
        recall: (1000,); 0 if the subset has no face.
        faces: number of faces that count.
    """

    precision: np.ndarray
    recall: np.ndarray
    faces: int

    @property
    def average_precision(self) -> float:
        """Area under the curve, with the highest precision at this or a higher recall (PASCAL VOC 2010)."""
        recall = np.concatenate([[0.0], self.recall, [1.0]])
        precision = np.concatenate([[0.0], self.precision, [0.0]])
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        return float(np.sum(np.diff(recall) * envelope[1:]))


@dataclass(frozen=True)
class Matches:
    """Matches between the predictions and the faces of one image, at any score threshold.

    Attributes:
        face_scores: (N,) score of the best prediction that matches each face; NaN if none does.
        matched_face: (M,) index of the face that each prediction matches, in input order; -1 if it matches none.
        is_best_match: (M,) bool, whether no prediction of a higher score matches the same face.
    """

    face_scores: np.ndarray
    matched_face: np.ndarray
    is_best_match: np.ndarray

    def is_counted(self, counted: np.ndarray) -> np.ndarray:
        """(M,) bool, whether each prediction counts as true or false: not if it matches a face that does not count.

        Args:
            counted: (N,) bool, which faces count.
        """
        # The appended value is at index -1: a prediction that matches no face is false.
        is_counted: np.ndarray = np.append(counted, True)[self.matched_face]
        return is_counted


@dataclass(frozen=True)
class Evaluation:
    """Curves by subset, and matches by image in the order of the ground truth."""

    curves: Mapping[str, Curve]
    matches: Sequence[Matches]

    @property
    def average_precisions(self) -> dict[str, float]:
        return {subset: curve.average_precision for subset, curve in self.curves.items()}


def load_ground_truth(folder: Path) -> list[GroundTruth]:
    """Read `wider_face_val.mat` and the `.mat` of the three subsets.

    Raises:
        UserError: a file is missing or malformed.
    """
    try:
        faces = _load(folder / "wider_face_val.mat", "event_list", "file_list", "face_bbx_list")
        kept = {subset: _load(folder / f"wider_{subset}_val.mat", "gt_list")["gt_list"] for subset in SUBSETS}
        truths = []
        for e, event in enumerate(faces["event_list"][:, 0]):
            for i, image in enumerate(faces["file_list"][e, 0][:, 0]):
                boxes = faces["face_bbx_list"][e, 0][i, 0].astype(np.float64).reshape(-1, 4)
                subsets = {}
                for subset in SUBSETS:
                    subsets[subset] = np.zeros(len(boxes), bool)
                    subsets[subset][kept[subset][e, 0][i, 0].ravel().astype(int) - 1] = True  # Matlab counts from 1
                truths.append(GroundTruth(f"{event[0]}/{image[0]}", boxes, subsets))
    except Exception as error:  # a damaged file makes SciPy's reader raise almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{folder}: not the official ground truth of WIDER FACE val ({reason})") from None
    if not truths:
        raise UserError(f"{folder}: names no image")
    return truths


def _load(path: Path, *variables: str) -> dict[str, np.ndarray]:
    """Read only the named variables of a .mat file."""
    return {name: value for name, value in loadmat(str(path), variable_names=variables).items() if name in variables}


def evaluate(
    predictions: Mapping[str, np.ndarray], truths: Sequence[GroundTruth], *, count_negatives: bool = False
) -> Evaluation:
    """Compare predictions with the faces of a set.

    If all scores are equal, every prediction passes every threshold. Predictions of equal score keep their order.

    Args:
        predictions: (N, 5) finite x, y, width, height, score, by `GroundTruth.name`; no entry means no
            predictions. Scores may have any range.
        truths: ground truth of at least one image; all have the same subsets.
        count_negatives: whether predictions in images without faces are false positives. The official tool ignores
            them.
    """
    all_matches = []
    totals = np.zeros((len(truths[0].subsets), 2, len(_THRESHOLDS)))
    for matches, counts in _compare_images(predictions, truths, count_negatives):
        all_matches.append(matches)
        totals += counts
    faces = _faces_by_image(truths).sum(axis=0)
    curves = {
        subset: _curve(proposals, found, int(count))
        for subset, (proposals, found), count in zip(truths[0].subsets, totals, faces, strict=True)
    }
    return Evaluation(curves, all_matches)


def bootstrap(
    predictions: Mapping[str, np.ndarray],
    truths: Sequence[GroundTruth],
    *,
    count_negatives: bool = False,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Estimate how much the average precision depends on the choice of images, by the bootstrap (Efron, 1979).

    Each sample draws as many images as the set has, with replacement. Scores keep the scale of the whole set. Other
    arguments are those of `evaluate`.

    Returns:
        (samples,) average precisions by subset. Their standard deviation is the standard error.
    """
    generator = np.random.default_rng(seed)
    counts = np.stack([each for _, each in _compare_images(predictions, truths, count_negatives)])
    faces = _faces_by_image(truths)
    subsets = tuple(truths[0].subsets)
    precisions = np.zeros((len(subsets), samples))
    for sample in range(samples):
        drawn = np.bincount(generator.integers(len(truths), size=len(truths)), minlength=len(truths))
        totals = np.tensordot(drawn.astype(counts.dtype), counts, axes=1)
        for number, ((proposals, found), count) in enumerate(zip(totals, drawn @ faces, strict=True)):
            precisions[number, sample] = _curve(proposals, found, int(count)).average_precision
    return dict(zip(subsets, precisions, strict=True))


def _compare_images(
    predictions: Mapping[str, np.ndarray], truths: Sequence[GroundTruth], count_negatives: bool
) -> Iterator[tuple[Matches, np.ndarray]]:
    """Yield the matches of each image, and its numbers of predictions and of found faces by subset and threshold.

    The numbers are an (S, 2, 1000) array.
    """
    lowest, highest = score_range(predictions[truth.name] for truth in truths if truth.name in predictions)
    for truth in truths:
        rows = predictions.get(truth.name, np.zeros((0, 5)))
        order = np.argsort(-rows[:, 4], kind="stable")
        matches = _match(rows, order, truth.boxes)
        counts = np.zeros((len(truth.subsets), 2, len(_THRESHOLDS)), np.float32)  # exact up to 2^24
        if len(rows) and (len(truth.boxes) or count_negatives):
            scaled = (rows[order, 4] - lowest) / (highest - lowest) if highest > lowest else np.ones(len(rows))
            # Number of predictions, best first, that pass each threshold.
            passing = np.searchsorted(-scaled, -_THRESHOLDS, side="right")
            matched_face, is_best_match = matches.matched_face[order], matches.is_best_match[order]
            for number, counted in enumerate(truth.subsets.values()):
                is_counted = matches.is_counted(counted)[order]
                counts[number, 0] = _prefix_sums(is_counted, passing)
                counts[number, 1] = _prefix_sums(is_best_match & is_counted & (matched_face >= 0), passing)
        yield matches, counts


def _faces_by_image(truths: Sequence[GroundTruth]) -> np.ndarray:
    """(I, S) number of faces of each image that count in each subset."""
    return np.array([[int(counted.sum()) for counted in truth.subsets.values()] for truth in truths])


def score_range(predictions: Iterable[np.ndarray]) -> tuple[float, float]:
    """The lowest and the highest score of (N, 5) predictions; zeros if there are none."""
    scores = np.concatenate([np.zeros(0), *(rows[:, 4] for rows in predictions)])
    return (float(scores.min()), float(scores.max())) if len(scores) else (0.0, 0.0)


def _match(rows: np.ndarray, order: np.ndarray, faces: np.ndarray) -> Matches:
    """Match every prediction with the face of highest IoU, if that IoU reaches the threshold."""
    face_scores = np.full(len(faces), np.nan)
    matched_face = np.full(len(rows), -1)
    is_best_match = np.zeros(len(rows), bool)
    if len(faces) == 0 or len(rows) == 0:
        return Matches(face_scores, matched_face, is_best_match)
    step = max(1, _OVERLAPS_AT_ONCE // len(faces))
    for part in (slice(start, start + step) for start in range(0, len(rows), step)):
        overlaps = _pixel_iou(rows[part, :4], faces)
        best = overlaps.argmax(axis=1)
        enough = overlaps[np.arange(len(best)), best] >= _IOU_THRESHOLD
        matched_face[part] = np.where(enough, best, -1)
    hits = order[matched_face[order] >= 0]  # best score first
    found, first = np.unique(matched_face[hits], return_index=True)
    is_best_match[hits[first]] = True
    face_scores[found] = rows[hits[first], 4]
    return Matches(face_scores, matched_face, is_best_match)


def _prefix_sums(flags: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """For each n of `counts`, the number of set flags among the first n."""
    return np.concatenate([[0], np.cumsum(flags)])[counts]


def _pixel_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N, M) IoU of (N, 4) and (M, 4) boxes, x, y, width, height, where x + width is the last pixel.

    The IoU of boxes of negative size is 0. Terms are added in the order of the official ports, so that rounding at an
    IoU of exactly 0.5 is the same.
    """
    starts, ends = boxes[:, None, :2], boxes[:, None, :2] + boxes[:, None, 2:]
    other_starts, other_ends = others[None, :, :2], others[None, :, :2] + others[None, :, 2:]
    sides = np.minimum(ends, other_ends) - np.maximum(starts, other_starts) + 1
    overlap = np.where((sides > 0).all(axis=2), sides[..., 0] * sides[..., 1], 0.0)
    areas, other_areas = (ends - starts + 1).prod(axis=2), (other_ends - other_starts + 1).prod(axis=2)
    return np.divide(overlap, areas + other_areas - overlap, out=np.zeros_like(overlap), where=overlap > 0)


def _curve(proposals: np.ndarray, found: np.ndarray, faces: int) -> Curve:
    proposals, found = proposals.astype(np.float64), found.astype(np.float64)
    precision = np.divide(found, proposals, out=np.zeros_like(found), where=proposals > 0)
    return Curve(precision, found / max(faces, 1), faces)
