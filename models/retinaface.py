"""The detector: backbone, pyramid and a list of stages."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from config import ModelConfig
from models.backbone import build_backbone
from models.heads import Stage
from models.net import FPN
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
        pyramid = self.fpn(self.backbone(images - self.pixel_mean))
        outputs: list[StageOutput] = []
        for stage in self.stages:
            outputs.append(stage(pyramid, outputs[-1] if outputs else None))
        return outputs
