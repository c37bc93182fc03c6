"""Non-maximum suppression as the reference implementations do it."""

from __future__ import annotations

from torch import Tensor
from torchvision.ops import nms


def pixel_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy suppression where boxes count pixels: a width is x2 - x1 + 1.

    The Fast R-CNN lineage (biubug6/Pytorch_Retinaface and the original among it) adds the pixel;
    `torchvision.ops.nms` does not, and keeps other boxes unless it is added for it.

    Args:
        boxes: (N, 4) xyxy in pixels.
        scores: (N,).
        iou_threshold: a box is dropped if its IoU with a better one is greater.

    Returns:
        Indices of the kept boxes, best first.
    """
    inclusive = boxes + boxes.new_tensor([0, 0, 1, 1])
    return nms(inclusive, scores, iou_threshold)
