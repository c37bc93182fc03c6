"""Tests of learning rates, parameter groups, weight averaging and frozen batch normalisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

from config import TrainConfig
from engine.optimisation import (
    build_average,
    build_optimizer,
    build_scheduler,
    freeze_batch_norm,
    rate_factor,
)


def factors(config: TrainConfig, steps_per_epoch: int, steps: list[int]) -> list[float]:
    factor = rate_factor(config, steps_per_epoch)
    return [factor(step) for step in steps]


def test_multistep_schedule_with_linear_warm_up() -> None:
    config = TrainConfig(epochs=10, warmup_epochs=1, milestones=(4, 8))
    assert factors(config, 10, [0, 5, 9, 10, 39, 40, 79, 80, 99]) == pytest.approx(
        [0.01, 0.505, 0.901, 1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def test_milestones_default_to_70_and_90_percent() -> None:
    config = TrainConfig(epochs=100, warmup_epochs=0)
    assert factors(config, 1, [0, 69, 70, 89, 90]) == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_cosine_schedule_decays_to_zero() -> None:
    config = TrainConfig(epochs=5, warmup_epochs=1, schedule="cosine")
    assert factors(config, 10, [10, 20, 30, 40, 50]) == pytest.approx([1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)


def test_cosine_schedule_with_restarts() -> None:
    config = TrainConfig(epochs=9, warmup_epochs=1, schedule="cosine_restarts", restart_epochs=4)
    assert factors(config, 2, [2, 6, 9, 10, 14, 18]) == pytest.approx([1, 0.5, 0.0380602, 1, 0.5, 1])


@pytest.mark.parametrize("schedule", ["multistep", "cosine", "cosine_restarts"])
def test_run_of_one_step_has_a_learning_rate(schedule: str) -> None:
    assert factors(TrainConfig(epochs=1, schedule=schedule), 1, [0]) == pytest.approx([1])


def small_module() -> nn.Module:
    parts = ("backbone", "upsampled_backbone", "head")
    return nn.ModuleDict({name: nn.Linear(2, 2) for name in parts})


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_backbone_and_new_parameters_have_their_own_learning_rates(optimizer: str) -> None:
    module = small_module()
    config = TrainConfig(optimizer=optimizer, learning_rate=0.1, backbone_rate_factor=0.5, new_rate_factor=3)
    built = build_optimizer(module, config, ["head.bias"])
    rates = {id(weights): group["lr"] for group in built.param_groups for weights in group["params"]}
    expected = {"backbone.weight": 0.05, "backbone.bias": 0.05, "head.weight": 0.1, "head.bias": 0.3}
    expected |= {"upsampled_backbone.weight": 0.05, "upsampled_backbone.bias": 0.05}
    assert {name: rates[id(weights)] for name, weights in module.named_parameters()} == pytest.approx(expected)


def test_schedule_can_start_at_any_step() -> None:
    """The learning rate of step 7 is bitwise the same whether the schedule is stepped to it or starts there."""
    config = TrainConfig(epochs=3, warmup_epochs=1, schedule="cosine", learning_rate=0.1)
    stepped = build_optimizer(small_module(), config, [])
    scheduler = build_scheduler(stepped, config, 4)
    for _ in range(7):
        stepped.step()
        scheduler.step()
    resumed = build_optimizer(small_module(), config, [])
    build_scheduler(resumed, config, 4)  # sets the initial rate of every group
    build_scheduler(resumed, config, 4, steps_done=7)
    assert resumed.param_groups[0]["lr"] == stepped.param_groups[0]["lr"]


def test_averaged_weights_follow_the_decay() -> None:
    """The decay is at most 2/11 after one step and 100/109 after 99 steps, and never more than configured."""
    module = nn.Linear(1, 1, bias=False)
    for decay, steps, expected in ((0.1, 1, 0.9), (0.9, 1, 9 / 11), (0.75, 99, 0.25), (0.99, 99, 9 / 109)):
        averaged = build_average(module, decay)
        assert averaged is not None
        nn.init.constant_(module.weight, 0.0)
        for _ in range(steps):
            averaged.update_parameters(module)
        nn.init.constant_(module.weight, 1.0)
        averaged.update_parameters(module)
        (weight,) = averaged.module.parameters()
        assert weight.tolist() == [[pytest.approx(expected)]]
    assert build_average(module, 0) is None


def test_new_batch_norm_is_not_frozen() -> None:
    module = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2)).train()
    freeze_batch_norm(module, ["1.weight", "1.bias"])
    assert [norm.training for norm in module] == [False, True]


def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_scale() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).train()
    freeze_batch_norm(module)
    norm = module[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    before = norm.running_mean.clone()
    optimizer = SGD(module.parameters(), lr=1.0)
    module(torch.rand(2, 1, 3, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(norm.running_mean, before)
    assert not torch.equal(norm.weight, torch.ones(2)) or not torch.equal(norm.bias, torch.zeros(2))
