"""Feature extractors: modules that return features of strides 8, 16 and 32, finest first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

import torchvision
from torch import Tensor, nn

from models.net import conv_bn_act


class Backbone(Protocol):
    """What the detector needs of a feature extractor."""

    out_channels: tuple[int, ...]

    def __call__(self, images: Tensor) -> list[Tensor]: ...


class MobileNetV1(nn.Module):
    """MobileNetV1 (arXiv:1704.04861) at a quarter of its width, cut after strides 8, 16 and 32."""

    out_channels = (64, 128, 256)

    def __init__(self, slope: float) -> None:
        super().__init__()
        separable = partial(_depthwise_separable, slope=slope)
        self.stage1 = nn.Sequential(
            conv_bn_act(3, 8, 3, slope, stride=2),
            separable(8, 16),
            separable(16, 32, stride=2),
            separable(32, 32),
            separable(32, 64, stride=2),
            separable(64, 64),
        )
        self.stage2 = nn.Sequential(separable(64, 128, stride=2), *(separable(128, 128) for _ in range(5)))
        self.stage3 = nn.Sequential(separable(128, 256, stride=2), separable(256, 256))

    def forward(self, images: Tensor) -> list[Tensor]:
        features = [self.stage1(images)]
        for stage in (self.stage2, self.stage3):
            features.append(stage(features[-1]))
        return features


def _depthwise_separable(in_channels: int, out_channels: int, slope: float, stride: int = 1) -> nn.Sequential:
    depthwise = conv_bn_act(in_channels, in_channels, 3, slope, stride, groups=in_channels)
    return depthwise.extend(conv_bn_act(in_channels, out_channels, 1, slope))


class ResNet(nn.Module):
    """torchvision's ResNet without its classifier, cut after `layer2`, `layer3` and `layer4`."""

    def __init__(self, architecture: str) -> None:
        super().__init__()
        network = cast(torchvision.models.ResNet, torchvision.models.get_model(architecture, weights=None))
        widest = network.fc.in_features
        self.out_channels = (widest // 4, widest // 2, widest)
        self.conv1, self.bn1, self.relu, self.maxpool = network.conv1, network.bn1, network.relu, network.maxpool
        self.layer1, self.layer2 = network.layer1, network.layer2
        self.layer3, self.layer4 = network.layer3, network.layer4

    def forward(self, images: Tensor) -> list[Tensor]:
        stem = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = [self.layer2(self.layer1(stem))]
        for layer in (self.layer3, self.layer4):
            features.append(layer(features[-1]))
        return features


def _build_resnet(architecture: str, _slope: float) -> nn.Module:
    return ResNet(architecture)


_BUILDERS: dict[str, Callable[[float], nn.Module]] = {
    "mobilenet0.25": MobileNetV1,
    **{name: partial(_build_resnet, name) for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")},
}


def build_backbone(name: str, slope: float) -> nn.Module:
    """A randomly initialised backbone; `slope` is for those with LeakyReLU (a ResNet keeps its ReLU)."""
    return _BUILDERS[name](slope)
