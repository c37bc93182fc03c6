"""Images kept decoded between epochs, in memory or on disk, at their own size or reduced.

In memory they take three bytes a pixel: 0.9 MB for 640 x 480, 2.7 GB for 3,000 of them. Worker processes that are
forked, as on Linux, share that memory; where they are spawned each has a copy, so take the disk there. On disk they
take as much, last from run to run, and are mapped into memory, where the system keeps as much as fits; the folder may
be deleted at any time.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from tqdm import tqdm

from config import DataConfig
from utils.runtime.experiment import make_folder
from utils.runtime.files import replacing
from utils.runtime.images import UnreadableImageError, read_image

_log = logging.getLogger(__name__)
_HEADER_VALUES = 5  # mark, height and width of the file's image, height and width of what is kept
_HEADER_BYTES = 4 * _HEADER_VALUES
_MARK = 0x46414331


@dataclass(frozen=True)
class KeptImage:
    """An image file's pixels as they are kept.

    Attributes:
        pixels: (H, W, 3) uint8 BGR, read-only.
        size_hw: height and width of the image in the file.
    """

    pixels: np.ndarray
    size_hw: tuple[int, int]

    @property
    def scale_xy(self) -> np.ndarray:
        """(2,) float32 factors from coordinates in the file's image to those in `pixels`."""
        height, width = self.pixels.shape[:2]
        return np.array([width / self.size_hw[1], height / self.size_hw[0]], np.float32)


class ImageReader(Protocol):
    """Gives the image of a file; raises `UnreadableImageError` as `read_image` does."""

    def read(self, path: Path) -> KeptImage: ...


def open_images(paths: Sequence[Path], config: DataConfig) -> ImageReader:
    """What reads these images as `--cache` and `--cache_side` ask; for `ram`, it has read them all.

    Raises:
        UserError: the folder for `disk` cannot be written to.
    """
    if config.cache == "ram":
        return MemoryCache(paths, config.cache_side)
    if config.cache == "disk":
        return DiskCache(make_folder(cache_folder()), config.cache_side)
    return ImageFiles()


def cache_folder() -> Path:
    """Where images are kept on disk: below $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retinaface_images"


class ImageFiles:
    """Decodes an image whenever it is asked for."""

    def read(self, path: Path) -> KeptImage:
        return _load(path, 0)


class MemoryCache:
    """Has read all images before the first is asked for, so that forked processes share them."""

    def __init__(self, paths: Sequence[Path], longest_side: int) -> None:
        """Read the images; those that cannot be read are tried again when they are asked for."""
        self.longest_side = longest_side
        with ThreadPoolExecutor() as pool:
            loaded = pool.map(self._try, paths)
            bar = tqdm(loaded, total=len(paths), desc="reading images", leave=False, disable=None)
            self.images = {path: image for path, image in zip(paths, bar, strict=True) if image is not None}
        size = sum(image.pixels.nbytes for image in self.images.values())
        _log.warning("--cache=ram: %d images take %.1f GB of memory", len(self.images), size / 1e9)

    def read(self, path: Path) -> KeptImage:
        return self.images.get(path) or _load(path, self.longest_side)

    def _try(self, path: Path) -> KeptImage | None:
        try:
            return _load(path, self.longest_side)
        except UnreadableImageError:
            return None


class DiskCache:
    """Keeps each image in a file of its own, from the first time on that it is asked for.

    The file is named by path, time and size of the original, so one that changes is read anew.
    """

    def __init__(self, folder: Path, longest_side: int) -> None:
        self.folder = folder
        self.longest_side = longest_side

    def read(self, path: Path) -> KeptImage:
        kept = self._path_for(path)
        image = _map(kept)
        if image is None:
            image = _load(path, self.longest_side)
            with suppress(OSError):  # a full disk makes training slower, which is no reason to end it
                _keep(kept, image)
        return image

    def _path_for(self, path: Path) -> Path:
        try:
            status = path.stat()
        except OSError as error:
            raise UnreadableImageError(error.strerror or str(error)) from None
        key = f"{path.absolute()}\n{status.st_mtime_ns}\n{status.st_size}\n{self.longest_side}"
        return self.folder / (hashlib.sha256(os.fsencode(key)).hexdigest()[:40] + ".bgr")


def _load(path: Path, longest_side: int) -> KeptImage:
    image = read_image(path)
    size_hw = (image.shape[0], image.shape[1])
    if 0 < longest_side < max(size_hw):
        height, width = (max(1, round(side * longest_side / max(size_hw))) for side in size_hw)
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    image.flags.writeable = False
    return KeptImage(image, size_hw)


def _keep(path: Path, image: KeptImage) -> None:
    header = np.array([_MARK, *image.size_hw, *image.pixels.shape[:2]], "<i4")
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(image.pixels).data)


def _map(path: Path) -> KeptImage | None:
    """What `_keep` wrote, read where it is looked at; None if there is no file, or a damaged one."""
    try:
        data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    except (OSError, ValueError):  # it does not exist, or is empty
        return None
    if len(data) < _HEADER_BYTES:
        return None
    mark, *size_hw, height, width = data[:_HEADER_BYTES].view("<i4").tolist()
    if mark != _MARK or min(*size_hw, height, width) < 1 or len(data) != _HEADER_BYTES + height * width * 3:
        return None
    return KeptImage(data[_HEADER_BYTES:].reshape(height, width, 3), (size_hw[0], size_hw[1]))
