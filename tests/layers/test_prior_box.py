from __future__ import annotations

from itertools import product
from math import ceil

import pytest
import torch

from config import ANCHOR_SIZES
from layers.prior_box import feature_sizes, prior_boxes

STRIDES = (8, 16, 32)


def priors_by_loops(height: int, width: int, anchor_sizes: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """The definition, as SSD and its descendants write it."""
    rows = []
    for sizes, stride in zip(anchor_sizes, STRIDES, strict=True):
        for i, j in product(range(ceil(height / stride)), range(ceil(width / stride))):
            for size in sizes:
                rows.append([(j + 0.5) * stride / width, (i + 0.5) * stride / height, size / width, size / height])
    return torch.tensor(rows)


@pytest.mark.parametrize("num_anchor", [2, 3])
@pytest.mark.parametrize("size", [(640, 640), (1, 1), (37, 1024), (683, 513)])
def test_equal_to_the_loops_to_the_bit(size: tuple[int, int], num_anchor: int, device: torch.device) -> None:
    anchor_sizes = ANCHOR_SIZES[num_anchor]
    priors = prior_boxes(size, anchor_sizes, STRIDES, device)
    assert priors.device.type == device.type
    assert torch.equal(priors.cpu(), priors_by_loops(*size, anchor_sizes))


def test_one_cell_by_hand() -> None:
    """A 16 x 8 image has one row and two columns of stride 8; their centres lie at 4 and 12 of 16 pixels."""
    assert feature_sizes((8, 16), (8,)) == [(1, 2)]
    expected = [[0.25, 0.5, 0.25, 0.5], [0.75, 0.5, 0.25, 0.5]]
    assert prior_boxes((8, 16), ((4,),), (8,)).tolist() == expected


def test_levels_and_strides_must_pair() -> None:
    with pytest.raises(ValueError, match="longer"):
        prior_boxes((8, 8), ((4,),), (8, 16))
