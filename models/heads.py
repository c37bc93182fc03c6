"""Prediction heads and cascade stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from config import ModelConfig
from models.net import ContextModule
from utils.landmarks import LANDMARKS_PER_FACE
from utils.structures import StageOutput


class PredictionHead(nn.Module):
    """1x1 convolutions that predict, for every cell of one level, what its anchors see."""

    def __init__(self, channels: int, anchors_per_cell: int, landmarks: bool, iou_aware: bool) -> None:
        super().__init__()
        self.class_logits = nn.Conv2d(channels, anchors_per_cell * 2, 1)
        self.box_deltas = nn.Conv2d(channels, anchors_per_cell * 4, 1)
        coordinates = 2 * LANDMARKS_PER_FACE
        self.landmark_deltas = nn.Conv2d(channels, anchors_per_cell * coordinates, 1) if landmarks else None
        self.iou_logits = nn.Conv2d(channels, anchors_per_cell, 1) if iou_aware else None

    def forward(self, feature: Tensor) -> StageOutput:
        """(B, channels, H, W) to the outputs of its H * W * anchors_per_cell priors."""
        return StageOutput(
            class_logits=_per_prior(self.class_logits(feature), 2),
            box_deltas=_per_prior(self.box_deltas(feature), 4),
            landmark_deltas=None
            if self.landmark_deltas is None
            else _per_prior(self.landmark_deltas(feature), 2 * LANDMARKS_PER_FACE),
            iou_logits=None if self.iou_logits is None else _per_prior(self.iou_logits(feature), 1).squeeze(-1),
        )


def _per_prior(prediction: Tensor, values: int) -> Tensor:
    """(B, anchors * values, H, W) to (B, H * W * anchors, values), the order of `prior_boxes`."""
    return prediction.permute(0, 2, 3, 1).reshape(prediction.shape[0], -1, values)


def _join(levels: Sequence[Tensor | None]) -> Tensor | None:
    """The priors of all levels in one tensor; None for a branch that the model does not have."""
    present = [level for level in levels if level is not None]
    return torch.cat(present, dim=1) if present else None


class Stage(nn.Module):
    """One cascade stage: a context module and a head for every pyramid level."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = config.fpn_channels
        self.context = nn.ModuleList(ContextModule(channels, config.activation_slope) for _ in config.strides)
        self.heads = nn.ModuleList(
            PredictionHead(channels, config.num_anchor, config.landmarks, config.iou_aware) for _ in config.strides
        )

    def forward(self, pyramid: Sequence[Tensor]) -> StageOutput:
        """Predict from the pyramid; what the deltas correct is the network's to say."""
        levels = [
            head(context(feature)) for head, context, feature in zip(self.heads, self.context, pyramid, strict=True)
        ]
        return StageOutput(
            class_logits=torch.cat([level.class_logits for level in levels], dim=1),
            box_deltas=torch.cat([level.box_deltas for level in levels], dim=1),
            landmark_deltas=_join([level.landmark_deltas for level in levels]),
            iou_logits=_join([level.iou_logits for level in levels]),
        )
