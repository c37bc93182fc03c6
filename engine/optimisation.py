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

_WARMUP_START = 0.01  # of the peak


def build_optimizer(network: nn.Module, config: TrainConfig, new_parameters: Sequence[str]) -> Optimizer:
    """SGD or AdamW with rates of their own for the backbone and for the parameters named `new_parameters`."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        factor = config.backbone_rate_factor if name.startswith("backbone.") else 1.0
        factor *= config.new_rate_factor if name in new_parameters else 1.0
        groups.setdefault(factor, []).append(parameter)
    options = [
        {"params": parameters, "lr": config.learning_rate * factor} for factor, parameters in sorted(groups.items())
    ]
    if config.optimizer == "adamw":
        return AdamW(options, weight_decay=config.weight_decay)
    return SGD(options, momentum=config.momentum, weight_decay=config.weight_decay)


def build_average(network: nn.Module, decay: float) -> AveragedModel | None:
    """An exponential moving average of the weights, and of batch normalisation's statistics; None for a decay of 0.

    The decay is smaller in the first steps, (1 + n) / (10 + n) after n of them, or a short run would end with an
    average in which the untrained weights still weigh.
    """
    if decay == 0:
        return None

    @torch.no_grad()
    def average(averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
        steps = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(averaged, current, count)

    return AveragedModel(network, multi_avg_fn=average, use_buffers=True)


def build_scheduler(optimizer: Optimizer, config: TrainConfig, steps_per_epoch: int, steps_done: int = 0) -> LambdaLR:
    """Linear warm-up, then steps, a cosine, or a cosine that starts again and again; it advances once a step.

    The rate depends on the number of the step alone, so a run that is continued with more epochs or another peak
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


def freeze_batch_norm(network: nn.Module, new_parameters: Sequence[str] = ()) -> None:
    """Let batch normalisation use and keep its running statistics; its scale and shift still learn.

    Where its scale is among `new_parameters` it has no statistics yet, and goes on to gather them.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.weight" not in new_parameters:
            module.eval()
