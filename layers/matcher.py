"""Which prior answers for which face."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

BACKGROUND = -1
# A face whose best prior overlaps it less than this is too far from every prior to be learnt from.
MIN_FORCED_IOU = 0.2


def match_priors(face_boxes: Tensor, priors: Tensor, match_iou: float) -> Tensor:
    """Assign a face to every prior, as SSD does (arXiv:1512.02325, section 2.2).

    A prior takes the face that it overlaps most, if by `match_iou` or more. In addition every face gets its best
    prior even below that, down to `MIN_FORCED_IOU`. Faces that are out of reach even so (tiny ones) are background:
    ignoring them, or faces that a crop cuts off, made the detector find more that is no face than it found more faces.

    Args:
        face_boxes: (N, 4) xyxy, normalised to the image; N may be 0.
        priors: (P, 4) cxcywh, normalised to the image.

    Returns:
        (P,) int64: index of the face, or `BACKGROUND`.
    """
    if len(face_boxes) == 0:
        return torch.full((len(priors),), BACKGROUND, dtype=torch.int64, device=priors.device)
    iou = box_iou(face_boxes, box_convert(priors, "cxcywh", "xyxy"))
    best_iou, best_face = iou.max(dim=0)
    forced_iou, forced_prior = iou.max(dim=1)
    reachable = forced_iou >= MIN_FORCED_IOU
    matches = torch.where(best_iou >= match_iou, best_face, BACKGROUND)
    faces = torch.arange(len(face_boxes), device=priors.device)
    matches[forced_prior[reachable]] = faces[reachable]
    return matches
