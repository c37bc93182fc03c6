"""Tests of what training derives from its data and devices, such as the validation interval, and of its messages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from config import TrainConfig
from engine.optimisation import choose_amp_dtype
from engine.training_state import (
    TrainingData,
    describe_duration,
    describe_loss_shares,
    must_sync_batch_norm,
    usual_eval_every,
)
from utils.datasets.labels import LabelledImage
from utils.evaluation.ground_truth import EvaluationSet
from utils.evaluation.wider_eval import GroundTruth
from utils.runtime.distributed import SINGLE_PROCESS, DistributedContext
from utils.structures import Faces

NO_FACES = Faces(np.zeros((0, 4), np.float32), np.zeros((0, 5, 2), np.float32), np.zeros(0, bool), np.zeros(0, bool))
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
EIGHT_PROCESSES = DistributedContext(0, 8)


def data_of(training: int, validation: int) -> TrainingData:
    images = [LabelledImage(Path("a.jpg"), NO_FACES)] * training
    truths = [GroundTruth(f"{number}", np.zeros((0, 4)), {"all": np.zeros(0, bool)}) for number in range(validation)]
    return TrainingData(
        images, validation=EvaluationSet(truths, None, Path("val"), official=False) if validation else None
    )


@pytest.mark.parametrize(
    ("training", "validation", "im_size", "expected"),
    [
        (12_880, 3_226, 640, 2),  # WIDER FACE: a validation takes a sixth of an epoch's time
        (12_880, 3_226, 320, 7),
        (12_880, 0, 640, 1),
        (100, 3_226, 640, 211),
        (100_000, 10, 640, 1),
    ],
)
def test_validation_takes_about_a_tenth_of_the_time(
    training: int, validation: int, im_size: int, expected: int
) -> None:
    assert usual_eval_every(data_of(training, validation), im_size) == expected


@pytest.mark.parametrize(
    ("train", "device", "context", "expected"),
    [
        (TrainConfig(), CUDA, EIGHT_PROCESSES, True),
        (TrainConfig(sync_bn=False), CUDA, EIGHT_PROCESSES, False),
        (TrainConfig(freeze_bn=True), CUDA, EIGHT_PROCESSES, False),
        (TrainConfig(sync_bn=True), CUDA, EIGHT_PROCESSES, True),
        (TrainConfig(), CUDA, SINGLE_PROCESS, False),
        (TrainConfig(), CPU, EIGHT_PROCESSES, False),
    ],
)
def test_normalisation_is_synchronised_over_several_devices(
    train: TrainConfig, device: torch.device, context: DistributedContext, expected: bool
) -> None:
    assert must_sync_batch_norm(train, device, context) is expected


@pytest.mark.parametrize(("has_bfloat16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_mixed_precision_uses_bfloat16_if_available(
    has_bfloat16: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bfloat16)
    assert choose_amp_dtype(TrainConfig(amp=True), CUDA) == expected
    assert choose_amp_dtype(TrainConfig(), CUDA) is None


def test_loss_is_described_by_the_shares_of_its_terms() -> None:
    metrics = {"loss": 4.0, "stage1/class": 1.0, "stage1/box": 2.6, "stage1/landmark": 0.4, "learning_rate": 0.01}
    assert describe_loss_shares(metrics) == (
        "shares of the loss: stage1/class 25%, stage1/box 65%, stage1/landmark 10%"
    )


def test_duration_of_a_run_is_described() -> None:
    line = describe_duration(8_000_000, 0.432)
    assert line == (
        "the remaining 8000000 steps take about 40 days, 0:00:00, without validation (--epochs sets their number)"
    )
