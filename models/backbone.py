"""Feature extractors: modules that return features of strides 4, 8, 16 and 32."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import cast

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from config import ModelConfig
from models.net import DeformableConv, conv_block, norm_layer


class MobileNetV1Stages(nn.Module):
    """The convolutions of MobileNetV1 (arXiv:1704.04861) at a quarter of its width.

    The stages have 64, 128 and 256 channels and 8, 16 and 32 times the stride of the image where the first convolution
    has a stride of 2, and half of that where it has a stride of 1.
    """

    def __init__(self, slope: float, first_stride: int) -> None:
        super().__init__()
        separable = partial(_depthwise_separable, slope=slope)
        self.stage1 = nn.Sequential(
            conv_block(3, 8, 3, slope, stride=first_stride),
            separable(8, 16),
            separable(16, 32, stride=2),
            separable(32, 32),
            separable(32, 64, stride=2),
            separable(64, 64),
        )
        self.stage2 = nn.Sequential(separable(64, 128, stride=2), *(separable(128, 128) for _ in range(5)))
        self.stage3 = nn.Sequential(separable(128, 256, stride=2), separable(256, 256))

    def features(self, images: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) images to features of 32, 64, 128 and 256 channels."""
        early = self.stage1[:4](images)
        first = self.stage1[4:](early)
        second = self.stage2(first)
        return [early, first, second, self.stage3(second)]


class MobileNetV1(MobileNetV1Stages):
    """MobileNetV1 with features of strides 4 to 32.

    With `ModelConfig.two_resolutions` a second MobileNet of half the strides runs beside it, for small faces. Its
    features of strides 8 and 16 are concatenated with those of the first one, and its features of stride 4, which
    are three times as deep as those of the first one, replace them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.activation_slope, first_stride=2)
        self.channels: Mapping[int, int] = {4: 32, 8: 64, 16: 128, 32: 256}
        self.fine: MobileNetV1Stages | None = None
        if config.two_resolutions:
            self.fine = MobileNetV1Stages(config.activation_slope, first_stride=1)
            self.channels = {4: 64, 8: 64 + 128, 16: 128 + 256, 32: 256}

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Map (B, 3, H, W) images to features by stride."""
        features = self.features(images)
        if self.fine is not None:
            _, *fine = self.fine.features(images)
            coarse = features[1:]
            shared = [torch.cat(pair, dim=1) for pair in zip(coarse[:-1], fine[1:], strict=True)]
            features = [fine[0], *shared, coarse[-1]]
        return dict(zip(self.channels, features, strict=True))


def _depthwise_separable(in_channels: int, out_channels: int, slope: float, stride: int = 1) -> nn.Sequential:
    depthwise = conv_block(in_channels, in_channels, 3, slope, stride, groups=in_channels)
    return depthwise.extend(conv_block(in_channels, out_channels, 1, slope))


class ResNet(nn.Module):
    """torchvision's ResNet without its classifier, with group normalisation and deformable convolutions if configured.

    Deformable convolutions replace the 3x3 convolutions of `layer3` and `layer4`, as in TinaFace.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        resnet = cast(
            torchvision.models.ResNet,
            torchvision.models.get_model(
                config.backbone,
                weights=None,
                norm_layer=norm_layer(config.norm),
                zero_init_residual=config.norm == "group",
            ),
        )
        widest = resnet.fc.in_features
        self.channels: Mapping[int, int] = {4: widest // 8, 8: widest // 4, 16: widest // 2, 32: widest}
        self.conv1, self.bn1, self.relu, self.maxpool = resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool
        self.layer1, self.layer2 = resnet.layer1, resnet.layer2
        self.layer3, self.layer4 = resnet.layer3, resnet.layer4
        if config.deformable_backbone:
            for block in (*self.layer3, *self.layer4):
                assert isinstance(block, Bottleneck), "deformable convolutions need a ResNet with bottlenecks"
                conv = block.conv2
                block.conv2 = cast(nn.Conv2d, DeformableConv(conv.in_channels, conv.out_channels, 3, conv.stride[0]))

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Map (B, 3, H, W) images to features by stride."""
        feature = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = {}
        for stride, layer in zip(self.channels, (self.layer1, self.layer2, self.layer3, self.layer4), strict=True):
            feature = layer(feature)
            features[stride] = feature
        return features


def build_backbone(config: ModelConfig) -> MobileNetV1 | ResNet:
    """Build the randomly initialised backbone of a configuration."""
    return MobileNetV1(config) if config.backbone == "mobilenet0.25" else ResNet(config)
