"""Measures that complement the official AP at an IoU of 0.5: AP at higher IoUs, and the error of landmarks."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.evaluation.wider_eval import GroundTruth
from utils.structures import Detections, Faces

# Maximum number of detections per image that count; crowds have up to 2,000 faces.
_MAX_DETECTIONS = 10_000


@dataclass(frozen=True)
class LocalisationAP:
    """COCO's average precision over the faces of the largest subset; other labelled faces are ignored.

    Attributes:
        ap: mean over the IoUs 0.5, 0.55, ..., 0.95.
        ap50, ap75: at the IoUs 0.5 and 0.75.
    """

    ap: float
    ap50: float
    ap75: float


def localisation_ap(predictions: Mapping[str, np.ndarray], truths: Sequence[GroundTruth]) -> LocalisationAP:
    """Evaluate predictions by `faster-coco-eval`, whose figures equal those of pycocotools.

    Args:
        predictions: (N, 5) x, y, width, height, score, by `GroundTruth.name`; no entry means no predictions.
        truths: ground truth of at least one image.
    """
    from faster_coco_eval import COCO, COCOeval_faster  # takes a second to import

    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image_id, truth in enumerate(truths, start=1):
        counted = list(truth.subsets.values())[-1]
        for box, counts in zip(truth.boxes.tolist(), counted.tolist(), strict=True):
            area = box[2] * box[3]
            face = {"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "bbox": box, "area": area}
            annotations.append(face | {"iscrowd": int(not counts)})
        for *box, score in predictions.get(truth.name, np.zeros((0, 5))).tolist():
            detections.append({"image_id": image_id, "category_id": 1, "bbox": box, "score": score})
    if not annotations or not detections:
        return LocalisationAP(0.0, 0.0, 0.0)
    images = [{"id": number, "width": 1, "height": 1} for number in range(1, len(truths) + 1)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "face"}]}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        ground_truth = COCO(content)
        evaluation = COCOeval_faster(ground_truth, ground_truth.loadRes(detections), "bbox")
        evaluation.params.maxDets = [_MAX_DETECTIONS]
        evaluation.params.areaRng = evaluation.params.areaRng[:1]
        evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[:1]
        evaluation.evaluate()
        evaluation.accumulate()
    # (IoUs, recalls, categories, areas, numbers of detections); -1 where no face counts.
    precision = evaluation.eval["precision"][:, :, 0, 0, -1]
    by_iou = np.where(precision >= 0, precision, 0.0).mean(axis=1)
    return LocalisationAP(float(by_iou.mean()), float(by_iou[0]), float(by_iou[5]))


def landmark_errors(detections: Detections, faces: Faces) -> np.ndarray:
    """Normalised errors of the landmarks of the detected faces of one image.

    A face is detected by the most confident detection with an IoU of at least 0.5. Its error is the mean distance of
    the five landmarks divided by the root of the area of the labelled box, as in RetinaFace (arXiv:1905.00641, section
    4.5).

    Returns:
        (K,) errors of the K detected faces that have labelled landmarks; K is 0 for a model without landmarks.
    """
    import torch  # takes a second to import, and only a detector that ran here has landmarks
    from torchvision.ops import box_iou

    labelled = faces.select(faces.has_landmarks & ~faces.ignored)
    if detections.landmarks is None or not len(detections) or not len(labelled):
        return np.zeros(0)
    is_hit = (box_iou(torch.from_numpy(labelled.boxes), detections.boxes) >= 0.5).numpy()
    found = is_hit.any(axis=1)
    best = is_hit.argmax(axis=1)[found]  # the first one, because detections are in descending order of score
    distances = np.linalg.norm(detections.landmarks.numpy()[best] - labelled.landmarks[found], axis=2).mean(axis=1)
    errors: np.ndarray = distances / np.sqrt((labelled.boxes[found, 2:] - labelled.boxes[found, :2]).prod(axis=1))
    return errors
