"""Building blocks between backbone and heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution with "same" padding and batch normalisation, without activation."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def conv_bn_act(
    in_channels: int, out_channels: int, kernel_size: int, slope: float, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """`conv_bn` followed by LeakyReLU; a slope of 0 makes it ReLU."""
    block = conv_bn(in_channels, out_channels, kernel_size, stride, groups)
    return block.append(nn.LeakyReLU(slope, inplace=True))


class FPN(nn.Module):
    """Feature pyramid (arXiv:1612.03144) of exactly the levels given, finest first.

    The coarsest level is its lateral projection; every finer one is merged with the level above by a 3x3 convolution.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, slope: float) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(conv_bn_act(channels, out_channels, 1, slope) for channels in in_channels)
        self.merge = nn.ModuleList(conv_bn_act(out_channels, out_channels, 3, slope) for _ in in_channels[1:])

    def forward(self, features: Sequence[Tensor], first: int = 0) -> list[Tensor]:
        """L tensors (B, C_l, H_l, W_l), finest first, to (B, out_channels, H_l, W_l) of the levels from `first` on."""
        laterals = [project(feature) for project, feature in zip(self.lateral[first:], features[first:], strict=True)]
        pyramid = [laterals[-1]]
        for lateral, merge in zip(reversed(laterals[:-1]), reversed(self.merge[first:]), strict=True):
            upsampled = F.interpolate(pyramid[0], size=lateral.shape[-2:], mode="nearest")
            pyramid.insert(0, merge(lateral + upsampled))
        return pyramid


class ContextModule(nn.Module):
    """Context module of SSH (arXiv:1708.03979), "CHM" in the original: receptive fields of 3, 5 and 7 side by side."""

    def __init__(self, channels: int, slope: float) -> None:
        super().__init__()
        half, quarter = channels // 2, channels // 4
        self.conv3x3 = conv_bn(channels, half, 3)
        self.conv5x5_1 = conv_bn_act(channels, quarter, 3, slope)
        self.conv5x5_2 = conv_bn(quarter, quarter, 3)
        self.conv7x7_2 = conv_bn_act(quarter, quarter, 3, slope)
        self.conv7x7_3 = conv_bn(quarter, quarter, 3)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, channels, H, W) to the same shape."""
        shared = self.conv5x5_1(feature)
        branches = [self.conv3x3(feature), self.conv5x5_2(shared), self.conv7x7_3(self.conv7x7_2(shared))]
        return F.relu(torch.cat(branches, dim=1))
