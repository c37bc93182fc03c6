"""Image files to prediction files, as the WIDER FACE evaluation takes them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from config import EXPERIMENTS, EvaluationOptions, Flags, ProtocolConfig, to_dict
from engine.stream import BatchDetector, detect_files
from models.detector import open_detector
from models.tta import ProtocolDetector
from utils.evaluation.ground_truth import EvaluationSet
from utils.evaluation.predictions import write_predictions
from utils.evaluation.report import Detected
from utils.evaluation.run import EvaluationRun, describe_protocol
from utils.runtime.cli import show_progress
from utils.runtime.distributed import Processes, done_by_main, merge_over_processes
from utils.runtime.experiment import Experiment
from utils.runtime.files import disk_errors
from utils.runtime.manifest import digest_of_file
from utils.runtime.sources import Picture
from utils.runtime.threads import Background
from utils.structures import Detections


def predict_files(
    detector: BatchDetector, files: Iterable[tuple[str, Path]], folder: Path, integer_boxes: bool
) -> Generator[Picture, None, None]:
    """Detect in image files and write the predictions of each below `folder`.

    A thread writes them while the next are detected; all are there when the iterator ends, is closed or fails.
    Pictures that come out with a `problem` have no predictions. See `write_predictions`.

    Raises:
        OSError: predictions cannot be written.
    """
    with Background() as background:
        for picture, detections in detect_files(detector, files):
            if picture.problem is None:
                background.submit(_write_predictions, folder, picture.name, detections, integer_boxes)
            yield picture


def _write_predictions(folder: Path, name: str, detections: Detections, integer_boxes: bool) -> None:
    write_predictions(folder, name, prediction_rows(detections), integer_boxes=integer_boxes)


def prediction_rows(detections: Detections) -> np.ndarray:
    """(N, 5) float64 x, y, width, height, score in pixels, as the WIDER FACE evaluation takes them."""
    x1, y1, x2, y2 = detections.boxes.double().numpy().T
    return np.stack([x1, y1, x2 - x1, y2 - y1, detections.scores.double().numpy()], axis=1)


def predict(
    flags: Flags,
    options: EvaluationOptions,
    faces: EvaluationSet,
    device: torch.device,
    processes: Processes,
) -> tuple[EvaluationRun, Detected]:
    """Run the detector over this process's share of the images and write its predictions as they come."""
    detector, checkpoint, name = open_detector(flags, device, "evaluation", EXPERIMENTS)
    protocol = flags.apply(ProtocolConfig())
    settings = {
        "checkpoint": checkpoint.path.name,
        "checkpoint_sha256": digest_of_file(checkpoint.path),
        "model": to_dict(detector.network.config),
        "protocol": dataclasses.asdict(protocol),
        "detection": dataclasses.asdict(detector.detection),
        "max_pixels": detector.max_pixels,
        "ground_truth": faces.source_name,
    }
    stamp = describe_protocol(protocol, detector.detection)
    predicted = EvaluationRun.of_detector(
        Experiment(EXPERIMENTS / name).results_folder, name, checkpoint.path.name, stamp, settings
    )
    if processes.is_main and not options.resume and (former := predicted.files):
        print(f"{predicted.folder}: replacing {len(former)} predictions of an earlier run (--resume keeps them)")
    kept = set(done_by_main(lambda: predicted.begin(faces.names, resume=options.resume)))
    missing = [file for file in zip(faces.names, faces.images or [], strict=True) if file[0] not in kept]
    files = missing[processes.rank :: processes.count]
    if processes.is_main:
        where = f"{device}, {detector.backend.name}"
        print(f"{name} ({checkpoint.kind}) on {where}: {len(missing)} images, {stamp}", flush=True)

    start, problems = time.perf_counter(), {}
    found = predict_files(ProtocolDetector(detector, protocol), files, predicted.folder, protocol.integer_boxes)
    try:
        with disk_errors(predicted.folder), closing(found):
            for picture in show_progress(found, len(files)) if processes.is_main else found:
                problems[picture.name] = picture.problem
    except KeyboardInterrupt:
        print(f"\n{len(kept) + len(problems)} of {len(faces.names)} images are done; --resume goes on from here")
        raise
    problems = merge_over_processes(problems)
    skipped = tuple((name, problem) for name, problem in problems.items() if problem)
    return predicted, Detected(len(problems) - len(skipped), time.perf_counter() - start, skipped)
