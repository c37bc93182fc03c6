"""The report of an evaluation: lines for the terminal, results.txt, results.json, curves, and a row of results.csv."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.evaluation.ground_truth import EvaluationSet
from utils.evaluation.localisation import LocalisationAP
from utils.evaluation.prediction_set import PredictionSet
from utils.evaluation.wider_eval import Curve, Evaluation
from utils.results.own_files import OwnFiles
from utils.runtime.manifest import read_object

# Boundaries of the classes of face height, in pixels of the original image.
_HEIGHTS = (16, 32, 64, 128)
_REPORT_FILES = ("results.txt", "results.json", "pr_curves.png")
CONFIDENT_SCORE = 0.5  # the default threshold of inference.py
_TABLE_COLUMNS = (
    "date experiment checkpoint ground_truth images easy medium hard all images_per_second protocol".split()
)


@dataclass(frozen=True)
class DetectionStats:
    """Statistics of the detector in this run.

    Attributes:
        images: number of images that were processed.
        seconds: duration of the detection.
        skipped: name of each image that could not be read, and the reason.
        landmark_errors: (K,) errors of the K detected faces with labelled landmarks; None if no face has any.
    """

    images: int = 0
    seconds: float = 0.0
    skipped: Sequence[tuple[str, str]] = ()
    landmark_errors: np.ndarray | None = None

    @property
    def images_per_second(self) -> float | None:
        return round(self.images / self.seconds, 2) if self.images else None

    @property
    def landmark_error(self) -> float | None:
        """Mean error relative to the square root of the face's area; None if there is none to average."""
        errors = self.landmark_errors
        return None if errors is None or not len(errors) else float(errors.mean())


@dataclass(frozen=True)
class Measurement:
    """An evaluation with everything that its report contains.

    Attributes:
        predicted: predictions and the settings with which they were made.
        faces: ground truth.
        evaluation: result of the comparison.
        detected: statistics of the detector; empty if predictions were given.
        with_predictions: names of the images that have predictions, which may be empty.
        localisation: AP at higher IoUs than the official evaluation's.
        standard_errors: standard error of the AP by subset; empty if not requested.
    """

    predicted: PredictionSet
    faces: EvaluationSet
    evaluation: Evaluation
    detected: DetectionStats
    with_predictions: Set[str]
    localisation: LocalisationAP
    standard_errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def without_predictions(self) -> list[str]:
        return [name for name in self.faces.names if name not in self.with_predictions]


@dataclass(frozen=True)
class HeightClass:
    """Number of counted faces in a range of heights, and their recall at any score and at `CONFIDENT_SCORE`."""

    heights: str
    faces: int
    recall: float
    recall_confident: float


def confident_false_boxes(
    predictions: Mapping[str, np.ndarray], faces: EvaluationSet, evaluation: Evaluation
) -> np.ndarray:
    """(N, 4) x, y, width, height of all predictions with a score of at least 0.5 that match no face, or one again."""
    found = [np.zeros((0, 4))]
    for truth, matches in zip(faces.truths, evaluation.matches, strict=True):
        rows = predictions.get(truth.name, np.zeros((0, 5)))
        is_false = matches.is_counted(truth.subsets[faces.largest_subset]) & ~matches.is_best_match
        found.append(rows[is_false & (rows[:, 4] >= CONFIDENT_SCORE), :4])
    return np.concatenate(found)


def recall_by_height(faces: EvaluationSet, evaluation: Evaluation) -> list[HeightClass]:
    """Recall at any score, and at a score of at least 0.5, by the height of the faces.

    The faces are those of the largest subset. A range without faces has a recall of 0.
    """
    counted = [truth.subsets[faces.largest_subset] for truth in faces.truths]
    heights = np.concatenate([truth.boxes[counts, 3] for truth, counts in zip(faces.truths, counted, strict=True)])
    scores = np.concatenate(
        [matches.face_scores[counts] for matches, counts in zip(evaluation.matches, counted, strict=True)]
    )
    classes = np.digitize(heights, _HEIGHTS)
    names = [f"under {_HEIGHTS[0]}", *(f"{low} to {high}" for low, high in pairwise(_HEIGHTS))]
    rows = []
    for number, name in enumerate([*names, f"from {_HEIGHTS[-1]}"]):
        members = scores[classes == number]
        count = max(1, len(members))
        found, sure = np.sum(~np.isnan(members)), np.sum(members >= CONFIDENT_SCORE)
        rows.append(HeightClass(name, len(members), float(found / count), float(sure / count)))
    return rows


