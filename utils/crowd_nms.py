"""Non-maximum suppression of tens of thousands of boxes, in time that grows with their number and not its square."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
from torch import Tensor
from torchvision.ops import nms

_BLOCK = 2048  # boxes that enter torchvision's suppression together
_SMALLEST = 4.0  # side in pixels below which boxes are not told apart by size
_FARTHEST = 8192.0  # distance in pixels from the median position beyond which boxes are not told apart by position
_MAX_COLUMNS = 1024  # of cells, and of rows, which bounds the memory


def crowd_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """The result of `torchvision.ops.nms`, computed with comparisons of neighbours only.

    Boxes are taken in blocks, best first. Those of a block that overlap a box kept before are dropped, the others enter
    `torchvision.ops.nms`. Boxes kept before are found in a grid of cells. Most of the boxes to be dropped are found
    earlier, by a comparison with the one box that was last kept near them.

    Args:
        boxes: (N, 4) float32 xyxy in pixels, finite, on the CPU.
        scores: (N,).
        iou_threshold: a box is dropped if its IoU with a better one is greater; between 0.2 and 0.8.

    Returns:
        Indices of the kept boxes, best first.
    """
    scores, order = scores.sort(descending=True, stable=True)
    boxes = boxes[order]
    grid = _Grid(boxes.numpy(), iou_threshold)
    last_kept = np.full(grid.size, -1, np.int32)  # of each cell and those around it
    kept = [np.zeros(0, np.int32)]
    rest = np.arange(len(boxes), dtype=np.int32)
    while len(rest):
        nearby = last_kept[grid.cells[rest]]
        rest = rest[~((nearby >= 0) & grid.overlap(rest, nearby))]
        block, rest = rest[:_BLOCK], rest[_BLOCK:]
        block = block[~grid.overlap_any(block, np.concatenate(kept))]
        kept.append(np.sort(block[nms(boxes[block], scores[block], iou_threshold).numpy()]))
        grid.enter(kept[-1], last_kept)
    return order[np.concatenate(kept)]


class _Grid:
    """Boxes by position and size: two boxes overlap enough only if their cells are neighbours.

    An IoU above t means that the sides differ by a factor of less than 1 / t, and the centres by less than 1 - t of the
    larger side, in either direction. So sizes are divided into levels by powers of 1 / t, each with square cells of
    1 - t times the largest side in it. A cell of the last level is as wide as the whole grid, which has a margin of one
    cell at each border.
    """

    def __init__(self, boxes: np.ndarray, threshold: float) -> None:
        self.threshold = threshold
        self.x1, self.y1, self.x2, self.y2 = np.ascontiguousarray(boxes.T)
        self.areas = (self.x2 - self.x1) * (self.y2 - self.y1)
        self.x, self.y = (_from_zero(low / 2 + high / 2) for low, high in ((self.x1, self.x2), (self.y1, self.y2)))
        largest = float(max(self.x.max(initial=0), self.y.max(initial=0))) / (1 - threshold)
        smallest = max(_SMALLEST, largest / _MAX_COLUMNS)
        ratio = 1.001 / threshold  # the margin is for rounding
        sides = np.maximum(self.x2 - self.x1, self.y2 - self.y1).clip(smallest, max(smallest, largest))
        self.levels = (np.log(sides / smallest) / math.log(ratio)).astype(np.int32)
        self.last_level = int(self.levels.max(initial=0))
        cell_sides = smallest * ratio ** np.arange(1, self.last_level + 2) * (1 - threshold)
        self.cells_per_pixel = (1 / cell_sides).astype(np.float32)
        self.columns, rows = (
            (positions.max(initial=0) * self.cells_per_pixel).astype(np.int32) + 3 for positions in (self.x, self.y)
        )
        self.first_cells = np.concatenate([[0], np.cumsum(self.columns * rows)]).astype(np.int32)
        self.size = int(self.first_cells[-1]) + 1
        everything = slice(None)
        self.cells = self._cells(everything, self.levels)
        # There is none above the last level, where this is not used.
        self.cells_above = self._cells(everything, np.minimum(self.levels + 1, self.last_level))

    def _cells(self, boxes: np.ndarray | slice, levels: np.ndarray) -> np.ndarray:
        """Cells at these levels of the positions of boxes."""
        scale, columns = self.cells_per_pixel[levels], self.columns[levels]
        row, column = (self.y[boxes] * scale).astype(np.int32) + 1, (self.x[boxes] * scale).astype(np.int32) + 1
        cells: np.ndarray = self.first_cells[levels] + row * columns + column
        return cells

    def overlap(self, boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Whether the IoU of each box with its partner exceeds the threshold, rounded as torchvision does."""
        width = np.minimum(self.x2[boxes], self.x2[others]) - np.maximum(self.x1[boxes], self.x1[others])
        height = np.minimum(self.y2[boxes], self.y2[others]) - np.maximum(self.y1[boxes], self.y1[others])
        common = width.clip(min=0) * height.clip(min=0)
        with np.errstate(divide="ignore", invalid="ignore"):  # boxes without area
            iou = common / (self.areas[boxes] + self.areas[others] - common)
        exceeds: np.ndarray = iou.astype(np.float64) > self.threshold
        return exceeds

    def overlap_any(self, boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Whether each of `boxes` overlaps any of `others` enough."""
        below, others_below = (each[self.levels[each] < self.last_level] for each in (boxes, others))
        found = np.zeros(len(self.areas), bool)
        near, near_others = self._neighbours(
            np.concatenate([boxes, below]),
            np.concatenate([self.cells[boxes], self.cells_above[below]]),
            np.concatenate([self.levels[boxes], self.levels[below] + 1]),
            others,
        )
        found[near[self.overlap(near, near_others)]] = True
        near_others, near = self._neighbours(
            others_below, self.cells_above[others_below], self.levels[others_below] + 1, boxes
        )
        found[near[self.overlap(near, near_others)]] = True
        return found[boxes]

    def _neighbours(
        self, boxes: np.ndarray, cells: np.ndarray, levels: np.ndarray, others: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """All pairs of a box and one of `others` that lies in its cell or in one of the eight around it."""
        order = np.argsort(self.cells[others], kind="stable")
        starts = np.zeros(self.size + 1, np.int32)
        np.cumsum(np.bincount(self.cells[others], minlength=self.size), out=starts[1:])
        # The three cells of a row are consecutive.
        middles = np.concatenate([cells - self.columns[levels], cells, cells + self.columns[levels]])
        first, counts = starts[middles - 1], starts[middles + 2] - starts[middles - 1]
        ends = np.cumsum(counts)
        within = np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - ends + counts, counts)
        return np.repeat(np.tile(boxes, 3), counts), others[order[within]]

    def enter(self, boxes: np.ndarray, table: np.ndarray) -> None:
        """Write the boxes into their cells and those around them, at their own levels and at the next ones."""
        for step in (-1, 1, 0):
            levels = (self.levels[boxes] + step).clip(0, self.last_level)
            cells, columns = self._cells(boxes, levels), self.columns[levels]
            for row, column in product((-1, 1, 0), repeat=2):
                table[cells + row * columns + column] = boxes


def _from_zero(positions: np.ndarray) -> np.ndarray:
    """Positions from the smallest one, where those far from the others are moved to the border."""
    centre = np.median(positions) if len(positions) else 0
    moved: np.ndarray = (positions - centre).clip(-_FARTHEST, _FARTHEST)
    return moved - moved.min(initial=_FARTHEST)
