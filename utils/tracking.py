"""Face tracking over the frames of a video: Kalman filters predict boxes, which are matched by their IoU."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torchvision.ops import box_iou

_MIN_IOU = 0.3
# Standard deviations relative to the size of the face: of a detected box, and of the change of velocity per frame.
_MEASUREMENT_NOISE, _VELOCITY_NOISE = 0.05, 0.02


class FaceTracker:
    """Assigns ids to the faces of consecutive frames, so that a face keeps its id as long as it is visible.

    A simple online tracker like SORT (arXiv:1602.00763). A face that is not detected for a while is assumed to keep its
    velocity; if it reappears where it is expected, it keeps its id.
    """

    def __init__(self, frames_per_second: float, patience_seconds: float = 1.0) -> None:
        """Start tracking in a video.

        Args:
            frames_per_second: frame rate of the video.
            patience_seconds: time after which a face that is not detected loses its id.
        """
        self._patience = max(1, round(frames_per_second * patience_seconds))
        self._tracks: list[_Track] = []
        self._next_id = 1

    def update(self, boxes: np.ndarray) -> list[int]:
        """Assign ids to the faces of the next frame.

        Args:
            boxes: (N, 4) xyxy in pixels, of positive area.

        Returns:
            N ids, numbered from 1 in the order of appearance.
        """
        expected = np.array([track.predict() for track in self._tracks], np.float32).reshape(-1, 4)
        ids = [0] * len(boxes)
        for track, index in _match(expected, np.asarray(boxes, np.float32)):
            ids[index] = self._tracks[track].identifier
            self._tracks[track].correct(boxes[index])
        self._tracks = [track for track in self._tracks if track.unseen <= self._patience]
        for index, identifier in enumerate(ids):
            if not identifier:
                ids[index] = self._next_id
                self._tracks.append(_Track(self._next_id, boxes[index]))
                self._next_id += 1
        return ids


def _match(expected: np.ndarray, boxes: np.ndarray) -> Sequence[tuple[int, int]]:
    """Pairs of expected and detected boxes with the largest sum of IoUs, except those that hardly overlap."""
    from scipy.optimize import linear_sum_assignment  # takes half a second to import, and only tracking needs it

    overlaps = box_iou(torch.from_numpy(expected), torch.from_numpy(boxes)).numpy()
    rows, columns = linear_sum_assignment(overlaps, maximize=True)
    return [(row, column) for row, column in zip(rows, columns, strict=True) if overlaps[row, column] >= _MIN_IOU]


class _Track:
    """One face: a Kalman filter of its centre and size, which change at a constant rate.

    Attributes:
        identifier: id of the face.
        unseen: number of frames since it was last detected.
    """

    def __init__(self, identifier: int, box: np.ndarray) -> None:
        self.identifier = identifier
        self.unseen = 0
        self._filter = cv2.KalmanFilter(8, 4, 0, cv2.CV_64F)
        self._filter.transitionMatrix = np.eye(8) + np.eye(8, k=4)
        self._filter.measurementMatrix = np.eye(4, 8)
        self._filter.statePost = np.concatenate([_centre_and_size(box), np.zeros(4)])[:, None]
        self._filter.errorCovPost = self._scaled_square(box, np.array([_MEASUREMENT_NOISE] * 4 + [0.2] * 4))

    def predict(self) -> np.ndarray:
        """Predict the (4,) xyxy box of the face in the next frame."""
        self.unseen += 1
        x, y, width, height = self._filter.predict()[:4, 0]
        centre, half = np.array([x, y]), np.maximum([width, height], 1) / 2
        return np.concatenate([centre - half, centre + half])

    def correct(self, box: np.ndarray) -> None:
        """Update the filter with the (4,) xyxy box of a detection."""
        self.unseen = 0
        self._filter.measurementNoiseCov = self._scaled_square(box, np.full(4, _MEASUREMENT_NOISE))
        self._filter.processNoiseCov = self._scaled_square(box, np.array([0.0] * 4 + [_VELOCITY_NOISE] * 4))
        self._filter.correct(_centre_and_size(box)[:, None])

    @staticmethod
    def _scaled_square(box: np.ndarray, deviations: np.ndarray) -> np.ndarray:
        """Diagonal covariance for standard deviations relative to the larger side of the face."""
        return np.diag((deviations * max(1.0, *(box[2:] - box[:2]))) ** 2).astype(np.float64)


def _centre_and_size(box: np.ndarray) -> np.ndarray:
    box = np.asarray(box, np.float64)
    return np.concatenate([(box[:2] + box[2:]) / 2, box[2:] - box[:2]])
