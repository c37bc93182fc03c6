"""A stub detector, and the configuration and landmarks for overfitting images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from config import DataConfig
from engine.stream import BatchDetector
from utils.structures import Detections

BLACK_IMAGE = np.zeros((40, 64, 3), np.uint8)


class WholeImageDetector:
    """Returns one face as large as the image for every image."""

    num_workers = 1

    def __init__(self, max_pixels: int = 0) -> None:
        self.max_pixels = max_pixels
        self.batches: list[int] = []

    def size_seen(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        return size_hw

    def for_worker(self) -> BatchDetector:
        return self

    def detect_batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
        self.batches.append(len(images))
        height, width = images[0].shape[:2]
        box = torch.tensor([[0.0, 0, width, height]])
        return [Detections(box, torch.ones(1), None)] * len(images)


# Every crop is the whole image, without augmentation.
WITHOUT_AUGMENTATION = DataConfig(
    im_size=128,
    crop_scales=(1.0,),
    mosaic_probability=0,
    flip_probability=0,
    colour_probability=0,
    grey_probability=0,
    num_workers=0,
)


def typical_landmarks(box: np.ndarray) -> np.ndarray:
    """Return five landmarks at typical places in a box."""
    places = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]])
    points: np.ndarray = (box[:2] + places * (box[2:] - box[:2])).astype(np.float32)
    return points
