"""What the loops do when something goes wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from config import ExperimentConfig, ModelConfig
from engine import detect_pictures
from models.detector import FaceDetector
from models.retinaface import RetinaFace
from utils.sources import Picture
from utils.structures import Detections

SMALL, LARGE = np.zeros((40, 64, 3), np.uint8), np.full((40, 64, 3), 9, np.uint8)


class ShortOfMemory(FaceDetector):
    """Fails on batches that hold the large picture."""

    def __init__(self, error: Exception) -> None:
        model = ModelConfig.for_backbone("mobilenet0.25", num_anchor=2)
        super().__init__(RetinaFace(model), ExperimentConfig().inference)
        self.error = error

    def detect_batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
        if any(image is LARGE for image in images):
            raise self.error
        return super().detect_batch(images)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: you tried 9 bytes")])
def test_a_picture_too_large_for_the_memory_stops_no_other(error: Exception) -> None:
    pictures = [Picture("a", SMALL), Picture("b", LARGE), Picture("c", SMALL), Picture("d", None, "broken")]
    torch.manual_seed(0)
    results = list(detect_pictures(ShortOfMemory(error), pictures, batch_same_sizes=True))
    assert [picture.name for picture, _ in results] == ["a", "b", "c", "d"]
    problems = [picture.problem for picture, _ in results]
    assert problems == [None, "64x40 pixels are too many for the memory", None, "broken"]


def test_other_failures_are_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        list(detect_pictures(ShortOfMemory(RuntimeError("a bug")), [Picture("b", LARGE)], batch_same_sizes=False))