def describe(measured: Measurement) -> list[str]:
    """The lines of the report; the last one is the AP."""
    count, detected = len(measured.faces.truths), measured.detected
    lines = []
    if detected.images:
        kept = len(measured.with_predictions) - detected.images
        lines.append(
            f"{detected.images} images in {detected.seconds:.1f} s ({detected.images_per_second:.1f} images/s)"
            + (f", {kept} from an earlier run" if kept else "")
        )
    lines += [f"skipped {name}: {reason}; no faces are detected in it" for name, reason in detected.skipped]
    absent = measured.without_predictions
    if len(absent) > len(detected.skipped):
        lines.append(f"{len(absent)} of {count} images have no predictions and count as empty; first {absent[0]}")
    lines += [f"protocol: {measured.predicted.protocol}", f"ground truth: {measured.faces.source_name}, {count} images"]
    subset = measured.faces.largest_subset
    lines.append(f"{f'face height ({subset} faces)':<24}{'faces':>7}{'recall':>9}{f'score >= {CONFIDENT_SCORE}':>14}")
    for row in recall_by_height(measured.faces, measured.evaluation):
        lines.append(f"{row.heights + ' px':<24}{row.faces:>7}{row.recall:>9.3f}{row.recall_confident:>14.3f}")
    if detected.landmark_errors is not None and detected.landmark_error is not None:
        found = f"landmark error over {len(detected.landmark_errors)} detected faces"
        lines.append(f"{found} : {100 * detected.landmark_error:.2f} % of the root of the face's area")
    localised = measured.localisation
    lines.append(
        f"AP over {subset} faces at IoU 0.5:0.95 : {localised.ap:.4f}   at 0.5 : {localised.ap50:.4f}   "
        f"at 0.75 : {localised.ap75:.4f} (COCO)"
    )
    if measured.standard_errors:
        errors = "   ".join(f"{subset} {error:.4f}" for subset, error in measured.standard_errors.items())
        lines.append(f"standard error of the AP over such images: {errors}")
    if not measured.faces.faces_counted:
        lines.append(f"no face of {measured.faces.source_name} counts, so that the AP is 0")
    precisions = measured.evaluation.average_precisions
    if measured.faces.official:
        lines.append("   ".join(f"{subset.capitalize()} AP : {value:.4f}" for subset, value in precisions.items()))
    else:
        (value,) = precisions.values()
        lines.append(f"AP over all labelled faces, not the official WIDER FACE figure : {value:.4f}")
    return lines


def check_report_is_ours(folder: Path, table: Path, *, with_gallery: bool) -> None:
    """Check that neither the report in this folder, nor the table to append to, is a file of the user.

    Raises:
        UserError: one is; the message says what to do instead.
    """
    names = (*_REPORT_FILES, "errors.png")
    own = OwnFiles(folder)
    if own.is_new and {"experiment", "ground_truth", "ap"} <= read_object(folder / "results.json").keys():
        own.adopt(folder / name for name in names)
    own.check(folder / name for name in (names if with_gallery else _REPORT_FILES))
    header = ",".join(_TABLE_COLUMNS)
    if table.is_file() and table.stat().st_size and not table.read_bytes().startswith(header.encode()):
        raise UserError(f"{table}: is another table than that of all runs; move it, or choose another --output_dir")


def write_report(folder: Path, measured: Measurement) -> None:
    """Write results.txt, results.json and pr_curves.png into a folder that exists.

    Raises:
        OSError: a file cannot be written.
        UserError: a file was not written by a run as it stands; see `check_report_is_ours`.
    """
    with OwnFiles(folder).replaced(*(folder / name for name in _REPORT_FILES)) as (text, values, curves):
        text.write_text("\n".join(describe(measured)) + "\n", encoding="utf-8", errors="backslashreplace")
        values.write_text(json.dumps(_as_json(measured), indent=2) + "\n", encoding="utf-8")
        title = f"{measured.predicted.experiment}\n{measured.predicted.protocol}"
        _draw_curves(curves, measured.evaluation.curves, title)


def _as_json(measured: Measurement) -> dict[str, Any]:
    return {
        "experiment": measured.predicted.experiment,
        "checkpoint": measured.predicted.checkpoint,
        "protocol": measured.predicted.protocol,
        "settings": dict(measured.predicted.settings),
        "ground_truth": measured.faces.source_name,
        "official": measured.faces.official,
        "images": len(measured.faces.truths),
        "faces": {subset: curve.faces for subset, curve in measured.evaluation.curves.items()},
        "ap": measured.evaluation.average_precisions,
        "localisation_ap": vars(measured.localisation),
        "landmark_error": measured.detected.landmark_error,
        "ap_standard_errors": dict(measured.standard_errors),
        "recall_by_height": [vars(row) for row in recall_by_height(measured.faces, measured.evaluation)],
        "detected_in_this_run": measured.detected.images,
        "seconds": round(measured.detected.seconds, 2),
        "images_per_second": measured.detected.images_per_second,
        "skipped": [{"name": name, "reason": reason} for name, reason in measured.detected.skipped],
        "without_predictions": measured.without_predictions,
    }


def append_to_table(path: Path, measured: Measurement) -> None:
    """Append a row to the table of all runs, which is created if necessary.

    Raises:
        OSError: the file cannot be written.
    """
    precisions = {subset: f"{value:.4f}" for subset, value in measured.evaluation.average_precisions.items()}
    row = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "experiment": measured.predicted.experiment,
        "checkpoint": measured.predicted.checkpoint,
        "ground_truth": measured.faces.source_name,
        "images": len(measured.faces.truths),
        "images_per_second": measured.detected.images_per_second,
        "protocol": measured.predicted.protocol,
        **precisions,
    }
    with path.open("a", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, _TABLE_COLUMNS)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def _draw_curves(path: Path, curves: Mapping[str, Curve], title: str) -> None:
    from matplotlib.figure import Figure  # instead of pyplot, which may need a display

    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    for subset, curve in curves.items():
        shown = curve.precision > 0
        axes.plot(curve.recall[shown], curve.precision[shown], label=f"{subset}  {curve.average_precision:.4f}")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.01))
    axes.set_title(title, fontsize="small")
    axes.grid(alpha=0.3)
    axes.legend(title="average precision", loc="lower left")
    figure.savefig(path, format="png", dpi=100)
