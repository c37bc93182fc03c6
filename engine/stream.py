"""A stream of images through a detector."""

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

from utils.errors import UserError
from utils.runtime.sources import InputImage, read_images
from utils.runtime.threads import map_in_order
from utils.structures import Detections

BATCH_SIZE = 8  # images of the same size in one forward pass
_MAX_PIXELS_IN_FLIGHT = 8 << 20  # total of the images being processed, unless a single one has more
_NO_DETECTIONS = Detections(torch.zeros(0, 4), torch.zeros(0), None)

Detected = tuple[InputImage, Detections]


class BatchDetector(Protocol):
    """Detects faces in images of the same size, as `FaceDetector` and `TestTimeAugmentation` do.

    Attributes:
        max_pixels: larger images are reduced to this number of pixels; 0 means no limit.
        num_workers: recommended number of threads, each of which calls the detector of its own `for_worker`.
    """

    @property
    def max_pixels(self) -> int: ...

    @property
    def num_workers(self) -> int: ...

    def pixels_seen(self, size_hw: tuple[int, int]) -> int:
        """Number of pixels that the model sees in one pass of an image of this size; memory grows with it."""
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
        batch_same_sizes: process neighbours of the same size in one forward pass. They share a block of `BATCH_SIZE`
            positions, so the batches do not depend on where a stream begins or which images it omits.
    """
    limit = _MAX_PIXELS_IN_FLIGHT // detector.num_workers
    batch_size = BATCH_SIZE if batch_same_sizes else 1
    batches = _batched(detector, _with_note(images, detector.max_pixels), batch_size, limit)
    for is_small, run in groupby(batches, lambda batch: _pixels(detector, batch[0]) * len(batch) <= limit):
        if is_small and detector.num_workers > 1:
            detect = partial(_detect, detector.for_worker())
            yield from chain.from_iterable(map_in_order(detect, run, detector.num_workers))
        else:
            yield from chain.from_iterable(map(partial(_detect, detector), run))


def _with_note(images: Iterable[InputImage], max_pixels: int) -> Iterator[InputImage]:
    """Yield the images, and print one note that names the first image that is reduced."""
    is_noted = False
    for image in images:
        if not is_noted and image.pixels is not None and 0 < max_pixels < image.pixels[..., 0].size:
            is_noted = True
            limit = f"images of more than --max_pixels={max_pixels} pixels are reduced to that"
            tqdm.write(f"note: {image.name}: {_size(image.pixels)} pixels; {limit}")  # beside the progress bar
        yield image


def _batched(
    detector: BatchDetector, images: Iterable[InputImage], size: int, limit: int
) -> Iterator[list[InputImage]]:
    """Images that share a forward pass: at most `size`, of at most `limit` pixels together unless there is only one."""
    batch: list[InputImage] = []
    for image in images:
        if batch:
            has_room = len(batch) < size and (len(batch) + 1) * _pixels(detector, image) <= limit
            if not (has_room and _may_share_pass(batch[0], image)):
                yield batch
                batch = []
        batch.append(image)
    if batch:
        yield batch


def _may_share_pass(first: InputImage, other: InputImage) -> bool:
    if first.pixels is None or other.pixels is None:
        return False
    same_size = first.pixels.shape == other.pixels.shape
    return same_size and first.position // BATCH_SIZE == other.position // BATCH_SIZE


def _pixels(detector: BatchDetector, image: InputImage) -> int:
    return 0 if image.pixels is None else detector.pixels_seen((image.pixels.shape[0], image.pixels.shape[1]))


def _detect(detector: BatchDetector, images: Sequence[InputImage]) -> list[Detected]:
    """Detect faces in images of the same size; a single image may be one that could not be read."""
    pixels = [image.pixels for image in images if image.pixels is not None]
    if not pixels:
        return [(image, _NO_DETECTIONS) for image in images]
    try:
        return list(zip(images, detector.detect_batch(pixels), strict=True))
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            if "CUDA" not in str(error):
                raise
            raise UserError(f"{images[0].name}: {str(error).splitlines()[0]}") from error
    if len(images) > 1:
        return [detected for image in images for detected in _detect(detector, [image])]
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
