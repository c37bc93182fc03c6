"""ImageNet weights compute in the detector what they compute in torchvision."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from config import ModelConfig
from models.architecture import usual_config
from models.image_pyramid import build_model
from models.initialise import initialise_backbone
from models.retinaface import RetinaFace

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
INPUTS: dict[str, dict[str, Any]] = {
    "biubug6": {},
    "insightface": {"channel_order": "rgb", "pixel_mean": (0.0, 0.0, 0.0)},
    "vedadet": {"channel_order": "rgb", "pixel_mean": (123.675, 116.28, 103.53)},
    "scrfd": {"pixel_mean": (127.5, 127.5, 127.5), "pixel_std": (128.0, 128.0, 128.0)},
}


def trained_resnet(name: str) -> torchvision.models.ResNet:
    """Random weights, and normalisation with statistics as after training."""
    torch.manual_seed(0)
    network: torchvision.models.ResNet = torchvision.models.get_model(name, weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.2)
    return network.eval()


@torch.no_grad()
def torchvision_features(network: torchvision.models.ResNet, images: Tensor) -> list[Tensor]:
    """The features of the four layers, of BGR images from 0 to 255."""
    feature = (images.flip(1) / 255 - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)
    feature = network.maxpool(network.relu(network.bn1(network.conv1(feature))))
    features = []
    for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
        feature = layer(feature)
        features.append(feature)
    return features


def initialised(config: ModelConfig, network: nn.Module, folder: Path) -> RetinaFace:
    """A detector whose backbone starts from a file of the network's weights."""
    torch.save(network.state_dict(), folder / "imagenet.pth")
    model = build_model(config)
    initialise_backbone(model, str(folder / "imagenet.pth"))
    model.eval()
    return model


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_features_equal_those_of_torchvision(name: str, inputs: dict[str, Any], tmp_path: Path) -> None:
    """Away from the border, where the padding has another colour. Deep features see the border from everywhere."""
    network = trained_resnet(name)
    model = initialised(dataclasses.replace(usual_config(name), **inputs), network, tmp_path)
    images = torch.rand(2, 3, 256, 192, generator=torch.Generator().manual_seed(1)) * 255
    expected = torchvision_features(network, images)
    with torch.no_grad():
        found = list(model.backbone(model.normalise(images)).values())
    assert [feature.shape for feature in found] == [feature.shape for feature in expected]
    inside = (..., slice(8, -8), slice(8, -8))
    assert torch.allclose(found[0][inside], expected[0][inside], rtol=1e-3, atol=1e-3)
    assert expected[0][inside].std() > 0.1
    if inputs.get("pixel_mean") == INPUTS["vedadet"]["pixel_mean"]:  # the padding has the same colour
        for own, theirs in zip(found, expected, strict=True):
            assert torch.allclose(own, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_features_without_the_adaptation_differ(tmp_path: Path) -> None:
    """What the test above measures: BGR minus the mean is another input than (RGB - mean) / std."""
    network = trained_resnet("resnet18")
    model = build_model(usual_config("resnet18")).eval()
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}
    model.backbone.load_state_dict(state)
    images = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1)) * 255
    with torch.no_grad():
        found = model.backbone(model.normalise(images))[4]
    expected = torchvision_features(network, images)[0]
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) < 0.9


def test_deformable_convolutions_start_as_the_convolutions_that_they_replace(tmp_path: Path) -> None:
    """Their offsets start at zero. The input needs no adaptation, so the features are torchvision's everywhere."""
    network = trained_resnet("resnet50")
    vedadet = {**INPUTS["vedadet"], "pixel_std": tuple((STD * 255).tolist())}
    config = dataclasses.replace(usual_config("resnet50"), deformable_backbone=True, **vedadet)
    model = initialised(config, network, tmp_path)
    images = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(1)) * 255
    with torch.no_grad():
        found = model.backbone(model.normalise(images)).values()
    for own, theirs in zip(found, torchvision_features(network, images), strict=True):
        assert torch.allclose(own, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_group_normalisation_takes_the_convolutions_and_no_statistics(tmp_path: Path) -> None:
    network = trained_resnet("resnet50")
    config = dataclasses.replace(usual_config("resnet50"), norm="group", deformable_backbone=True)
    model = initialised(config, network, tmp_path)
    own = model.backbone.state_dict()
    assert torch.equal(own["layer3.0.conv2.conv.weight"], network.state_dict()["layer3.0.conv2.weight"])
    assert torch.equal(own["layer1.0.conv1.weight"], network.state_dict()["layer1.0.conv1.weight"])
    assert (own["layer1.0.bn1.weight"] == 1).all()
    assert not own["layer3.0.conv2.offsets.weight"].any()
