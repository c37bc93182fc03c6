"""Measure a detector on labelled images: python test.py --experiment_name=NAME. See README.md, or --help."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from config import ROOT, EvaluationOptions, ExperimentConfig, ModelConfig, RunOptions, WeightOptions, parse_flags
from engine import ap_of_all_faces, detect_labelled
from models.detector import open_detector
from utils.cli import choose_device, run
from utils.dataset_folder import find_datasets, read_split
from utils.experiment import Experiment, make_folder
from utils.labels import LabelledImage
from utils.structures import Detections
from utils.wider_eval import evaluate, load_ground_truth

OPTIONS = (RunOptions(), WeightOptions(), EvaluationOptions(), ExperimentConfig().evaluation, ModelConfig)


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse_flags(__doc__ or "", OPTIONS, argv)
    device = choose_device(flags.apply(RunOptions()).gpu_num)
    detector, checkpoint, name = open_detector(flags, device, "evaluation", ROOT / "experiments")
    folders = find_datasets(flags.apply(EvaluationOptions()).dataset, ROOT / "data")
    images = read_split(folders, "val")

    start = time.perf_counter()
    found = detect_labelled(detector, images)
    seconds = time.perf_counter() - start

    results = {
        "checkpoint": checkpoint.path.name,
        "protocol": dataclasses.asdict(detector.detection) | {"size": "original"},
        "images": len(images),
        "images_per_second": round(len(images) / seconds, 2),
        "ap_all_faces": ap_of_all_faces(found, images),
    }
    lines = [
        f"{len(images)} images in {seconds:.1f} s ({len(images) / seconds:.1f} images/s)",
        f"protocol: {results['protocol']}",
        f"AP over all labelled faces, not the official figure : {results['ap_all_faces']:.4f}",
    ]
    ground_truth = folders[0] / "val/gt"
    if len(folders) == 1 and ground_truth.is_dir():
        official = evaluate(
            official_predictions(found, images, folders[0] / "val/images"), load_ground_truth(ground_truth)
        )
        results["official_ap"] = official
        lines.append("   ".join(f"{subset.capitalize()} AP : {value:.4f}" for subset, value in official.items()))

    folder = make_folder(Experiment(ROOT / "experiments" / name).results_folder)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (folder / "results.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def official_predictions(
    found: Sequence[Detections], images: Sequence[LabelledImage], folder: Path
) -> dict[str, np.ndarray]:
    """By `event/image`, rows of x, y, width, height, score."""
    predictions = {}
    for detections, labelled in zip(found, images, strict=True):
        x1, y1, x2, y2 = detections.boxes.double().numpy().T
        rows = np.stack([x1, y1, x2 - x1, y2 - y1, detections.scores.double().numpy()], axis=1)
        predictions[labelled.path.relative_to(folder).with_suffix("").as_posix()] = rows
    return predictions


if __name__ == "__main__":
    run(main)
