"""Optimiser, learning rate and averaging, built from the configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from config import TrainConfig

Tensors = tuple[Tensor, ...] | list[Tensor]

_WARMUP_START = 0.01  # relative to the peak learning rate


def build_optimizer(model: nn.Module, config: TrainConfig, new_parameters: Sequence[str]) -> Optimizer:
    """Build SGD or AdamW, with separate learning rates for the backbone and for `new_parameters`."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        factor = config.backbone_rate_factor if name.startswith("backbone.") else 1.0
        factor *= config.new_rate_factor if name in new_parameters else 1.0
        groups.setdefault(factor, []).append(parameter)
    options = [
        {"params": parameters, "lr": config.learning_rate * factor} for factor, parameters in sorted(groups.items())
    ]
    if config.optimizer == "adamw":
        return AdamW(options, weight_decay=config.weight_decay)
    return SGD(options, momentum=config.momentum, weight_decay=config.weight_decay)


def build_average(model: nn.Module, decay: float) -> AveragedModel | None:
    """An exponential moving average of the weights and of batch normalisation's statistics; None for a decay of 0.

    After n steps the decay is at most (1 + n) / (10 + n), so that the initial weights do not dominate the average of a
    short run.
    """
    if decay == 0:
        return None

    @torch.no_grad()
    def average(averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
        steps = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(averaged, current, count)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


def build_scheduler(optimizer: Optimizer, config: TrainConfig, steps_per_epoch: int, steps_done: int = 0) -> LambdaLR:
    """Linear warm-up, then step decay, a cosine or a cosine with restarts; the schedule advances once per step.

    The rate depends only on the number of the step, so a run that is continued with more epochs or another peak rate
    follows the new schedule from there on.
    """
    return LambdaLR(optimizer, rate_factor(config, steps_per_epoch), last_epoch=steps_done - 1)


def rate_factor(config: TrainConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate relative to its peak as a function of the step, counted from 0."""
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total - 1)
    milestones = config.milestones or (round(0.7 * config.epochs), round(0.9 * config.epochs))
    period = config.restart_epochs * steps_per_epoch

    def fall(step: int) -> float:
        if config.schedule == "multistep":
            return float(0.1 ** sum(step >= epoch * steps_per_epoch for epoch in milestones))
        done = (step - warmup) / (total - warmup) if config.schedule == "cosine" else (step - warmup) % period / period
        cosine = (1 + math.cos(math.pi * min(1.0, done))) / 2
        return config.min_rate_factor + (1 - config.min_rate_factor) * cosine

    def factor(step: int) -> float:
        if step < warmup:
            return _WARMUP_START + (1 - _WARMUP_START) * step / warmup
        return fall(step)

    return factor


def freeze_batch_norm(model: nn.Module, new_parameters: Sequence[str] = ()) -> None:
    """Make batch normalisation use its running statistics unchanged; scale and shift are still trained.

    Layers whose scale is among `new_parameters` have no statistics yet, so they keep updating them.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.weight" not in new_parameters:
            module.eval()
