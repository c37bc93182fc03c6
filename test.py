"""Evaluate a detector on WIDER FACE or on your own labelled images: python test.py --experiment_name=NAME.

`--pred_dir` evaluates predictions of any detector, instead of running one. See README.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from config import (
    DATA,
    DEFAULT_EXPERIMENT,
    EVALUATION_COMPUTE,
    EXPERIMENTS,
    EvaluationOptions,
    ExperimentConfig,
    ModelOverrides,
    ProtocolConfig,
    RunOptions,
    WeightOptions,
)
from utils.datasets.folders import describe_faces_outside, find_dataset
from utils.datasets.labels import LabelledImage
from utils.errors import ConfigError, UserError
from utils.evaluation.ground_truth import EvaluationSet, open_evaluation_set
from utils.evaluation.localisation import localisation_ap
from utils.evaluation.page import write_evaluation_page
from utils.evaluation.prediction_set import PredictionSet
from utils.evaluation.predictions import prediction_file, read_predictions
from utils.evaluation.report import (
    DetectionStats,
    Measurement,
    append_to_table,
    check_report_is_ours,
    describe,
    write_report,
)
from utils.evaluation.suspected_form import suspected_form
from utils.options import Flags, parse_flags
from utils.results.own_files import OwnFiles
from utils.results.page import check_page_is_ours
from utils.runtime.cli import choose_device, run
from utils.runtime.experiment import Experiment
from utils.runtime.files import disk_errors, is_folder, locked, make_folder, own_folder, user_path

GROUPS = (
    RunOptions(),
    EvaluationOptions(),
    EVALUATION_COMPUTE,
    ProtocolConfig(),
    ExperimentConfig().evaluation,
    WeightOptions(),
    ModelOverrides(),
)
# The flags that have an effect with --pred_dir, where no detector runs.
_WITH_PREDICTIONS = set(
    "pred_dir gt_dir dataset subset save_errors page bootstrap experiment_name gpu_num output_dir".split()
)
_UNNAMED_RESULTS = Path("test_results")  # so that nothing is written into an experiment that was not named


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse_flags(__doc__ or "", GROUPS, argv)
    options, experiment = flags.apply(EvaluationOptions()), flags.apply(RunOptions()).experiment_name
    faces = open_faces(options, "dataset" in flags.given)
    with ExitStack() as stack:
        if options.pred_dir is None:
            detect_and_report(flags, options, experiment, faces, stack)
            return
        if idle := sorted(set(flags.given) - _WITH_PREDICTIONS):
            raise ConfigError(f"--{idle[0]} has no effect with --pred_dir, because no detector runs; drop one of them")
        predicted = PredictionSet.open(user_path(options.pred_dir), experiment)
        predictions = read_all(predicted, faces)
        results = results_folder(options, experiment, predicted.experiment, predicted.folder, faces, stack)
        report(predicted, predictions, DetectionStats(), faces, options, results)


def detect_and_report(
    flags: Flags, options: EvaluationOptions, experiment: str | None, faces: EvaluationSet, stack: ExitStack
) -> None:
    """Run a detector on the images of the ground truth, in every process, and report in the main one."""
    # PyTorch takes a second to import, and --pred_dir does not need it.
    import torch

    from engine.evaluation import EvaluationRun, predict
    from models.checkpoint import load_checkpoint, locate_checkpoint
    from models.detector import FaceDetector
    from models.initialise import load_model
    from utils.runtime.distributed import distributed_context, run_on_main

    device, weight = choose_device(flags.apply(RunOptions()).gpu_num), flags.apply(WeightOptions()).model_weight
    # The processes exchange messages, not tensors, for which the CPU suffices.
    context = stack.enter_context(distributed_context(torch.device("cpu")))
    path = locate_checkpoint(EXPERIMENTS, experiment or DEFAULT_EXPERIMENT, weight)
    checkpoint = load_checkpoint(path, flags.apply(ModelOverrides()))
    saved = checkpoint.configuration
    model, thresholds = load_model(checkpoint).to(device), flags.apply(saved.evaluation)
    detector = FaceDetector(model, thresholds, flags.apply(EVALUATION_COMPUTE))
    name = experiment or checkpoint.experiment_name(EXPERIMENTS)
    results = run_on_main(lambda: results_folder(options, experiment, name, checkpoint.path, faces, stack))
    evaluation = EvaluationRun(name, checkpoint, detector, flags.apply(saved.protocol), results, options.resume)
    predicted, detected = predict(evaluation, faces, context)
    if context.is_main:
        if detected.skipped and not detected.images and len(detected.skipped) == len(faces.truths):
            first, reason = detected.skipped[0]
            raise UserError(
                f"{faces.source}: none of its {len(faces.truths)} images can be read; first {first}: {reason}"
            )
        report(predicted, read_all(predicted, faces), detected, faces, options, results)


def open_faces(options: EvaluationOptions, dataset_is_given: bool) -> EvaluationSet:
    """Open the ground truth; images are required to run a detector and to draw errors."""
    needs_images = options.pred_dir is None or options.save_errors > 0
    is_optional = options.gt_dir is not None and not dataset_is_given and not needs_images
    is_absent = is_optional and not is_folder(DATA / options.dataset)
    dataset = None if is_absent else find_dataset(options.dataset, DATA)
    gt_dir = user_path(options.gt_dir) if options.gt_dir else None
    faces = open_evaluation_set(dataset, gt_dir, need_images=needs_images)
    return faces.sample(options.subset) if options.subset else faces


def read_all(predicted: PredictionSet, faces: EvaluationSet) -> dict[str, np.ndarray]:
    """Read the predictions of the images of the ground truth.

    Raises:
        UserError: a file is malformed, or there are none of these images.
    """
    predictions = read_predictions(predicted.folder, faces.names)
    if not predictions:
        example = prediction_file(predicted.folder, faces.names[0])
        raise UserError(f"{predicted.folder}: holds no predictions of these images; expected files like {example}")
    return predictions


def results_folder(
    options: EvaluationOptions, experiment: str | None, name: str, source: Path, faces: EvaluationSet, stack: ExitStack
) -> Path:
    """Create the folder of the results: the one given, that of the named experiment, or one of its own.

    It is locked until `stack` is closed. One of its own has the given `name`, and is for one `source` of predictions, a
    checkpoint or a folder, on one ground truth.

    Raises:
        UserError: another run is writing there, or a file there that would be replaced is not of an evaluation.
    """
    if options.output_dir:
        results = make_folder(user_path(options.output_dir).absolute())
    elif experiment:
        results = make_folder(Experiment(EXPERIMENTS / experiment).results_folder)
    else:
        owner = Path(f"{source.resolve()}{os.pathsep}{faces.source.resolve()}")
        results = own_folder(_UNNAMED_RESULTS.absolute() / name, owner)
    stack.enter_context(locked(results))
    check_report_is_ours(results, table_of(results), with_gallery=options.save_errors > 0)
    if options.page and faces.images is not None:
        check_page_is_ours(results)
    return results


def table_of(results: Path) -> Path:
    """The table of all runs: one for all experiments, or one in the folder of the results."""
    return (EXPERIMENTS if results.is_relative_to(EXPERIMENTS) else results) / "results.csv"


def report(
    predicted: PredictionSet,
    predictions: dict[str, np.ndarray],
    detected: DetectionStats,
    faces: EvaluationSet,
    options: EvaluationOptions,
    results: Path,
) -> None:
    """Evaluate the predictions, write the report into `results`, and print it."""
    errors = faces.standard_errors(predictions, options.bootstrap) if options.bootstrap else {}
    localisation = localisation_ap(predictions, faces.truths)
    names = frozenset(predictions)
    measured = Measurement(predicted, faces, faces.evaluate(predictions), detected, names, localisation, errors)
    form = suspected_form(predictions, faces) if options.pred_dir else None
    labelled = map(LabelledImage, faces.images or (), faces.labelled or ())
    if outside := describe_faces_outside(list(labelled)):
        print(f"warning: {faces.source}: {outside}", file=sys.stderr)
    if form:
        print(f"warning: {predicted.folder}: {form}; expected x y width height score in pixels", file=sys.stderr)
    with disk_errors(results):
        write_report(results, measured)
        append_to_table(table_of(results), measured)
        if options.save_errors:
            from utils.evaluation.error_gallery import draw_error_gallery  # only the gallery needs OpenCV
            from utils.runtime.images import write_image

            gallery = draw_error_gallery(faces, predictions, measured.evaluation, options.save_errors)
            with OwnFiles(results).replaced(results / "errors.png") as (temporary,):
                encoded = temporary.with_suffix(".png")
                write_image(encoded, gallery)
                encoded.replace(temporary)
        page = write_evaluation_page(results, measured, predictions) if options.page else None
    print(f"results are in {results}")
    if page is not None:
        print(f"open {page.resolve()} to see the images")
    print("\n".join(describe(measured)))


if __name__ == "__main__":
    run(main)
