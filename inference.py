"""Find faces in pictures: python inference.py --inference_dir=FOLDER --save_img. See README.md, or --help."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing

from config import (
    ROOT,
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
from engine import detect_pictures
from models.detector import open_detector
from utils.background import Background
from utils.cli import choose_device, run, show_progress
from utils.experiment import user_path
from utils.masks import Head, HeadSegmenter, InferenceResults
from utils.sources import open_source
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


def inference(argv: Sequence[str] | None = None) -> InferenceResults:
    """Do what the command does and return what it found, for callers in Python; all masks are held in memory.

    Raises:
        UserError: what was asked for cannot be done; the message says why and what to do.
    """
    results = InferenceResults([], [], [], [], [])
    _infer(parse_flags(__doc__ or "", OPTIONS, argv), results.add)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    _infer(parse_flags(__doc__ or "", OPTIONS, argv), lambda detections, heads: None)


def _infer(flags: Flags, keep: Callable[[Detections, Sequence[Head]], None]) -> None:
    runtime, options = flags.apply(RunOptions()), flags.apply(InferenceOptions())
    device = choose_device(runtime.gpu_num)
    detector, checkpoint, name = open_detector(flags, device, "inference", ROOT / "experiments")
    if checkpoint.note:
        print(f"note: {checkpoint.note}")
    folder = user_path(options.inference_save_folder)
    source = open_source(options.inference_dir, ROOT / "data", exclude=folder, max_frames=options.max_frames)
    about = {"experiment": name, "checkpoint": checkpoint.path.name, "source": source.description}
    what = f"{name} ({checkpoint.kind}) on {device}, {detector.backend.name}"
    print(f"{source.description}: {source.total or 'unknown'} images; {what}")

    start = time.perf_counter()
    with ExitStack() as stack:
        model = user_path(options.segmenter_model) if options.segmenter_model else None
        segmenter = stack.enter_context(HeadSegmenter(model)) if options.mask else None
        writer = ResultWriter(
            folder,
            name,
            about | {"detection": dataclasses.asdict(detector.detection)},
            names=source.names,
            save_images=options.save_img,
            save_masks=options.save_mask,
            frames_per_second=source.frames_per_second,
        )
        stack.enter_context(closing(writer))
        stack.callback(lambda: print(writer.summary.describe(time.perf_counter() - start)))
        background = stack.enter_context(Background())
        if writer.replaces:
            print(f"{folder}: replacing the results of an earlier run")
        found = detect_pictures(detector, source, options.infer_imsize_same)
        for picture, detections in show_progress(found, source.total):
            if picture.image is None:
                background.submit(writer.skip, picture.name, picture.problem or "unreadable")
                continue
            heads = [segmenter.segment(picture.image, face) for face in detections.boxes.numpy()] if segmenter else None
            background.submit(writer.add, picture.name, picture.image, detections, heads)
            keep(detections, heads or [])
    if source.ignored:
        print(f"{source.ignored} files without an image's suffix were left alone")
    print(f"results are in {folder.resolve()}")
    if not writer.summary.images:
        raise UserError(f"{source.description}: no image could be read")


if __name__ == "__main__":
    run(main)
