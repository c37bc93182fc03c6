"""What `inference.py` does: pictures to faces, masks and files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import (
    EXPERIMENTS,
    ROOT,
    ConfigError,
    Flags,
    InferenceOptions,
    RunOptions,
    SpeedOptions,
    to_dict,
)
from engine.stream import BATCH_SIZE, detect_pictures
from models.checkpoint import Checkpoint
from models.detector import FaceDetector, open_detector
from utils.results.masks import Head, HeadSegmenter
from utils.results.writer import ResultWriter
from utils.runtime.cli import choose_device, show_progress
from utils.runtime.distributed import Processes, own_share
from utils.runtime.experiment import user_path
from utils.runtime.manifest import digest_of_file
from utils.runtime.sources import ImageFiles, Picture, Source, open_source
from utils.runtime.threads import Background
from utils.structures import Detections

# Fields of `InferenceOptions` that say where or when something is done, not what.
_NOT_OF_RESULTS = ("inference_dir", "inference_save_folder", "segmenter_model", "max_frames", "resume")

FoundHeads = tuple[Picture, Detections, list[Head] | None]


@dataclass(frozen=True)
class InferenceJob:
    """What a command line asks for, opened.

    Attributes:
        folder: of the results.
        name: that they bear.
        about: all that they depend on.
    """

    options: InferenceOptions
    folder: Path
    detector: FaceDetector
    checkpoint: Checkpoint
    name: str
    source: Source
    segmenter: HeadSegmenter | None
    about: dict[str, Any]

    @classmethod
    def open(cls, flags: Flags, processes: Processes, stack: ExitStack) -> InferenceJob:
        """Open everything that a run needs; `stack` closes it.

        Raises:
            UserError: something is not there, or cannot be had together.
        """
        options = flags.apply(InferenceOptions())
        device = choose_device(flags.apply(RunOptions()).gpu_num)
        detector, checkpoint, name = open_detector(flags, device, "inference", EXPERIMENTS)
        folder = user_path(options.inference_save_folder)
        source = open_source(options.inference_dir, ROOT / "data", exclude=folder, max_frames=options.max_frames)
        if not isinstance(source, ImageFiles):
            _refuse_to_divide(source, options, processes)
        model = user_path(options.segmenter_model) if options.segmenter_model else None
        segmenter = stack.enter_context(HeadSegmenter(model)) if options.mask else None
        about = {
            "experiment": name,
            "checkpoint": checkpoint.path.name,
            "source": source.description,
            "detection": dataclasses.asdict(detector.detection),
            "checkpoint_sha256": digest_of_file(checkpoint.path),
            "model": to_dict(detector.network.config),
            "paths_sha256": source.digest() if isinstance(source, ImageFiles) else None,
            "computed": {
                **dataclasses.asdict(flags.apply(SpeedOptions())),
                "backend": detector.backend.name,
                "device": device.type,
                "max_pixels": detector.max_pixels,
            },
            "options": {key: value for key, value in dataclasses.asdict(options).items() if key not in _NOT_OF_RESULTS},
            "segmenter_sha256": digest_of_file(model) if model else None,
        }
        return cls(options, folder, detector, checkpoint, name, source, segmenter, about)

    def describe(self) -> str:
        """What is detected in, by what and where, in one line."""
        number, device = self.source.total or "unknown", self.detector.network.pixel_mean.device
        detector = f"{self.name} ({self.checkpoint.kind}) on {device}, {self.detector.backend.name}"
        return f"{self.source.description}: {number} images; {detector}"

    def open_writer(self, processes: Processes) -> ResultWriter:
        """Begin writing, or go on with what an interrupted run left; see `ResultWriter`."""
        return ResultWriter(
            self.folder,
            self.name,
            self.about,
            names=self.source.names,
            save_images=self.options.save_img,
            save_masks=self.options.save_mask,
            frames_per_second=self.source.frames_per_second,
            threads=self._threads,
            resume=self.options.resume,
            processes=processes,
        )

    @property
    def _threads(self) -> int | None:
        """That compute, where it is known that the last digits depend on their number."""
        is_cpu = self.detector.network.pixel_mean.device.type == "cpu"
        return torch.get_num_threads() if is_cpu and self.detector.backend.name != "onnx" else None

    def find(self, writer: ResultWriter, background: Background) -> Iterator[FoundHeads]:
        """Go through this process's share of the pictures, have what is found written, and pass it on."""
        batched = self.options.infer_imsize_same
        pictures, again, total = _share(self.source, writer, BATCH_SIZE if batched else 1)
        if writer.start.threads is not None:
            torch.set_num_threads(writer.start.threads)
        found = detect_pictures(self.detector, pictures, batched)
        missing = ((picture, detections) for picture, detections in found if picture.position not in again)
        for picture, detections in show_progress(missing, total) if writer.processes.is_main else missing:
            heads = None
            if picture.image is None:
                background.submit(writer.skip, picture.name, picture.problem or "unreadable", picture.position)
            else:
                if self.segmenter is not None:
                    heads = [self.segmenter.segment(picture.image, face) for face in detections.boxes.numpy()]
                background.submit(writer.add, picture.name, picture.image, detections, heads, picture.position)
            yield picture, detections, heads


def _refuse_to_divide(source: Source, options: InferenceOptions, processes: Processes) -> None:
    """Frames come one after another, so others cannot begin in the middle, nor can a later run."""
    if processes.count > 1:
        raise ConfigError(
            f"{source.description}: {processes.count} processes cannot share a video or camera; start one"
        )
    if options.resume:
        raise ConfigError(f"{source.description}: a video or camera cannot be resumed; drop --resume")


def _share(source: Source, writer: ResultWriter, block: int) -> tuple[Iterator[Picture], set[int], int | None]:
    """This process's pictures, the positions among them that need not be written again, and how many others there are.

    Pictures that are done come once more where they shared a pass with one that is not: the last digits of that one
    could depend on it.
    """
    if not isinstance(source, ImageFiles):
        return iter(source), set(), source.total
    positions = own_share(len(source.names), writer.start.done, block, writer.processes)
    again = set(np.intersect1d(positions, writer.start.done).tolist())
    return source.read(positions), again, len(positions) - len(again)
