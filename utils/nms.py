"""Non-maximum suppression as in the reference implementations."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

from utils.crowd_nms import crowd_nms, crowd_votes

_CROWD = 2000  # boxes from which `crowd_nms` is faster; fewer are not worth its compilation
_VOTERS_AT_ONCE = 4096  # bounds the memory


def pixel_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression with inclusive pixel coordinates: a width is x2 - x1 + 1.

    Descendants of Fast R-CNN, such as biubug6/Pytorch_Retinaface and the original, add the pixel.
    `torchvision.ops.nms` does not, and keeps other boxes unless the caller adds it.

    Args:
        boxes: (N, 4) xyxy in pixels.
        scores: (N,).
        iou_threshold: a box is dropped if its IoU with a better one is greater.

    Returns:
        Indices of the kept boxes, best first.
    """
    inclusive = boxes + boxes.new_tensor([0, 0, 1, 1])
    suppress = crowd_nms if _is_crowd(inclusive, iou_threshold) else nms
    kept: Tensor = suppress(inclusive, scores, iou_threshold)
    return kept


def _is_crowd(boxes: Tensor, iou_threshold: float) -> bool:
    is_traced = isinstance(boxes.shape[0], Tensor)  # into a graph, which is also for other numbers of boxes
    is_usual = boxes.dtype == torch.float32 and not boxes.is_cuda and not is_traced
    return is_usual and len(boxes) > _CROWD and 0.1 <= iou_threshold <= 1


def vote_boxes(boxes: Tensor, scores: Tensor, iou_threshold: float) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression with box voting.

    A kept box becomes the mean, weighted by score, of itself and of the boxes that it suppresses
    (Gidaris and Komodakis, arXiv:1505.01749, section 5), as RetinaFace merges the passes of its test-time augmentation.

    Args:
        boxes: (N, 4) xyxy in pixels.
        scores: (N,), positive.
        iou_threshold: a box votes for the best one with which its IoU, counting pixels, is greater.

    Returns:
        (K,) indices of the kept boxes, best first, and (K, 4) the boxes after voting.
    """
    if not len(boxes):
        return scores.argsort(), boxes
    inclusive = boxes + boxes.new_tensor([0, 0, 1, 1])
    if _is_crowd(inclusive, iou_threshold):
        kept, winners = crowd_votes(inclusive, scores, iou_threshold)
    else:
        kept = nms(inclusive, scores, iou_threshold)
        winners = _winners(inclusive, kept, iou_threshold)
    weights = boxes.new_zeros(len(kept)).index_add(0, winners, scores)
    sums = boxes.new_zeros(len(kept), 4).index_add(0, winners, boxes * scores[:, None])
    return kept, sums / weights[:, None]


def _winners(boxes: Tensor, kept: Tensor, iou_threshold: float) -> Tensor:
    """(N,) position among the (K,) kept boxes of the best one that suppresses each box; a kept box has its own."""
    winners = torch.empty(len(boxes), dtype=torch.long, device=boxes.device)
    for part in torch.arange(len(boxes), device=boxes.device).split(_VOTERS_AT_ONCE):
        overlaps = box_iou(boxes[kept], boxes[part])
        enough = overlaps > iou_threshold
        first = enough.to(torch.uint8).argmax(dim=0)  # the best of those that overlap enough
        winners[part] = torch.where(enough.any(dim=0), first, overlaps.argmax(dim=0))  # rounding may leave none
    winners[kept] = torch.arange(len(kept), device=boxes.device)  # also those without area
    return winners
