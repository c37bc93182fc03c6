"""A gallery of the most confident false positives and the tallest missed faces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.drawing import arrange_tiles, draw_box
from utils.evaluation.ground_truth import EvaluationSet
from utils.evaluation.report import CONFIDENT_SCORE
from utils.evaluation.wider_eval import Evaluation
from utils.runtime.images import UnreadableImageError, read_image

_SIDE = 220  # side of a tile in pixels
_COLUMNS = 6
_CONTEXT = 3.0  # side of the cut-out relative to the side of the box
_CAPTION = 30
_FACE_COLOUR, _IGNORED_COLOUR, _PREDICTION_COLOUR = (60, 220, 60), (160, 160, 160), (60, 60, 255)  # BGR
_BACKGROUND = 32


@dataclass(frozen=True)
class Mistake:
    """A false positive or a missed face.

    Attributes:
        image: index of the image in the evaluation set.
        box: x, y, width, height in pixels.
        caption: text that describes the mistake.
    """

    image: int
    box: np.ndarray
    caption: str


def false_positives(
    faces: EvaluationSet, predictions: Mapping[str, np.ndarray], evaluation: Evaluation, limit: int
) -> list[Mistake]:
    """Predictions that match no face, or a face that a better prediction matches, most confident first."""
    mistakes = []
    for number, (truth, matches) in enumerate(zip(faces.truths, evaluation.matches, strict=True)):
        rows = predictions.get(truth.name, np.zeros((0, 5)))
        for index in np.flatnonzero(matches.is_counted(truth.subsets[faces.largest_subset]) & ~matches.is_best_match):
            kind = "no face" if matches.matched_face[index] < 0 else "again"
            mistakes.append((rows[index, 4], Mistake(number, rows[index, :4], f"{kind}, score {rows[index, 4]:.3f}")))
    return [mistake for _, mistake in sorted(mistakes, key=lambda pair: -pair[0])[:limit]]


def missed_faces(faces: EvaluationSet, evaluation: Evaluation, limit: int) -> list[Mistake]:
    """Counted faces that no prediction of any score matches, tallest first."""
    mistakes = []
    for number, (truth, matches) in enumerate(zip(faces.truths, evaluation.matches, strict=True)):
        for index in np.flatnonzero(truth.subsets[faces.largest_subset] & np.isnan(matches.face_scores)):
            box = truth.boxes[index]
            mistakes.append(Mistake(number, box, f"missed, {box[2]:.0f} x {box[3]:.0f} px"))
    return sorted(mistakes, key=lambda mistake: -mistake.box[3])[:limit]


def draw_error_gallery(
    faces: EvaluationSet, predictions: Mapping[str, np.ndarray], evaluation: Evaluation, limit: int
) -> np.ndarray:
    """Draw up to `limit` false positives and up to `limit` missed faces.

    Counted faces are green, other faces grey, confident predictions red; the box in question has a thick line.

    Returns:
        (H, W, 3) uint8 BGR.
    """
    wrong = false_positives(faces, predictions, evaluation, limit)
    missed = missed_faces(faces, evaluation, limit)
    parts = []
    for heading, mistakes, colour in (
        (f"{len(wrong)} false positives, the most confident first", wrong, _PREDICTION_COLOUR),
        (f"{len(missed)} missed faces, the tallest first", missed, _FACE_COLOUR),
    ):
        parts.append(_heading(heading))
        if mistakes:
            tiles = [_tile(mistake, faces, predictions, colour) for mistake in mistakes]
            parts.append(arrange_tiles(tiles, _COLUMNS, _BACKGROUND))
    return np.concatenate(parts)


def _heading(text: str) -> np.ndarray:
    canvas = np.full((_CAPTION, _SIDE * _COLUMNS, 3), 255, np.uint8)
    cv2.putText(canvas, text, (8, 21), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
    return canvas


def _tile(
    mistake: Mistake, faces: EvaluationSet, predictions: Mapping[str, np.ndarray], colour: tuple[int, int, int]
) -> np.ndarray:
    assert faces.images is not None
    truth, path = faces.truths[mistake.image], faces.images[mistake.image]
    canvas, to_tile = _cut_out(path, mistake.box)
    counted = truth.subsets[faces.largest_subset]
    for box, counts in zip(truth.boxes, counted, strict=True):
        draw_box(canvas, to_tile(box), _FACE_COLOUR if counts else _IGNORED_COLOUR, 1)
    for row in predictions.get(truth.name, np.zeros((0, 5))):
        if row[4] >= CONFIDENT_SCORE:
            draw_box(canvas, to_tile(row[:4]), _PREDICTION_COLOUR, 1)
    draw_box(canvas, to_tile(mistake.box), colour, 3)
    caption = np.full((_CAPTION, _SIDE, 3), _BACKGROUND, np.uint8)
    name = Path(truth.name).name
    for text, y in ((mistake.caption, 12), (name if len(name) < 34 else f"...{name[-30:]}", 25)):
        cv2.putText(caption, text, (3, y), cv2.FONT_HERSHEY_SIMPLEX, 0.36, (255, 255, 255), 1, cv2.LINE_AA)
    return np.concatenate([canvas, caption])


def _cut_out(path: Path, box: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """A tile of a box and its surroundings, and a function from xywh in the image to xyxy in the tile."""
    side = max(32.0, _CONTEXT * float(max(box[2:])))
    scale = _SIDE / side
    corner = box[:2] + box[2:] / 2 - side / 2

    def to_tile(other: np.ndarray) -> np.ndarray:
        start = (other[:2] - corner) * scale
        return np.concatenate([start, start + other[2:] * scale])

    try:
        image = read_image(path)
    except UnreadableImageError:
        return np.full((_SIDE, _SIDE, 3), _BACKGROUND, np.uint8), to_tile
    matrix = np.array([[scale, 0, -corner[0] * scale], [0, scale, -corner[1] * scale]])
    border = (_BACKGROUND, _BACKGROUND, _BACKGROUND)
    return cv2.warpAffine(image, matrix, (_SIDE, _SIDE), borderValue=border), to_tile
