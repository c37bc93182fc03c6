"""Prediction heads and cascade stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from config import LevelConfig, ModelConfig
from models.net import ContextModule
from utils.structures import LANDMARKS_PER_FACE, StageOutput


@dataclass(frozen=True)
class LevelOutput:
    """Raw predictions of one pyramid level, channels first.

    Attributes:
        class_logits: (B, A * 2, H, W) background, face of each of A anchors.
        box_deltas: (B, A * 4, H, W).
        landmark_deltas: (B, A * 10, H, W) or None.
        iou_logits: (B, A, H, W) or None.
    """

    class_logits: Tensor
    box_deltas: Tensor
    landmark_deltas: Tensor | None
    iou_logits: Tensor | None


class PredictionHead(nn.Module):
    """1x1 convolutions that predict, for every anchor of every cell of a level, class, box, landmarks and IoU."""

    def __init__(self, channels: int, anchors_per_cell: int, landmarks: bool, iou_aware: bool) -> None:
        super().__init__()
        self.class_logits = nn.Conv2d(channels, anchors_per_cell * 2, 1)
        self.box_deltas = nn.Conv2d(channels, anchors_per_cell * 4, 1)
        coordinates = 2 * LANDMARKS_PER_FACE
        self.landmark_deltas = nn.Conv2d(channels, anchors_per_cell * coordinates, 1) if landmarks else None
        self.iou_logits = nn.Conv2d(channels, anchors_per_cell, 1) if iou_aware else None

    def forward(self, feature: Tensor) -> LevelOutput:
        """(B, channels, H, W) to the predictions of its H * W cells."""
        return LevelOutput(
            class_logits=self.class_logits(feature),
            box_deltas=self.box_deltas(feature),
            landmark_deltas=None if self.landmark_deltas is None else self.landmark_deltas(feature),
            iou_logits=None if self.iou_logits is None else self.iou_logits(feature),
        )


class Stage(nn.Module):
    """One cascade stage: a context module and a prediction head for every pyramid level."""

    def __init__(self, model_config: ModelConfig, levels: Sequence[LevelConfig]) -> None:
        super().__init__()
        channels = model_config.fpn_channels
        self.context = nn.ModuleList(ContextModule(channels, model_config.activation_slope) for _ in levels)
        self.heads = nn.ModuleList(
            PredictionHead(channels, len(level.anchor_sizes), model_config.landmarks, model_config.iou_aware)
            for level in levels
        )

    def forward(self, features: Sequence[Tensor]) -> list[LevelOutput]:
        """(B, channels, H_l, W_l) features of every level to the predictions of every level."""
        return [
            head(context(feature)) for context, head, feature in zip(self.context, self.heads, features, strict=True)
        ]


def join_levels(levels: Sequence[LevelOutput], priors: Tensor) -> StageOutput:
    """The predictions of all levels in the order of `prior_boxes`, with the priors that they are relative to."""
    landmark_deltas = [level.landmark_deltas for level in levels if level.landmark_deltas is not None]
    iou_logits = [level.iou_logits for level in levels if level.iou_logits is not None]
    return StageOutput(
        class_logits=_join([level.class_logits for level in levels], 2),
        box_deltas=_join([level.box_deltas for level in levels], 4),
        landmark_deltas=_join(landmark_deltas, 2 * LANDMARKS_PER_FACE) if landmark_deltas else None,
        iou_logits=_join(iou_logits, 1).squeeze(-1) if iou_logits else None,
        priors=priors,
    )


def _join(levels: Sequence[Tensor], values: int) -> Tensor:
    """(B, A * values, H_l, W_l) of every level to (B, sum of H_l * W_l * A, values)."""
    return torch.cat([level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, values) for level in levels], dim=1)
