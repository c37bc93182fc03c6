"""Validation during training, by the official evaluation where there is official ground truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tqdm import tqdm

from config import EVALUATION_COMPUTE, ExperimentConfig
from engine.evaluation import prediction_rows
from engine.stream import detect_files
from models.detector import FaceDetector
from models.image_pyramid import nearest_anchor
from models.retinaface import RetinaFace
from utils.drawing import draw_detections
from utils.evaluation.ground_truth import EvaluationSet
from utils.evaluation.report import CONFIDENT_SCORE, confident_false_boxes
from utils.runtime.distributed import DistributedContext, broadcast_buffers, gather_dicts
from utils.runtime.logger import RunLog
from utils.structures import Detections

_IMAGES_IN_LOG = 4
# An untrained model has candidates everywhere, whose suppression would take minutes.
_TOP_K = 10_000


def validate(
    model: RetinaFace,
    config: ExperimentConfig,
    faces: EvaluationSet,
    context: DistributedContext,
    log: RunLog,
    epoch: int,
) -> dict[str, float]:
    """Detect faces in this process's shard of the validation images, and evaluate those of all processes.

    Args:
        model: switched to evaluation mode.
        config: configuration of the experiment, for its thresholds.
        faces: images and ground truth.
        context: rank and number of processes.
        log: log for curves and for drawings of the first images.
        epoch: number of the epoch, for the log.

    Returns:
        The mean average precision as `val/ap`, and where there are several subsets, the AP of each; where faces have
        labelled landmarks, the mean landmark error as `val/landmark_error`.
    """
    broadcast_buffers(model)
    thresholds = replace(config.evaluation, top_k=config.evaluation.top_k or _TOP_K)
    detector = FaceDetector(model, thresholds, replace(EVALUATION_COMPUTE, backend="torch"))
    files = list(zip(faces.names, faces.images or [], strict=True))
    own_files = files[context.rank :: context.world_size]
    is_quiet = None if context.is_main else True
    bar = tqdm(
        detect_files(detector, own_files), total=len(own_files), desc="validation", disable=is_quiet, leave=False
    )
    predictions: dict[str, np.ndarray] = {}
    found: dict[str, Detections] = {}
    for number, (image, detections) in enumerate(bar):
        if image.problem:
            log.line(f"warning: {image.name}: {image.problem}; no faces are detected in it")
        elif number < _IMAGES_IN_LOG and image.pixels is not None:
            confident = detections.select(detections.scores >= config.inference.confidence_threshold)
            log.image(f"validation/{number}", draw_detections(image.pixels, confident), epoch)
        predictions[image.name] = prediction_rows(detections)
        found[image.name] = detections
    predictions = gather_dicts(predictions)
    evaluation = faces.evaluate(predictions)
    log.curves(evaluation.curves, epoch)
    false_boxes = confident_false_boxes(predictions, faces, evaluation)
    log.line(f"false boxes per image, score from {CONFIDENT_SCORE}: {_by_level(false_boxes, model, len(faces.names))}")
    precisions = evaluation.average_precisions
    subsets = {f"val/ap_{subset}": value for subset, value in precisions.items()} if len(precisions) > 1 else {}
    errors = faces.landmark_errors(gather_dicts(found)) if faces.labelled is not None else None
    if errors is not None and len(errors):
        subsets["val/landmark_error"] = float(errors.mean())
    return {"val/ap": sum(precisions.values()) / len(precisions), **subsets}


def _by_level(boxes: np.ndarray, model: RetinaFace, images: int) -> str:
    """Number of boxes per image of the size of each level's anchors.

    A level that has learnt from crops alone finds faces in the plain parts of whole images, which no loss shows.
    """
    nearest = [nearest_anchor(side, model.levels)[0] for side in np.sqrt(boxes[:, 2:].prod(axis=1)).clip(min=1)]
    counts = np.bincount(nearest, minlength=len(model.levels))
    parts = zip(model.levels, counts, strict=True)
    return ", ".join(f"{count / images:.2f} of stride {level.stride}" for level, count in parts)
