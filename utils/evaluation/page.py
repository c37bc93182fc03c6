"""The page of an evaluation: every image with its hits, its false alarms and the faces that were missed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from utils.datasets.formats.annotations import upright_size
from utils.datasets.labels import DatasetError
from utils.evaluation.report import CONFIDENT_SCORE, Measurement, recall_by_height
from utils.evaluation.wider_eval import GroundTruth, Matches, score_range
from utils.results.page import PageHead, Table, file_url, settings_rows, write_page

# Predictions of a lower score are not shown: WIDER FACE is evaluated down to 0.02, with a hundred boxes per image.
_LOWEST_SCORE = 0.1
_KINDS = {"hit": "hits", "false": "false alarms", "missed": "missed faces", "ignored": "not counted"}


def write_evaluation_page(folder: Path, measured: Measurement, predictions: Mapping[str, np.ndarray]) -> Path | None:
    """Write index.html, which links to the image files; returns None if there is no folder of images.

    Args:
        folder: folder of the results, with pr_curves.png.
        measured: evaluation to show.
        predictions: (N, 5) x, y, width, height, score, by the name of the image.

    Raises:
        OSError: the page cannot be written.
    """
    if measured.faces.images is None:
        return None
    subset, evaluation = measured.faces.largest_subset, measured.evaluation
    precisions = [(f"AP {name}", f"{value:.4f}") for name, value in evaluation.average_precisions.items()]
    recall = Table(
        f"Recall by face height ({subset} faces)",
        ("height", "faces", "recall", f"score >= {CONFIDENT_SCORE}"),
        [
            (f"{row.heights} px", row.faces, f"{row.recall:.3f}", f"{row.recall_confident:.3f}")
            for row in recall_by_height(measured.faces, evaluation)
        ],
    )
    official = "" if measured.faces.official else "; not the official figure of WIDER FACE"
    head = PageHead(
        title=f"{measured.predicted.experiment} on {measured.faces.source_name}",
        summary=f"{len(measured.faces.truths)} images; protocol: {measured.predicted.protocol}{official}",
        lowest_score=_LOWEST_SCORE,
        threshold=CONFIDENT_SCORE,
        settings=settings_rows(measured.predicted.settings),
        metrics=precisions,
        figures=["pr_curves.png"],
        tables=[recall],
        kinds=_KINDS,
    )
    return write_page(folder, head, _entries(folder, measured, predictions), len(measured.faces.truths))


def _entries(folder: Path, measured: Measurement, predictions: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    images, subset = measured.faces.images or [], measured.faces.largest_subset
    lowest, highest = score_range(predictions.values())
    # Scores in [0, 1] are shown as they are, others mapped to it.
    lowest, span = (0.0, 1.0) if lowest >= 0 and highest <= 1 else (lowest, (highest - lowest) or 1.0)
    problems = dict(measured.detected.skipped)
    for truth, image, matches in zip(measured.faces.truths, images, measured.evaluation.matches, strict=True):
        rows = predictions.get(truth.name, np.zeros((0, 5)))
        try:
            width, height = upright_size(image)
        except DatasetError:
            yield {"name": truth.name, "skipped": problems.get(truth.name, "the image cannot be read")}
            continue
        url = file_url(image, folder)
        shown = {"name": truth.name, "width": width, "height": height, "thumbnail": url, "source": url}
        yield shown | {"faces": list(image_faces(truth, matches, rows, subset, lowest, span))}


def image_faces(
    truth: GroundTruth, matches: Matches, rows: np.ndarray, subset: str, lowest: float = 0.0, span: float = 1.0
) -> Iterator[dict[str, Any]]:
    """The predictions of an image and its labelled faces, with their kinds.

    A labelled face counts as missed at every threshold above the score with which it is `found`.

    Args:
        truth: labelled faces of the image.
        matches: matches between predictions and faces.
        rows: (N, 5) predictions, x, y, width, height, score.
        subset: name of the subset whose faces count.
        lowest: offset that is subtracted from scores.
        span: divisor of the scores after the subtraction.
    """
    counted = truth.subsets[subset]
    scores = (rows[:, 4] - lowest) / span
    for index in np.flatnonzero(scores >= _LOWEST_SCORE):
        face = matches.matched_face[index]
        kind = "false" if face < 0 or not matches.is_best_match[index] else "hit"
        kind = "ignored" if face >= 0 and not counted[face] else kind
        yield {"box": _corners(rows[index]), "score": round(float(scores[index]), 4), "kind": kind}
    for index, box in enumerate(truth.boxes):
        found = (matches.face_scores[index] - lowest) / span
        shown: dict[str, Any] = {"box": _corners(box), "kind": "missed" if counted[index] else "ignored"}
        yield shown if np.isnan(found) else shown | {"found": round(float(found), 4)}


def _corners(box: np.ndarray) -> list[float]:
    x, y, width, height = (float(value) for value in box[:4])
    return [round(value, 1) for value in (x, y, x + width, y + height)]
