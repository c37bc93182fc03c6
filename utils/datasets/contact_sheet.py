"""Contact sheets of augmented training crops."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path

import cv2
import numpy as np

from utils.datasets.face_dataset import Batch
from utils.drawing import BOX_COLOUR, arrange_tiles, draw_box, draw_landmarks
from utils.runtime.images import write_image

_MAX_TILE_SIDE = 320


def write_contact_sheet(path: Path, batches: Iterable[Batch], count: int) -> None:
    """Draw the first `count` crops with their faces, or all if there are fewer, and write them as one image.

    Args:
        path: file to write; its suffix selects the format, as in `write_image`.
        batches: crops and their faces.
        count: number of crops.

    Raises:
        OSError: the file cannot be written.
    """
    tiles = list(islice(chain.from_iterable(map(draw_crops, batches)), count))
    write_image(path, arrange_tiles(tiles, math.ceil(math.sqrt(len(tiles)))))


def draw_crops(batch: Batch) -> list[np.ndarray]:
    """Draw boxes and landmarks into B crops, each (T, T, 3) uint8 BGR of at most 320 pixels."""
    side = min(batch.images.shape[2], _MAX_TILE_SIDE)
    targets, counts = batch.targets, batch.targets.counts
    boxes = (targets.boxes * side).split(counts)
    landmarks = (targets.landmarks * side).split(counts)
    known = targets.has_landmarks.split(counts)
    tiles = []
    for number, image in enumerate(batch.images):
        tile = cv2.resize(image.permute(1, 2, 0).numpy(), (side, side), interpolation=cv2.INTER_AREA)
        for box, points, has_landmarks in zip(boxes[number], landmarks[number], known[number], strict=True):
            draw_box(tile, box.numpy(), BOX_COLOUR, 1)
            if has_landmarks:
                draw_landmarks(tile, points.numpy(), max(1, round(float(box[2] - box[0]) / 25)))
        tiles.append(tile)
    return tiles
