"""Which prior answers for which face."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_convert

from utils.boxes import paired_iou
from utils.structures import BatchTargets

BACKGROUND = -1
IGNORED = -2
# A face whose best prior overlaps it less than this is too far from every prior to be learnt from.
MIN_FORCED_IOU = 0.2
# Faces compared with all priors at once: memory does not grow with the crowd, and what is compared stays in the cache.
_FACES_AT_ONCE = 32
# Different IoUs of 1/1000 and more are at least 2^-34 apart in float32, so float64 has room beside them for the row of
# one of 2^15 faces.
_ROW_UNIT = 2.0**-50


@torch.no_grad()
def match_priors(
    targets: BatchTargets, priors: Tensor, match_iou: float, background_iou: float | None = None
) -> Tensor:
    """Assign a face to every prior of every image, as SSD does (arXiv:1512.02325, section 2.2).

    A prior takes the face of its image that it overlaps most, the first of equals, if by `match_iou` or more. It is
    background below `background_iou` and ignored between the two. In addition every face gets its best prior even
    below `match_iou`, down to `MIN_FORCED_IOU`; the last face wins a prior that is the best of several. Faces that are
    out of reach even so (tiny ones, or those without area) are background: ignoring them, or faces that a crop cuts
    off, made the detector find more that is no face than it found more faces.

    Never waits for the device.

    Args:
        targets: N faces of B images, on the device of the priors; N may be 0.
        priors: (P, 4) cxcywh, normalised to the image; or (B, P, 4), other ones for each image.
        match_iou: 1/1000 or more.
        background_iou: at most `match_iou`; None is `match_iou`: nothing is ignored.

    Returns:
        (B, P) int64: row of the face in `targets`, `BACKGROUND` or `IGNORED`.
    """
    count = priors.shape[-2]
    # Planes of x1, y1, x2 and y2 lie in one piece each, which makes the IoU several times as fast.
    corners = box_convert(priors, "cxcywh", "xyxy").movedim(-1, 0).contiguous().movedim(0, -1)
    best = torch.zeros(targets.batch_size, count, dtype=torch.float64, device=priors.device)
    forced = torch.full((targets.batch_size * count,), BACKGROUND, device=priors.device)
    rows = torch.arange(len(targets), device=priors.device)
    pieces = (tensor.split(_FACES_AT_ONCE) for tensor in (rows, targets.image_indices, targets.boxes))
    for row, image, boxes in zip(*pieces, strict=True):
        iou = paired_iou(boxes.unsqueeze(1), corners if corners.dim() == 2 else _of_images(corners, image))
        # The largest of these is the largest IoU and, among equal ones, the first face.
        ordered = iou.double() - (row * _ROW_UNIT).unsqueeze(1)
        best.scatter_reduce_(0, image.unsqueeze(1).expand_as(ordered), ordered, "amax")
        forced_iou, forced_prior = iou.max(dim=1)
        reachable = torch.where(forced_iou >= MIN_FORCED_IOU, row, BACKGROUND)
        forced.scatter_reduce_(0, image * count + forced_prior, reachable, "amax")

    best_iou = best.float()
    best_face = ((best_iou - best) / _ROW_UNIT).long()
    without = torch.where(best_iou < (background_iou or match_iou), BACKGROUND, IGNORED)
    matches = torch.where(best_iou >= match_iou, best_face, without)
    forced = forced.view_as(matches)
    return torch.where(forced != BACKGROUND, forced, matches)


def _of_images(corners: Tensor, images: Tensor) -> Tensor:
    """Rows `images` of (B, P, 4), in planes as well."""
    return corners.movedim(-1, 0)[:, images].movedim(0, -1)
