"""Detection in image files, with predictions in the format of the WIDER FACE evaluation."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config import ProtocolConfig
from engine.stream import BatchDetector, detect_files
from models.checkpoint import Checkpoint
from models.detector import FaceDetector
from models.tta import TestTimeAugmentation
from utils.evaluation.ground_truth import EvaluationSet
from utils.evaluation.prediction_set import PREDICTION_FOLDER, PredictionSet, describe_protocol
from utils.evaluation.predictions import write_predictions
from utils.evaluation.report import DetectionStats
from utils.options import to_dict
from utils.runtime.cli import show_progress
from utils.runtime.distributed import DistributedContext, gather_dicts, run_on_main
from utils.runtime.files import disk_errors
from utils.runtime.manifest import file_digest
from utils.runtime.sources import InputImage
from utils.runtime.threads import BackgroundWorker
from utils.structures import Detections


@dataclass(frozen=True)
class EvaluationRun:
    """Everything that a run of `test.py` needs to make predictions.

    Attributes:
        name: name of the experiment, used in the results.
        checkpoint: checkpoint of the detector.
        detector: detector on the target device.
        protocol: test protocol: how images are resized and padded.
        results: folder of the results.
        resume: whether to keep the predictions of an interrupted run.
    """

    name: str
    checkpoint: Checkpoint
    detector: FaceDetector
    protocol: ProtocolConfig
    results: Path
    resume: bool

    def settings(self, faces: EvaluationSet) -> dict[str, Any]:
        """Everything that the predictions depend on, as JSON values."""
        return {
            "checkpoint": self.checkpoint.path.name,
            "checkpoint_sha256": file_digest(self.checkpoint.path),
            "model": to_dict(self.detector.model.model_config),
            "protocol": dataclasses.asdict(self.protocol),
            "detection": dataclasses.asdict(self.detector.config),
            "max_pixels": self.detector.max_pixels,
            "ground_truth": faces.source_name,
        }


def predict(
    run: EvaluationRun, faces: EvaluationSet, context: DistributedContext
) -> tuple[PredictionSet, DetectionStats]:
    """Detect faces in this process's shard of the images, and write the predictions as they are made."""
    protocol = describe_protocol(run.protocol, run.detector.config)
    folder, checkpoint = run.results / PREDICTION_FOLDER, run.checkpoint.path.name
    predicted = PredictionSet(run.name, folder, checkpoint, protocol, run.settings(faces))
    if context.is_main and not run.resume and (former := predicted.files):
        print(f"{predicted.folder}: replacing {len(former)} predictions of an earlier run (--resume keeps them)")
    done = set(run_on_main(lambda: predicted.begin(faces.names, resume=run.resume)))
    missing = [file for file in zip(faces.names, faces.images or [], strict=True) if file[0] not in done]
    files = missing[context.rank :: context.world_size]
    if context.is_main:
        where = f"{run.detector.model.device}, {run.detector.backend.name}"
        print(f"{run.name}{run.checkpoint.suffix} on {where}: {len(missing)} images, {protocol}", flush=True)

    start, problems = time.perf_counter(), {}
    found: dict[str, Detections] = {}
    detector = TestTimeAugmentation(run.detector, run.protocol)
    detected = predict_files(detector, files, predicted.folder, run.protocol.integer_boxes)
    try:
        with disk_errors(predicted.folder), closing(detected):
            for image, detections in show_progress(detected, len(files)) if context.is_main else detected:
                problems[image.name] = image.problem
                if faces.labelled is not None and image.problem is None:
                    found[image.name] = detections
    except KeyboardInterrupt:
        print(f"\n{len(done) + len(problems)} of {len(faces.names)} images are done; --resume continues from here")
        raise
    problems, errors = gather_dicts(problems), faces.landmark_errors(gather_dicts(found))
    skipped = tuple((name, problem) for name, problem in problems.items() if problem)
    return predicted, DetectionStats(len(problems) - len(skipped), time.perf_counter() - start, skipped, errors)


def predict_files(
    detector: BatchDetector, files: Iterable[tuple[str, Path]], folder: Path, integer_boxes: bool
) -> Generator[tuple[InputImage, Detections], None, None]:
    """Detect faces in image files, and write the predictions below `folder`; see `write_predictions`.

    A thread writes them while the next ones are made; all are written when the generator ends, is closed or fails.
    Images that are yielded with a `problem` have no predictions.

    Raises:
        OSError: predictions cannot be written.
    """
    with BackgroundWorker() as worker:
        for image, detections in detect_files(detector, files):
            if image.problem is None:
                rows = prediction_rows(detections)
                worker.submit(write_predictions, folder, image.name, rows, integer_boxes=integer_boxes)
            yield image, detections


def prediction_rows(detections: Detections) -> np.ndarray:
    """(N, 5) float64 x, y, width, height, score in pixels, as the WIDER FACE evaluation expects them."""
    x1, y1, x2, y2 = detections.boxes.double().numpy().T
    return np.stack([x1, y1, x2 - x1, y2 - y1, detections.scores.double().numpy()], axis=1)
