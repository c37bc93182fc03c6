"""Tests of pixel NMS and box voting."""

from __future__ import annotations

import pytest
import torch

from utils.nms import pixel_nms, vote_boxes


def reference_nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> list[int]:
    """Greedy suppression with areas that count pixels, one box at a time."""
    remaining = scores.argsort(descending=True).tolist()
    areas = [(x2 - x1 + 1) * (y2 - y1 + 1) for x1, y1, x2, y2 in boxes.tolist()]
    corners = boxes.tolist()
    kept = []
    while remaining:
        best, *rest = remaining
        kept.append(best)
        remaining = []
        for other in rest:
            width = max(0.0, min(corners[best][2], corners[other][2]) - max(corners[best][0], corners[other][0]) + 1)
            height = max(0.0, min(corners[best][3], corners[other][3]) - max(corners[best][1], corners[other][1]) + 1)
            overlap = width * height
            if overlap / (areas[best] + areas[other] - overlap) <= threshold:
                remaining.append(other)
    return kept


@pytest.mark.parametrize("threshold", [0.3, 0.4])
def test_pixel_nms_equals_the_reference_loop(threshold: float, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(300, 2, generator=generator) * 60
    boxes = torch.cat([corners, corners + torch.rand(300, 2, generator=generator) * 20], dim=1)
    scores = torch.rand(300, generator=generator)
    kept = pixel_nms(boxes.to(device), scores.to(device), threshold)
    assert kept.tolist() == reference_nms(boxes, scores, threshold)


def test_pixel_convention_matters_for_small_boxes() -> None:
    """Boxes of 3 and 2 pixels width: their IoU is 1/2 as continuous boxes, but 2/3 if pixels are counted."""
    boxes = torch.tensor([[0.0, 0, 2, 0], [0, 0, 1, 0]])
    assert pixel_nms(boxes, torch.tensor([0.9, 0.8]), 0.6).tolist() == [0]


def test_no_boxes() -> None:
    assert pixel_nms(torch.zeros(0, 4), torch.zeros(0), 0.3).tolist() == []


def test_suppressed_boxes_vote_by_their_scores(device: torch.device) -> None:
    """The mean of x1 = 0 with weight 0.6 and x1 = 4 with weight 0.2 is 1; the box far away stays as it is."""
    boxes = torch.tensor([[4.0, 0, 24, 20], [0, 0, 20, 20], [100, 0, 120, 20]], device=device)
    kept, voted = vote_boxes(boxes, torch.tensor([0.2, 0.6, 0.5], device=device), 0.4)
    assert kept.tolist() == [1, 2]
    assert voted.flatten().tolist() == pytest.approx([1, 0, 21, 20, 100, 0, 120, 20])


def test_box_votes_once_for_the_best_that_suppresses_it() -> None:
    """The middle box overlaps both others, which do not overlap each other enough."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10]])
    kept, voted = vote_boxes(boxes, torch.tensor([0.8, 0.4, 0.6]), 0.3)
    assert kept.tolist() == [0, 2]
    assert voted[0].tolist() == pytest.approx([5 / 3, 0, 10 + 5 / 3, 10])
    assert voted[1].tolist() == [10, 0, 20, 10]


def test_voting_in_chunks_gives_the_same_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(200, 2, generator=generator) * 60
    boxes = torch.cat([corners, corners + torch.rand(200, 2, generator=generator) * 20], dim=1)
    scores = torch.rand(200, generator=generator)
    kept, voted = vote_boxes(boxes, scores, 0.4)
    assert torch.equal(kept, pixel_nms(boxes, scores, 0.4))
    monkeypatch.setattr("utils.nms._VOTERS_AT_ONCE", 7)
    assert torch.equal(vote_boxes(boxes, scores, 0.4)[1], voted)


def test_no_boxes_no_votes() -> None:
    kept, voted = vote_boxes(torch.zeros(0, 4), torch.zeros(0), 0.4)
    assert kept.tolist() == []
    assert voted.shape == (0, 4)
