"""Inference: detections, head masks and result files of a source of images."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import ComputeOptions, InferenceOptions
from engine.stream import BATCH_SIZE, detect_images
from models.checkpoint import Checkpoint
from models.detector import FaceDetector
from utils.datasets.formats.registry import check_names
from utils.errors import ConfigError, UserError
from utils.options import require, to_dict
from utils.results.masks import HeadMask, HeadSegmenter
from utils.results.page import PAGE_NAME, check_page_is_ours
from utils.results.writer import ResultWriter
from utils.runtime.cli import show_progress
from utils.runtime.distributed import DistributedContext, shard_positions
from utils.runtime.files import OUTPUT_FOLDERS
from utils.runtime.manifest import file_digest
from utils.runtime.sources import ImageFiles, InputImage, Source, VideoFrames, is_large
from utils.runtime.threads import BackgroundWorker
from utils.structures import Detections
from utils.tracking import FaceTracker

# Fields of `InferenceOptions` on which the results do not depend.
_IRRELEVANT_OPTIONS = ("inference_dir", "inference_save_folder", "segmenter_model", "max_frames", "resume", "export")

DetectedHeads = tuple[InputImage, Detections, list[HeadMask] | None]


@dataclass(frozen=True)
class InferenceRun:
    """Everything that a run of `inference.py` needs.

    Attributes:
        name: name of the experiment, used in the names of the result files.
        checkpoint: checkpoint of the detector.
        detector: detector on the target device.
        compute: backend and precision of the detector.
        source: source of the images.
        folder: folder of the results.
        options: options that select what is written.
        segmenter: head segmenter, with `--mask`.
        segmenter_model: file of the segmenter, if the user gave one.
    """

    name: str
    checkpoint: Checkpoint
    detector: FaceDetector
    compute: ComputeOptions
    source: Source
    folder: Path
    options: InferenceOptions
    segmenter: HeadSegmenter | None
    segmenter_model: Path | None

    def check(self, context: DistributedContext) -> None:
        """Check that the options fit the source, the model and the folder of the results.

        Results must not overwrite the input. Frames can only be read in sequence, so a video can neither be shared by
        several processes nor resumed.

        Raises:
            ConfigError: an option does not fit; the message says what to do instead.
        """
        outputs = [(self.folder / name).resolve() for name in OUTPUT_FOLDERS]
        for folder in self.source.folders:
            if any(folder.resolve().is_relative_to(output) for output in outputs):
                raise ConfigError(
                    f"{folder}: holds images to be read, but results are written there; choose another "
                    "--inference_save_folder"
                )
        if "aligned" in self.options.save_crops and not self.detector.model.model_config.landmarks:
            raise ConfigError("--save_crops aligned needs landmarks, which this model does not predict; choose plain")
        check_names(self.options.export, self.source.names)
        if self.options.page:
            check_page_is_ours(self.folder)
        if isinstance(self.source, ImageFiles):
            require(not self.options.track, "--track follows faces over the frames of a video or camera; drop it")
            return
        if context.world_size > 1:
            raise ConfigError(
                f"{self.source.description}: {context.world_size} processes cannot share a video or camera; start one"
            )
        if self.options.resume:
            raise ConfigError(f"{self.source.description}: a video or camera cannot be resumed; drop --resume")

    def describe(self) -> str:
        """The images, the detector and the device, in one line."""
        detector = f"{self.name}{self.checkpoint.suffix} on {self.detector.model.device}, {self.detector.backend.name}"
        return f"{self.source.description}: {self.source.total or 'unknown'} images; {detector}"

    def settings(self) -> dict[str, Any]:
        """Everything that the results depend on, as JSON values."""
        options = to_dict(self.options)
        return {
            "experiment": self.name,
            "checkpoint": self.checkpoint.path.name,
            "source": self.source.description,
            "detection": dataclasses.asdict(self.detector.config),
            "checkpoint_sha256": file_digest(self.checkpoint.path),
            "model": to_dict(self.detector.model.model_config),
            "paths_sha256": self.source.digest() if isinstance(self.source, ImageFiles) else None,
            "computed": {
                **dataclasses.asdict(self.compute),
                "backend": self.detector.backend.name,
                "device": self.detector.model.device.type,
            },
            "options": {name: value for name, value in options.items() if name not in _IRRELEVANT_OPTIONS},
            "segmenter_sha256": file_digest(self.segmenter_model) if self.segmenter_model else None,
        }

    def open_writer(self, context: DistributedContext) -> ResultWriter:
        """Begin writing results, or continue an interrupted run."""
        source = self.source
        video = Path(source.description) if isinstance(source, VideoFrames) else None
        # On a CPU, the last digits of PyTorch's results depend on the number of threads.
        depends_on_threads = self.detector.model.device.type == "cpu" and self.detector.backend.name != "onnx"
        return ResultWriter(
            self.folder,
            self.name,
            self.settings(),
            names=source.names,
            options=self.options,
            images=source.folder if isinstance(source, ImageFiles) else None,
            video=video if video is not None and video.is_file() else None,
            frames_per_second=source.frames_per_second,
            threads=torch.get_num_threads() if depends_on_threads else None,
            context=context,
        )


def run_inference(
    run: InferenceRun, context: DistributedContext, keep: Callable[[Detections, Sequence[HeadMask]], None]
) -> None:
    """Detect faces in this process's shard of the images, and write the results.

    Args:
        run: detector, images and output of the run.
        context: rank and number of processes.
        keep: called with the detections and head masks of every image that could be read.

    Raises:
        UserError: results cannot be written, or no image could be read.
    """
    say = print if context.is_main else lambda *words, **options: None
    if run.checkpoint.note:
        say(f"note: {run.checkpoint.note}")
    say(run.describe())
    start = time.perf_counter()
    writer = run.open_writer(context)
    if writer.start.note:
        say(f"{run.folder}: {writer.start.note}", flush=True)
    try:
        with writer, BackgroundWorker() as worker:
            for image, detections, heads in _detect(run, writer, worker):
                if image.pixels is not None:
                    keep(detections, heads or [])
                del image
    except KeyboardInterrupt:
        say(f"interrupted{'; --resume continues from here' if isinstance(run.source, ImageFiles) else ''}")
        raise
    finally:
        if not writer.start.is_complete:
            say(writer.summary.describe(time.perf_counter() - start))
            if run.segmenter is not None:
                say(run.segmenter.describe())
    for note in writer.notes:
        say(f"note: {note}")
    for note in run.source.notes:
        say(note)
    say(f"results are in {run.folder.resolve()}")
    if run.options.page:
        say(f"open {run.folder.resolve() / PAGE_NAME} to see them")
    if context.is_main and not len(writer.start.done) and not writer.summary.images:
        raise UserError(f"{run.source.description}: no image could be read")


def _detect(run: InferenceRun, writer: ResultWriter, worker: BackgroundWorker) -> Iterator[DetectedHeads]:
    """Detect faces in this process's shard of the images, write the results in the background, and yield them."""
    batched = run.options.infer_imsize_same
    images, repeated, total = _shard_images(run.source, writer, BATCH_SIZE if batched else 1)
    tracker = FaceTracker(run.source.frames_per_second or 25) if run.options.track else None
    if writer.start.threads is not None:
        torch.set_num_threads(writer.start.threads)
    detected = detect_images(run.detector, images, batched)
    missing = filter(lambda each: each[0].position not in repeated, detected)
    for image, detections in show_progress(missing, total) if writer.context.is_main else missing:
        heads = None
        if image.pixels is None:
            worker.submit(writer.skip, image.name, image.problem or "unreadable", image.position)
        else:
            if run.segmenter is not None:
                heads = [run.segmenter.segment(image.pixels, face) for face in detections.boxes.numpy()]
            tracks = tracker.update(detections.boxes.numpy()) if tracker is not None else None
            worker.submit(
                writer.add,
                image.name,
                image.pixels,
                detections,
                heads,
                image.position,
                note=image.note,
                tracks=tracks,
                seconds=image.seconds,
            )
        if is_large(image):
            worker.wait()
        yield image, detections, heads
        del image  # frees its pixels before the next one is read


def _shard_images(
    source: Source, writer: ResultWriter, block: int
) -> tuple[Iterator[InputImage], set[int], int | None]:
    """The images of this process, the positions of those already done, and the number of the others if it is known.

    Images that are done are processed again if they share a batch with one that is not, because the last digits of
    its results may depend on the batch.
    """
    if not isinstance(source, ImageFiles):
        return iter(source), set(), source.total
    positions = shard_positions(len(source.names), writer.start.done, block, writer.context)
    repeated = set(np.intersect1d(positions, writer.start.done).tolist())
    return source.read(positions), repeated, len(positions) - len(repeated)
