"""Tests of face tracking: ids over the frames of a video."""

from __future__ import annotations

import numpy as np

from utils.tracking import FaceTracker


def face(x: float, y: float, side: float = 20) -> list[float]:
    return [x, y, x + side, y + side]


def frame(*faces: list[float]) -> np.ndarray:
    return np.array(faces, np.float32).reshape(-1, 4)


def test_ids_start_at_one_and_persist() -> None:
    tracker = FaceTracker(25)
    assert tracker.update(frame()) == []
    assert tracker.update(frame(face(0, 0), face(100, 0))) == [1, 2]
    assert tracker.update(frame(face(101, 1), face(2, 0), face(50, 50))) == [2, 1, 3]


def test_faces_that_cross_keep_their_ids() -> None:
    """One moves right and one left; where they meet, each detection overlaps both tracks by a half."""
    tracker = FaceTracker(25)
    for step in range(60):
        ids = tracker.update(frame(face(4 * step, 0), face(240 - 4 * step, 6)))
        assert ids == [1, 2], step


def test_hidden_face_keeps_its_id_when_it_reappears() -> None:
    """It moves by 4 pixels a frame, so after 8 frames it does not overlap where it was last seen."""
    tracker = FaceTracker(25)
    for step in range(20):
        assert tracker.update(frame(face(4 * step, 0))) == [1]
    for _ in range(8):
        assert tracker.update(frame()) == []
    assert tracker.update(frame(face(4 * 28, 0))) == [1]


def test_lost_face_is_forgotten_after_the_patience() -> None:
    tracker = FaceTracker(10, patience_seconds=0.5)
    assert tracker.update(frame(face(0, 0))) == [1]
    for _ in range(5):
        tracker.update(frame())
    assert tracker.update(frame(face(0, 0))) == [1]
    for _ in range(6):
        tracker.update(frame())
    assert tracker.update(frame(face(0, 0))) == [2]


def test_noise_creates_no_new_ids() -> None:
    generator = np.random.default_rng(0)
    tracker = FaceTracker(25)
    for step in range(100):
        boxes = frame(face(step, 0), face(300, 2 * step, 40)) + generator.normal(0, 1, (2, 4)).astype(np.float32)
        assert tracker.update(boxes) == [1, 2]
