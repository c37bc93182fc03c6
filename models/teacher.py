"""A trained detector as a teacher for knowledge distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from layers.postprocess import fuse_scores
from layers.prior_box import feature_sizes
from models.retinaface import RetinaFace
from utils.errors import UserError


class Teacher:
    """Face scores of a frozen detector, averaged over an image and its mirror image.

    The average is the score of test-time flipping. It needs no labels, so the student can keep what the teacher has
    learnt from images that are rare in a new training set.
    """

    def __init__(self, model: RetinaFace) -> None:
        """Freeze a model on the target device."""
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) BGR images, 0 to 255, to the (B, P) face scores of the last stage.

        Raises:
            UserError: the width is not a multiple of every stride, so cells have no mirror image.
        """
        levels = self.model.levels
        height, width = images.shape[2:]
        if width % levels[-1].stride:
            raise UserError(f"--teacher needs an --im_size that is a multiple of {levels[-1].stride}, got {width}")
        scores, mirrored_scores = self._scores(images), self._scores(images.flip(3))
        sizes = feature_sizes((height, width), levels)
        shapes = [
            (rows, columns, len(level.anchor_sizes)) for level, (rows, columns) in zip(levels, sizes, strict=True)
        ]
        parts = mirrored_scores.split([rows * columns * anchors for rows, columns, anchors in shapes], dim=1)
        flipped = [part.unflatten(1, shape).flip(2).flatten(1) for part, shape in zip(parts, shapes, strict=True)]
        return (scores + torch.cat(flipped, dim=1)) / 2

    def _scores(self, images: Tensor) -> Tensor:
        return fuse_scores(self.model(images)[-1].class_logits.float(), None, exponent=1)
