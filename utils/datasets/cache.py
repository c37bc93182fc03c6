"""Decoded training images kept between epochs, in memory or on disk.

They take three bytes per pixel: 0.9 MB for 640 x 480, 2.7 GB for 3,000 of them. In memory they are shared by worker
processes that are forked, as on Linux; where workers are spawned each has a copy, so the disk is better there. On disk
they last from run to run and are memory-mapped; the folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.runtime.files import atomic_write, make_folder
from utils.runtime.images import UnreadableImageError, read_image

_log = logging.getLogger(__name__)


def open_images(paths: Sequence[Path], cache: str) -> Callable[[Path], np.ndarray]:
    """A function that reads one of these images as (H, W, 3) uint8 BGR, read-only, and raises as `read_image` does.

    Args:
        paths: paths of all images.
        cache: `none`, `ram`, which reads all images now, or `disk`.

    Raises:
        UserError: the folder of the disk cache cannot be written to.
    """
    if cache == "ram":
        return partial(_read_from_memory, _load(paths))
    return partial(_read_through_disk, make_folder(cache_folder())) if cache == "disk" else _read


def cache_folder() -> Path:
    """Folder of the disk cache: below $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retinaface_images"


def _read(path: Path) -> np.ndarray:
    """Read an image as a read-only array, because the array may be kept and shared."""
    image = read_image(path)
    image.flags.writeable = False
    return image


def _load(paths: Sequence[Path]) -> dict[Path, np.ndarray]:
    """Read all images that can be read, before workers are forked so that they share them."""
    with ThreadPoolExecutor() as pool:
        bar = tqdm(pool.map(_try_to_read, paths), total=len(paths), desc="reading images", leave=False, disable=None)
        images = {path: image for path, image in zip(paths, bar, strict=True) if image is not None}
    size = sum(image.nbytes for image in images.values())
    _log.warning("--cache=ram: %d images take %.1f GB of memory", len(images), size / 1e9)
    return images


def _try_to_read(path: Path) -> np.ndarray | None:
    try:
        return _read(path)
    except UnreadableImageError:
        return None


def _read_from_memory(images: Mapping[Path, np.ndarray], path: Path) -> np.ndarray:
    return images[path] if path in images else _read(path)


def _read_through_disk(folder: Path, path: Path) -> np.ndarray:
    """Read an image from its `.npy` file in `folder`, which is written when the image is read for the first time."""
    cached = folder / _cached_name(path)
    try:
        image: np.ndarray = np.load(cached, mmap_mode="r")
        return image
    except Exception:  # the file does not exist, or is damaged, for which NumPy raises almost anything
        pass
    image = _read(path)
    # A full disk only makes training slower, so it is not an error.
    with suppress(OSError), atomic_write(cached) as temporary, temporary.open("wb") as file:
        np.save(file, image)
    return image


def _cached_name(path: Path) -> str:
    """A name from path, time and size of the image, so that an image that changes is read again."""
    try:
        status = path.stat()
    except OSError as error:
        raise UnreadableImageError(error.strerror or str(error)) from None
    key = f"{path.absolute()}\n{status.st_mtime_ns}\n{status.st_size}"
    return hashlib.sha256(os.fsencode(key)).hexdigest()[:40] + ".npy"
