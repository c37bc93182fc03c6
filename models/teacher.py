"""A trained detector that says, prior by prior, what another one should."""

from __future__ import annotations

import torch
from torch import Tensor

from config import UserError
from layers.postprocess import fuse_scores
from layers.prior_box import feature_sizes
from models.retinaface import RetinaFace


class Teacher:
    """Scores of a frozen detector, averaged over an image and its mirror image.

    The average is better than either (it is what a test with flipping finds), and needs no labels: what the detector
    knew of pictures that are rare in a new training set is not forgotten.
    """

    def __init__(self, network: RetinaFace) -> None:
        """Freeze a network, on its device."""
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) BGR, 0 to 255, to the face scores (B, P) of the last stage; see `RetinaFace.forward`.

        Raises:
            UserError: the mirror image of a cell is no cell, as the width is no multiple of every stride.
        """
        model = self.network.config
        height, width = images.shape[2:]
        if width % model.strides[-1]:
            raise UserError(f"--teacher needs an --im_size that is a multiple of {model.strides[-1]}, got {width}")
        plain, mirrored = self._scores(images), self._scores(images.flip(3))
        sizes = feature_sizes((height, width), model.strides)
        levels = mirrored.split([rows * columns * model.num_anchor for rows, columns in sizes], dim=1)
        turned = [
            level.view(len(level), rows, columns, model.num_anchor).flip(2).flatten(1)
            for level, (rows, columns) in zip(levels, sizes, strict=True)
        ]
        return (plain + torch.cat(turned, dim=1)) / 2

    def _scores(self, images: Tensor) -> Tensor:
        return fuse_scores(self.network(images)[-1].class_logits.float(), None, exponent=1)
