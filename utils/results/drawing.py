"""Drawing detections so that they can be read on small and large pictures."""

from __future__ import annotations

import cv2
import numpy as np

from utils.structures import Detections

BOX_COLOUR = (60, 220, 60)  # BGR
_TEXT_COLOUR = (0, 0, 0)
# Left eye, right eye, nose, left mouth corner, right mouth corner.
LANDMARK_COLOURS = ((60, 60, 255), (60, 200, 255), (255, 60, 255), (255, 200, 60), (255, 100, 60))
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def draw_detections(image: np.ndarray, detections: Detections) -> np.ndarray:
    """A copy of the image with boxes, landmarks and scores.

    Lines and letters grow with the picture. A score that would cover its neighbours, being much wider than its face,
    is left out.

    Args:
        image: (H, W, 3) uint8 BGR.
        detections: in pixels of the image.
    """
    canvas = image.copy()
    unit = max(1.0, min(image.shape[:2]) / 500)
    # The best are drawn last, on top.
    for index in reversed(range(len(detections))):
        x1, y1, x2, y2 = detections.boxes[index].round().int().tolist()
        cv2.rectangle(canvas, (x1, y1), (x2, y2), BOX_COLOUR, max(1, round(unit * 1.2)))
        if detections.landmarks is not None:
            radius = max(1, round(min(unit * 2, (x2 - x1) / 25)))
            points = detections.landmarks[index].round().int().tolist()
            for colour, point in zip(LANDMARK_COLOURS, points, strict=True):
                cv2.circle(canvas, point, radius, colour, cv2.FILLED, cv2.LINE_AA)
        _draw_score(canvas, f"{float(detections.scores[index]):.2f}", (x1, y1, x2, y2), unit)
    return canvas


def _draw_score(canvas: np.ndarray, text: str, box: tuple[int, int, int, int], unit: float) -> None:
    scale, stroke = 0.4 * unit, max(1, round(unit * 0.8))
    (width, height), descent = cv2.getTextSize(text, _FONT, scale, stroke)
    x1, y1, x2, _ = box
    if width > 1.5 * (x2 - x1):
        return
    label_height = height + descent
    left = min(max(x1, 0), max(0, canvas.shape[1] - width))
    bottom = y1 if y1 >= label_height else max(y1, 0) + label_height  # inside the box where there is no room above
    cv2.rectangle(canvas, (left, bottom - label_height), (left + width, bottom), BOX_COLOUR, cv2.FILLED)
    cv2.putText(canvas, text, (left, bottom - descent + 1), _FONT, scale, _TEXT_COLOUR, stroke, cv2.LINE_AA)
