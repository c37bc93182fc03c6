"""The detector: backbone, pyramid and a list of stages."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from config import ModelConfig
from layers.prior_box import prior_boxes
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
        backbone = build_backbone(config.backbone, config.activation_slope, config.strides[0])
        channels: tuple[int, ...] = backbone.out_channels  # type: ignore[assignment]
        self.backbone = backbone
        self.fpn = FPN(channels, config.fpn_channels, config.activation_slope, len(config.strides))
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
        pyramid = self.fpn(self.backbone(images - self.pixel_mean))
        outputs: list[StageOutput] = []
        for stage in self.stages:
            output = stage(pyramid)
            outputs.append(self._refined(outputs[-1], output, images.shape) if outputs else output)
        return outputs

    def _refined(self, previous: StageOutput, output: StageOutput, images_shape: torch.Size) -> StageOutput:
        """`output` as a correction of `previous`: of its deltas, or of the boxes that they decode to."""
        if self.config.refinement == "sum":
            return dataclasses.replace(output, box_deltas=previous.box_deltas + output.box_deltas)
        priors = previous.priors
        if priors is None:
            size_hw = (images_shape[2], images_shape[3])
            priors = prior_boxes(size_hw, self.config.anchor_sizes, self.config.strides, output.box_deltas.device)
        return dataclasses.replace(output, priors=refine_priors(previous.box_deltas, priors, self.config.variances))
