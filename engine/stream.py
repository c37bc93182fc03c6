"""A stream of pictures through a detector."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from utils.runtime.sources import Picture, read_pictures
from utils.runtime.threads import map_in_order
from utils.structures import Detections

BATCH_SIZE = 8  # images of one size that share a pass
_PIXELS_AT_ONCE = 8 << 20  # that images in work have together at most, unless a single one has more
_NOTHING = Detections(torch.zeros(0, 4), torch.zeros(0), None)

Found = tuple[Picture, Detections]


class BatchDetector(Protocol):
    """What finds faces in images of one size; `FaceDetector` and `ProtocolDetector` do.

    Attributes:
        max_pixels: larger images are reduced to so many; 0 is no limit.
        lanes: threads that should call it at once, for the machine to be used best.
    """

    @property
    def max_pixels(self) -> int: ...

    @property
    def lanes(self) -> int: ...

    def pixels_seen(self, size_hw: tuple[int, int]) -> int:
        """That the network sees in one pass of an image of a height and width; memory grows with them."""
        ...

    def for_lane(self) -> BatchDetector:
        """The same detector for one of these threads: it finds the same, with its share of the cores."""
        ...

    def detect_batch(self, images: Sequence[np.ndarray]) -> list[Detections]: ...


def detect_files(detector: BatchDetector, files: Iterable[tuple[str, Path]]) -> Iterator[Found]:
    """Detect in image files, each with its name, in their order; see `detect_pictures`."""
    return detect_pictures(detector, read_pictures(files), batch_same_sizes=True)


def detect_pictures(detector: BatchDetector, pictures: Iterable[Picture], batch_same_sizes: bool) -> Iterator[Found]:
    """Detect in a stream of pictures, in its order; several threads do, where the detector is made for that.

    A picture that could not be read, or is too large for the memory, comes out with its `problem` and no detections.

    Args:
        batch_same_sizes: pass neighbours of one size through the network together. They share a block of `BATCH_SIZE`
            positions, so which pictures go together does not depend on where a stream begins or what it leaves out.
    """
    limit = _PIXELS_AT_ONCE // detector.lanes
    groups = _grouped(detector, _noted(pictures, detector.max_pixels), BATCH_SIZE if batch_same_sizes else 1, limit)
    for is_small, stretch in groupby(groups, lambda group: _pixels(detector, group[0]) * len(group) <= limit):
        if is_small and detector.lanes > 1:
            detect = partial(_detect, detector.for_lane())
            yield from chain.from_iterable(map_in_order(detect, stretch, detector.lanes))
        else:
            yield from chain.from_iterable(map(partial(_detect, detector), stretch))


def _noted(pictures: Iterable[Picture], max_pixels: int) -> Iterator[Picture]:
    """Pictures as they are; a line says that there are some of which the network sees less, and names the first."""
    told = False
    for picture in pictures:
        if not told and picture.image is not None and 0 < max_pixels < picture.image[..., 0].size:
            told = True
            limit = f"what has more than --max_pixels={max_pixels} is looked at reduced to that"
            tqdm.write(f"note: {picture.name}: {_size(picture.image)} pixels; {limit}")  # beside the progress bar
        yield picture


def _grouped(detector: BatchDetector, pictures: Iterable[Picture], size: int, limit: int) -> Iterator[list[Picture]]:
    """Pictures that go through the network together, `size` at most, of `limit` pixels together unless alone."""
    group: list[Picture] = []
    for picture in pictures:
        if group:
            has_room = len(group) < size and (len(group) + 1) * _pixels(detector, picture) <= limit
            if not (has_room and _share_pass(group[0], picture)):
                yield group
                group = []
        group.append(picture)
    if group:
        yield group


def _share_pass(first: Picture, other: Picture) -> bool:
    """Whether two pictures may go through the network together."""
    if first.image is None or other.image is None:
        return False
    same_size = first.image.shape == other.image.shape
    return same_size and first.position // BATCH_SIZE == other.position // BATCH_SIZE


def _pixels(detector: BatchDetector, picture: Picture) -> int:
    return 0 if picture.image is None else detector.pixels_seen((picture.image.shape[0], picture.image.shape[1]))


def _detect(detector: BatchDetector, pictures: Sequence[Picture]) -> list[Found]:
    """Pictures of one size, or one that could not be read."""
    images = [picture.image for picture in pictures if picture.image is not None]
    if not images:
        return [(picture, _NOTHING) for picture in pictures]
    try:
        return list(zip(pictures, detector.detect_batch(images), strict=True))
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
    if len(pictures) > 1:
        return [found for picture in pictures for found in _detect(detector, [picture])]
    problem = f"{_size(images[0])} pixels are too many for the memory"
    return [(replace(pictures[0], image=None, problem=problem), _NOTHING)]


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
