"""Measure a detector on WIDER FACE or labelled images of your own: python test.py --experiment_name=NAME.

`--pred_dir` measures predictions that any detector left, instead of running one. See README.md, or --help.
"""

from __future__ import annotations

from collections.abc import Sequence

from config import (
    EVALUATION_MEMORY,
    EXPERIMENTS,
    ROOT,
    ConfigError,
    EvaluationOptions,
    ExperimentConfig,
    Flags,
    ModelConfig,
    ProtocolConfig,
    RunOptions,
    SpeedOptions,
    UserError,
    WeightOptions,
    parse_flags,
)
from utils.datasets.folders import find_dataset
from utils.evaluation.ground_truth import EvaluationSet, open_evaluation_set
from utils.evaluation.predictions import prediction_file, read_predictions
from utils.evaluation.report import Detected, Measurement, append_to_table, describe, write_report
from utils.evaluation.run import EvaluationRun
from utils.runtime.cli import choose_device, run
from utils.runtime.experiment import Experiment, make_folder, user_path
from utils.runtime.files import disk_errors

OPTIONS = (
    RunOptions(),
    EvaluationOptions(),
    SpeedOptions(),
    EVALUATION_MEMORY,
    ProtocolConfig(),
    ExperimentConfig().evaluation,
    WeightOptions(),
    ModelConfig,
)
# The flags that mean something where no detector runs.
_WITH_GIVEN_PREDICTIONS = {"pred_dir", "gt_dir", "dataset", "save_errors", "bootstrap", "experiment_name", "gpu_num"}


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse_flags(__doc__ or "", OPTIONS, argv)
    options = flags.apply(EvaluationOptions())
    faces = open_faces(flags, options)
    if options.pred_dir:
        report(given_predictions(flags, options), Detected(), faces, options)
        return
    # PyTorch takes a second to import, which --pred_dir need not wait for.
    from engine.evaluation import predict
    from utils.runtime.distributed import join_processes

    device = choose_device(flags.apply(RunOptions()).gpu_num)
    with join_processes(device) as processes:
        predicted, detected = predict(flags, options, faces, device, processes)
        if processes.is_main:
            report(predicted, detected, faces, options)


def report(predicted: EvaluationRun, detected: Detected, faces: EvaluationSet, options: EvaluationOptions) -> None:
    """Measure predictions, write what there is to say of them, and print it."""
    predictions = read_predictions(predicted.folder, faces.names)
    if not predictions:
        example = prediction_file(predicted.folder, faces.names[0])
        raise UserError(f"{predicted.folder}: holds no predictions of these images; expected files like {example}")
    errors = faces.standard_errors(predictions, options.bootstrap) if options.bootstrap else {}
    measured = Measurement(predicted, faces, faces.evaluate(predictions), detected, frozenset(predictions), errors)
    results = make_folder(Experiment(EXPERIMENTS / predicted.experiment).results_folder)
    with disk_errors(results):
        write_report(results, measured)
        append_to_table(EXPERIMENTS / "results.csv", measured)
        if options.save_errors:
            from utils.evaluation.error_gallery import write_error_page  # OpenCV is not needed for the rest

            write_error_page(results / "errors.png", measured, predictions, options.save_errors)
    print(f"results are in {results}")
    print("\n".join(describe(measured)))


def open_faces(flags: Flags, options: EvaluationOptions) -> EvaluationSet:
    """The ground truth that the flags name. Images are needed by a detector, and to show errors."""
    need_images = options.pred_dir is None or options.save_errors > 0
    is_dispensable = options.gt_dir is not None and "dataset" not in flags.given and not need_images
    folder = ROOT / "data" / options.dataset
    dataset = None if is_dispensable and not folder.is_dir() else find_dataset(options.dataset, ROOT / "data")
    gt_dir = user_path(options.gt_dir) if options.gt_dir else None
    return open_evaluation_set(dataset, gt_dir, need_images=need_images)


def given_predictions(flags: Flags, options: EvaluationOptions) -> EvaluationRun:
    """Predictions of any detector, which `--pred_dir` names."""
    idle = sorted(set(flags.given) - _WITH_GIVEN_PREDICTIONS)
    if idle:
        raise ConfigError(f"--{idle[0]} does nothing with --pred_dir, for no detector runs; drop one of them")
    return EvaluationRun.given(user_path(options.pred_dir or ""), flags.apply(RunOptions()).experiment_name)


if __name__ == "__main__":
    run(main)
