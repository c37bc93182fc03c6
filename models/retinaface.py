"""The detector: backbone, pyramid and a list of stages."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from layers.prior_box import feature_sizes, prior_boxes
from models.backbone import build_backbone
from models.heads import Stage
from models.net import FPN
from utils.boxes import refine_priors
from utils.structures import StageOutput


class RetinaFace(nn.Module):
    """RetinaFace (arXiv:1905.00641) as a cascade, with the IoU-aware branch of TinaFace (arXiv:2011.13183) or without.

    Parameters exist for what the configuration asks for and nothing else.
    """

    pixel_mean: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.backbone, config.activation_slope)
        self.fpn = FPN(self.backbone.out_channels, config.fpn_channels, config.activation_slope)  # type: ignore[arg-type]
        self.stages = nn.ModuleList(Stage(config) for _ in config.stages)
        # The configuration owns the mean, so checkpoints need not carry it.
        mean = torch.tensor(config.pixel_mean).view(1, 3, 1, 1)
        self.register_buffer("pixel_mean", mean, persistent=False)

    def forward(self, images: Tensor) -> list[StageOutput]:
        """Run every stage.

        Args:
            images: (B, 3, H, W) BGR, 0 to 255, uint8 or float, any size.

        Returns:
            One `StageOutput` a stage; the last is the refined one.
        """
        pixels = images - self.pixel_mean
        pyramid, surroundings = self._pyramids(pixels)
        coarse = self._coarse_pyramid(pixels) if self.config.coarse_share else []
        outputs: list[StageOutput] = []
        for stage in self.stages:
            output = stage(pyramid, surroundings, coarse)
            outputs.append(self._refined(outputs[-1], output, images.shape) if outputs else output)
        return outputs

    def _pyramids(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The features of every level, finest first; and those that take part in the scores of fine levels.

        Fine levels are those of the picture at twice its size, where a face is twice as large: an image pyramid of
        shared weights (arXiv:1612.04402) within the network. Of the picture itself the coarser levels remain, and the
        others are where fine levels look for what is around a face.
        """
        fine_levels = self.config.fine_levels
        if not fine_levels:
            return self.fpn(self.backbone(images)), []
        height, width = images.shape[2:]
        enlarged = F.interpolate(images, size=(2 * height, 2 * width), mode="bilinear")
        fine = self.fpn(self.backbone(enlarged))[:fine_levels]
        # An odd size leaves the enlarged picture a cell more than the level has.
        sizes = feature_sizes((height, width), self.config.strides)
        fine = [level[..., :rows, :columns] for level, (rows, columns) in zip(fine, sizes, strict=False)]
        first = 0 if self.config.context_share else fine_levels - 1
        plain = self.fpn(self.backbone(images), first=first)
        kept = fine_levels - 1 - first
        return fine + plain[kept:], plain[:kept]

    def _coarse_pyramid(self, images: Tensor) -> list[Tensor]:
        """The features of the picture at half its size, finest first."""
        height, width = images.shape[2:]
        halved = F.interpolate(images, size=((height + 1) // 2, (width + 1) // 2), mode="bilinear")
        return self.fpn(self.backbone(halved))

    def _refined(self, previous: StageOutput, output: StageOutput, images_shape: torch.Size) -> StageOutput:
        """`output` as a correction of `previous`: of its deltas, or of the boxes that they decode to."""
        if self.config.refinement == "sum":
            return dataclasses.replace(output, box_deltas=previous.box_deltas + output.box_deltas)
        priors = previous.priors
        if priors is None:
            size_hw = (images_shape[2], images_shape[3])
            priors = prior_boxes(size_hw, self.config.anchor_sizes, self.config.strides, output.box_deltas.device)
        return dataclasses.replace(output, priors=refine_priors(previous.box_deltas, priors, self.config.variances))
