"""Tests of the types for detections, labelled faces and training targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from utils.structures import Detections, Faces, FaceTargets, join_faces

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


def test_mirroring_detections_swaps_left_and_right_landmarks() -> None:
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


LABELLED = Faces(
    np.array([[10, 20, 40, 60], [0, 0, 5, 10]], np.float32),
    np.array([[[15, 30], [35, 31], [25, 40], [18, 50], [32, 51]], [[0, 0]] * 5], np.float32),
    np.array([True, False]),
    np.array([False, True]),
)
NO_FACES = LABELLED.select(np.arange(0))


def test_moved_faces_are_relative_to_another_origin() -> None:
    """The origin of the other image lies 5 pixels to the left of this one's, and 2 below it."""
    found = LABELLED.moved((5, -2))
    assert found.boxes.tolist() == [[15, 18, 45, 58], [5, -2, 10, 8]]
    assert found.landmarks[0].tolist() == [[20, 28], [40, 29], [30, 38], [23, 48], [37, 49]]
    assert found.has_landmarks.tolist() == [True, False]
    assert found.boxes.dtype == found.landmarks.dtype == np.float32


def test_scaled_labels_are_resized_with_the_image() -> None:
    found = LABELLED.scaled(0.5)
    assert found.boxes.tolist() == [[5, 10, 20, 30], [0, 0, 2.5, 5]]
    assert found.landmarks[0, 0].tolist() == [7.5, 15]
    assert found.boxes.dtype == found.landmarks.dtype == np.float32


def test_mirroring_labels_swaps_left_and_right_landmarks() -> None:
    found = LABELLED.mirrored(100)
    assert found.boxes.tolist() == [[60, 20, 90, 60], [95, 0, 100, 10]]
    assert found.landmarks[0].tolist() == [[65, 31], [85, 30], [75, 40], [68, 51], [82, 50]]
    assert LABELLED.boxes[0].tolist() == [10, 20, 40, 60]
    back = found.mirrored(100)
    for name in ("boxes", "landmarks", "has_landmarks"):
        assert np.array_equal(getattr(back, name), getattr(LABELLED, name)), name


def test_no_labels() -> None:
    for found in (NO_FACES.moved((1, 2)), NO_FACES.scaled(2), NO_FACES.mirrored(10), join_faces([NO_FACES, NO_FACES])):
        assert len(found) == 0
        assert (found.boxes.shape, found.landmarks.shape, found.has_landmarks.shape) == ((0, 4), (0, 5, 2), (0,))


def test_joined_labels_keep_their_order() -> None:
    found = join_faces([LABELLED.select(np.array([1])), NO_FACES, LABELLED.select(np.array([True, False]))])
    assert found.boxes.tolist() == [[0, 0, 5, 10], [10, 20, 40, 60]]
    assert found.has_landmarks.tolist() == [False, True]
    assert found.ignored.tolist() == [True, False]


def test_targets_are_fractions_of_width_and_height() -> None:
    """In an image of 80 x 40, x is divided by 80 and y by 40; unknown landmarks become zeros."""
    faces = Faces(LABELLED.boxes, LABELLED.landmarks + 1, LABELLED.has_landmarks, LABELLED.ignored)
    targets = FaceTargets.from_faces(faces, (40, 80))
    assert targets.boxes.tolist() == [[0.125, 0.5, 0.5, 1.5], [0, 0, 0.0625, 0.25]]
    assert targets.landmarks[0, 0].tolist() == pytest.approx([0.2, 0.775])
    assert not targets.landmarks[1].any()
    assert targets.has_landmarks.tolist() == [True, False]
    assert targets.ignored.tolist() == [False, True]
    assert targets.counts == (2,)
    assert targets.boxes.dtype == targets.landmarks.dtype == torch.float32


def test_joined_targets_count_the_faces_of_each_image() -> None:
    both, none = FaceTargets.from_faces(LABELLED, (100, 100)), FaceTargets.from_faces(NO_FACES, (100, 100))
    joined = FaceTargets.join([none, FaceTargets.join([both, none]), both])
    assert joined.counts == (0, 2, 0, 2)
    assert len(joined) == 4
    assert torch.equal(joined.boxes, torch.cat([both.boxes, both.boxes]))
    assert joined.has_landmarks.tolist() == [True, False, True, False]
    assert joined.ignored.tolist() == [False, True, False, True]
    assert FaceTargets.join([none]).boxes.shape == (0, 4)


def test_targets_move_to_a_device(device: torch.device) -> None:
    targets = FaceTargets.from_faces(LABELLED, (100, 100)).to(device)
    assert targets.boxes.device.type == targets.has_landmarks.device.type == device.type
    assert targets.counts == (2,)


def test_detections_are_selected_by_mask_or_indices() -> None:
    detections = Detections(torch.arange(12.0).view(3, 4), torch.tensor([0.9, 0.5, 0.1]), None)
    assert detections.select(torch.tensor([True, False, True])).scores.tolist() == pytest.approx([0.9, 0.1])
    assert detections.select(torch.tensor([2, 0])).boxes[:, 0].tolist() == [8, 0]
    assert len(detections.select(torch.zeros(3, dtype=torch.bool))) == 0
    with pytest.raises(ValueError, match="expected a mask of length 3, got 2"):
        detections.select(torch.tensor([True, True]))
    with pytest.raises(IndexError):
        detections.select(torch.tensor([3]))
