"""Matches priors with ground-truth faces (SSD, arXiv:1512.02325, section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_convert

from config import StageConfig
from utils.boxes import paired_iou
from utils.structures import FaceTargets

BACKGROUND = -1
IGNORED = -2
# A face whose best prior has a lower IoU is unreachable: it is not forced to match.
MIN_FORCED_IOU = 0.2
# A prior with a higher IoU with an ignored or unreachable face does not count as background.
MAX_BACKGROUND_IOU = 0.1
_FACES_PER_CHUNK = 64  # bounds the memory of the IoU matrix in crowds


@torch.no_grad()
def match_priors(targets: FaceTargets, priors: Tensor, stage: StageConfig) -> Tensor:
    """Assign a face, background or nothing to every prior of every image.

    A prior is matched with the face of its image with which it has the highest IoU (the first of ties), if the IoU is
    at least `match_iou`. It is background below `negative_iou` and ignored in between. With `force_match` every face
    also gets its best prior, even below `match_iou` and down to `MIN_FORCED_IOU`; the last face wins a prior that is
    the best of several. Faces that no prior reaches, and faces labelled as ignored, match nothing. The priors around
    them are ignored, because they would be the hardest negatives; see `StageConfig`.

    Args:
        targets: N faces of B images, on the device of the priors; N may be 0.
        priors: (P, 4) cxcywh, normalised to the image; or (B, P, 4), different ones for each image.
        stage: thresholds.

    Returns:
        (B, P) int64: row of the face in `targets`, `BACKGROUND` or `IGNORED`.
    """
    corners = box_convert(priors, "cxcywh", "xyxy")
    # Contiguous x1, y1, x2 and y2 make the IoU computation several times as fast.
    corners = corners.movedim(-1, 0).contiguous().movedim(0, -1)
    matches, first_row = [], 0
    parts = zip(targets.boxes.split(targets.counts), targets.ignored.split(targets.counts), strict=True)
    for image, (boxes, ignored) in enumerate(parts):
        faces = _match_image(boxes, ignored, corners if corners.dim() == 2 else corners[image], stage)
        matches.append(torch.where(faces >= 0, faces + first_row, faces))
        first_row += len(boxes)
    return torch.stack(matches)


def _match_image(boxes: Tensor, ignored: Tensor, corners: Tensor, stage: StageConfig) -> Tensor:
    """Match the (N, 4) faces of one image with its (P, 4) priors, all xyxy; see `match_priors`.

    Returns:
        (P,) int64: index of the face, `BACKGROUND` or `IGNORED`.
    """
    best_iou = corners.new_zeros(len(corners))
    best_face = torch.full((len(corners),), BACKGROUND, device=corners.device)
    if len(boxes) == 0:
        return best_face
    forced = torch.full_like(best_face, BACKGROUND)
    near_ignored = torch.zeros(len(corners), dtype=torch.bool, device=corners.device)
    for part in torch.arange(len(boxes), device=corners.device).split(_FACES_PER_CHUNK):
        iou = paired_iou(boxes[part].unsqueeze(1), corners)
        face_iou, face_prior = iou.max(dim=1)
        is_reachable = face_iou >= (MIN_FORCED_IOU if stage.force_match else stage.match_iou)
        is_skipped = ignored[part] | ~is_reachable
        keeps_clear = ignored[part] | ~is_reachable if stage.ignore_unreachable else ignored[part]
        near_ignored |= ((iou > MAX_BACKGROUND_IOU) & keeps_clear.unsqueeze(1)).any(dim=0)
        prior_iou, prior_face = iou.masked_fill(is_skipped.unsqueeze(1), 0.0).max(dim=0)
        best_face = torch.where(prior_iou > best_iou, part[prior_face], best_face)
        best_iou = torch.maximum(prior_iou, best_iou)
        forced.scatter_reduce_(0, face_prior, torch.where(is_skipped, BACKGROUND, part), "amax")
    is_background = (best_iou < stage.background_iou) & ~near_ignored
    matches = torch.where(best_iou >= stage.match_iou, best_face, torch.where(is_background, BACKGROUND, IGNORED))
    return torch.where(forced != BACKGROUND, forced, matches)
