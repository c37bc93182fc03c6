"""Tests of the teacher's predictions for distillation."""

from __future__ import annotations

import pytest
import torch

from config import ImagePyramidConfig
from models.architecture import usual_config
from models.image_pyramid import build_model
from models.retinaface import RetinaFace
from models.teacher import Teacher
from utils.boxes import decode_boxes
from utils.errors import UserError


def untrained() -> RetinaFace:
    torch.manual_seed(2)
    return RetinaFace(usual_config("mobilenet0.25", num_anchor=2, fpn_channels=16))


def test_scores_are_the_mean_over_the_image_and_its_mirror_image() -> None:
    model = untrained()
    images = torch.rand(2, 3, 64, 96) * 255
    found = Teacher(model)(images)
    scores = found.scores
    with torch.no_grad():
        plain, mirrored = (model(view)[-1].class_logits.softmax(2)[..., 1] for view in (images, images.flip(3)))
    # The finest level has 8 rows of 12 cells of 2 anchors; cell (3, 1) of the image is (3, 10) of its mirror image.
    cell, mirror_cell = (3 * 12 + 1) * 2 + 1, (3 * 12 + 10) * 2 + 1
    torch.testing.assert_close(scores[:, cell], (plain[:, cell] + mirrored[:, mirror_cell]) / 2)
    # The coarsest has 2 rows of 3 cells, and its last cell is the first of the last row of the mirror image.
    torch.testing.assert_close(scores[:, -1], (plain[:, -1] + mirrored[:, -5]) / 2)
    assert not scores.requires_grad


def test_predictions_for_the_mirror_image_are_mirrored() -> None:
    images = torch.rand(1, 3, 64, 96) * 255
    teacher = Teacher(untrained())
    plain, mirrored = teacher(images), teacher(images.flip(3))
    cell, mirror_cell = (3 * 12 + 1) * 2 + 1, (3 * 12 + 10) * 2 + 1
    x1, y1, x2, y2 = plain.boxes[0, cell]
    torch.testing.assert_close(mirrored.boxes[0, mirror_cell], torch.stack([1 - x2, y1, 1 - x1, y2]))
    assert plain.landmarks is not None
    assert mirrored.landmarks is not None
    left_eye, right_eye = plain.landmarks[0, cell, :2]
    expected = torch.tensor([1, 0]) + torch.tensor([-1, 1]) * torch.stack([right_eye, left_eye])
    torch.testing.assert_close(mirrored.landmarks[0, mirror_cell, :2], expected)


def test_boxes_are_the_mean_of_the_refined_boxes_of_the_last_stage() -> None:
    torch.manual_seed(2)
    model = RetinaFace(usual_config("mobilenet0.25", num_anchor=2, fpn_channels=16, refinement="rematch"))
    teacher = Teacher(model)
    images = torch.rand(1, 3, 64, 96) * 255
    with torch.no_grad():
        views = [model(view)[-1] for view in (images, images.flip(3))]
    boxes = [decode_boxes(view.box_deltas, view.priors, (0.1, 0.2))[0] for view in views]
    cell, mirror_cell = (3 * 12 + 1) * 2 + 1, (3 * 12 + 10) * 2 + 1
    x1, y1, x2, y2 = boxes[1][mirror_cell]
    expected = (boxes[0][cell] + torch.stack([1 - x2, y1, 1 - x1, y2])) / 2
    torch.testing.assert_close(teacher(images).boxes[0, cell], expected)


def test_scores_of_a_symmetric_image_are_symmetric() -> None:
    half = torch.rand(1, 3, 32, 32) * 255
    scores = Teacher(untrained())(torch.cat([half, half.flip(3)], dim=3)).scores
    finest = scores[:, : 4 * 8 * 2].view(4, 8, 2)
    torch.testing.assert_close(finest, finest.flip(1))


def test_upsampled_levels_are_mirrored_too() -> None:
    """They come first: here 16 x 16 cells of stride 4 with two anchors, and 8 x 8 of stride 8."""
    torch.manual_seed(2)
    config = usual_config("mobilenet0.25", num_anchor=2, fpn_channels=16, image_pyramid=ImagePyramidConfig(2, 0.3))
    half = torch.rand(1, 3, 64, 32) * 255
    scores = Teacher(build_model(config))(torch.cat([half, half.flip(3)], dim=3)).scores
    finest, second, _ = scores.split([16 * 16 * 2, 8 * 8 * 2, (4 * 4 + 2 * 2) * 2], dim=1)
    for level, side in ((finest, 16), (second, 8)):
        grid = level.view(side, side, 2)
        torch.testing.assert_close(grid, grid.flip(1))


def test_width_that_is_not_a_multiple_of_the_strides_is_refused() -> None:
    with pytest.raises(UserError, match="--im_size that is a multiple of 32, got 72"):
        Teacher(untrained())(torch.zeros(1, 3, 64, 72))
