"""Prediction heads and cascade stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from models.levels import nearest_anchor
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

    def forward(
        self, pyramid: Sequence[Tensor], surroundings: Sequence[Tensor] = (), coarse: Sequence[Tensor] = ()
    ) -> StageOutput:
        """Predict from the pyramid; what the deltas correct is the network's to say.

        Args:
            pyramid: (B, channels, H_l, W_l) of every level.
            surroundings: of those levels of the picture at its own size that the pyramid has enlarged ones for instead.
            coarse: of all levels of the picture at half its size.
        """
        contexts = [context(feature) for context, feature in zip(self.context, pyramid, strict=True)]
        levels = [head(context) for head, context in zip(self.heads, contexts, strict=True)]
        class_logits = [level.class_logits for level in levels]
        shapes = [feature.shape[-2:] for feature in pyramid]
        fine_levels, plain_sizes = self.config.fine_levels, plain_anchor_sizes(self.config)
        if fine_levels and self.config.context_share:
            replaced = [context(feature) for context, feature in zip(self.context, surroundings, strict=False)]
            maps = self._plain_logits([*replaced, *contexts[fine_levels:]])
            fused = self._mixed(class_logits[:fine_levels], shapes, maps, plain_sizes, self.config.context_share)
            class_logits[:fine_levels] = fused
        if self.config.coarse_share:
            modules = [self.context[number] for number in self._plain_modules]
            maps = self._plain_logits([context(feature) for context, feature in zip(modules, coarse, strict=True)])
            sizes = [tuple(2 * size for size in level) for level in plain_sizes]
            class_logits = self._mixed(class_logits, shapes, maps, sizes, self.config.coarse_share)
        return StageOutput(
            class_logits=torch.cat(class_logits, dim=1),
            box_deltas=torch.cat([level.box_deltas for level in levels], dim=1),
            landmark_deltas=_join([level.landmark_deltas for level in levels]),
            iou_logits=_join([level.iou_logits for level in levels]),
        )

    @property
    def _plain_modules(self) -> list[int]:
        """Numbers of the context modules and heads that know the levels of a picture at its own size, finest first.

        They are those of fine levels, which know the same strides in the enlarged picture, and then the others.
        """
        fine_levels = self.config.fine_levels
        return [*range(fine_levels - 1), *range(fine_levels, len(self.heads))]

    def _plain_logits(self, contexts: Sequence[Tensor]) -> list[Tensor]:
        """(B, anchors, 2, H_l, W_l) of what the contexts show of a whole picture, level by level."""
        heads = [cast(PredictionHead, self.heads[number]) for number in self._plain_modules]
        return [head.class_logits(context).unflatten(1, (-1, 2)) for head, context in zip(heads, contexts, strict=True)]

    def _mixed(
        self,
        class_logits: Sequence[Tensor],
        shapes: Sequence[torch.Size],
        maps: Sequence[Tensor],
        sizes: Sequence[tuple[int, ...]],
        share: float,
    ) -> list[Tensor]:
        """The logits of the first levels, with a share of those at the same place of the picture at another size.

        There every anchor has a counterpart: the one nearest in size. In a smaller picture the network sees farther
        around it, and takes fewer things for faces that are none.

        Args:
            class_logits: (B, P_l, 2) of as many levels as are to be mixed.
            shapes: height and width of the levels.
            maps: (B, anchors, 2, H, W) of the other picture's levels.
            sizes: their anchors' sides in pixels of the picture at its own size.
        """
        mixed = []
        for logits, shape, own_sizes in zip(class_logits, shapes, self.config.anchor_sizes, strict=False):
            counterparts = []
            for size in own_sizes:
                there, anchor = nearest_anchor(size, sizes)
                counterparts.append(F.interpolate(maps[there][:, anchor], size=shape, mode="bilinear"))
            mixed.append((1 - share) * logits + share * _per_prior(torch.cat(counterparts, dim=1), 2))
        return mixed


def plain_anchor_sizes(config: ModelConfig) -> list[tuple[int, ...]]:
    """The anchor sides of the levels of the picture at its own size, finest first, whether they are in use or not."""
    replaced = [tuple(2 * size for size in level) for level in config.anchor_sizes[: max(config.fine_levels - 1, 0)]]
    return [*replaced, *config.anchor_sizes[config.fine_levels :]]
