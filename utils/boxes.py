"""Box and landmark coding relative to priors."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_convert


def encode_boxes(boxes: Tensor, priors: Tensor, variances: tuple[float, float]) -> Tensor:
    """Boxes as regression targets relative to priors.

    Args:
        boxes: (..., P, 4) xyxy, normalised to the image, of positive width and height.
        priors: (P, 4) cxcywh, normalised to the image.
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
        priors: (P, 4) cxcywh, normalised to the image.

    Returns:
        (..., P, 4) xyxy, normalised to the image, not clipped.
    """
    prior_centres, prior_sizes = priors.split(2, dim=-1)
    centres = prior_centres + deltas[..., :2] * variances[0] * prior_sizes
    sizes = prior_sizes * torch.exp(deltas[..., 2:] * variances[1])
    top_left = centres - sizes / 2
    return torch.cat([top_left, top_left + sizes], dim=-1)


def encode_landmarks(landmarks: Tensor, priors: Tensor, variances: tuple[float, float]) -> Tensor:
    """Landmarks as regression targets relative to priors.

    Args:
        landmarks: (..., P, K, 2) x, y, normalised to the image.
        priors: (P, 4) cxcywh, normalised to the image.

    Returns:
        (..., P, 2 K) deltas: offsets from the prior's centre in units of its size and the first variance.
    """
    prior_centres, prior_sizes = priors.unsqueeze(-2).split(2, dim=-1)
    return ((landmarks - prior_centres) / (variances[0] * prior_sizes)).flatten(-2)


def decode_landmarks(deltas: Tensor, priors: Tensor, variances: tuple[float, float]) -> Tensor:
    """Invert `encode_landmarks`: (..., P, 2 K) deltas to (..., P, K, 2) points."""
    prior_centres, prior_sizes = priors.unsqueeze(-2).split(2, dim=-1)
    return prior_centres + deltas.unflatten(-1, (-1, 2)) * variances[0] * prior_sizes


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of each box with its partner, (..., 4) and (..., 4) xyxy to (...,); 0 where both are empty.

    Coordinates are continuous here: no pixel is added to widths and heights.
    """
    overlap_top_left = torch.maximum(boxes[..., :2], others[..., :2])
    overlap_bottom_right = torch.minimum(boxes[..., 2:], others[..., 2:])
    overlap = (overlap_bottom_right - overlap_top_left).clamp(min=0).prod(dim=-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(dim=-1) for box in (boxes, others)]
    union = areas[0] + areas[1] - overlap
    return overlap / union.clamp(min=torch.finfo(union.dtype).tiny)
