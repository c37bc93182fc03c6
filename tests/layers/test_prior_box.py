"""Tests of prior boxes, by hand and against reference loops."""

from __future__ import annotations

from itertools import product
from math import ceil, sqrt

import pytest
import torch

from config import USUAL_LEVELS, LevelConfig
from layers.prior_box import feature_sizes, prior_boxes


def priors_by_loops(
    height: int, width: int, levels: tuple[LevelConfig, ...], ratio: float = 1.0, offset: float = 0.5
) -> torch.Tensor:
    """Reference implementation in loops, as in SSD."""
    rows = []
    for level in levels:
        stride = level.stride
        for i, j in product(range(ceil(height / stride)), range(ceil(width / stride))):
            centre = [(j + offset) * stride / width, (i + offset) * stride / height]
            for size in level.anchor_sizes:
                rows.append([*centre, size / sqrt(ratio) / width, size * sqrt(ratio) / height])
    return torch.tensor(rows)


@pytest.mark.parametrize("num_anchor", [2, 3])
@pytest.mark.parametrize("size", [(640, 640), (1, 1), (37, 1024), (683, 513)])
def test_prior_boxes_equal_the_reference_loops(size: tuple[int, int], num_anchor: int, device: torch.device) -> None:
    levels = USUAL_LEVELS[num_anchor]
    priors = prior_boxes(size, levels, device)
    assert priors.device.type == device.type
    assert torch.equal(priors.cpu(), priors_by_loops(*size, levels))


# Three anchors per octave, as in TinaFace, for all strides from 4 to 128.
FRACTIONAL_LEVELS = tuple(
    LevelConfig(2**power, tuple(2.0**power * 4 * 2 ** (third / 3) for third in range(3))) for power in range(2, 8)
)


@pytest.mark.parametrize(("ratio", "offset"), [(1.0, 0.5), (1.3, 0.0), (0.7, 0.46875)])
@pytest.mark.parametrize("size", [(1, 1), (37, 512), (131, 257)])
def test_fractional_anchors_equal_the_reference_loops(
    size: tuple[int, int], ratio: float, offset: float, device: torch.device
) -> None:
    priors = prior_boxes(size, FRACTIONAL_LEVELS, device, ratio, offset)
    assert torch.equal(priors.cpu(), priors_by_loops(*size, FRACTIONAL_LEVELS, ratio, offset))


def test_anchor_ratio_preserves_the_area() -> None:
    """An anchor of side 10 and ratio 4 is 5 wide and 20 high, here in an image of 40 x 20 pixels."""
    (prior,) = prior_boxes((40, 20), (LevelConfig(64, (10,)),), ratio=4.0, offset=0.0)
    assert prior.tolist() == [0, 0, 0.25, 0.5]


def test_priors_of_two_cells_by_hand() -> None:
    """A 16 x 8 image has one row and two columns of stride 8; their centres lie at 4 and 12 of 16 pixels."""
    levels = (LevelConfig(8, (4,)),)
    assert feature_sizes((8, 16), levels) == [(1, 2)]
    expected = [[0.25, 0.5, 0.25, 0.5], [0.75, 0.5, 0.25, 0.5]]
    assert prior_boxes((8, 16), levels).tolist() == expected


def test_levels_may_have_different_numbers_of_anchors() -> None:
    """A 16 x 16 image has 2 x 2 cells of stride 8 with one anchor, and one cell of stride 16 with two."""
    priors = prior_boxes((16, 16), (LevelConfig(8, (4,)), LevelConfig(16, (8, 12))))
    assert priors[:, 2].tolist() == [0.25] * 4 + [0.5, 0.75]
    assert priors[4:, :2].tolist() == [[0.5, 0.5]] * 2
