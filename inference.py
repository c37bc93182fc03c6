"""Find faces in pictures: python inference.py --inference_dir=FOLDER --save_img. See README.md, or --help."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from config import (
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
)
from engine.inference import InferenceJob
from utils.results.masks import Head, InferenceResults
from utils.runtime.cli import run
from utils.runtime.distributed import in_step, join_processes
from utils.runtime.sources import ImageFiles
from utils.runtime.threads import Background
from utils.structures import Detections

OPTIONS = (
    RunOptions(),
    WeightOptions(),
    InferenceOptions(),
    SpeedOptions(),
    MemoryOptions(),
    ExperimentConfig().inference,
    ModelConfig,
)


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
        job = in_step(lambda: InferenceJob.open(flags, processes, stack))
        source = job.source
        say = print if processes.is_main else _say_nothing
        if job.checkpoint.note:
            say(f"note: {job.checkpoint.note}")
        say(job.describe())
        start = time.perf_counter()
        writer = job.open_writer(processes)
        if writer.start.note:
            say(f"{job.folder}: {writer.start.note}", flush=True)
        try:
            with writer, Background() as background:
                for picture, detections, heads in job.find(writer, background):
                    if picture.image is not None:
                        keep(detections, heads or [])
        except KeyboardInterrupt:
            say(f"interrupted{'; --resume goes on from here' if isinstance(source, ImageFiles) else ''}")
            raise
        finally:
            if not writer.start.is_finished:
                say(writer.summary.describe(time.perf_counter() - start))
                if job.segmenter is not None:
                    say(job.segmenter.describe())
        if source.ignored:
            say(f"{source.ignored} files without an image's suffix were left alone")
        say(f"results are in {job.folder.resolve()}")
        if processes.is_main and not writer.start.is_finished and not writer.summary.images:
            raise UserError(f"{source.description}: no image could be read")


def _say_nothing(*words: object, **options: object) -> None:
    """What all processes but the main one say."""


if __name__ == "__main__":
    run(main)
