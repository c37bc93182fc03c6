"""Detections in another image: resized, mirrored, cut off."""

from __future__ import annotations

import pytest
import torch

from utils.structures import Detections

ONE = Detections(
    torch.tensor([[10.0, 20, 40, 60]]),
    torch.tensor([0.9]),
    torch.tensor([[[15.0, 30], [35, 31], [25, 40], [18, 50], [32, 51]]]),
)


def test_scaled_by_two_factors() -> None:
    found = ONE.scaled(2, 0.5)
    assert found.boxes.tolist() == [[20, 10, 80, 30]]
    assert found.landmarks is not None
    assert found.landmarks[0, 0].tolist() == [30, 15]


def test_mirrored_faces_exchange_left_and_right() -> None:
    found = ONE.mirrored(100)
    assert found.boxes.tolist() == [[60, 20, 90, 60]]
    assert found.landmarks is not None
    assert found.landmarks[0].tolist() == [[65, 31], [85, 30], [75, 40], [68, 51], [82, 50]]
    back = found.mirrored(100)
    assert torch.equal(back.boxes, ONE.boxes)
    assert back.landmarks is not None
    assert ONE.landmarks is not None
    assert torch.equal(back.landmarks, ONE.landmarks)


def test_clipped_to_height_and_width() -> None:
    outside = Detections(torch.tensor([[-5.0, -6, 50, 70]]), torch.tensor([0.5]), None)
    assert outside.clipped((60, 30)).boxes.tolist() == [[0, 0, 30, 60]]


@pytest.mark.parametrize("landmarks", [None, torch.zeros(0, 5, 2)])
def test_no_faces(landmarks: torch.Tensor | None) -> None:
    none = Detections(torch.zeros(0, 4), torch.zeros(0), landmarks)
    for found in (none.scaled(2, 3), none.mirrored(10), none.clipped((3, 4))):
        assert len(found) == 0
        assert (found.landmarks is None) == (landmarks is None)
