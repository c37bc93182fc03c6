from __future__ import annotations

from itertools import product
from math import ceil

import pytest
import torch

from config import USUAL_LEVELS, LevelConfig
from layers.prior_box import feature_sizes, prior_boxes


def priors_by_loops(height: int, width: int, levels: tuple[LevelConfig, ...]) -> torch.Tensor:
    """The definition, as SSD and its descendants write it."""
    rows = []
    for level in levels:
        stride = level.stride
        for i, j in product(range(ceil(height / stride)), range(ceil(width / stride))):
            for size in level.anchor_sizes:
                rows.append([(j + 0.5) * stride / width, (i + 0.5) * stride / height, size / width, size / height])
    return torch.tensor(rows)


@pytest.mark.parametrize("num_anchor", [2, 3])
@pytest.mark.parametrize("size", [(640, 640), (1, 1), (37, 1024), (683, 513)])
def test_equal_to_the_loops_to_the_bit(size: tuple[int, int], num_anchor: int, device: torch.device) -> None:
    levels = USUAL_LEVELS[num_anchor]
    priors = prior_boxes(size, levels, device)
    assert priors.device.type == device.type
    assert torch.equal(priors.cpu(), priors_by_loops(*size, levels))


def test_one_cell_by_hand() -> None:
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
