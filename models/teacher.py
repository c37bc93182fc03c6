"""A trained detector as a teacher for knowledge distillation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from config import ModelConfig
from layers.postprocess import fuse_scores
from layers.prior_box import feature_sizes
from models.checkpoint import load_checkpoint
from models.image_pyramid import build_model, pyramid_levels
from models.initialise import initialise_from_detector
from models.retinaface import RetinaFace
from utils.boxes import clamp_deltas, decode_boxes, decode_landmarks
from utils.errors import ConfigError, UserError
from utils.structures import MIRRORED_LANDMARKS, TeacherOutput


class Teacher:
    """Scores, boxes and landmarks of a frozen detector, averaged over an image and its mirror image.

    The average score is that of test-time flipping. It needs no labels, so the student can keep what the teacher has
    learnt from images that are rare in a new training set.
    """

    def __init__(self, model: RetinaFace) -> None:
        """Freeze a model on the target device."""
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> TeacherOutput:
        """Map (B, 3, H, W) BGR images, 0 to 255, to the predictions of the last stage.

        Raises:
            UserError: the width is not a multiple of every stride, so cells have no mirror image.
        """
        height, width = images.shape[2:]
        coarsest = self.model.levels[-1].stride
        if width % coarsest:
            raise UserError(f"--teacher needs an --im_size that is a multiple of {coarsest}, got {width}")
        original, mirrored = self._predict(images), self._predict(images.flip(3))
        positions = self._mirrored_positions((height, width)).to(images.device)
        landmarks = None
        if original.landmarks is not None and mirrored.landmarks is not None:
            x, y = mirrored.landmarks[:, positions][..., MIRRORED_LANDMARKS, :].unbind(-1)
            landmarks = (original.landmarks + torch.stack([1 - x, y], dim=-1)) / 2
        x1, y1, x2, y2 = mirrored.boxes[:, positions].unbind(-1)
        return TeacherOutput(
            scores=(original.scores + mirrored.scores[:, positions]) / 2,
            boxes=(original.boxes + torch.stack([1 - x2, y1, 1 - x1, y2], dim=-1)) / 2,
            landmarks=landmarks,
        )

    def _predict(self, images: Tensor) -> TeacherOutput:
        output, variances = self.model(images)[-1].float(), self.model.model_config.variances
        landmarks = None
        if output.landmark_deltas is not None:
            landmarks = decode_landmarks(output.landmark_deltas, output.priors, variances)
        return TeacherOutput(
            scores=fuse_scores(output.class_logits, None, exponent=1),
            boxes=decode_boxes(clamp_deltas(output.box_deltas, variances), output.priors, variances),
            landmarks=landmarks,
        )

    def _mirrored_positions(self, size_hw: tuple[int, int]) -> Tensor:
        """(P,) position of the prior that the mirror image has in place of each prior."""
        positions: list[Tensor] = []
        start = 0
        for level, (rows, columns) in zip(self.model.levels, feature_sizes(size_hw, self.model.levels), strict=True):
            shape = (rows, columns, len(level.anchor_sizes))
            count = rows * columns * len(level.anchor_sizes)
            positions.append(torch.arange(start, start + count).view(shape).flip(1).flatten())
            start += count
        return torch.cat(positions)


def open_teacher(path: Path, student_config: ModelConfig, device: torch.device) -> Teacher:
    """Open the checkpoint of a teacher on a device.

    It keeps its own scales of the image if its priors are those of the student, and otherwise takes the student's
    scales.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        ConfigError: the priors differ.
    """
    checkpoint = load_checkpoint(path)
    model_config = checkpoint.model_config
    if pyramid_levels(model_config) != pyramid_levels(student_config):
        pyramid = dataclasses.replace(student_config.image_pyramid, upsampled_channels=())
        model_config = dataclasses.replace(model_config, image_pyramid=pyramid)
    if pyramid_levels(model_config) != pyramid_levels(student_config):
        raise ConfigError(f"--teacher {checkpoint.path}: its anchors differ from the model's; choose another")
    model = build_model(model_config)
    initialise_from_detector(model, checkpoint)
    return Teacher(model.to(device))
