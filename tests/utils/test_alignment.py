"""Tests of plain and aligned face crops."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from utils.alignment import _TEMPLATE, aligned_crop, plain_crop, similarity_transform

# ArcFace's, as insightface publishes it.
EYES_112 = [[38.2946, 51.6963], [73.5318, 51.5014]]


def moved(points: np.ndarray, degrees: float, scale: float, shift: tuple[float, float]) -> np.ndarray:
    """Rotate, scale and shift points."""
    angle = math.radians(degrees)
    matrix = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return points @ matrix.T + shift


def test_template_equals_that_of_arcface() -> None:
    np.testing.assert_allclose(_TEMPLATE[:2], EYES_112)


@pytest.mark.parametrize(("degrees", "scale", "shift"), [(0, 1, (0, 0)), (30, 2.5, (40, -7)), (180, 0.1, (5, 5))])
def test_similarity_transform_inverts_a_known_transform(
    degrees: float, scale: float, shift: tuple[float, float]
) -> None:
    points = moved(_TEMPLATE, degrees, scale, shift)
    matrix = similarity_transform(points, _TEMPLATE)
    np.testing.assert_allclose(points @ matrix[:, :2].T + matrix[:, 2], _TEMPLATE, atol=1e-9)


def test_similarity_transform_is_the_least_squares_solution() -> None:
    """No similarity near it has a smaller squared distance, and it never mirrors."""
    generator = np.random.default_rng(0)
    points = _TEMPLATE + generator.normal(0, 4, (5, 2))
    best = similarity_transform(points, _TEMPLATE)

    def distance(matrix: np.ndarray) -> float:
        return float(((points @ matrix[:, :2].T + matrix[:, 2] - _TEMPLATE) ** 2).sum())

    for a, b, x, y in generator.normal(0, 0.01, (200, 4)):
        assert distance(best + np.array([[a, -b, x], [b, a, y]])) >= distance(best)
    assert np.linalg.det(similarity_transform(_TEMPLATE * [-1, 1], _TEMPLATE)[:, :2]) >= 0


@pytest.mark.parametrize("side", [112, 56])
def test_aligned_crop_places_landmarks_on_the_template(side: int) -> None:
    """Dots at the landmarks of a tilted face in an image that is not square."""
    image = np.zeros((300, 500, 3), np.uint8)
    landmarks = moved(_TEMPLATE, 25, 1.8, (150, 40))
    for x, y in landmarks:
        cv2.circle(image, (round(x), round(y)), 5, (255, 255, 255), cv2.FILLED)
    crop = aligned_crop(image, landmarks, side)
    assert crop.shape == (side, side, 3)
    for x, y in _TEMPLATE * side / 112:
        assert crop[round(y), round(x)].min() > 200
    assert crop[-1, -1].max() == 0


def test_identical_landmarks_are_accepted() -> None:
    assert aligned_crop(np.zeros((9, 9, 3), np.uint8), np.full((5, 2), 3.0)).shape == (112, 112, 3)


@pytest.mark.parametrize(
    ("box", "margin", "shape"),
    [
        ([10, 10, 20, 30], 0, (20, 10, 3)),
        ([10, 10, 20, 30], 0.25, (30, 20, 3)),
        ([-5, -5, 5, 5], 0, (5, 5, 3)),
        ([90, 40, 120, 60], 0.5, (25, 25, 3)),
        ([200, 200, 210, 210], 0, (0, 0, 3)),
    ],
)
def test_plain_crop_has_its_margin_inside_the_image(
    box: list[float], margin: float, shape: tuple[int, int, int]
) -> None:
    assert plain_crop(np.zeros((50, 100, 3), np.uint8), np.array(box), margin).shape == shape
