"""Average precision over all labelled faces at one IoU, pooled over the images of a set.

This is not the WIDER FACE easy / medium / hard figure: every labelled face counts, and none is ignored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torchvision.ops import box_iou


def average_precision(
    predictions: Sequence[tuple[np.ndarray, np.ndarray]], truths: Sequence[np.ndarray], iou_threshold: float = 0.5
) -> float:
    """Area under the interpolated precision/recall curve (PASCAL VOC 2010 and later).

    Args:
        predictions: per image, boxes (N, 4) xyxy and scores (N,).
        truths: per image, boxes (M, 4) xyxy.
        iou_threshold: overlap from which a prediction finds a face. Each face is found once, by the best score.

    Returns:
        In [0, 1]; 0 where nothing is predicted or nothing is labelled.
    """
    scores = [np.zeros(0)]
    hits = [np.zeros(0, bool)]
    for (boxes, image_scores), faces in zip(predictions, truths, strict=True):
        order = np.argsort(-image_scores, kind="stable")
        scores.append(image_scores[order])
        hits.append(_match(boxes[order], faces, iou_threshold))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    found = np.concatenate(hits)[order].cumsum()
    faces_in_all = sum(len(faces) for faces in truths)
    if faces_in_all == 0 or len(found) == 0:
        return 0.0
    recall = found / faces_in_all
    precision = found / np.arange(1, len(found) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0) * envelope))


def _match(boxes: np.ndarray, faces: np.ndarray, iou_threshold: float) -> np.ndarray:
    """(N,) bool: which boxes, best first, find a face that no better one has found."""
    hit = np.zeros(len(boxes), bool)
    if len(boxes) == 0 or len(faces) == 0:
        return hit
    iou = box_iou(torch.as_tensor(boxes, dtype=torch.float64), torch.as_tensor(faces, dtype=torch.float64)).numpy()
    candidates = np.flatnonzero(iou.max(axis=1) >= iou_threshold)
    _, first = np.unique(iou[candidates].argmax(axis=1), return_index=True)
    hit[candidates[first]] = True
    return hit
