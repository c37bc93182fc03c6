"""Tests of the summary of false boxes in validation."""

from __future__ import annotations

import numpy as np

from config import ModelConfig
from engine.validation import _by_level
from models.retinaface import RetinaFace


def test_false_boxes_are_counted_by_the_level_of_their_size() -> None:
    """Levels of strides 8, 16 and 32 have anchors from 16, 64 and 256 pixels; two boxes of 300 px in four images."""
    boxes = np.array([[0, 0, 300, 300], [9, 9, 200, 450], [0, 0, 10, 10]], float)
    model = RetinaFace(ModelConfig())
    assert _by_level(boxes, model, 4) == "0.25 of stride 8, 0.00 of stride 16, 0.50 of stride 32"
    assert _by_level(np.zeros((0, 4)), model, 4) == "0.00 of stride 8, 0.00 of stride 16, 0.00 of stride 32"
