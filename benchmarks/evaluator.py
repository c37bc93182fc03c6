"""Seconds and memory of the WIDER FACE evaluation against the number of boxes: python -m benchmarks.evaluator.

Faces and predictions are synthetic: 3,226 images with 12 faces each, as many as the validation set has. For each number
of boxes the text files are written to a temporary folder (40 bytes per box), read and evaluated.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from utils.evaluation.predictions import read_predictions, write_predictions
from utils.evaluation.wider_eval import SUBSETS, GroundTruth, evaluate
from utils.runtime.cli import run

_IMAGES, _FACES = 3226, 12


def make_ground_truth(generator: np.random.Generator) -> list[GroundTruth]:
    truths = []
    for number in range(_IMAGES):
        boxes = generator.uniform(8, 900, (_FACES, 4))
        boxes[:, 2:] = np.exp(generator.normal(3.2, 0.8, (_FACES, 2)))
        subsets = {
            subset: generator.random(_FACES) < part for subset, part in zip(SUBSETS, (0.2, 0.4, 0.8), strict=True)
        }
        truths.append(GroundTruth(f"event{number % 61}/{number}", boxes, subsets))
    return truths


def write_all_predictions(folder: Path, truths: list[GroundTruth], boxes: int, generator: np.random.Generator) -> None:
    """Write predictions: slightly displaced faces, and boxes at random places."""
    for number, truth in enumerate(truths):
        count = boxes // _IMAGES + (number < boxes % _IMAGES)
        rows = np.concatenate([generator.uniform(8, 900, (count, 4)), generator.random((count, 1))], axis=1)
        near = min(count, _FACES)
        rows[:near, :4] = truth.boxes[:near] + generator.normal(0, 2, (near, 4))
        write_predictions(folder, truth.name, rows[np.argsort(-rows[:, 4])])


def measure(folder: Path, truths: list[GroundTruth], repeats: int) -> tuple[float, float]:
    """Measure the median seconds of reading and of evaluating."""
    reading, evaluating = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        predictions = read_predictions(folder, [truth.name for truth in truths])
        read = time.perf_counter()
        evaluate(predictions, truths)
        reading.append(read - start)
        evaluating.append(time.perf_counter() - read)
    return statistics.median(reading), statistics.median(evaluating)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=float, default=1e7, help="largest number of boxes (default: 1e7)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the median is shown (default: 3)")
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    truths = make_ground_truth(generator)
    print(f"{'boxes':>10}{'read, s':>10}{'evaluate, s':>13}{'both, us a box':>16}{'peak, MB':>10}")
    # Ascending, because the peak of memory is the peak of the process so far.
    for boxes in (round(10 ** (4 + step / 2)) for step in range(7)):
        if boxes > arguments.largest:
            break
        with TemporaryDirectory() as folder:
            write_all_predictions(Path(folder), truths, boxes, generator)
            read, evaluated = measure(Path(folder), truths, arguments.repeats)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
        each = 1e6 * (read + evaluated) / boxes
        print(f"{boxes:>10,}{read:>10.2f}{evaluated:>13.2f}{each:>16.2f}{peak:>10.0f}", flush=True)


if __name__ == "__main__":
    run(main)
