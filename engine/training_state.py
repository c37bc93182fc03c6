"""The data and the progress of a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import Tensor

from config import ExperimentConfig, TrainConfig
from utils.datasets.labels import LabelledImage
from utils.errors import UserError
from utils.evaluation.ground_truth import EvaluationSet
from utils.runtime.distributed import DistributedContext

_VALIDATION_PIXELS = 800_000  # of a WIDER FACE image, on average


class TrainingError(UserError):
    """Training cannot continue."""


@dataclass(frozen=True)
class TrainingData:
    """Training and validation data of a run.

    Attributes:
        images: labelled training images.
        weights: relative frequency of each image; None draws each once an epoch.
        validation: validation set that selects the best checkpoint, or None.
    """

    images: Sequence[LabelledImage]
    weights: Sequence[float] | None = None
    validation: EvaluationSet | None = None


@dataclass
class Progress:
    """Progress of a training run.

    Attributes:
        epoch: number of completed epochs.
        position: number of images of the current epoch that were trained on, over all processes.
        sums: sum of each loss term over the batches of the current epoch, averaged over the processes.
        best_ap: highest validation AP.
        validations_without_improvement: number of validations since the best one.
        unreadable: path of each image that could not be read, and why.
    """

    epoch: int = 0
    position: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    best_ap: float = -1.0
    validations_without_improvement: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        within = f" and {self.position} images of the next" if self.position else ""
        return f"epoch {self.epoch}{within}"


def check_options(
    config: ExperimentConfig, data: TrainingData, device: torch.device, context: DistributedContext
) -> None:
    """Reject options that the device, the processes or the data do not allow; see `engine.training.Trainer`."""
    train, world_size = config.train, context.world_size
    if train.amp and device.type != "cuda":
        raise TrainingError("--amp needs a CUDA device; drop it")
    if train.sync_bn and (device.type != "cuda" or world_size == 1):
        raise TrainingError("--sync_bn needs several processes with a CUDA device each; use torchrun, or drop it")
    if train.batch_size % world_size:
        raise TrainingError(f"--batch_size={train.batch_size} cannot be shared by {world_size} processes evenly")
    if train.best_metric != "mean" and not (data.validation and data.validation.official):
        raise TrainingError(
            f"--best_metric={train.best_metric} needs the official ground truth in val/gt; use mean, or add it"
        )


def must_sync_batch_norm(train: TrainConfig, device: torch.device, context: DistributedContext) -> bool:
    """Whether batch normalisation is synchronised: by default with several CUDA devices, unless it is frozen."""
    is_possible = device.type == "cuda" and context.world_size > 1
    return is_possible and not train.freeze_bn if train.sync_bn is None else train.sync_bn


def usual_eval_every(data: TrainingData, im_size: int) -> int:
    """Number of epochs between validations for which validation takes about a tenth of the time.

    A training step takes about three times as long as detection in as many pixels.
    """
    if data.validation is None:
        return 1
    trained_pixels = 3 * im_size**2 * len(data.images)
    return math.ceil(10 * _VALIDATION_PIXELS * len(data.validation.truths) / trained_pixels)


def describe_loss_shares(metrics: Mapping[str, float]) -> str:
    """The share of every weighted term in the loss, which shows the terms that dominate the gradient."""
    terms = {name: value for name, value in metrics.items() if name.startswith("stage")}
    total = sum(terms.values()) or 1.0
    return "shares of the loss: " + ", ".join(f"{name} {value / total:.0%}" for name, value in terms.items())


def describe_duration(steps: int, seconds_per_step: float) -> str:
    """The time that the remaining steps take at the speed of the first ones."""
    remaining = timedelta(seconds=round(steps * seconds_per_step))
    return f"the remaining {steps} steps take about {remaining}, without validation (--epochs sets their number)"
