"""Optimiser, learning rate and averaging, built from the configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from config import TrainConfig

Tensors = tuple[Tensor, ...] | list[Tensor]

_WARMUP_START = 0.01  # relative to the peak learning rate
_BACKBONES = ("backbone.", "upsampled_backbone.")  # beginnings of the names of their parameters


class Optimization:
    """The optimiser, the learning rate schedule, the gradient scaler and the averaged weights, which step together.

    Attributes:
        optimizer: the optimiser.
        scheduler: the schedule of the learning rate.
        averaged: moving average of the weights, or None.
        amp_dtype: the 16-bit type of mixed precision, or None without it.
        scaler: scaler of the gradients, which is enabled for fp16 only.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        new_parameters: Sequence[str],
        steps_per_epoch: int,
        device: torch.device,
    ) -> None:
        """Prepare the first step.

        Args:
            model: model on the target device.
            config: options of training.
            new_parameters: names of the randomly initialised parameters, if the others are pretrained.
            steps_per_epoch: number of steps of the optimiser in an epoch.
            device: device of the model.
        """
        self._model, self._config, self._steps_per_epoch = model, config, steps_per_epoch
        self.optimizer = build_optimizer(model, config, new_parameters)
        self.averaged = build_average(model, config.ema_decay)
        self.amp_dtype = choose_amp_dtype(config, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype == torch.float16)
        self.scheduler = build_scheduler(self.optimizer, config, steps_per_epoch)

    @property
    def learning_rate(self) -> float:
        """The current learning rate of the first group of parameters."""
        return float(self.scheduler.get_last_lr()[0])

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss."""
        self.scaler.scale(loss).backward()

    def clip_gradients(self) -> Tensor:
        """Clip the gradients to the configured norm, and return the norm that they had before."""
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for parameter in self._model.parameters() if parameter.grad is not None]
        return nn.utils.clip_grad_norm_(parameters, self._config.clip_gradient or math.inf)

    def step(self) -> None:
        """Update the weights, their average and the learning rate, and clear the gradients."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self._model)

    def state_dict(self) -> dict[str, Any]:
        """The state to continue from; see `load_state_dict`."""
        return {
            "averaged": {} if self.averaged is None else self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any], steps_done: int) -> None:
        """Continue from a saved state at the given step, with the learning rates of the configuration.

        Raises:
            ValueError: the saved optimiser has other groups of parameters.
        """
        groups = self.optimizer.param_groups
        configured = [{name: group[name] for name in group if name != "params"} for group in groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, options in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(options)
        if self.averaged is not None and saved["averaged"]:
            self.averaged.load_state_dict(saved["averaged"])
        if saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])
        self.scheduler = build_scheduler(self.optimizer, self._config, self._steps_per_epoch, steps_done)


def choose_amp_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """The 16-bit type of mixed precision, or None without it."""
    if not config.amp:
        return None
    return torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported() else torch.float16


def build_optimizer(model: nn.Module, config: TrainConfig, new_parameters: Sequence[str]) -> Optimizer:
    """Build SGD or AdamW, with separate learning rates for the backbones and for `new_parameters`."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        factor = config.backbone_rate_factor if name.startswith(_BACKBONES) else 1.0
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
