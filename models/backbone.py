"""Feature extractors: modules that return features of doubling strides from 4 or 8 on, finest first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

import torchvision
from torch import Tensor, nn

from models.net import conv_bn_act, depthwise_separable


class Backbone(Protocol):
    """What the detector needs of a feature extractor."""

    out_channels: tuple[int, ...]

    def __call__(self, images: Tensor) -> list[Tensor]: ...


class MobileNetV1(nn.Module):
    """MobileNetV1 (arXiv:1704.04861) at a quarter of its width, cut after each of its last three strides.

    They are 8, 16 and 32. With a finest stride of 4 the first convolution has a stride of 1, which halves them all.
    """

    out_channels = (64, 128, 256)

    def __init__(self, slope: float, finest_stride: int) -> None:
        super().__init__()
        separable = partial(depthwise_separable, slope=slope)
        self.stage1 = nn.Sequential(
            conv_bn_act(3, 8, 3, slope, stride=finest_stride // 4),
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


class ResNet(nn.Module):
    """torchvision's ResNet without its classifier, cut after `layer2`, `layer3` and `layer4` (strides 8, 16 and 32).

    With a finest stride of 4 also after `layer1`.
    """

    def __init__(self, architecture: str, finest_stride: int) -> None:
        super().__init__()
        network = cast(torchvision.models.ResNet, torchvision.models.get_model(architecture, weights=None))
        widest = network.fc.in_features
        self.out_channels = (widest // 8, widest // 4, widest // 2, widest)[0 if finest_stride == 4 else 1 :]
        self.conv1, self.bn1, self.relu, self.maxpool = network.conv1, network.bn1, network.relu, network.maxpool
        self.layer1, self.layer2 = network.layer1, network.layer2
        self.layer3, self.layer4 = network.layer3, network.layer4

    def forward(self, images: Tensor) -> list[Tensor]:
        stem = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = [self.layer1(stem)]
        for layer in (self.layer2, self.layer3, self.layer4):
            features.append(layer(features[-1]))
        return features[-len(self.out_channels) :]


def _build_resnet(architecture: str, _slope: float, finest_stride: int) -> nn.Module:
    return ResNet(architecture, finest_stride)


_BUILDERS: dict[str, Callable[[float, int], nn.Module]] = {
    "mobilenet0.25": MobileNetV1,
    **{name: partial(_build_resnet, name) for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")},
}


def build_backbone(name: str, slope: float, finest_stride: int = 8) -> nn.Module:
    """A randomly initialised backbone; `slope` is for those with LeakyReLU (a ResNet keeps its ReLU).

    Its features begin at `finest_stride`, 4 or 8, and end at 16 or 32: see the classes.
    """
    return _BUILDERS[name](slope, finest_stride)
