"""Pictures of what the network is shown in training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor

from utils.datasets.face_dataset import Batch
from utils.results.drawing import BOX_COLOUR, LANDMARK_COLOURS
from utils.runtime.images import write_image
from utils.structures import BatchTargets

_LARGEST_TILE = 320


def write_contact_sheet(path: Path, batches: Iterable[Batch], count: int) -> None:
    """Draw the first `count` crops, or all if there are fewer, and write them as one picture.

    Args:
        path: its suffix decides the format, as in `write_image`.

    Raises:
        OSError: it cannot be written.
    """
    tiles = list(islice(chain.from_iterable(map(draw_tiles, batches)), count))
    write_image(path, arrange(tiles, math.ceil(math.sqrt(len(tiles)))))


def draw_contact_sheet(batch: Batch, columns: int) -> np.ndarray:
    """(H, W, 3) uint8 BGR: the crops of a batch in rows, with their faces marked."""
    return arrange(draw_tiles(batch), columns)


def draw_tiles(batch: Batch) -> list[np.ndarray]:
    """B crops, (T, T, 3) uint8 BGR of at most 320 pixels, with boxes, and landmarks where they are known."""
    return [_draw_tile(image, batch.targets, index) for index, image in enumerate(batch.images)]


def arrange(tiles: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Tiles of one size side by side, row after row; the last row ends in black."""
    side = tiles[0].shape[0]
    sheet = np.zeros((math.ceil(len(tiles) / columns) * side, columns * side, 3), np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * side, index % columns * side
        sheet[top : top + side, left : left + side] = tile
    return sheet


def _draw_tile(image: Tensor, targets: BatchTargets, index: int) -> np.ndarray:
    side = min(image.shape[1], _LARGEST_TILE)
    tile = cv2.resize(image.permute(1, 2, 0).numpy(), (side, side), interpolation=cv2.INTER_AREA)
    own = targets.image_indices == index
    boxes = (targets.boxes[own] * side).round().int().tolist()
    landmarks = (targets.landmarks[own] * side).round().int().tolist()
    for (x1, y1, x2, y2), points, known in zip(boxes, landmarks, targets.has_landmarks[own], strict=True):
        cv2.rectangle(tile, (x1, y1), (x2, y2), BOX_COLOUR, 1)
        if known:
            for colour, point in zip(LANDMARK_COLOURS, points, strict=True):
                cv2.circle(tile, point, max(1, round((x2 - x1) / 25)), colour, cv2.FILLED, cv2.LINE_AA)
    return tile
