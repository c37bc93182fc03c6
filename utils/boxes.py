"""Box and landmark coding relative to priors."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.ops import box_convert

# Maximum ratio between the sides of a box and of its prior, either way, as in torchvision's detectors. A model that
# predicts more has diverged.
MAX_SIZE_RATIO = 1000 / 16


def encode_boxes(boxes: Tensor, priors: Tensor, variances: tuple[float, float]) -> Tensor:
    """Encode boxes as regression targets relative to priors.

    Args:
        boxes: (..., P, 4) xyxy, normalised to the image, of positive width and height.
        priors: (P, 4) or (B, P, 4) cxcywh, normalised to the image.
        variances: divisors of the centre and the size deltas.

    Returns:
        (..., P, 4) deltas, SSD parameterisation (arXiv:1512.02325, eq. 2).
    """
    centres, sizes = box_convert(boxes, "xyxy", "cxcywh").split(2, dim=-1)
    prior_centres, prior_sizes = priors.split(2, dim=-1)
    centre_deltas = (centres - prior_centres) / (variances[0] * prior_sizes)
    size_deltas = torch.log(sizes / prior_sizes) / variances[1]
    return torch.cat([centre_deltas, size_deltas], dim=-1)


def decode_boxes(deltas: Tensor, priors: Tensor, variances: tuple[float, float]) -> Tensor:
    """Invert `encode_boxes`.

    Args:
        deltas: (..., P, 4) regression output.
        priors: (P, 4) or (B, P, 4) cxcywh, normalised to the image.

    Returns:
        (..., P, 4) xyxy, normalised to the image, not clipped.
    """
    centres, sizes = _decode(deltas, priors, variances)
    top_left = centres - sizes / 2
    return torch.cat([top_left, top_left + sizes], dim=-1)


def _decode(deltas: Tensor, priors: Tensor, variances: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Centres and sizes, each (..., P, 2), of the boxes that (..., P, 4) deltas encode."""
    prior_centres, prior_sizes = priors.split(2, dim=-1)
    centres = prior_centres + deltas[..., :2] * variances[0] * prior_sizes
    return centres, prior_sizes * torch.exp(deltas[..., 2:] * variances[1])


def encode_landmarks(landmarks: Tensor, priors: Tensor, variances: tuple[float, float]) -> Tensor:
    """Encode landmarks as regression targets relative to priors.

    Args:
        landmarks: (..., P, K, 2) x, y, normalised to the image.
        priors: (P, 4) or (B, P, 4) cxcywh, normalised to the image.

    Returns:
        (..., P, 2 K) deltas: offsets from the prior's centre in units of its size and the first variance.
    """
    prior_centres, prior_sizes = priors.unsqueeze(-2).split(2, dim=-1)
    return ((landmarks - prior_centres) / (variances[0] * prior_sizes)).flatten(-2)


def decode_landmarks(deltas: Tensor, priors: Tensor, variances: tuple[float, float]) -> Tensor:
    """Invert `encode_landmarks`: (..., P, 2 K) deltas to (..., P, K, 2) points."""
    prior_centres, prior_sizes = priors.unsqueeze(-2).split(2, dim=-1)
    return prior_centres + deltas.unflatten(-1, (deltas.shape[-1] // 2, 2)) * variances[0] * prior_sizes


def clamp_deltas(deltas: Tensor, variances: tuple[float, float]) -> Tensor:
    """Clamp (..., 4) box deltas so that sides change by at most `MAX_SIZE_RATIO`, which keeps exp() finite."""
    limit = math.log(MAX_SIZE_RATIO) / variances[1]
    return torch.cat([deltas[..., :2], deltas[..., 2:].clamp(-limit, limit)], dim=-1)


def refine_priors(deltas: Tensor, priors: Tensor, variances: tuple[float, float]) -> Tensor:
    """Decode boxes to be the priors of the next stage of the cascade (arXiv:1905.00641).

    Args:
        deltas: (..., P, 4) regression output; size deltas are clamped.
        priors: (P, 4) or (B, P, 4) cxcywh, normalised to the image.

    Returns:
        (..., P, 4) cxcywh, normalised to the image, of positive width and height, without a gradient.
    """
    return torch.cat(_decode(clamp_deltas(deltas.detach().float(), variances), priors, variances), dim=-1)


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of each box with its partner, (..., 4) and (..., 4) xyxy to (...,); 0 where both are empty.

    Coordinates are continuous here: no pixel is added to widths and heights.
    """
    left, top, right, bottom = boxes.unbind(dim=-1)
    other_left, other_top, other_right, other_bottom = others.unbind(dim=-1)
    width = (torch.minimum(right, other_right) - torch.maximum(left, other_left)).clamp(min=0)
    height = (torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top)).clamp(min=0)
    overlap = width * height
    area, other_area = (right - left) * (bottom - top), (other_right - other_left) * (other_bottom - other_top)
    union = area + other_area - overlap
    return overlap / union.clamp(min=torch.finfo(union.dtype).tiny)
