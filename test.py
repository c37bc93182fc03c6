"""Measure a detector on labelled images: python test.py --experiment_name=NAME. See README.md, or --help."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence

from config import (
    ROOT,
    EvaluationOptions,
    ExperimentConfig,
    ModelConfig,
    RunOptions,
    WeightOptions,
    parse_flags,
)
from engine import evaluate
from models.detector import open_detector
from utils.cli import choose_device, run
from utils.datasets import find_datasets, read_split
from utils.experiment import Experiment, make_folder

OPTIONS = (RunOptions(), WeightOptions(), EvaluationOptions(), ExperimentConfig().evaluation, ModelConfig)


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse_flags(__doc__ or "", OPTIONS, argv)
    device = choose_device(flags.apply(RunOptions()).gpu_num)
    detector, checkpoint, name = open_detector(flags, device, "evaluation", ROOT / "experiments")
    dataset = flags.apply(EvaluationOptions()).dataset
    images = read_split(find_datasets(dataset, ROOT / "data"), "val")

    start = time.perf_counter()
    precision = evaluate(detector, images)
    seconds = time.perf_counter() - start

    protocol = dataclasses.asdict(detector.detection) | {"size": "original", "iou": 0.5}
    results = {
        "ap_all_faces": precision,
        "images": len(images),
        "faces": sum(len(image.boxes) for image in images),
        "seconds": round(seconds, 1),
        "images_per_second": round(len(images) / seconds, 2),
        "checkpoint": checkpoint.path.name,
        "protocol": protocol,
    }
    folder = make_folder(Experiment(ROOT / "experiments" / name).results_folder)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    lines = [
        f"{results['images']} images, {results['faces']} faces in {seconds:.1f} s",
        f"protocol: {protocol}",
        f"AP over all labelled faces at IoU 0.5: {precision:.4f} (not the official easy / medium / hard figure)",
    ]
    (folder / "results.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    run(main)
