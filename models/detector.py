"""The detector as a whole: weights, model and post-processing behind one call."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from config import DEFAULT_EXPERIMENT, EXPERIMENTS, ComputeOptions, PostprocessConfig
from layers.postprocess import postprocess
from models.backend import Backend, build_backend
from models.checkpoint import load_checkpoint, locate_checkpoint
from models.initialise import load_model
from models.retinaface import RetinaFace
from utils.runtime.images import ImageLike, as_bgr_uint8
from utils.runtime.pixels import limited_size, resize_to_limit
from utils.runtime.threads import map_in_order
from utils.structures import Detections

# The default for callers in Python: it starts at once and writes no files.
_TORCH = ComputeOptions(backend="torch")


@functools.cache
def _limit_threads_after_fork() -> None:
    """Make processes that are forked from this one compute on a single thread.

    The threads of the parent do not exist in them, and PyTorch and OpenCV would wait for these threads forever. ONNX
    Runtime and CUDA cannot be used after a fork at all.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))
        os.register_at_fork(after_in_child=functools.partial(cv2.setNumThreads, 0))


def _check_are_several(images: object) -> None:
    """Raise a TypeError for one image, of which the rows would be taken for images."""
    if isinstance(images, (str, os.PathLike, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim < 4):
        raise TypeError("expected several images, such as a list of them, got one; call detect for one image")


class FaceDetector:
    """Detects faces in images held in memory.

    >>> detector = FaceDetector.from_experiment()
    >>> detections = detector.detect(cv2.imread("people.jpg"))
    >>> detections.boxes, detections.scores, detections.landmarks
    """

    def __init__(self, model: RetinaFace, config: PostprocessConfig, compute: ComputeOptions = _TORCH) -> None:
        """Prepare a model for inference.

        Args:
            model: a detector on the target device; switched to evaluation mode. Later changes of its weights have no
                effect.
            config: thresholds of the post-processing.
            compute: backend, and size to which larger images are reduced.

        Raises:
            ConfigError: the backend is unavailable.
        """
        _limit_threads_after_fork()
        self.model = model.eval().to(memory_format=torch.channels_last)
        self.config = config
        self.max_pixels = compute.max_pixels
        self.backend: Backend = build_backend(self.model, compute)

    @classmethod
    def from_experiment(
        cls,
        name: str = DEFAULT_EXPERIMENT,
        model_weight: str = "ckpt-best.pth",
        device: torch.device | str = "cpu",
        experiments: Path = EXPERIMENTS,
        compute: ComputeOptions = _TORCH,
        **options: Any,
    ) -> FaceDetector:
        """The detector of `experiments/<name>/`; see `from_checkpoint`."""
        return cls.from_checkpoint(locate_checkpoint(experiments, name, model_weight), device, compute, **options)

    @classmethod
    def from_checkpoint(
        cls,
        path: Path | str,
        device: torch.device | str = "cpu",
        compute: ComputeOptions = _TORCH,
        max_pixels: int | None = None,
        **thresholds: Any,
    ) -> FaceDetector:
        """The detector of any supported checkpoint file: ours, the original's or biubug6's.

        Args:
            path: the file.
            device: device on which the model runs.
            compute: backend, and size to which larger images are reduced.
            max_pixels: number of pixels that replaces that size; 0 means no limit.
            thresholds: fields of `PostprocessConfig` that replace those of the checkpoint, such as
                `confidence_threshold=0.3`.

        Raises:
            CheckpointError: the file does not exist, cannot be read or is of an unknown kind.
            ConfigError: the backend is unavailable.
        """
        checkpoint = load_checkpoint(Path(path))
        config = dataclasses.replace(checkpoint.configuration.inference, **thresholds)
        if max_pixels is not None:
            compute = dataclasses.replace(compute, max_pixels=max_pixels)
        return cls(load_model(checkpoint).to(device), config, compute)

    @property
    def num_workers(self) -> int:
        """Recommended number of threads that call `detect_batch` at the same time, each on its own `for_worker`."""
        return self.backend.num_workers

    def size_seen(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """Height and width in which the model sees an image of this height and width."""
        return limited_size(size_hw, self.max_pixels)

    def for_worker(self) -> FaceDetector:
        """The same detector with the same weights for one of `num_workers` threads."""
        worker = copy.copy(self)
        worker.backend = self.backend.for_worker()
        return worker

    def detect(self, image: ImageLike) -> Detections:
        """Detect the faces of one image.

        Args:
            image: (H, W, 3) uint8 BGR, as OpenCV reads it, of any size, or anything else that `as_bgr_uint8` takes.

        Returns:
            `Detections` in pixels of the image, on the CPU.

        Raises:
            TypeError, ValueError: the argument is not an image.
        """
        return self.detect_batch([image])[0]

    def detect_many(self, images: Iterable[ImageLike], workers: int | None = None) -> Iterator[Detections]:
        """Detect the faces of a stream of images of any sizes, in its order, in several threads.

        Only a few images more than there are threads are read from the stream ahead of the results.

        Args:
            images: images of the types that `detect` accepts.
            workers: number of threads; None means `num_workers`.
        """
        _check_are_several(images)
        workers = workers or self.num_workers
        detector = self.for_worker() if workers > 1 else self
        return map_in_order(detector.detect, images, workers)

    def detect_batch(self, images: Sequence[ImageLike]) -> list[Detections]:
        """Detect the faces of images that the model sees in the same size in one forward pass; see `detect`."""
        _check_are_several(images)
        pixels = [as_bgr_uint8(image) for image in images]
        if len({self.size_seen((each.shape[0], each.shape[1])) for each in pixels}) > 1:
            sizes = ", ".join(f"{each.shape[1]}x{each.shape[0]}" for each in pixels)
            raise ValueError(f"expected images of the same size, got {sizes}; call detect for each")
        # Cloned outside of inference mode, so that callers may write to the results.
        return [found.clone() for found in self._detect(pixels)] if pixels else []

    @torch.inference_mode()
    def _detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        batch = self._to_device([resize_to_limit(image, self.max_pixels) for image in images])
        seen_hw = (batch.shape[1], batch.shape[2])
        found = postprocess(self.backend(batch), seen_hw, self.model.model_config, self.config)
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        return [self._enlarged(each, seen_hw, size_hw) for each, size_hw in zip(found, sizes, strict=True)]

    def _enlarged(self, found: Detections, seen_hw: tuple[int, int], size_hw: tuple[int, int]) -> Detections:
        """Detections in pixels of the image, from those in pixels of what the model has seen of it."""
        if seen_hw == size_hw:
            return found
        found = found.scaled(size_hw[1] / seen_hw[1], size_hw[0] / seen_hw[0])
        return found.clipped(size_hw) if self.config.clip_boxes else found

    def _to_device(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """Copy images of the same size into a (B, H, W, 3) tensor on the device of the model."""
        stacked = torch.from_numpy(np.ascontiguousarray(images[0])[None] if len(images) == 1 else np.stack(images))
        if self.model.device.type != "cuda":
            return stacked.to(self.model.device)
        # From page-locked memory the copy runs while this thread launches the model.
        return stacked.pin_memory().to(self.model.device, non_blocking=True)
