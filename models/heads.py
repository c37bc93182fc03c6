"""Prediction heads and cascade stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from config import LevelConfig, ModelConfig
from models.net import ContextModule, conv_block
from utils.structures import LANDMARKS_PER_FACE, StageOutput

_TOWER_CONVS = 4
_PRIOR_PROBABILITY = 0.01  # initial face score of every prior (arXiv:1708.02002, section 4.1)


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
        """Map (B, channels, H, W) features to the predictions of their H * W cells."""
        return LevelOutput(
            class_logits=self.class_logits(feature),
            box_deltas=self.box_deltas(feature),
            landmark_deltas=None if self.landmark_deltas is None else self.landmark_deltas(feature),
            iou_logits=None if self.iou_logits is None else self.iou_logits(feature),
        )


class Stage(nn.Module):
    """One cascade stage: a context module and a prediction head for every pyramid level."""

    def __init__(self, config: ModelConfig, levels: Sequence[LevelConfig], level_channels: Sequence[int]) -> None:
        super().__init__()
        self.context = nn.ModuleList(ContextModule(channels, config) for channels in level_channels)
        self.heads = nn.ModuleList(
            PredictionHead(channels, len(level.anchor_sizes), config.landmarks, config.iou_aware)
            for level, channels in zip(levels, level_channels, strict=True)
        )

    def forward(self, features: Sequence[Tensor]) -> list[LevelOutput]:
        """Map the (B, C_l, H_l, W_l) features of every level, or of the coarsest ones, to their predictions."""
        first = len(self.heads) - len(features)
        layers = zip(self.context[first:], self.heads[first:], features, strict=True)
        return [head(context(feature)) for context, head, feature in layers]


class TowerStage(nn.Module):
    """The head of TinaFace (arXiv:2011.13183) as a stage, with weights that all levels share.

    A context module is followed by two towers of four convolutions. 3x3 convolutions predict class logits from the
    first, and boxes, landmarks and IoU from the second. The background logit is always zero, so that the softmax of
    both logits is the sigmoid of the face logit.
    """

    def __init__(self, config: ModelConfig, levels: Sequence[LevelConfig]) -> None:
        super().__init__()
        width, anchors = config.fpn_channels, len(levels[0].anchor_sizes)
        self.context = ContextModule(width, config)
        self.class_tower = self._tower(config)
        self.box_tower = self._tower(config)
        self.face_logits = _predictor(width, anchors, -math.log((1 - _PRIOR_PROBABILITY) / _PRIOR_PROBABILITY))
        self.box_deltas = _predictor(width, anchors * 4)
        self.landmark_deltas = _predictor(width, anchors * 2 * LANDMARKS_PER_FACE) if config.landmarks else None
        self.iou_logits = _predictor(width, anchors) if config.iou_aware else None

    @staticmethod
    def _tower(config: ModelConfig) -> nn.Sequential:
        width = config.fpn_channels
        tower = nn.Sequential(*(conv_block(width, width, 3, 0.0, norm=config.norm) for _ in range(_TOWER_CONVS)))
        for block in tower:
            nn.init.normal_(cast(nn.Conv2d, cast(nn.Sequential, block)[0]).weight, std=0.01)
        return tower

    def forward(self, features: Sequence[Tensor]) -> list[LevelOutput]:
        """Map the (B, C, H_l, W_l) features of every level to its predictions."""
        return [self._predict(self.context(feature)) for feature in features]

    def _predict(self, feature: Tensor) -> LevelOutput:
        box_feature = self.box_tower(feature)
        face_logits = self.face_logits(self.class_tower(feature))
        return LevelOutput(
            class_logits=torch.stack([torch.zeros_like(face_logits), face_logits], dim=2).flatten(1, 2),
            box_deltas=self.box_deltas(box_feature),
            landmark_deltas=None if self.landmark_deltas is None else self.landmark_deltas(box_feature),
            iou_logits=None if self.iou_logits is None else self.iou_logits(box_feature),
        )


def _predictor(channels: int, values: int, bias: float = 0.0) -> nn.Conv2d:
    conv = nn.Conv2d(channels, values, 3, padding=1)
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.constant_(conv.bias, bias)
    return conv


def build_stage(config: ModelConfig, levels: Sequence[LevelConfig], level_channels: Sequence[int]) -> nn.Module:
    """Build a stage with the head that the configuration names."""
    return TowerStage(config, levels) if config.head == "tower" else Stage(config, levels, level_channels)


def join_levels(levels: Sequence[LevelOutput], priors: Tensor) -> StageOutput:
    """Join the predictions of all levels in the order of `prior_boxes`, with the priors that they are relative to."""
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
    """Join (B, A * values, H_l, W_l) predictions to (B, sum of H_l * W_l * A, values)."""
    return torch.cat([level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, values) for level in levels], dim=1)
