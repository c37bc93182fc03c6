"""Fused networks: the same outputs, no batch normalisation, and one memory layout throughout."""

from __future__ import annotations

import copy

import pytest
import torch
from models.fuse import fuse_batch_norm
from torch import Tensor, nn

from models.retinaface import RetinaFace

CASCADES = {"single": (False, "sum"), "sum": (True, "sum"), "rematch": (True, "rematch")}
FINE_LEVELS_OF = {"mobilenet0.25": 2, "resnet18": 0, "resnet50": 0}


def trained_like(backbone: str, cascade: bool = True, refinement: str = "sum") -> RetinaFace:
    """A network whose batch normalisations all do something."""
    generator = torch.Generator().manual_seed(5)
    model = usual_config(
        backbone, cascade=cascade, refinement=refinement, fpn_channels=32, fine_levels=FINE_LEVELS_OF[backbone]
    )
    network = RetinaFace(model).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.0),
                (module.bias, -0.2, 0.2),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 1.5),
            ):
                assert tensor is not None
                tensor.data.uniform_(low, high, generator=generator)
    return network


def images() -> Tensor:
    """Two, not square, of an odd height."""
    return torch.rand(2, 3, 67, 96, generator=torch.Generator().manual_seed(1)) * 255


@torch.inference_mode()
@pytest.mark.parametrize(("cascade", "refinement"), CASCADES.values(), ids=CASCADES.keys())
@pytest.mark.parametrize("backbone", ["mobilenet0.25", "resnet18", "resnet50"])
def test_fused_outputs_equal_those_of_the_network(
    backbone: str, cascade: bool, refinement: str, device: torch.device
) -> None:
    network = trained_like(backbone, cascade, refinement).to(device)
    fused = fuse_batch_norm(network)
    assert not [name for name, module in fused.named_modules() if "BatchNorm" in type(module).__name__]
    for found, expected in zip(fused(images().to(device)), network(images().to(device)), strict=True):
        for name, value in vars(expected).items():
            torch.testing.assert_close(getattr(found, name), value, atol=1e-4, rtol=1e-4)


def test_the_network_itself_is_left_as_it_is() -> None:
    network = trained_like("mobilenet0.25").train()
    before = copy.deepcopy(network.state_dict())
    fused = fuse_batch_norm(network)
    assert network.training
    assert not fused.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


@torch.inference_mode()
@pytest.mark.parametrize("backbone", ["mobilenet0.25", "resnet18"])
def test_nothing_changes_its_memory_layout(backbone: str) -> None:
    """Every convolution reads and writes channels_last, so the heads' predictions are in the priors' order already."""
    fused = fuse_batch_norm(trained_like(backbone))
    laid_out_otherwise: list[torch.Size] = []

    def check(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        laid_out_otherwise.extend(
            tensor.shape for tensor in (*inputs, output) if not tensor.is_contiguous(memory_format=torch.channels_last)
        )

    for module in fused.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(check)
    pictures = torch.zeros(2, 67, 96, 3, dtype=torch.uint8)
    fused(pictures.permute(0, 3, 1, 2))
    assert not laid_out_otherwise
