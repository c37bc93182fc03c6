"""Images per second with an infinitely fast model: python -m benchmarks.host --images=FOLDER.

The model's outputs are computed beforehand and stored, so that only the remaining work of the CPU is measured: reading,
filtering, decoding, suppression and writing. No GPU can exceed this rate.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from config import DEFAULT_EXPERIMENT, EXPERIMENTS, ComputeOptions
from engine.evaluation import predict_files, prediction_rows
from layers.postprocess import apply_nms, filter_and_decode
from models.backend import Backend
from models.checkpoint import locate_checkpoint
from models.detector import FaceDetector
from utils.errors import UserError
from utils.evaluation.predictions import write_predictions
from utils.runtime.cli import run
from utils.runtime.images import IMAGE_SUFFIXES, read_image
from utils.structures import Detections, StageOutput

_THRESHOLDS = ((0.5, 0.3), (0.02, 0.4))  # score and NMS thresholds of inference.py and of test.py


class StoredOutputs:
    """Returns the stored outputs of another backend for the same images."""

    name = "stored"

    def __init__(self, backend: Backend, images: Sequence[Tensor]) -> None:
        self._outputs = {_key(image): backend(image[None]) for image in images}
        self._joined: dict[tuple[tuple[bytes, torch.Size], ...], StageOutput] = {}
        self.num_workers = torch.get_num_threads()

    def for_worker(self) -> Backend:
        return self

    def __call__(self, images: Tensor) -> StageOutput:
        keys = tuple(_key(image) for image in images)
        if len(keys) == 1:
            return self._outputs[keys[0]]
        if keys not in self._joined:  # only in the first run
            self._joined[keys] = join_outputs([self._outputs[key] for key in keys])
        return self._joined[keys]


def _key(image: Tensor) -> tuple[bytes, torch.Size]:
    return image[::67, ::61].numpy().tobytes(), image.shape


def join_outputs(outputs: Sequence[StageOutput]) -> StageOutput:
    """Join the outputs of several images of the same size."""
    first = outputs[0]
    landmarks = [output.landmark_deltas for output in outputs if output.landmark_deltas is not None]
    ious = [output.iou_logits for output in outputs if output.iou_logits is not None]
    return StageOutput(
        class_logits=torch.cat([output.class_logits for output in outputs]),
        box_deltas=torch.cat([output.box_deltas for output in outputs]),
        landmark_deltas=torch.cat(landmarks) if landmarks else None,
        iou_logits=torch.cat(ious) if ious else None,
        priors=first.priors if first.priors.dim() == 2 else torch.cat([output.priors for output in outputs]),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of images, with subfolders")
    parser.add_argument("--limit", type=int, default=40, help="number of images, spread evenly over the folder")
    parser.add_argument("--experiments", nargs="+", default=[DEFAULT_EXPERIMENT], help="names of experiments")
    parser.add_argument("--repeats", type=int, default=3, help="number of runs of which the median is shown")
    options = parser.parse_args(argv)
    found = sorted(path for path in options.images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise UserError(f"{options.images}: no images")
    paths = found[:: max(1, len(found) // options.limit)][: options.limit]
    print(f"{len(paths)} images, {torch.get_num_threads()} threads; milliseconds per image in one thread\n")
    print("| experiment | score above | read | filter and decode | suppress | write | images/s in all threads |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in options.experiments:
        for score, iou in _THRESHOLDS:
            detector = FaceDetector.from_checkpoint(
                locate_checkpoint(EXPERIMENTS, name, "ckpt-best.pth"),
                compute=ComputeOptions(backend="auto"),
                confidence_threshold=score,
                nms_threshold=iou,
            )
            print(f"| {name} | {score} | {measure(detector, paths, options.repeats)} |", flush=True)


@torch.inference_mode()
def measure(detector: FaceDetector, paths: Sequence[Path], repeats: int) -> str:
    """Return a row of the table: milliseconds of each step, and images per second with all threads."""
    images = [torch.from_numpy(read_image(path)) for path in paths]
    detector.backend = StoredOutputs(detector.backend, images)
    sizes = [(image.shape[0], image.shape[1]) for image in images]
    files = [(path.stem, path) for path in paths]
    threads = torch.get_num_threads()

    def filter_all() -> list[Detections]:
        found = []
        for image, size in zip(images, sizes, strict=True):
            output = detector.backend(image[None])
            candidates, _, is_above = filter_and_decode(output, size, detector.model.model_config, detector.config)
            found.append(candidates.select(is_above))
        return found

    def suppress_all() -> list[Detections]:
        return [apply_nms(found, size, detector.config) for found, size in zip(candidates, sizes, strict=True)]

    def write_all() -> None:
        for (name, _), found in zip(files, detected, strict=True):
            write_predictions(Path(folder), name, prediction_rows(found), integer_boxes=False)

    candidates = filter_all()
    detected = suppress_all()
    with TemporaryDirectory() as folder:
        steps: list[Callable[[], object]] = [
            lambda: [read_image(path) for path in paths],
            filter_all,
            suppress_all,
            write_all,
        ]
        torch.set_num_threads(1)
        milliseconds = [1000 * _seconds(step, repeats) / len(paths) for step in steps]
        torch.set_num_threads(threads)
        seconds = _seconds(lambda: list(predict_files(detector, files, Path(folder), integer_boxes=False)), repeats)
    return " | ".join([*(f"{value:.1f}" for value in milliseconds), f"{len(paths) / seconds:.0f}"])


def _seconds(step: Callable[[], object], repeats: int) -> float:
    durations = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


if __name__ == "__main__":
    run(main)
