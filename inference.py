"""Find faces in pictures: python inference.py --inference_dir=FOLDER --save_img. See README.md, or --help."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import (
    ROOT,
    ConfigError,
    ExperimentConfig,
    Flags,
    InferenceOptions,
    MemoryOptions,
    ModelConfig,
    RunOptions,
    SpeedOptions,
    UserError,
    WeightOptions,
    parse_flags,
    to_dict,
)
from engine import BATCH_SIZE, detect_pictures
from models.detector import FaceDetector, open_detector
from utils.background import Background
from utils.checkpoint import Checkpoint
from utils.cli import choose_device, run, show_progress
from utils.distributed import Processes, in_step, join_processes, own_share
from utils.experiment import user_path
from utils.masks import Head, HeadSegmenter, InferenceResults
from utils.settings import digest_of_file
from utils.sources import ImageFiles, Picture, Source, open_source
from utils.structures import Detections
from utils.writers import ResultWriter

OPTIONS = (
    RunOptions(),
    WeightOptions(),
    InferenceOptions(),
    SpeedOptions(),
    MemoryOptions(),
    ExperimentConfig().inference,
    ModelConfig,
)
# Fields of `InferenceOptions` that say where or when something is done, not what.
_NOT_OF_RESULTS = ("inference_dir", "inference_save_folder", "segmenter_model", "max_frames", "resume")


@dataclass(frozen=True)
class Job:
    """What a command line asks for, opened.

    Attributes:
        name: that outputs bear.
        about: all that the results depend on.
    """

    options: InferenceOptions
    folder: Path
    detector: FaceDetector
    checkpoint: Checkpoint
    name: str
    source: Source
    segmenter: HeadSegmenter | None
    about: dict[str, Any]

    @property
    def threads(self) -> int | None:
        """That compute, where it is known that the last digits depend on their number."""
        is_cpu = self.detector.network.pixel_mean.device.type == "cpu"
        return torch.get_num_threads() if is_cpu and self.detector.backend.name != "onnx" else None


def inference(argv: Sequence[str] | None = None) -> InferenceResults:
    """Do what the command does and return what it found, for callers in Python; all masks are held in memory.

    With `--resume`, and in one of several processes, that is what this call did itself.

    Raises:
        UserError: what was asked for cannot be done; the message says why and what to do.
    """
    results = InferenceResults([], [], [], [], [])
    _infer(parse_flags(__doc__ or "", OPTIONS, argv), results.add)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    _infer(parse_flags(__doc__ or "", OPTIONS, argv), lambda detections, heads: None)


def _infer(flags: Flags, keep: Callable[[Detections, Sequence[Head]], None]) -> None:
    # They exchange words, not tensors: for that the CPU is enough, and a long wait costs nothing.
    with join_processes(torch.device("cpu")) as processes, ExitStack() as stack:
        job = in_step(lambda: _open(flags, processes, stack))
        source = job.source
        say = print if processes.is_main else _say_nothing
        if job.checkpoint.note:
            say(f"note: {job.checkpoint.note}")
        device = job.detector.network.pixel_mean.device
        what = f"{job.name} ({job.checkpoint.kind}) on {device}, {job.detector.backend.name}"
        say(f"{source.description}: {source.total or 'unknown'} images; {what}")
        start = time.perf_counter()
        writer = _open_writer(job, processes)
        if writer.start.note:
            say(f"{job.folder}: {writer.start.note}", flush=True)
        try:
            with writer, Background() as background:
                for picture, detections, heads in _find(job, writer, background):
                    if picture.image is not None:
                        keep(detections, heads or [])
        except KeyboardInterrupt:
            say(f"interrupted{'; --resume goes on from here' if isinstance(source, ImageFiles) else ''}")
            raise
        finally:
            if not writer.start.is_finished:
                say(writer.summary.describe(time.perf_counter() - start))
        if source.ignored:
            say(f"{source.ignored} files without an image's suffix were left alone")
        say(f"results are in {job.folder.resolve()}")
        if processes.is_main and not writer.start.is_finished and not writer.summary.images:
            raise UserError(f"{source.description}: no image could be read")


def _open(flags: Flags, processes: Processes, stack: ExitStack) -> Job:
    """Everything that a run needs; `stack` closes it.

    Raises:
        UserError: something is not there, or cannot be had together.
    """
    runtime, options = flags.apply(RunOptions()), flags.apply(InferenceOptions())
    device = choose_device(runtime.gpu_num)
    detector, checkpoint, name = open_detector(flags, device, "inference", ROOT / "experiments")
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
    return Job(options, folder, detector, checkpoint, name, source, segmenter, about)


def _refuse_to_divide(source: Source, options: InferenceOptions, processes: Processes) -> None:
    """Frames come one after another, so others cannot begin in the middle, nor can a later run."""
    if processes.count > 1:
        raise ConfigError(
            f"{source.description}: {processes.count} processes cannot share a video or camera; start one"
        )
    if options.resume:
        raise ConfigError(f"{source.description}: a video or camera cannot be resumed; drop --resume")


def _open_writer(job: Job, processes: Processes) -> ResultWriter:
    return ResultWriter(
        job.folder,
        job.name,
        job.about,
        names=job.source.names,
        save_images=job.options.save_img,
        save_masks=job.options.save_mask,
        frames_per_second=job.source.frames_per_second,
        threads=job.threads,
        resume=job.options.resume,
        processes=processes,
    )


def _find(
    job: Job, writer: ResultWriter, background: Background
) -> Iterator[tuple[Picture, Detections, list[Head] | None]]:
    """Go through this process's share of the pictures, have what is found written, and pass it on."""
    batched, segmenter = job.options.infer_imsize_same, job.segmenter
    pictures, again, total = _share(job.source, writer, BATCH_SIZE if batched else 1)
    if writer.start.threads is not None:
        torch.set_num_threads(writer.start.threads)
    found = detect_pictures(job.detector, pictures, batched)
    missing = ((picture, detections) for picture, detections in found if picture.position not in again)
    for picture, detections in show_progress(missing, total) if writer.processes.is_main else missing:
        heads = None
        if picture.image is None:
            background.submit(writer.skip, picture.name, picture.problem or "unreadable", picture.position)
        else:
            if segmenter is not None:
                heads = [segmenter.segment(picture.image, face) for face in detections.boxes.numpy()]
            background.submit(writer.add, picture.name, picture.image, detections, heads, picture.position)
        yield picture, detections, heads


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


def _say_nothing(*words: object, **options: object) -> None:
    """What all processes but the main one say."""


if __name__ == "__main__":
    run(main)
