"""Drawing of boxes, landmarks and scores, and of tiles side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from utils.structures import Detections  # which draw themselves

BOX_COLOUR = (60, 220, 60)  # BGR
_TEXT_COLOUR = (0, 0, 0)
# Left eye, right eye, nose, left mouth corner, right mouth corner.
_LANDMARK_COLOURS = ((60, 60, 255), (60, 200, 255), (255, 60, 255), (255, 200, 60), (255, 100, 60))
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def draw_detections(image: np.ndarray, detections: Detections) -> np.ndarray:
    """Draw boxes, landmarks and scores into a copy of an image.

    Lines and letters scale with the image. A score that is much wider than its face is left out.

    Args:
        image: (H, W, 3) uint8 BGR.
        detections: faces in pixels of the image.
    """
    canvas = image.copy()
    unit = max(1.0, min(image.shape[:2]) / 500)
    # The best detections are drawn last, on top.
    for index in reversed(range(len(detections))):
        box = detections.boxes[index].numpy()
        draw_box(canvas, box, BOX_COLOUR, max(1, round(unit * 1.2)))
        if detections.landmarks is not None:
            radius = max(1, round(min(unit * 2, (box[2] - box[0]) / 25)))
            draw_landmarks(canvas, detections.landmarks[index].numpy(), radius)
        _draw_score(canvas, f"{float(detections.scores[index]):.2f}", box, unit)
    return canvas


def draw_box(canvas: np.ndarray, box: np.ndarray, colour: tuple[int, int, int], stroke: int) -> None:
    """Draw a (4,) xyxy box."""
    x1, y1, x2, y2 = np.clip(box, -1e4, 1e5).round().astype(int).tolist()
    cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, stroke)


def draw_landmarks(canvas: np.ndarray, landmarks: np.ndarray, radius: int) -> None:
    """Draw (5, 2) landmarks as discs of different colours."""
    points = np.clip(landmarks, -1e4, 1e5).round().astype(int).tolist()
    for colour, point in zip(_LANDMARK_COLOURS, points, strict=True):
        cv2.circle(canvas, point, radius, colour, cv2.FILLED, cv2.LINE_AA)


def _draw_score(canvas: np.ndarray, text: str, box: np.ndarray, unit: float) -> None:
    scale, stroke = 0.4 * unit, max(1, round(unit * 0.8))
    (width, height), descent = cv2.getTextSize(text, _FONT, scale, stroke)
    x1, y1, x2, _ = box.round().astype(int).tolist()
    if width > 1.5 * (x2 - x1):
        return
    label_height = height + descent
    left = min(max(x1, 0), max(0, canvas.shape[1] - width))
    bottom = y1 if y1 >= label_height else max(y1, 0) + label_height  # inside the box where there is no space above
    cv2.rectangle(canvas, (left, bottom - label_height), (left + width, bottom), BOX_COLOUR, cv2.FILLED)
    cv2.putText(canvas, text, (left, bottom - descent + 1), _FONT, scale, _TEXT_COLOUR, stroke, cv2.LINE_AA)


def arrange_tiles(tiles: Sequence[np.ndarray], columns: int, background: int = 0) -> np.ndarray:
    """Arrange (H, W, 3) tiles of the same size in rows; the last row is filled with the grey level `background`."""
    height, width = tiles[0].shape[:2]
    sheet = np.full((math.ceil(len(tiles) / columns) * height, columns * width, 3), background, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * height, index % columns * width
        sheet[top : top + height, left : left + width] = tile
    return sheet
