"""The same model at several scales of the image, within one forward pass.

Small faces are found better in the image at twice its size, and false detections are recognised better with the
context that is visible at half its size. An image pyramid of shared weights is described in arXiv:1612.04402.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Container, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ImagePyramidConfig, LevelConfig, ModelConfig
from layers.prior_box import feature_sizes
from models.backbone import MobileNetV1, ResNet, build_backbone
from models.heads import LevelOutput, build_stage
from models.net import MergedFPN
from models.retinaface import RetinaFace, run_cascade
from utils.structures import StageOutput


def build_model(model_config: ModelConfig) -> RetinaFace:
    """Build a randomly initialised model, with other scales of the image if the configuration has any."""
    pyramid = model_config.image_pyramid
    has_scales = pyramid.upsampled_levels or pyramid.half_scale_weight
    return ImagePyramid(model_config) if has_scales else RetinaFace(model_config)


def pyramid_levels(model_config: ModelConfig) -> tuple[LevelConfig, ...]:
    """The levels of the priors: the upsampled ones, and those of the native scale that they do not replace.

    An upsampled level has half the stride and half the anchor sizes in pixels of the image.
    """
    count = model_config.image_pyramid.upsampled_levels
    upsampled = [_scaled_level(level, 0.5) for level in model_config.levels[:count]]
    return (*upsampled, *model_config.levels[max(count - 1, 0) :])


def _scaled_level(level: LevelConfig, scale: float) -> LevelConfig:
    return LevelConfig(int(level.stride * scale), tuple(size * scale for size in level.anchor_sizes), level.channels)


def _upsampled_config(model_config: ModelConfig, strides: Container[int]) -> ModelConfig:
    """The configuration of the upsampled levels' own model, with levels of the given strides only."""
    levels = [level for level in model_config.levels if level.stride in strides]
    channels = model_config.image_pyramid.upsampled_channels
    finest = [dataclasses.replace(level, channels=width) for level, width in zip(levels, channels, strict=False)]
    return dataclasses.replace(
        model_config, levels=(*finest, *levels[len(finest) :]), image_pyramid=ImagePyramidConfig()
    )


