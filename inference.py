"""Find faces in pictures: python inference.py --inference_dir=FOLDER --save_img. See README.md, or --help."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from config import (
    ROOT,
    ExperimentConfig,
    Flags,
    InferenceOptions,
    ModelConfig,
    RunOptions,
    UserError,
    WeightOptions,
    parse_flags,
)
from engine import detect_pictures
from models.detector import open_detector
from utils.cli import choose_device, run
from utils.experiment import user_path
from utils.masks import Head, HeadSegmenter
from utils.sources import Picture, open_source
from utils.structures import Detections
from utils.writers import ResultWriter, Summary

OPTIONS = (RunOptions(), WeightOptions(), InferenceOptions(), ExperimentConfig().inference, ModelConfig)
Result = tuple[Picture, Detections]


class InferenceResults(NamedTuple):
    """What was found: five lists with an entry for each image that could be read, in one order.

    Attributes:
        result_bboxes: (N, 4) int faces, xyxy in pixels of the image.
        face_bboxes: (N, 4) int faces, xyxy in pixels of their head regions.
        face_masks: N uint8 masks of the faces, 255 where the person is.
        head_bboxes: (N, 4) int head regions, xyxy in pixels of the image.
        head_masks: N uint8 masks of the head regions.

    Without `--mask` all but `result_bboxes` hold empty entries.
    """

    result_bboxes: list[np.ndarray]
    face_bboxes: list[np.ndarray]
    face_masks: list[list[np.ndarray]]
    head_bboxes: list[np.ndarray]
    head_masks: list[list[np.ndarray]]

    def add(self, detections: Detections, heads: Sequence[Head]) -> None:
        self.result_bboxes.append(detections.boxes.int().numpy())
        self.face_bboxes.append(np.array([head.face_box for head in heads], dtype=int).reshape(-1, 4))
        self.face_masks.append([head.face_mask for head in heads])
        self.head_bboxes.append(np.array([head.head_box for head in heads], dtype=int).reshape(-1, 4))
        self.head_masks.append([head.head_mask for head in heads])


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
    print(f"{source.description}: {source.total or 'unknown'} images; {name} ({checkpoint.kind}) on {device}")

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
        stack.callback(lambda: _print_summary(writer.summary, time.perf_counter() - start, source.ignored, folder))
        if writer.replaces:
            print(f"{folder}: replacing the results of an earlier run")
        for picture, detections in _with_progress(
            detect_pictures(detector, source, options.infer_imsize_same), source.total
        ):
            if picture.image is None:
                writer.skip(picture.name, picture.problem or "unreadable")
                continue
            heads = [segmenter.segment(picture.image, face) for face in detections.boxes.numpy()] if segmenter else None
            writer.add(picture.name, picture.image, detections, heads)
            keep(detections, heads or [])
    if not writer.summary.images:
        raise UserError(f"{source.description}: no image could be read")


def _with_progress(results: Iterable[Result], total: int | None) -> Iterator[Result]:
    """A bar on a terminal; elsewhere a line every ten images, as the original prints."""
    start = time.perf_counter()
    bar = tqdm(results, total=total, unit="image", disable=None)
    for number, result in enumerate(bar, start=1):
        yield result
        if bar.disable and number % 10 == 0:
            milliseconds = 1000 * (time.perf_counter() - start) / number
            print(f"im_detect: {number}/{total or '?'} {milliseconds:.1f} ms an image", flush=True)


def _print_summary(summary: Summary, seconds: float, ignored: int, folder: Path) -> None:
    rate = summary.images / max(seconds, 1e-9)
    print(f"{summary.images} images, {summary.faces} faces in {seconds:.1f} s ({rate:.1f} images/s)")
    for name, reason in summary.skipped:
        print(f"skipped {name}: {reason}")
    if ignored:
        print(f"{ignored} files without an image's suffix were left alone")
    print(f"results are in {folder.resolve()}")


if __name__ == "__main__":
    run(main)
