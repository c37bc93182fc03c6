"""Measure a detector on WIDER FACE or labelled images of your own: python test.py --experiment_name=NAME.

`--pred_dir` measures predictions that any detector left, instead of running one. See README.md, or --help.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from config import (
    ROOT,
    ConfigError,
    EvaluationOptions,
    ExperimentConfig,
    Flags,
    MemoryOptions,
    ModelConfig,
    ProtocolConfig,
    RunOptions,
    SpeedOptions,
    UserError,
    WeightOptions,
    parse_flags,
    to_dict,
)
from utils.cli import choose_device, run, show_progress
from utils.dataset_folder import find_dataset
from utils.evaluation_report import Detected, Measurement, append_to_table, describe, write_report
from utils.evaluation_run import EvaluationRun, describe_protocol
from utils.evaluation_set import EvaluationSet, open_evaluation_set
from utils.experiment import Experiment, make_folder, user_path
from utils.files import disk_errors
from utils.settings import digest_of_file
from utils.wider_predictions import prediction_file, read_predictions

if TYPE_CHECKING:
    import torch

    from utils.distributed import Processes

OPTIONS = (
    RunOptions(),
    EvaluationOptions(),
    SpeedOptions(),
    MemoryOptions(),
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
    from utils.distributed import join_processes  # torch takes a second to import, which --pred_dir need not wait for

    device = choose_device(flags.apply(RunOptions()).gpu_num)
    with join_processes(device) as processes:
        predicted, detected = detect(flags, options, faces, device, processes)
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
    results = make_folder(results_folder(predicted.experiment))
    with disk_errors(results):
        write_report(results, measured)
        append_to_table(ROOT / "experiments" / "results.csv", measured)
        if options.save_errors:
            from utils.error_page import write_error_page  # OpenCV is not needed for the rest

            write_error_page(results / "errors.png", measured, predictions, options.save_errors)
    print(f"results are in {results}")
    print("\n".join(describe(measured)))


def results_folder(experiment: str) -> Path:
    return Experiment(ROOT / "experiments" / experiment).results_folder


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


def detect(
    flags: Flags, options: EvaluationOptions, faces: EvaluationSet, device: torch.device, processes: Processes
) -> tuple[EvaluationRun, Detected]:
    """Run the detector over this process's share of the images and write its predictions as they come."""
    from engine import predict_files
    from models.detector import open_detector
    from models.protocol import ProtocolDetector
    from utils.distributed import done_by_main, merge_over_processes

    detector, checkpoint, name = open_detector(flags, device, "evaluation", ROOT / "experiments")
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
    predicted = EvaluationRun.of_detector(results_folder(name), name, checkpoint.path.name, stamp, settings)
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


if __name__ == "__main__":
    run(main)
