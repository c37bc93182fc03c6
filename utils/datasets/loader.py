"""The data loader of training."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cv2
from torch.utils.data import DataLoader

from config import ExperimentConfig
from utils.datasets.face_dataset import FaceDataset, collate
from utils.datasets.labels import LabelledImage
from utils.datasets.sampler import EpochSampler

_MAX_WORKERS = 16  # more would wait for batches to be consumed
_SECONDS_AFTER_SIGTERM = 30  # after which a worker ends


def build_loader(
    images: Sequence[LabelledImage], config: ExperimentConfig, sampler: EpochSampler, pin_memory: bool
) -> DataLoader[Any]:
    """Build the loader of this process's share of the augmented crops, in the order of the sampler."""
    workers, mean = config.data.num_workers, config.model.pixel_mean
    if workers < 0:
        workers = max(1, min(_MAX_WORKERS, (os.cpu_count() or 2) - 1))
    return DataLoader(
        FaceDataset(images, config.data, fill=mean if config.model.channel_order == "bgr" else mean[::-1]),
        batch_size=sampler.batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_prepare_worker,
    )


@contextmanager
def ended_workers(loader: DataLoader[Any]) -> Iterator[None]:
    """Context manager that ends the worker processes, if there are any, when it is left."""
    try:
        yield
    finally:
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()  # type: ignore[attr-defined]


def _prepare_worker(_worker: int) -> None:
    """Disable OpenCV's threads, because workers run in parallel already, and leave stopping to the main process.

    Terminals and schedulers such as SLURM send Ctrl-C and SIGTERM to every process of a run. After SIGTERM, which
    Python also sends at exit to processes that are left, the main process has some time to save.
    """
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_SECONDS_AFTER_SIGTERM))
