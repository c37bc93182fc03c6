"""Prior boxes (anchors) of a feature pyramid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from config import LevelConfig


def feature_sizes(image_size_hw: tuple[int, int], levels: Sequence[LevelConfig]) -> list[tuple[int, int]]:
    """Height and width of every pyramid level: those of the image divided by the stride, rounded up."""
    height, width = image_size_hw
    return [
        ((height + level.stride - 1) // level.stride, (width + level.stride - 1) // level.stride) for level in levels
    ]


def prior_boxes(
    image_size_hw: tuple[int, int],
    levels: tuple[LevelConfig, ...],
    device: torch.device | None = None,
    ratio: float = 1.0,
    offset: float = 0.5,
) -> Tensor:
    """Priors of every cell of every level, by default squares at the centre of the cell.

    The order is that of the outputs of the heads: level, row, column, anchor. Priors are computed in double precision
    and rounded once, so the result equals the usual definition by nested loops bit for bit. The result is cached,
    because computing it takes about 5 % of the time of a small detector; do not write to it.

    Args:
        image_size_hw: height and width of the model's input in pixels.
        levels: strides and anchor sizes, finest level first.
        device: device of the result; None means the CPU.
        ratio: height of the priors relative to their width; their area is that of the square anchor.
        offset: centre of the priors from the corner of their cell, in cells.

    Returns:
        (P, 4) float32 cxcywh, normalised to the image, not clipped.
    """
    if isinstance(image_size_hw[0], Tensor):  # tracing: the graph computes with sizes
        return _prior_boxes(image_size_hw, levels, device, ratio, offset)
    return _cached_prior_boxes(image_size_hw, levels, device, ratio, offset)


@torch.inference_mode(False)  # a tensor made in inference mode cannot take part in training
def _prior_boxes(
    image_size_hw: tuple[int, int],
    levels: Sequence[LevelConfig],
    device: torch.device | None,
    ratio: float,
    offset: float,
) -> Tensor:
    height, width = image_size_hw
    priors = []
    for level, (rows, columns) in zip(levels, feature_sizes(image_size_hw, levels), strict=True):
        # Filled on the device, because a copy from the host would wait for it.
        sides = torch.stack([torch.full((), size, dtype=torch.float64, device=device) for size in level.anchor_sizes])
        centre_y = (torch.arange(rows, dtype=torch.float64, device=device) + offset) * level.stride / height
        centre_x = (torch.arange(columns, dtype=torch.float64, device=device) + offset) * level.stride / width
        shape = (rows, columns, len(sides))
        values = [
            centre_x[None, :, None].expand(shape),
            centre_y[:, None, None].expand(shape),
            (sides / math.sqrt(ratio) / width).expand(shape),
            (sides * math.sqrt(ratio) / height).expand(shape),
        ]
        priors.append(torch.stack(values, dim=-1).reshape(-1, 4))
    return torch.cat(priors).float()


_cached_prior_boxes = lru_cache(maxsize=4)(_prior_boxes)
