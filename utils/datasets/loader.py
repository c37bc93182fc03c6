"""The data loader of training."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any

import cv2
from torch.utils.data import DataLoader

from config import ExperimentConfig
from utils.datasets.face_dataset import FaceDataset, collate
from utils.datasets.labels import LabelledImage
from utils.datasets.sampler import EpochSampler


def build_loader(
    images: Sequence[LabelledImage], config: ExperimentConfig, sampler: EpochSampler, pin_memory: bool
) -> DataLoader[Any]:
    """Batches of this process's share of the augmented crops, in the order of the sampler."""
    return DataLoader(
        FaceDataset(images, config.data, fill=config.model.pixel_mean),
        batch_size=sampler.batch_size,
        sampler=sampler,
        num_workers=config.data.num_workers,
        persistent_workers=config.data.num_workers > 0,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_prepare_worker,
    )


def _prepare_worker(_worker: int) -> None:
    """Disable OpenCV's threads, because workers run in parallel already, and leave Ctrl-C to the main process."""
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
