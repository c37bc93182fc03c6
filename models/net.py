"""Building blocks between backbone and heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from config import ModelConfig

_GROUPS = 32  # groups of group normalisation (arXiv:1803.08494)


def norm_layer(kind: str) -> Callable[[int], nn.Module]:
    """A function that makes a normalisation layer for a number of channels; `kind` is `batch` or `group`."""
    return nn.BatchNorm2d if kind == "batch" else partial(nn.GroupNorm, _GROUPS)


class DeformableConv(nn.Module):
    """Deformable convolution (arXiv:1703.06211) whose offsets are predicted from its input and start at zero."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.offsets = nn.Conv2d(in_channels, 2 * kernel_size**2, kernel_size, stride, padding)
        nn.init.zeros_(self.offsets.weight)
        assert self.offsets.bias is not None
        nn.init.zeros_(self.offsets.bias)
        self.conv = DeformConv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)

    def forward(self, feature: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride)."""
        result: Tensor = self.conv(feature, self.offsets(feature))
        return result


def conv_block(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    slope: float | None,
    stride: int = 1,
    groups: int = 1,
    *,
    norm: str = "batch",
    deformable: bool = False,
) -> nn.Sequential:
    """Convolution with "same" padding, normalisation, and LeakyReLU unless the slope is None; 0 makes it ReLU."""
    conv: nn.Module
    if deformable:
        conv = DeformableConv(in_channels, out_channels, kernel_size, stride)
    else:
        padding = kernel_size // 2
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
    activation = [] if slope is None else [nn.LeakyReLU(slope, inplace=True)]
    return nn.Sequential(conv, norm_layer(norm)(out_channels), *activation)


class MergedFPN(nn.Module):
    """Feature pyramid of RetinaFace, as in biubug6/Pytorch_Retinaface.

    Every level has a 1x1 lateral convolution. A finer level is added to the upsampled coarser one, and merged by a 3x3
    convolution before it goes on to the next finer level. All convolutions have normalisation and activation. With
    `lateral`, the lateral features go on to the next finer level instead of the merged ones, as in insightface's
    symbol_common.py.
    """

    def __init__(self, in_channels: Mapping[int, int], config: ModelConfig) -> None:
        """Build the pyramid.

        Args:
            in_channels: channels of the backbone's features by their stride.
            config: levels and widths.
        """
        super().__init__()
        self.config = config
        strides = [level.stride for level in config.levels if level.stride in in_channels]
        widths = config.level_channels
        slope, norm = config.activation_slope, config.norm
        self.lateral = nn.ModuleList(
            conv_block(in_channels[stride], width, 1, slope, norm=norm)
            for stride, width in zip(strides, widths, strict=False)
        )
        self.merge = nn.ModuleList(
            conv_block(width, width, 3, slope, norm=norm, deformable=config.deformable_context)
            for width in widths[: len(strides) - 1]
        )
        # A coarser level of another width is projected to that of the finer one before they are added.
        self.project = nn.ModuleList(
            nn.Identity() if width == coarser else conv_block(coarser, width, 1, slope, norm=norm)
            for width, coarser in pairwise(widths[: len(strides)])
        )
        self.extra = _extra_levels(in_channels, config, slope)

    def forward(self, features: Mapping[int, Tensor], first: int = 0) -> list[Tensor]:
        """Map features of the backbone by stride to (B, C_l, H_l, W_l) features of every level, finest first.

        Levels before the one of index `first` are not computed.
        """
        strides = [level.stride for level in self.config.levels if level.stride in features]
        laterals = [conv(features[stride]) for conv, stride in list(zip(self.lateral, strides, strict=True))[first:]]
        levels = [laterals[-1]]
        steps = zip(laterals, self.merge[first:], self.project[first:], strict=False)
        coarser = laterals[-1]
        for lateral, merge, project in reversed(list(steps)):
            merged = merge(lateral + _upsample(project(coarser), lateral, self.config.upsampling))
            levels.insert(0, merged)
            coarser = lateral if self.config.fpn == "lateral" else merged
        return levels + _apply_extra(self.extra, features)


class OutputFPN(nn.Module):
    """Feature pyramid of arXiv:1612.03144, as in mmdetection and vedadet.

    Lateral features are added from the coarsest to the finest level, and each sum has a 3x3 output convolution. All
    convolutions have normalisation and none has an activation.
    """

    def __init__(self, in_channels: Mapping[int, int], config: ModelConfig) -> None:
        """See `MergedFPN`."""
        super().__init__()
        self.config = config
        strides = [level.stride for level in config.levels if level.stride in in_channels]
        width, norm = config.fpn_channels, config.norm
        self.lateral = nn.ModuleList(conv_block(in_channels[stride], width, 1, None, norm=norm) for stride in strides)
        self.output = nn.ModuleList(conv_block(width, width, 3, None, norm=norm) for _ in strides)
        self.extra = _extra_levels(in_channels, config, None)

    def forward(self, features: Mapping[int, Tensor], first: int = 0) -> list[Tensor]:
        """See `MergedFPN.forward`."""
        strides = [level.stride for level in self.config.levels if level.stride in features]
        sums = [conv(features[stride]) for conv, stride in list(zip(self.lateral, strides, strict=True))[first:]]
        for index in range(len(sums) - 1, 0, -1):
            sums[index - 1] = sums[index - 1] + _upsample(sums[index], sums[index - 1], self.config.upsampling)
        levels = [conv(feature) for conv, feature in zip(self.output[first:], sums, strict=True)]
        return levels + _apply_extra(self.extra, features)


def _extra_levels(in_channels: Mapping[int, int], config: ModelConfig, slope: float | None) -> nn.ModuleList:
    """Stride-2 convolutions for the levels that are coarser than the backbone; the first takes its last feature."""
    count = sum(level.stride not in in_channels for level in config.levels)
    widths = [in_channels[max(in_channels)], *([config.fpn_channels] * count)]
    return nn.ModuleList(conv_block(before, after, 3, slope, 2, norm=config.norm) for before, after in pairwise(widths))


def _apply_extra(extra: nn.ModuleList, features: Mapping[int, Tensor]) -> list[Tensor]:
    levels, feature = [], features[max(features)]
    for conv in extra:
        feature = conv(feature)
        levels.append(feature)
    return levels


def _upsample(feature: Tensor, like: Tensor, mode: str) -> Tensor:
    """Upsample a feature to the height and width of another."""
    return F.interpolate(feature, size=like.shape[-2:], mode=mode)


class ContextModule(nn.Module):
    """Context module of SSH (arXiv:1708.03979), "CHM" in the original: receptive fields of 3, 5 and 7 side by side."""

    def __init__(self, channels: int, config: ModelConfig) -> None:
        super().__init__()
        half, quarter, slope = channels // 2, channels // 4, config.activation_slope
        norm, deformable = config.norm, config.deformable_context
        self.conv3x3 = conv_block(channels, half, 3, None, norm=norm, deformable=deformable)
        self.conv5x5_1 = conv_block(channels, quarter, 3, slope, norm=norm, deformable=deformable)
        self.conv5x5_2 = conv_block(quarter, quarter, 3, None, norm=norm, deformable=deformable)
        self.conv7x7_2 = conv_block(quarter, quarter, 3, slope, norm=norm, deformable=deformable)
        self.conv7x7_3 = conv_block(quarter, quarter, 3, None, norm=norm, deformable=deformable)

    def forward(self, feature: Tensor) -> Tensor:
        """Map (B, channels, H, W) to the same shape."""
        shared = self.conv5x5_1(feature)
        branches = [self.conv3x3(feature), self.conv5x5_2(shared), self.conv7x7_3(self.conv7x7_2(shared))]
        return F.relu(torch.cat(branches, dim=1))
