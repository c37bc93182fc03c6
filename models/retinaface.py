"""The detection model: backbone, feature pyramid and the stages of the cascade."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from config import ModelConfig
from layers.prior_box import prior_boxes
from models.backbone import build_backbone
from models.heads import LevelOutput, build_stage, join_levels
from models.net import MergedFPN, OutputFPN
from utils.boxes import decode_landmarks, encode_landmarks, refine_priors
from utils.structures import StageOutput


class RetinaFace(nn.Module):
    """RetinaFace (arXiv:1905.00641) as a cascade, with or without the IoU-aware branch of TinaFace (arXiv:2011.13183).

    The model has only the parameters that the configuration needs.

    Attributes:
        model_config: the architecture.
        levels: strides and anchor sizes of the priors, in the order of the outputs.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, model_config: ModelConfig) -> None:
        super().__init__()
        self.model_config = model_config
        self.levels = model_config.levels
        self.backbone = build_backbone(model_config)
        fpn = OutputFPN if model_config.fpn == "output" else MergedFPN
        self.fpn = fpn(self.backbone.channels, model_config)
        channels = model_config.level_channels
        self.stages = nn.ModuleList(build_stage(model_config, self.levels, channels) for _ in model_config.stages)
        # Mean and standard deviation are part of the configuration, so checkpoints do not contain them.
        for name in ("pixel_mean", "pixel_std"):
            values = torch.tensor(getattr(model_config, name)).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    @property
    def backbones(self) -> Sequence[nn.Module]:
        """Every backbone of the model."""
        return [self.backbone]

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, images: Tensor) -> list[StageOutput]:
        """Run every stage.

        Args:
            images: (B, 3, H, W) BGR, 0 to 255, uint8 or float, any size.

        Returns:
            One `StageOutput` for each stage; the last is the refined one.
        """
        features = self.features(self.normalise(images))
        levels = [stage(features) for stage in self.stages]
        return run_cascade(levels, self.priors(images), self.model_config)

    def priors(self, images: Tensor) -> Tensor:
        """(P, 4) cxcywh priors of the first stage, normalised to the image."""
        config = self.model_config
        size_hw = (images.shape[2], images.shape[3])
        return prior_boxes(size_hw, self.levels, images.device, config.anchor_ratio, config.anchor_offset)

    def normalise(self, images: Tensor) -> Tensor:
        """Convert (B, 3, H, W) BGR images, 0 to 255, to the channel order and range of the model."""
        if self.model_config.channel_order == "rgb":
            images = images.flip(1)
        centred = images - self.pixel_mean
        return centred if self.model_config.pixel_std == (1.0, 1.0, 1.0) else centred / self.pixel_std

    def features(self, images: Tensor, first: int = 0) -> list[Tensor]:
        """Map normalised (B, 3, H, W) images to (B, C, H_l, W_l) features of the levels from `first` on."""
        features: list[Tensor] = self.fpn(self.backbone(images), first)
        return features


def run_cascade(
    stage_levels: Sequence[Sequence[LevelOutput]], priors: Tensor, model_config: ModelConfig
) -> list[StageOutput]:
    """Combine the predictions of every stage with those of the previous stage.

    With `sum`, box deltas of earlier stages are added and the priors stay the same. With `rematch`, the decoded boxes
    of a stage become the priors of the next one. Landmarks are predicted relative to the priors of the first stage.

    Args:
        stage_levels: predictions of every level, for each stage.
        priors: (P, 4) cxcywh priors of the first stage, normalised to the image.
    """
    outputs: list[StageOutput] = []
    first_priors = priors
    for levels in stage_levels:
        output = join_levels(levels, priors)
        if priors is not first_priors and output.landmark_deltas is not None:
            points = decode_landmarks(output.landmark_deltas.float(), first_priors, model_config.variances)
            landmark_deltas = encode_landmarks(points, priors, model_config.variances)
            output = dataclasses.replace(output, landmark_deltas=landmark_deltas)
        if outputs and model_config.refinement == "sum":
            output = dataclasses.replace(output, box_deltas=outputs[-1].box_deltas + output.box_deltas)
        outputs.append(output)
        if model_config.refinement == "rematch":
            priors = refine_priors(output.box_deltas, priors, model_config.variances)
    return outputs
