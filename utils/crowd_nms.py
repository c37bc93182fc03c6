"""Non-maximum suppression of tens of thousands of boxes, in time that grows with their number and not its square."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_SMALLEST_CELL = 4.0  # side in pixels
_MAX_COLUMNS = 512  # of cells, and of rows, which bounds the memory
_LARGEST_EXTENT = 16384.0  # of the grid in pixels
_LARGEST_SIDE = 1e9  # in pixels, so that all positions are integers
_MARGIN = 1.001  # for rounding


def crowd_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """The result of `torchvision.ops.nms`, computed with comparisons of neighbours only.

    Boxes kept before are found in grids of cells, one for each level of size: the largest side of a box of level l is
    between half the side of a cell of its grid and the whole of it. Two boxes with an IoU above t have centres that
    are less than (1 - t) / (1 + t) of the larger side apart in either direction, and sides that differ by a factor of
    less than 1 / t.

    The first call takes two seconds more, for the compilation.

    Args:
        boxes: (N, 4) float32 xyxy in pixels, finite, on the CPU.
        scores: (N,).
        iou_threshold: a box is dropped if its IoU with a better one is greater; between 0.1 and 1.

    Returns:
        Indices of the kept boxes, best first.
    """
    order = scores.argsort(descending=True, stable=True)
    if not len(order):
        return order
    sorted_boxes = boxes[order].numpy()
    low, high = sorted_boxes[:, :2].astype(np.float64), sorted_boxes[:, 2:].astype(np.float64)
    sides = np.maximum(*(high - low).T).clip(max=_LARGEST_SIDE)
    # The grid is centred on the best box. Boxes beyond it are moved to its border, which cannot separate neighbours.
    offsets = (low + high) / 2
    offsets -= offsets[0].copy()
    extent = min(2 * float(np.abs(offsets).max()), _LARGEST_EXTENT)
    centres = (offsets + extent / 2).clip(0, extent)
    smallest = max(_SMALLEST_CELL, extent / _MAX_COLUMNS)
    levels = np.ceil(np.log2(sides.clip(smallest, max(extent, smallest)) / smallest)).astype(np.int64)
    cell_sides = smallest * 2.0 ** np.arange(levels.max() + 1)
    largest_sides = np.append(cell_sides[:-1], max(cell_sides[-1], sides.max()))
    columns = (extent / cell_sides).astype(np.int64) + 1
    first_cells = np.append(0, np.cumsum(columns**2))
    is_kept = np.zeros(len(sides), np.bool_)
    _compiled()(
        sorted_boxes,
        centres,
        sides,
        levels,
        cell_sides,
        largest_sides,
        columns,
        first_cells,
        np.full(first_cells[-1], -1, np.int64),
        np.empty(len(sides), np.int64),
        iou_threshold,
        is_kept,
    )
    return order[torch.from_numpy(is_kept)]


@functools.cache
def _compiled() -> Callable[..., None]:
    import numba  # takes half a second, and few images have so many boxes

    compiled: Callable[..., None] = numba.njit(_mark_kept, nogil=True, error_model="numpy")
    return compiled


def _mark_kept(
    boxes: np.ndarray,
    centres: np.ndarray,
    sides: np.ndarray,
    levels: np.ndarray,
    cell_sides: np.ndarray,
    largest_sides: np.ndarray,
    columns: np.ndarray,
    first_cells: np.ndarray,
    newest: np.ndarray,
    older: np.ndarray,
    threshold: float,
    is_kept: np.ndarray,
) -> None:
    """Set `is_kept` for the boxes, best first, that no better one suppresses; compiled by numba.

    Args:
        boxes, centres, sides, levels: of each of N boxes.
        cell_sides, largest_sides, columns, first_cells: of each level: the side of its cells, the largest side of its
            boxes, the number of columns and of rows, and the index of its first cell.
        newest: the last kept box of each cell, -1 for none.
        older: (N,) the box that was kept in the cell before each kept one.
        threshold: threshold of the IoU, which is rounded as torchvision does.
        is_kept: (N,) bool, False at first.
    """
    reach = (1 - threshold) / (1 + threshold) * _MARGIN
    for box in range(len(boxes)):
        x1, y1, x2, y2 = boxes[box, 0], boxes[box, 1], boxes[box, 2], boxes[box, 3]
        area = (x2 - x1) * (y2 - y1)
        x, y, side = centres[box, 0], centres[box, 1], sides[box] * _MARGIN
        found = False
        for level in range(len(cell_sides)):
            cell_side, largest = cell_sides[level], largest_sides[level] * _MARGIN
            has_similar_sides = largest > side * threshold and (level == 0 or side > cell_side / 2 * threshold)
            if not has_similar_sides or found:
                continue
            radius = reach * max(side, largest) + 0.01
            last = columns[level] - 1
            first_column, last_column = max(int((x - radius) / cell_side), 0), min(int((x + radius) / cell_side), last)
            row, last_row = max(int((y - radius) / cell_side), 0), min(int((y + radius) / cell_side), last)
            while row <= last_row and not found:
                column = first_column
                while column <= last_column and not found:
                    other = newest[first_cells[level] + row * (last + 1) + column]
                    while other >= 0 and not found:
                        u1, v1, u2, v2 = boxes[other, 0], boxes[other, 1], boxes[other, 2], boxes[other, 3]
                        width, height = min(x2, u2) - max(x1, u1), min(y2, v2) - max(y1, v1)
                        if width > 0 and height > 0:
                            common = width * height
                            found = common / ((u2 - u1) * (v2 - v1) + area - common) > threshold
                        other = older[other]
                    column += 1
                row += 1
        if not found:
            is_kept[box] = True
            level = levels[box]
            row, column = int(y / cell_sides[level]), int(x / cell_sides[level])
            cell = first_cells[level] + row * columns[level] + column
            older[box] = newest[cell]
            newest[cell] = box
