"""Tests that ImageNet weights give the same features in the detector as in torchvision."""

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
    """Return a ResNet with random weights and random statistics, as after training."""
    torch.manual_seed(0)
    resnet: torchvision.models.ResNet = torchvision.models.get_model(name, weights=None)
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.2)
    return resnet.eval()


@torch.no_grad()
def torchvision_features(resnet: torchvision.models.ResNet, images: Tensor) -> list[Tensor]:
    """Return the features of the four layers for BGR images from 0 to 255."""
    feature = (images.flip(1) / 255 - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)
    feature = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(feature))))
    features = []
    for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
        feature = layer(feature)
        features.append(feature)
    return features


def initialised(config: ModelConfig, resnet: nn.Module, folder: Path) -> RetinaFace:
    """Return a detector whose backbone is initialised from a file with the weights of a ResNet."""
    torch.save(resnet.state_dict(), folder / "imagenet.pth")
    model = build_model(config)
    initialise_backbone(model, str(folder / "imagenet.pth"))
    model.eval()
    return model


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_features_equal_those_of_torchvision(name: str, inputs: dict[str, Any], tmp_path: Path) -> None:
    """Except at the border, where the padding has another colour; deep features depend on the border everywhere."""
    resnet = trained_resnet(name)
    model = initialised(dataclasses.replace(usual_config(name), **inputs), resnet, tmp_path)
    images = torch.rand(2, 3, 256, 192, generator=torch.Generator().manual_seed(1)) * 255
    expected = torchvision_features(resnet, images)
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
    """Shows that the test above can fail: BGR minus the mean is another input than (RGB - mean) / std."""
    resnet = trained_resnet("resnet18")
    model = build_model(usual_config("resnet18")).eval()
    state = {name: tensor for name, tensor in resnet.state_dict().items() if not name.startswith("fc.")}
    model.backbone.load_state_dict(state)
    images = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1)) * 255
    with torch.no_grad():
        found = model.backbone(model.normalise(images))[4]
    expected = torchvision_features(resnet, images)[0]
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) < 0.9


def test_deformable_convolutions_start_as_plain_convolutions(tmp_path: Path) -> None:
    """Their offsets start at zero. The input needs no adaptation, so all features equal those of torchvision."""
    resnet = trained_resnet("resnet50")
    vedadet = {**INPUTS["vedadet"], "pixel_std": tuple((STD * 255).tolist())}
    config = dataclasses.replace(usual_config("resnet50"), deformable_backbone=True, **vedadet)
    model = initialised(config, resnet, tmp_path)
    images = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(1)) * 255
    with torch.no_grad():
        found = model.backbone(model.normalise(images)).values()
    for own, theirs in zip(found, torchvision_features(resnet, images), strict=True):
        assert torch.allclose(own, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_group_norm_loads_the_convolutions_but_no_statistics(tmp_path: Path) -> None:
    resnet = trained_resnet("resnet50")
    config = dataclasses.replace(usual_config("resnet50"), norm="group", deformable_backbone=True)
    model = initialised(config, resnet, tmp_path)
    own = model.backbone.state_dict()
    assert torch.equal(own["layer3.0.conv2.conv.weight"], resnet.state_dict()["layer3.0.conv2.weight"])
    assert torch.equal(own["layer1.0.conv1.weight"], resnet.state_dict()["layer1.0.conv1.weight"])
    assert (own["layer1.0.bn1.weight"] == 1).all()
    assert not own["layer3.0.conv2.offsets.weight"].any()
