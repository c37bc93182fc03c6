"""The detector as a whole: weights, network and post-processing behind one call."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from config import (
    DEFAULT_EXPERIMENT,
    EVALUATION_MEMORY,
    EXPERIMENTS,
    DetectionConfig,
    ExperimentConfig,
    Flags,
    MemoryOptions,
    RunOptions,
    SpeedOptions,
    WeightOptions,
)
from layers.postprocess import postprocess
from models.backend import Backend, TorchBackend, build_backend
from models.checkpoint import Checkpoint, CheckpointError, State, load_checkpoint, locate_checkpoint
from models.retinaface import RetinaFace
from utils.runtime.images import reduced
from utils.structures import Detections

# For callers in Python: starts at once, and writes nothing.
_FUSED = SpeedOptions(backend="torch")


class FaceDetector:
    """Finds faces in images held in memory.

    >>> detector = FaceDetector.from_experiment()
    >>> detections = detector.detect(cv2.imread("people.jpg"))
    >>> detections.boxes, detections.scores, detections.landmarks
    """

    def __init__(
        self,
        network: RetinaFace,
        detection: DetectionConfig,
        speed: SpeedOptions | None = None,
        max_pixels: int = MemoryOptions.max_pixels,
    ) -> None:
        """Take a network on its device; it is put into evaluation mode.

        Args:
            speed: how a network that learns no more is computed; None computes the network itself, as it is then.
            max_pixels: the network sees larger images reduced to so many; 0 is no limit.

        Raises:
            ConfigError: the backend that was asked for cannot be had.
        """
        self.network = network.eval().to(memory_format=torch.channels_last)
        self.detection = detection
        self.max_pixels = max_pixels
        self.backend: Backend = TorchBackend(self.network) if speed is None else build_backend(self.network, speed)

    @classmethod
    def from_experiment(
        cls,
        name: str = DEFAULT_EXPERIMENT,
        model_weight: str = "ckpt-best.pth",
        device: torch.device | str = "cpu",
        experiments: Path = EXPERIMENTS,
        speed: SpeedOptions = _FUSED,
        **detection: Any,
    ) -> FaceDetector:
        """The detector of `experiments/<name>/`; keywords such as `confidence_threshold=0.3` replace its thresholds.

        Raises:
            CheckpointError: there is no such experiment or checkpoint, or it cannot be read.
            ConfigError: the backend that `speed` asks for cannot be had.
        """
        return cls.from_checkpoint(locate_checkpoint(experiments, name, model_weight), device, speed, **detection)

    @classmethod
    def from_checkpoint(
        cls,
        path: Path | str,
        device: torch.device | str = "cpu",
        speed: SpeedOptions = _FUSED,
        **detection: Any,
    ) -> FaceDetector:
        """The detector of any supported checkpoint file: ours, the original's or biubug6's.

        Raises:
            CheckpointError: the file cannot be read or is of no kind that is known here.
            ConfigError: the backend that `speed` asks for cannot be had.
        """
        checkpoint = load_checkpoint(Path(path), Flags({}))
        thresholds = (checkpoint.experiment or ExperimentConfig()).inference
        return cls(build_network(checkpoint).to(device), dataclasses.replace(thresholds, **detection), speed)

    @property
    def lanes(self) -> int:
        """Threads that should call `detect_batch` at once, each with what `for_lane` gives."""
        return self.backend.lanes

    def pixels_seen(self, size_hw: tuple[int, int]) -> int:
        """That the network sees of an image of a height and width."""
        pixels = size_hw[0] * size_hw[1]
        return min(pixels, self.max_pixels) if self.max_pixels else pixels

    def for_lane(self) -> FaceDetector:
        """The same detector with the same weights, for threads that detect at once; any number may share it."""
        lane = copy.copy(self)
        lane.backend = self.backend.for_lane()
        return lane

    def detect(self, image: np.ndarray) -> Detections:
        """The faces of one image.

        Args:
            image: (H, W, 3) uint8 BGR, as OpenCV reads it, of any size.

        Returns:
            `Detections` in pixels of the image, on the CPU.
        """
        return self.detect_batch([image])[0]

    @torch.inference_mode()
    def detect_batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """The faces of images of one size, in one pass; see `detect`."""
        height, width = images[0].shape[:2]
        shown = self._on_device([reduced(image, self.max_pixels) for image in images])
        size_hw = (shown.shape[1], shown.shape[2])
        found = postprocess(self.backend(shown), size_hw, self.network.config, self.detection)
        if size_hw == (height, width):
            return found
        found = [detections.scaled(width / size_hw[1], height / size_hw[0]) for detections in found]
        return [each.clipped((height, width)) for each in found] if self.detection.clip_boxes else found

    def _on_device(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """Images of one size as a (B, H, W, 3) tensor."""
        device = self.network.pixel_mean.device
        stacked = torch.from_numpy(np.ascontiguousarray(images[0])[None] if len(images) == 1 else np.stack(images))
        # From pinned memory a GPU copies by itself, while this thread hands it the network.
        return stacked.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else stacked.to(device)


def open_detector(
    flags: Flags, device: torch.device, purpose: Literal["inference", "evaluation"], experiments: Path
) -> tuple[FaceDetector, Checkpoint, str]:
    """The detector that a command line asks for.

    Args:
        flags: of `RunOptions`, `WeightOptions`, `ModelConfig`, `DetectionConfig`, `SpeedOptions` and `MemoryOptions`.
        purpose: whose saved thresholds hold where no flag is given.

    Returns:
        The detector, its checkpoint, and the name that outputs bear: the experiment's, or the stem of a checkpoint
        that was given by its path.

    Raises:
        CheckpointError: there is no such checkpoint, it cannot be read, or a flag contradicts it.
        ConfigError: the backend that was asked for cannot be had.
    """
    asked_name = flags.apply(RunOptions()).experiment_name
    path = locate_checkpoint(experiments, asked_name or DEFAULT_EXPERIMENT, flags.apply(WeightOptions()).model_weight)
    checkpoint = load_checkpoint(path, flags)
    thresholds = getattr(checkpoint.experiment or ExperimentConfig(), purpose)
    detector = FaceDetector(
        build_network(checkpoint).to(device),
        flags.apply(thresholds),
        flags.apply(SpeedOptions()),
        flags.apply(EVALUATION_MEMORY if purpose == "evaluation" else MemoryOptions()).max_pixels,
    )
    is_in_experiment = path.parent.parent.parent == experiments
    return detector, checkpoint, asked_name or (path.parent.parent.name if is_in_experiment else path.stem)


def build_network(checkpoint: Checkpoint) -> RetinaFace:
    """The network of a checkpoint with its weights, strictly: every tensor has its place and every place its tensor.

    Raises:
        CheckpointError: names the first tensor that is missing, left over or of another shape.
    """
    network = RetinaFace(checkpoint.model)
    load_strictly(network, checkpoint.state, checkpoint.path)
    return network


def load_strictly(module: nn.Module, state: State, path: Path) -> None:
    """Copy `state` into `module`; see `build_network`."""
    expected = module.state_dict()
    problems = [f"lacks {name}" for name in expected if name not in state]
    problems += [f"has {name}, which the architecture does not" for name in state if name not in expected]
    problems += [
        f"has {name} of shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise CheckpointError(f"{path}: {problems[0]}{more}; the file is damaged or of another architecture")
    module.load_state_dict(state)
