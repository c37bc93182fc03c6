"""Feature extractors: modules that return features of strides 4, 8, 16 and 32."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import cast

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from config import ModelConfig
from models.net import DeformableConv, conv_norm_act, norm_layer


class MobileNetV1(nn.Module):
    """MobileNetV1 (arXiv:1704.04861) at a quarter of its width.

    Residual blocks can be added behind its features of every stride. They start as the identity, so that published
    weights of the narrow network are a start for a deeper one.
    """

    channels: Mapping[int, int] = {4: 32, 8: 64, 16: 128, 32: 256}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        slope = config.activation_slope
        separable = partial(_depthwise_separable, slope=slope)
        self.stage1 = nn.Sequential(
            conv_norm_act(3, 8, 3, slope, stride=2),
            separable(8, 16),
            separable(16, 32, stride=2),
            separable(32, 32),
            separable(32, 64, stride=2),
            separable(64, 64),
        )
        self.stage2 = nn.Sequential(separable(64, 128, stride=2), *(separable(128, 128) for _ in range(5)))
        self.stage3 = nn.Sequential(separable(128, 256, stride=2), separable(256, 256))
        counts = config.extra_blocks or (0,) * len(self.channels)
        self.extra = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(width, slope) for _ in range(count)))
            for width, count in zip(self.channels.values(), counts, strict=True)
        )

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """(B, 3, H, W) to the features by stride."""
        # The first stage has the features of strides 4 and 8.
        stages = (self.stage1[:4], self.stage1[4:], self.stage2, self.stage3)
        features, feature = {}, images
        for stride, stage, extra in zip(self.channels, stages, self.extra, strict=True):
            feature = extra(stage(feature))
            features[stride] = feature
        return features


class ResidualBlock(nn.Module):
    """A depthwise separable convolution that is added to its input, and is zero at first."""

    def __init__(self, channels: int, slope: float) -> None:
        super().__init__()
        self.block = _depthwise_separable(channels, channels, slope)[:-1]
        nn.init.zeros_(cast(nn.BatchNorm2d, self.block[-1]).weight)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, channels, H, W) to the same shape."""
        return feature + self.block(feature)


def _depthwise_separable(in_channels: int, out_channels: int, slope: float, stride: int = 1) -> nn.Sequential:
    depthwise = conv_norm_act(in_channels, in_channels, 3, slope, stride, groups=in_channels)
    return depthwise.extend(conv_norm_act(in_channels, out_channels, 1, slope))


class ResNet(nn.Module):
    """torchvision's ResNet without its classifier, with group normalisation and deformable convolutions if asked for.

    Deformable convolutions replace the 3x3 convolutions of `layer3` and `layer4`, as in TinaFace.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        network = cast(
            torchvision.models.ResNet,
            torchvision.models.get_model(
                config.backbone,
                weights=None,
                norm_layer=norm_layer(config.norm),
                zero_init_residual=config.norm == "group",
            ),
        )
        widest = network.fc.in_features
        self.channels: Mapping[int, int] = {4: widest // 8, 8: widest // 4, 16: widest // 2, 32: widest}
        self.conv1, self.bn1, self.relu, self.maxpool = network.conv1, network.bn1, network.relu, network.maxpool
        self.layer1, self.layer2 = network.layer1, network.layer2
        self.layer3, self.layer4 = network.layer3, network.layer4
        if config.deformable_backbone:
            for block in (*self.layer3, *self.layer4):
                _make_deformable(block)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """(B, 3, H, W) to the features by stride."""
        feature = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = {}
        for stride, layer in zip(self.channels, (self.layer1, self.layer2, self.layer3, self.layer4), strict=True):
            feature = layer(feature)
            features[stride] = feature
        return features


def _make_deformable(block: nn.Module) -> None:
    """Replace the 3x3 convolution of a bottleneck block."""
    assert isinstance(block, Bottleneck), "deformable convolutions need a ResNet with bottlenecks"
    conv = block.conv2
    block.conv2 = cast(nn.Conv2d, DeformableConv(conv.in_channels, conv.out_channels, 3, conv.stride[0]))


def build_backbone(config: ModelConfig) -> MobileNetV1 | ResNet:
    """The randomly initialised backbone of a configuration."""
    return MobileNetV1(config) if config.backbone == "mobilenet0.25" else ResNet(config)
