"""Tests of drawing detections on images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from utils.drawing import draw_detections
from utils.structures import Detections

GREEN = [60, 220, 60]


def detections_of(*boxes: list[float], landmarks: bool = False) -> Detections:
    count = len(boxes)
    points = torch.full((count, 5, 2), 50.0) if landmarks else None
    return Detections(torch.tensor(boxes).reshape(-1, 4), torch.full((count,), 0.87), points)


def black_image(height: int = 100, width: int = 160) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


@pytest.mark.parametrize("landmarks", [False, True])
def test_drawing_no_faces_returns_a_copy_of_the_image(landmarks: bool) -> None:
    image = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    drawing = draw_detections(image, detections_of(landmarks=landmarks))
    assert np.array_equal(drawing, image)
    assert drawing is not image
    assert not np.shares_memory(drawing, image)


def test_box_is_drawn_on_a_copy_at_its_place() -> None:
    image = black_image()
    drawing = draw_detections(image, detections_of([20.4, 29.6, 80.0, 90.0]))
    assert image.max() == 0
    for x, y in ((20, 60), (80, 60), (50, 90), (70, 30)):
        assert drawing[y, x].tolist() == GREEN
    assert drawing[35:85, 25:75].max() == 0  # inside
    assert drawing[:, 90:].max() == 0


def test_landmarks_have_five_colours() -> None:
    points = torch.tensor([[[30.0, 40], [60, 40], [45, 55], [35, 70], [55, 70]]])
    found = Detections(torch.tensor([[20.0, 30, 80, 90]]), torch.ones(1), points)
    drawing = draw_detections(black_image(), found)
    assert len({tuple(drawing[int(y), int(x)]) for x, y in points[0].tolist()} - {(0, 0, 0)}) == 5


@pytest.mark.parametrize(
    ("top", "rows"),
    [(40, slice(20, 38)), (0, slice(2, 16)), (-30, slice(0, 16))],
    ids=["above the box", "inside the box", "at the border of the image"],
)
def test_score_is_drawn_where_there_is_space(top: float, rows: slice) -> None:
    drawing = draw_detections(black_image(), detections_of([20, top, 120, 90]))
    assert (drawing[rows, 24:46] == GREEN).all(axis=-1).sum() > 60


def test_score_much_wider_than_its_face_is_left_out() -> None:
    drawing = draw_detections(black_image(), detections_of([20, 40, 30, 50]))
    assert drawing[:39].max() == 0
    assert drawing[40, 25].tolist() == GREEN


def test_line_width_grows_with_the_image() -> None:
    thin = draw_detections(black_image(500, 500), detections_of([100, 100, 400, 400]))
    thick = draw_detections(black_image(2000, 2000), detections_of([100, 100, 400, 400]))
    thin_width, thick_width = ((drawing[250, 80:150] > 0).any(axis=-1).sum() for drawing in (thin, thick))
    assert thick_width >= 2 * thin_width > 0


def test_best_face_is_drawn_on_top() -> None:
    boxes = torch.tensor([[20.0, 40, 120, 90], [60.0, 20, 160, 60]])
    points = torch.full((2, 5, 2), 300.0)
    points[1, 4] = torch.tensor([70.0, 40.0])  # a landmark of the weaker face on the edge of the better one
    drawing = draw_detections(black_image(), Detections(boxes, torch.tensor([0.9, 0.8]), points))
    assert drawing[40, 70].tolist() == GREEN


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 200), (200, 1)])
@pytest.mark.parametrize("box", [[0.0, 0, 1, 1], [-50, -50, 400, 400], [300, 300, 310, 310], [5, 5, 5, 5]])
def test_any_box_on_an_image_of_any_size(size_hw: tuple[int, int], box: list[float]) -> None:
    image = black_image(*size_hw)
    drawing = draw_detections(image, detections_of(box, landmarks=True))
    assert drawing.shape == image.shape
    assert image.max() == 0
