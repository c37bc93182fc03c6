"""Prior boxes (anchors) of a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def feature_sizes(image_size_hw: tuple[int, int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Height and width of every pyramid level: the image's divided by the stride, rounded up."""
    height, width = image_size_hw
    return [((height + stride - 1) // stride, (width + stride - 1) // stride) for stride in strides]


def prior_boxes(
    image_size_hw: tuple[int, int],
    anchor_sizes: tuple[tuple[int, ...], ...],
    strides: tuple[int, ...],
    device: torch.device | None = None,
) -> Tensor:
    """Square priors at the centre of every cell of every level.

    The order is that of the heads' outputs: level, row, column, anchor. Computed in double precision and
    rounded once, so the result equals the usual definition by nested loops to the bit. Cached: do not write to it.

    Args:
        image_size_hw: height and width of the network's input in pixels.
        anchor_sizes: sides in pixels, one tuple a level.
        strides: pixels per cell, one a level.
        device: where the result lies; None is the CPU.

    Returns:
        (P, 4) float32 cxcywh, normalised to the image, not clipped.
    """
    if isinstance(image_size_hw[0], Tensor):  # in a trace: the graph computes with sizes, and no cache may keep them
        return _prior_boxes(image_size_hw, anchor_sizes, strides).to(device=device, dtype=torch.float32)
    return _kept_prior_boxes(image_size_hw, anchor_sizes, strides, device)


@lru_cache(maxsize=4)  # neighbours of one size; of a large photograph they take some ten megabytes
def _kept_prior_boxes(
    image_size_hw: tuple[int, int],
    anchor_sizes: tuple[tuple[int, ...], ...],
    strides: tuple[int, ...],
    device: torch.device | None,
) -> Tensor:
    with torch.inference_mode(False):  # what is made in inference mode could never take part in training
        return _prior_boxes(image_size_hw, anchor_sizes, strides).to(device=device, dtype=torch.float32)


def _prior_boxes(
    image_size_hw: tuple[int, int], anchor_sizes: tuple[tuple[int, ...], ...], strides: tuple[int, ...]
) -> Tensor:
    height, width = image_size_hw
    levels = []
    for sizes, stride, (rows, columns) in zip(
        anchor_sizes, strides, feature_sizes(image_size_hw, strides), strict=True
    ):
        centre_y = (torch.arange(rows, dtype=torch.float64) + 0.5) * stride / height
        centre_x = (torch.arange(columns, dtype=torch.float64) + 0.5) * stride / width
        sides = torch.tensor(sizes, dtype=torch.float64)
        shape = (rows, columns, len(sizes))
        level = [
            centre_x[None, :, None].expand(shape),
            centre_y[:, None, None].expand(shape),
            (sides / width).expand(shape),
            (sides / height).expand(shape),
        ]
        levels.append(torch.stack(level, dim=-1).reshape(-1, 4))
    return torch.cat(levels)
