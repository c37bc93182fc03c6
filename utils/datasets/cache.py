"""Decoded training images kept between epochs, in memory or on disk.

They take three bytes per pixel: 0.9 MB for 640 x 480, 2.7 GB for 3,000 of them. In memory they are shared by worker
processes that are forked, as on Linux; where workers are spawned each has a copy, so the disk is better there. On disk
they last from run to run and are memory-mapped; the folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from utils.runtime.files import atomic_write, make_folder
from utils.runtime.images import UnreadableImageError, read_image

_log = logging.getLogger(__name__)


class ImageReader(Protocol):
    """Reads an image file as (H, W, 3) uint8 BGR, read-only.

    Raises `UnreadableImageError` as `read_image` does.
    """

    def read(self, path: Path) -> np.ndarray: ...


def open_images(paths: Sequence[Path], cache: str) -> ImageReader:
    """A reader for these images.

    Args:
        paths: paths of all images.
        cache: `none`, `ram`, which reads all images now, or `disk`.

    Raises:
        UserError: the folder of the disk cache cannot be written to.
    """
    if cache == "ram":
        return MemoryCache(paths)
    return DiskCache(make_folder(cache_folder())) if cache == "disk" else Uncached()


def cache_folder() -> Path:
    """Folder of the disk cache: below $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retinaface_images"


class Uncached:
    """Decodes an image every time that it is read."""

    def read(self, path: Path) -> np.ndarray:
        return _read_only(path)


class MemoryCache:
    """Holds all images in memory, read before workers are forked so that they share them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read the images; those that cannot be read are tried again when they are needed."""
        with ThreadPoolExecutor() as pool:
            loaded = pool.map(_try_to_read, paths)
            bar = tqdm(loaded, total=len(paths), desc="reading images", leave=False, disable=None)
            self.images = {path: image for path, image in zip(paths, bar, strict=True) if image is not None}
        size = sum(image.nbytes for image in self.images.values())
        _log.warning("--cache=ram: %d images take %.1f GB of memory", len(self.images), size / 1e9)

    def read(self, path: Path) -> np.ndarray:
        image = self.images.get(path)
        return _read_only(path) if image is None else image


def _try_to_read(path: Path) -> np.ndarray | None:
    try:
        return _read_only(path)
    except UnreadableImageError:
        return None


def _read_only(path: Path) -> np.ndarray:
    """Read an image as a read-only array, because the array may be kept and shared."""
    image = read_image(path)
    image.flags.writeable = False
    return image


class DiskCache:
    """Keeps each image in a `.npy` file after it is read for the first time.

    The file is named by path, time and size of the original, so an image that changes is read again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, path: Path) -> np.ndarray:
        cached = self._path_for(path)
        try:
            image: np.ndarray = np.load(cached, mmap_mode="r")
            return image
        except Exception:  # the file does not exist, or is damaged, for which NumPy raises almost anything
            pass
        image = _read_only(path)
        # A full disk only makes training slower, so it is not an error.
        with suppress(OSError), atomic_write(cached) as temporary, temporary.open("wb") as file:
            np.save(file, image)
        return image

    def _path_for(self, path: Path) -> Path:
        try:
            status = path.stat()
        except OSError as error:
            raise UnreadableImageError(error.strerror or str(error)) from None
        key = f"{path.absolute()}\n{status.st_mtime_ns}\n{status.st_size}"
        return self.folder / (hashlib.sha256(os.fsencode(key)).hexdigest()[:40] + ".npy")
