"""What a training run learns from, and how far it has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from config import ExperimentConfig
from utils.datasets.labels import LabelledImage
from utils.errors import UserError
from utils.evaluation.ground_truth import EvaluationSet
from utils.runtime.distributed import DistributedContext


class TrainingError(UserError):
    """Training cannot continue."""


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from, and what it is validated on.

    Attributes:
        images: labelled training images.
        weights: relative frequency of each image; None draws each once an epoch.
        validation: decides which checkpoint is the best, or None.
    """

    images: Sequence[LabelledImage]
    weights: Sequence[float] | None = None
    validation: EvaluationSet | None = None


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        epoch: number of completed epochs.
        position: number of images of the current epoch that were learnt from, over all processes.
        sums: of each loss term over the batches of the current epoch.
        best_ap: highest validation AP.
        validations_without_improvement: since the best one.
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
    """Refuse options that the device, the processes or the data do not allow; see `engine.training.Trainer`."""
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
