"""Recognising predictions that are not x, y, width, height, score in pixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from utils.datasets.labels import MAX_NORMALISED_SUM
from utils.evaluation.ground_truth import EvaluationSet

_MAX_PERCENT = 101.0  # boxes may reach outside of the image a little
_MIN_ROWS = 20  # fewer rows may have something in common by chance
_IMAGES_TO_EVALUATE = 100
_MIN_RISE = 0.02
# Index of x, y, width, height and score, or of what stands for them.
_ORDERS = {"": (0, 1, 2, 3, 4), " with y before x": (1, 0, 3, 2, 4), " after a class or score": (1, 2, 3, 4, 0)}


def suspected_form(predictions: Mapping[str, np.ndarray], faces: EvaluationSet) -> str | None:
    """Guess the form of predictions, if another one than x, y, width, height, score in pixels fits the faces better.

    A detector that is merely weak fits them worse in any other form.

    Args:
        predictions: (N, 5) rows of the files, by the name of the image.
        faces: ground truth.
    """
    rows = np.concatenate(list(predictions.values()))
    truths = np.concatenate([truth.boxes for truth in faces.truths])
    if not len(rows) or not len(truths):
        return None
    largest = rows[:, :4].max(axis=1)
    if np.median(largest) <= MAX_NORMALISED_SUM:
        return "its boxes look normalised to 0..1"
    ends = [(truth.boxes[:, :2] + truth.boxes[:, 2:]).max() for truth in faces.truths if len(truth.boxes)]
    if np.quantile(largest, 0.99) <= _MAX_PERCENT < np.median(ends) / 2:
        return "its boxes look like percents of the image"
    fitting = _fitting_form(predictions, faces)
    if fitting or len(rows) < _MIN_ROWS:
        return f"its boxes look like {fitting}" if fitting else None
    if (rows[:, 0] == rows[0, 0]).all():
        return "its first numbers are all the same, like a class"
    if _share_like_corners(rows) > 0.99 and _share_like_corners(truths) < 0.5:
        return "its boxes look like corners"
    return None


def _fitting_form(predictions: Mapping[str, np.ndarray], faces: EvaluationSet) -> str | None:
    """Name of the form in which the AP over some of the images is highest; None if it is the expected form.

    It must be higher by more than finding a single face by chance.
    """
    subset = faces.largest_subset
    truths = [t for t in faces.truths if t.subsets[subset].any() and len(predictions.get(t.name, ()))]
    truths = truths[:: max(1, len(truths) // _IMAGES_TO_EVALUATE)]
    if not truths:
        return None
    sample = replace(faces, truths=truths)

    def average_precision(form: np.ndarray, order: Sequence[int]) -> float:
        changed = {
            t.name: np.concatenate([rows[:, :4] @ form.T, rows[:, 4:]], axis=1)
            for t in truths
            for rows in [predictions[t.name][:, order]]
        }
        return sample.evaluate(changed).average_precisions[subset]

    expected = average_precision(np.eye(4), _ORDERS[""])
    best, name = max((average_precision(form, order), name) for name, form, order in _other_forms())
    return name if best > expected + min(0.9, _MIN_RISE + 1 / sample.faces_counted) else None


def _other_forms() -> Iterator[tuple[str, np.ndarray, Sequence[int]]]:
    """Yield names, matrices to x, y, width, height, and orders of the numbers."""
    corners, centres = np.eye(4) - np.eye(4, k=-2), np.eye(4) - np.eye(4, k=2) / 2
    forms = {"x y width height": np.eye(4), "corners x1 y1 x2 y2": corners, "centres x y width height": centres}
    for name, form in forms.items():
        for order_name, order in _ORDERS.items():
            if form is not forms["x y width height"] or order_name:
                yield name + order_name, form, order
        for factor in (0.25, 0.5, 2, 4):
            yield f"{name} at {1 / factor:g} times the size", form * factor, _ORDERS[""]


def _share_like_corners(boxes: np.ndarray) -> float:
    """Share of (N, 4) boxes of which the third and fourth number exceed the first and second."""
    return float((boxes[:, 2:4] > boxes[:, :2]).all(axis=1).mean())
