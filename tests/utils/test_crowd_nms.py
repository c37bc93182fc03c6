"""Tests that `crowd_nms` keeps the same boxes as `torchvision.ops.nms`, and that voting finds their suppressors."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torchvision.ops import nms

from utils.crowd_nms import _compiled, crowd_nms, crowd_votes
from utils.nms import _CROWD, _winners, pixel_nms, vote_boxes


def crowd(count: int, seed: int, spread: float = 400, side: float = 12, variety: float = 0.6) -> torch.Tensor:
    """Return (N, 4) random boxes with sides around `side`; `variety` is the standard deviation of their logarithms."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(count, 2, generator=generator) * spread
    common = torch.randn(count, 1, generator=generator) * variety
    sides = side * (common + torch.randn(count, 2, generator=generator) * 0.2).exp()
    return torch.cat([centres - sides / 2, centres + sides / 2], dim=1)


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.3, 0.4, 0.65, 0.8])
@pytest.mark.parametrize("variety", [0.0, 0.6, 2.0])
def test_equals_torchvision_in_crowds(threshold: float, variety: float) -> None:
    boxes = crowd(7000, seed=1, variety=variety)
    scores = torch.rand(7000, generator=torch.Generator().manual_seed(2))
    kept = crowd_nms(boxes, scores, threshold)
    assert 100 < len(kept) < 7000
    assert kept.equal(nms(boxes, scores, threshold))


def test_equals_torchvision_where_faces_have_many_boxes_of_equal_scores() -> None:
    faces = crowd(300, seed=3, spread=1500, side=40)
    boxes = faces.repeat(30, 1) + torch.randn(9000, 4, generator=torch.Generator().manual_seed(4))
    scores = torch.randint(1, 20, (9000,), generator=torch.Generator().manual_seed(5)) / 20
    assert crowd_nms(boxes, scores, 0.4).equal(nms(boxes, scores, 0.4))


def test_equals_torchvision_with_extreme_boxes() -> None:
    """Boxes far away, huge, thin, without area and equal ones."""
    boxes = crowd(5000, seed=6)
    boxes[:50] += 1e20
    boxes[50:100] *= 1e6
    boxes[100:600, 2] = boxes[100:600, 0] + 500
    boxes[600:700, 2:] = boxes[600:700, :2]
    boxes[700:900] = boxes[900]
    scores = torch.rand(5000, generator=torch.Generator().manual_seed(7))
    assert crowd_nms(boxes, scores, 0.3).equal(nms(boxes, scores, 0.3))


@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.8])
def test_equals_torchvision_with_boxes_of_a_hundred_thousand_pixels(threshold: float) -> None:
    """As those of a diverged model; their centres lie far apart, and they overlap nevertheless."""
    boxes = torch.cat([crowd(2500, seed=10, spread=60_000, side=200_000, variety=0.1), crowd(2500, seed=11)])
    scores = torch.rand(5000, generator=torch.Generator().manual_seed(12))
    assert crowd_nms(boxes, scores, threshold).equal(nms(boxes, scores, threshold))


@pytest.mark.parametrize("threshold", [0.4, 0.65, 0.8])
def test_equals_torchvision_with_outliers(threshold: float) -> None:
    boxes = crowd(5000, seed=13)
    boxes[:20] += 1e20
    boxes[20:40] -= 1e20
    scores = torch.rand(5000, generator=torch.Generator().manual_seed(14))
    assert crowd_nms(boxes, scores, threshold).equal(nms(boxes, scores, threshold))


@pytest.mark.parametrize("threshold", [0.1, 0.4, 0.8])
@pytest.mark.parametrize("variety", [0.0, 0.6, 2.0])
def test_votes_go_to_the_best_box_that_suppresses(threshold: float, variety: float) -> None:
    boxes = crowd(4000, seed=16, variety=variety)
    scores = torch.rand(4000, generator=torch.Generator().manual_seed(17))
    kept, winners = crowd_votes(boxes, scores, threshold)
    assert kept.equal(crowd_nms(boxes, scores, threshold))
    assert winners.equal(_winners(boxes, kept, threshold))
    assert winners.bincount(minlength=len(kept)).max() > 1


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_boxes(count: int) -> None:
    boxes, scores = crowd(count, seed=8), torch.rand(count)
    assert crowd_nms(boxes, scores, 0.3).equal(nms(boxes, scores, 0.3))
    kept, winners = crowd_votes(boxes, scores, 0.3)
    assert winners.equal(kept.argsort() if len(kept) == count else torch.zeros(count, dtype=torch.long))


def test_voting_does_not_compare_all_boxes_of_a_crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, scores = crowd(_CROWD + 1, seed=18), torch.rand(_CROWD + 1)
    kept, voted = vote_boxes(boxes, scores, 0.4)
    monkeypatch.setattr("utils.nms._CROWD", len(boxes))
    expected = vote_boxes(boxes, scores, 0.4)
    assert kept.equal(expected[0])
    assert voted.equal(expected[1])
    monkeypatch.undo()
    monkeypatch.delattr("utils.nms.box_iou")
    vote_boxes(boxes, scores, 0.4)


def test_pixel_nms_uses_crowd_nms_for_crowds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.nms.crowd_nms", lambda boxes, scores, iou_threshold: torch.tensor([len(boxes)]))
    assert len(pixel_nms(crowd(_CROWD, seed=9), torch.rand(_CROWD), 0.4)) > 1
    assert pixel_nms(crowd(_CROWD + 1, seed=9), torch.rand(_CROWD + 1), 0.4).tolist() == [_CROWD + 1]


def test_threads_may_compile_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.crowd_nms._compiled", functools.cache(_compiled.__wrapped__))
    boxes, scores = crowd(3000, seed=15), torch.rand(3000)
    with ThreadPoolExecutor(4) as pool:
        kept = list(pool.map(lambda _: crowd_nms(boxes, scores, 0.4), range(4)))
    assert all(each.equal(nms(boxes, scores, 0.4)) for each in kept)
