"""A stream of images through a detector."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import chain, groupby
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from utils.errors import UserError
from utils.runtime.sources import InputImage, is_large, read_images
from utils.runtime.threads import map_in_order
from utils.structures import Detections

BATCH_SIZE = 8  # images of the same size in one forward pass
_MAX_PIXELS_IN_FLIGHT = 8 << 20  # total of the images being processed, unless a single one has more
_NO_DETECTIONS = Detections(torch.zeros(0, 4), torch.zeros(0), None)

Detected = tuple[InputImage, Detections]


class BatchDetector(Protocol):
    """Detects faces in images that the model sees in the same size, as `FaceDetector` and `TestTimeAugmentation` do.

    Attributes:
        max_pixels: larger images are reduced to this number of pixels; 0 means no limit.
        num_workers: recommended number of threads, each of which calls the detector of its own `for_worker`.
    """

    @property
    def max_pixels(self) -> int: ...

    @property
    def num_workers(self) -> int: ...

    def size_seen(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """Height and width in which the model sees an image of this size, in its largest pass."""
        ...

    def for_worker(self) -> BatchDetector:
        """The same detector for one of `num_workers` threads, with a share of the cores."""
        ...

    def detect_batch(self, images: Sequence[np.ndarray]) -> list[Detections]: ...


def detect_files(detector: BatchDetector, files: Iterable[tuple[str, Path]]) -> Iterator[Detected]:
    """Detect faces in image files, each given with its name, in their order; see `detect_images`."""
    return detect_images(detector, read_images(files), batch_same_sizes=True)


def detect_images(detector: BatchDetector, images: Iterable[InputImage], batch_same_sizes: bool) -> Iterator[Detected]:
    """Detect faces in a stream of images, in its order, with `detector.num_workers` threads.

    An image that could not be read, or is too large for the memory, is yielded with its `problem` and no detections.

    Args:
        detector: detector to run.
        images: images to process.
        batch_same_sizes: process neighbours that the model sees in the same size in one forward pass. They share a
            block of `BATCH_SIZE` positions, so the batches do not depend on where a stream begins or which images it
            omits.
    """
    limit = _MAX_PIXELS_IN_FLIGHT // detector.num_workers
    batch_size = BATCH_SIZE if batch_same_sizes else 1
    batches = _batched(detector, _with_note(images, detector.max_pixels), batch_size, limit)
    note_once = cache(tqdm.write)  # beside the progress bar
    for is_small, run in groupby(batches, partial(_is_small, detector, limit=limit)):
        if is_small and detector.num_workers > 1:
            detect = partial(_detect, detector.for_worker(), note_once)
            yield from chain.from_iterable(map_in_order(detect, run, detector.num_workers))
        else:
            yield from chain.from_iterable(map(partial(_detect, detector, note_once), run))


def _with_note(images: Iterable[InputImage], max_pixels: int) -> Iterator[InputImage]:
    """Yield the images, and print one note that names the first image that is reduced."""
    is_noted = False
    for image in images:
        if not is_noted and image.pixels is not None and 0 < max_pixels < image.pixels[..., 0].size:
            is_noted = True
            limit = f"images of more than --max_pixels={max_pixels} pixels are reduced to that"
            tqdm.write(f"note: {image.name}: {_size(image.pixels)} pixels; {limit}")  # beside the progress bar
        yield image
        del image  # frees its pixels before the next one is read


def _batched(
    detector: BatchDetector, images: Iterable[InputImage], size: int, limit: int
) -> Iterator[list[InputImage]]:
    """Images that share a forward pass: at most `size`, of at most `limit` pixels together unless there is only one."""
    batch: list[InputImage] = []
    for image in images:
        if batch:
            has_room = len(batch) < size and (len(batch) + 1) * _pixels(detector, image) <= limit
            is_same_block = image.position // BATCH_SIZE == batch[0].position // BATCH_SIZE
            size_seen = _size_seen(detector, image)
            if not (has_room and is_same_block and size_seen and size_seen == _size_seen(detector, batch[0])):
                yield batch
                batch = []
        batch.append(image)
        del image
        if is_large(batch[0]):  # not kept until the next one has been read
            yield batch
            batch = []
    if batch:
        yield batch


def _size_seen(detector: BatchDetector, image: InputImage) -> tuple[int, int] | None:
    return None if image.pixels is None else detector.size_seen((image.pixels.shape[0], image.pixels.shape[1]))


def _is_small(detector: BatchDetector, batch: Sequence[InputImage], limit: int) -> bool:
    """Whether several such batches may be in memory, both their images and what the model sees of them."""
    return not is_large(batch[0]) and _pixels(detector, batch[0]) * len(batch) <= limit


def _pixels(detector: BatchDetector, image: InputImage) -> int:
    """Number of pixels that the model sees, with which its memory grows."""
    height, width = _size_seen(detector, image) or (0, 0)
    return height * width


def _detect(detector: BatchDetector, note_once: Callable[[str], None], images: Sequence[InputImage]) -> list[Detected]:
    """Detect faces in images that share a pass; a single image may be one that could not be read."""
    pixels = [image.pixels for image in images if image.pixels is not None]
    if not pixels:
        return [(image, _NO_DETECTIONS) for image in images]
    try:
        return list(zip(images, detector.detect_batch(pixels), strict=True))
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            if not re.search("cuda|cudnn|cublas", str(error), re.IGNORECASE):
                raise
            raise UserError(f"{images[0].name}: {str(error).splitlines()[0]}") from error
    if len(images) > 1:
        note_once("note: the memory is too small for some batches; they are processed in halves")
        middle = len(images) // 2
        return [
            *_detect(detector, note_once, images[:middle]),
            *_detect(detector, note_once, images[middle:]),
        ]
    problem = f"{_size(pixels[0])} pixels are too many for the memory"
    return [(replace(images[0], pixels=None, problem=problem), _NO_DETECTIONS)]


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory is used up, on the GPU or in PyTorch and ONNX Runtime on the CPU.

    Other CUDA errors, such as illegal memory accesses, also mention memory, but the device is unusable after them.
    """
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    text = str(error)
    return "CUDA" not in text and any(words in text for words in ("llocate memory", "bad_alloc", "bad allocation"))


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"
