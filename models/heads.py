"""Prediction heads and cascade stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
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
        self.config = config
        self.context = nn.ModuleList(ContextModule(channels, config.activation_slope) for _ in config.strides)
        self.heads = nn.ModuleList(
            PredictionHead(channels, config.num_anchor, config.landmarks, config.iou_aware) for _ in config.strides
        )

    def forward(self, pyramid: Sequence[Tensor], surroundings: Sequence[Tensor] = ()) -> StageOutput:
        """Predict from the pyramid; what the deltas correct is the network's to say.

        Args:
            pyramid: (B, channels, H_l, W_l) of every level.
            surroundings: of those levels of the picture at its own size that the pyramid has enlarged ones for instead.
        """
        contexts = [context(feature) for context, feature in zip(self.context, pyramid, strict=True)]
        levels = [head(context) for head, context in zip(self.heads, contexts, strict=True)]
        class_logits = [level.class_logits for level in levels]
        if self.config.fine_levels and self.config.context_share:
            class_logits = self._with_surroundings(class_logits, contexts, surroundings)
        return StageOutput(
            class_logits=torch.cat(class_logits, dim=1),
            box_deltas=torch.cat([level.box_deltas for level in levels], dim=1),
            landmark_deltas=_join([level.landmark_deltas for level in levels]),
            iou_logits=_join([level.iou_logits for level in levels]),
        )

    def _with_surroundings(
        self, class_logits: Sequence[Tensor], contexts: Sequence[Tensor], surroundings: Sequence[Tensor]
    ) -> list[Tensor]:
        """The logits of all levels, those of fine ones with their share of what is seen at the picture's own size.

        There every anchor of a fine level has a counterpart at the same place: the one nearest in size. In the plain
        picture the network sees twice as far around it, and takes fewer things for small faces that are none.
        """
        fine_levels, share = self.config.fine_levels, self.config.context_share
        # The plain picture's levels: those that gave way to fine ones, whose weights they share, and the others.
        seen = [context(feature) for context, feature in zip(self.context, surroundings, strict=False)]
        heads = [*self.heads[: len(seen)], *self.heads[fine_levels:]]
        maps = [
            cast(PredictionHead, head).class_logits(context).unflatten(1, (-1, 2))  # (B, anchors, 2, H, W)
            for head, context in zip(heads, [*seen, *contexts[fine_levels:]], strict=True)
        ]
        sizes = plain_anchor_sizes(self.config)
        fused = []
        for level in range(fine_levels):
            shape = contexts[level].shape[-2:]
            counterparts = []
            for size in self.config.anchor_sizes[level]:
                there, anchor = nearest_anchor(size, sizes)
                counterparts.append(F.interpolate(maps[there][:, anchor], size=shape, mode="bilinear"))
            around = _per_prior(torch.cat(counterparts, dim=1), 2)
            fused.append((1 - share) * class_logits[level] + share * around)
        return [*fused, *class_logits[fine_levels:]]


def plain_anchor_sizes(config: ModelConfig) -> list[tuple[int, ...]]:
    """The anchor sides of the levels of the picture at its own size, finest first, whether they are in use or not."""
    replaced = [tuple(2 * size for size in level) for level in config.anchor_sizes[: config.fine_levels - 1]]
    return [*replaced, *config.anchor_sizes[config.fine_levels :]]


def nearest_anchor(size: int, levels: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Level and number of the anchor whose side is nearest in proportion, the finest of equals."""
    distances = {
        (level, anchor): abs(math.log(other / size))
        for level, sizes in enumerate(levels)
        for anchor, other in enumerate(sizes)
    }
    return min(distances, key=distances.__getitem__)
