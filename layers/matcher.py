"""Matches priors with ground-truth faces (SSD, arXiv:1512.02325, section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_convert

from utils.boxes import paired_iou
from utils.structures import FaceTargets

BACKGROUND = -1
IGNORED = -2
# A face whose best prior has a lower IoU is too far from every prior to be learnt from.
MIN_FORCED_IOU = 0.2
_FACES_AT_ONCE = 64  # bounds the memory of the IoU matrix in crowds


@torch.no_grad()
def match_priors(targets: FaceTargets, priors: Tensor, match_iou: float, background_iou: float | None = None) -> Tensor:
    """Assign a face, background or nothing to every prior of every image.

    A prior takes the face of its image with which it has the highest IoU, the first of equals, if the IoU is at least
    `match_iou`. It is background below `background_iou` and ignored in between. In addition every face gets its best
    prior, even below `match_iou` and down to `MIN_FORCED_IOU`; the last face wins a prior that is the best of several.

    Args:
        targets: N faces of B images, on the device of the priors; N may be 0.
        priors: (P, 4) cxcywh, normalised to the image; or (B, P, 4), different ones for each image.
        match_iou: IoU from which a prior is positive.
        background_iou: at most `match_iou`; None is `match_iou`, so that nothing is ignored.

    Returns:
        (B, P) int64: row of the face in `targets`, `BACKGROUND` or `IGNORED`.
    """
    corners = box_convert(priors, "cxcywh", "xyxy")
    # Contiguous x1, y1, x2 and y2 make the IoU several times as fast.
    corners = corners.movedim(-1, 0).contiguous().movedim(0, -1)
    matches, first_row = [], 0
    for image, boxes in enumerate(targets.boxes.split(targets.counts)):
        own_corners = corners if corners.dim() == 2 else corners[image]
        faces = _match_image(boxes, own_corners, match_iou, background_iou or match_iou)
        matches.append(torch.where(faces >= 0, faces + first_row, faces))
        first_row += len(boxes)
    return torch.stack(matches)


def _match_image(boxes: Tensor, corners: Tensor, match_iou: float, background_iou: float) -> Tensor:
    """Match the (N, 4) faces of one image with its (P, 4) priors, all xyxy; see `match_priors`.

    Returns:
        (P,) int64: index of the face, `BACKGROUND` or `IGNORED`.
    """
    best_iou = corners.new_zeros(len(corners))
    best_face = torch.full((len(corners),), BACKGROUND, device=corners.device)
    if len(boxes) == 0:
        return best_face
    forced = torch.full_like(best_face, BACKGROUND)
    for part in torch.arange(len(boxes), device=corners.device).split(_FACES_AT_ONCE):
        iou = paired_iou(boxes[part].unsqueeze(1), corners)
        part_iou, part_face = iou.max(dim=0)
        best_face = torch.where(part_iou > best_iou, part[part_face], best_face)
        best_iou = torch.maximum(part_iou, best_iou)
        best_prior_iou, best_prior = iou.max(dim=1)
        reachable = torch.where(best_prior_iou >= MIN_FORCED_IOU, part, BACKGROUND)
        forced.scatter_reduce_(0, best_prior, reachable, "amax")
    unmatched = torch.where(best_iou < background_iou, BACKGROUND, IGNORED)
    matches = torch.where(best_iou >= match_iou, best_face, unmatched)
    return torch.where(forced != BACKGROUND, forced, matches)
