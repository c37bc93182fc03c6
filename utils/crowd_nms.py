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
    suppressors = _suppressors(boxes[order], iou_threshold, find_best=False)
    return order[suppressors == torch.arange(len(order))]


def crowd_votes(boxes: Tensor, scores: Tensor, iou_threshold: float) -> tuple[Tensor, Tensor]:
    """The result of `crowd_nms`, and the (N,) position among the kept boxes of the best one that suppresses each box.

    The arguments are those of `crowd_nms`. A kept box has its own position.
    """
    order = scores.argsort(descending=True, stable=True)
    suppressors = _suppressors(boxes[order], iou_threshold, find_best=True)
    is_kept = suppressors == torch.arange(len(order))
    positions = is_kept.cumsum(0) - 1
    return order[is_kept], torch.empty_like(order).index_copy_(0, order, positions[suppressors])


def _suppressors(boxes: Tensor, iou_threshold: float, *, find_best: bool) -> Tensor:
    """(N,) index of the box that suppresses each of (N, 4) boxes, sorted by score; its own index if it is kept.

    Of several, it is the best one with `find_best`, and otherwise the one that is found first, which is faster.
    """
    if not len(boxes):
        return torch.zeros(0, dtype=torch.long)
    sorted_boxes = boxes.numpy()
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
    suppressors = np.arange(len(sides))
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
        find_best,
        suppressors,
    )
    return torch.from_numpy(suppressors)


@functools.cache
def _compiled() -> Callable[..., None]:
    import numba  # takes half a second, and few images have so many boxes

    compiled: Callable[..., None] = numba.njit(_find_suppressors, nogil=True, error_model="numpy")
    return compiled


def _find_suppressors(
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
    find_best: bool,
    suppressors: np.ndarray,
) -> None:
    """Set the suppressor of every box that a better kept box suppresses. Boxes are sorted by score, best first.

    Compiled by numba.

    Args:
        boxes, centres, sides, levels: of each of N boxes.
        cell_sides, largest_sides, columns, first_cells: of each level: the side of its cells, the largest side of its
            boxes, the number of columns and of rows, and the index of its first cell.
        newest: the last kept box of each cell, -1 for none.
        older: (N,) the box that was kept in the cell before each kept one.
        threshold: threshold of the IoU, which is rounded as torchvision does.
        find_best: whether to find the best of several suppressors, or any.
        suppressors: (N,) the index of each box itself at first.
    """
    reach = (1 - threshold) / (1 + threshold) * _MARGIN
    for box in range(len(boxes)):
        x1, y1, x2, y2 = boxes[box, 0], boxes[box, 1], boxes[box, 2], boxes[box, 3]
        area = (x2 - x1) * (y2 - y1)
        x, y, side = centres[box, 0], centres[box, 1], sides[box] * _MARGIN
        suppressor = box
        is_done = False
        for level in range(len(cell_sides)):
            cell_side, largest = cell_sides[level], largest_sides[level] * _MARGIN
            has_similar_sides = largest > side * threshold and (level == 0 or side > cell_side / 2 * threshold)
            if not has_similar_sides or is_done:
                continue
            radius = reach * max(side, largest) + 0.01
            last = columns[level] - 1
            first_column, last_column = max(int((x - radius) / cell_side), 0), min(int((x + radius) / cell_side), last)
            row, last_row = max(int((y - radius) / cell_side), 0), min(int((y + radius) / cell_side), last)
            while row <= last_row and not is_done:
                column = first_column
                while column <= last_column and not is_done:
                    other = newest[first_cells[level] + row * (last + 1) + column]
                    while other >= 0 and not is_done:
                        u1, v1, u2, v2 = boxes[other, 0], boxes[other, 1], boxes[other, 2], boxes[other, 3]
                        width, height = min(x2, u2) - max(x1, u1), min(y2, v2) - max(y1, v1)
                        if width > 0 and height > 0 and other < suppressor:
                            common = width * height
                            if common / ((u2 - u1) * (v2 - v1) + area - common) > threshold:
                                suppressor = other
                                is_done = not find_best
                        other = older[other]
                    column += 1
                row += 1
        suppressors[box] = suppressor
        if suppressor == box:
            level = levels[box]
            row, column = int(y / cell_sides[level]), int(x / cell_sides[level])
            cell = first_cells[level] + row * columns[level] + column
            older[box] = newest[cell]
            newest[cell] = box