class ImagePyramid(RetinaFace):
    """A `RetinaFace` that also sees the image at twice and at half its size.

    The finest levels are computed on the image at twice its size, by context modules and heads of their own, and by a
    backbone and a feature pyramid of their own where the configuration has `upsampled_channels`. They replace the
    finest levels of the native scale; see `pyramid_levels`. Face logits of the upsampled levels are averaged with those
    of the native scale at the same place, and all face logits with those of the image at half its size, by the weights
    of `ImagePyramidConfig`.
    """

    def __init__(self, model_config: ModelConfig) -> None:
        super().__init__(model_config)
        self.levels = pyramid_levels(model_config)
        pyramid = model_config.image_pyramid
        count = pyramid.upsampled_levels
        levels, channels = model_config.levels[:count], model_config.level_channels[:count]
        self.upsampled_backbone: MobileNetV1 | ResNet | None = None
        self.upsampled_fpn: MergedFPN | None = None
        if pyramid.upsampled_channels:
            channels = pyramid.upsampled_channels
            self.upsampled_backbone = build_backbone(model_config)
            backbone_channels = self.upsampled_backbone.channels
            self.upsampled_fpn = MergedFPN(backbone_channels, _upsampled_config(model_config, backbone_channels))
        self.upsampled_stages = nn.ModuleList(build_stage(model_config, levels, channels) for _ in self.stages)
        # Without a weight, the native levels that upsampled ones replace are not computed.
        self.first_native = 0 if pyramid.native_scale_weight else max(count - 1, 0)
        self._freeze_unused()

    @property
    def backbones(self) -> Sequence[nn.Module]:
        """See `RetinaFace.backbones`."""
        return [self.backbone] if self.upsampled_backbone is None else [self.backbone, self.upsampled_backbone]

    def _freeze_unused(self) -> None:
        """Freeze parameters that no output depends on, as DistributedDataParallel requires.

        Native levels that upsampled ones replace contribute at most their face logits.
        """
        pyramid = self.model_config.image_pyramid
        if self.model_config.head == "tower":  # all levels share its weights
            return
        has_logits = bool(pyramid.native_scale_weight or pyramid.half_scale_weight)
        for name, parameter in self.stages.named_parameters():
            _, kind, level, branch, _ = name.split(".", 4)
            if int(level) < pyramid.upsampled_levels - 1:
                parameter.requires_grad_(has_logits and (kind == "context" or branch == "class_logits"))
        if self.upsampled_fpn is not None and not has_logits:
            for name, parameter in self.fpn.named_parameters():
                kind, level, _ = name.split(".", 2)
                parameter.requires_grad_(kind == "extra" or int(level) >= self.first_native)

    def forward(self, images: Tensor) -> list[StageOutput]:
        """See `RetinaFace.forward`."""
        normalised = self.normalise(images)
        native = self.features(normalised, self.first_native)
        upsampled, half = self._upsampled_features(normalised), self._half_features(normalised)
        stage_levels = []
        for stage, upsampled_stage in zip(self.stages, self.upsampled_stages, strict=True):
            levels = self._merge_native(upsampled_stage(upsampled), stage(native))
            stage_levels.append(self._merge_half(levels, stage(half)) if half else levels)
        return run_cascade(stage_levels, self.priors(images), self.model_config)

    def _upsampled_features(self, images: Tensor) -> list[Tensor]:
        """Features of the finest levels of the image at twice its size, cropped to the cells of their stride."""
        count = self.model_config.image_pyramid.upsampled_levels
        if not count:
            return []
        height, width = images.shape[2:]
        enlarged = F.interpolate(images, size=(2 * height, 2 * width), mode="bilinear")
        # An image of odd size has one cell more at twice its size than the level.
        sizes = feature_sizes((height, width), self.levels[:count])
        if self.upsampled_backbone is None or self.upsampled_fpn is None:
            levels = self.features(enlarged)
        else:
            levels = self.upsampled_fpn(self.upsampled_backbone(enlarged))
        features = zip(levels, sizes, strict=False)
        return [feature[..., :rows, :columns] for feature, (rows, columns) in features]

    def _half_features(self, images: Tensor) -> list[Tensor]:
        """Features of the image at half its size, or an empty list if their weight is 0."""
        if not self.model_config.image_pyramid.half_scale_weight:
            return []
        height, width = images.shape[2:]
        halved = F.interpolate(images, size=((height + 1) // 2, (width + 1) // 2), mode="bilinear")
        return self.features(halved)

    def _merge_native(self, upsampled: Sequence[LevelOutput], native: Sequence[LevelOutput]) -> list[LevelOutput]:
        """The levels of both scales, with the face logits of the native scale averaged into the upsampled ones."""
        weight = self.model_config.image_pyramid.native_scale_weight
        averaged = _average_logits(upsampled, self.levels, native, self.model_config.levels, weight)
        return [*averaged, *native[len(upsampled) - len(self.levels) :]]

    def _merge_half(self, levels: Sequence[LevelOutput], half: Sequence[LevelOutput]) -> list[LevelOutput]:
        """The levels with the face logits of the image at half its size averaged into all of them."""
        half_levels = [_scaled_level(level, 2) for level in self.model_config.levels]
        weight = self.model_config.image_pyramid.half_scale_weight
        return _average_logits(levels, self.levels, half, half_levels, weight)


def _average_logits(
    outputs: Sequence[LevelOutput],
    levels: Sequence[LevelConfig],
    other_outputs: Sequence[LevelOutput],
    other_levels: Sequence[LevelConfig],
    weight: float,
) -> list[LevelOutput]:
    """Average the class logits of outputs with those of another scale of the image, which have the given weight.

    Each anchor is averaged with the anchor of nearest size at the other scale, interpolated to its level.
    """
    if not weight:
        return list(outputs)
    averaged = []
    for output, level in zip(outputs, levels, strict=False):
        counterparts = []
        for size in level.anchor_sizes:
            index, anchor = nearest_anchor(size, other_levels)
            logits = other_outputs[index].class_logits[:, 2 * anchor : 2 * anchor + 2]
            counterparts.append(F.interpolate(logits, size=output.class_logits.shape[-2:], mode="bilinear"))
        logits = (1 - weight) * output.class_logits + weight * torch.cat(counterparts, dim=1)
        averaged.append(dataclasses.replace(output, class_logits=logits))
    return averaged


def nearest_anchor(size: float, levels: Sequence[LevelConfig]) -> tuple[int, int]:
    """Index of the level and of the anchor whose side is nearest to `size` in ratio; the finest level wins ties."""
    distances = {
        (index, anchor): abs(math.log(other / size))
        for index, level in enumerate(levels)
        for anchor, other in enumerate(level.anchor_sizes)
    }
    return min(distances, key=distances.__getitem__)


def add_upsampled_stages(state: Mapping[str, Tensor], upsampled_levels: int) -> dict[str, Tensor]:
    """The tensors of an `ImagePyramid` whose upsampled levels use the weights of the native scale.

    Args:
        state: `RetinaFace.state_dict()`.
        upsampled_levels: number of levels that are upsampled.
    """
    extended = dict(state)
    for name, tensor in state.items():
        part = re.fullmatch(r"stages\.(\d+\.(?:context|heads)\.(\d+)\..+)", name)
        if part and int(part[2]) < upsampled_levels:
            extended[f"upsampled_stages.{part[1]}"] = tensor
    return extended
