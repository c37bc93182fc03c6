"""Reading and writing image files of all common formats, and recognising damaged ones."""

from __future__ import annotations

import errno
import io
import math
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.runtime.files import atomic_write

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .bmp .dib .gif .tif .tiff .webp .ppm .pgm .pbm .pnm .jp2 .avif".split()
)
WRITABLE_SUFFIXES = frozenset(".jpg .jpeg .png .bmp .tif .tiff .webp".split())
# Files with these endings are complete. Others of the formats that OpenCV decodes are checked by Pillow first.
_COMPLETE_ENDINGS = (b"\xff\xd9", b"IEND\xaeB`\x82")
# Beginnings of JPEG, PNG, BMP, TIFF and PNM, which OpenCV decodes. Pillow decodes all others, because OpenCV does not
# rotate WebP upright and crashes on damaged JPEG 2000.
_OPENCV_BEGINNINGS = (b"\xff\xd8", b"\x89PNG", b"BM", b"II", b"MM", b"P")


class UnreadableImageError(Exception):
    """A file is missing, damaged or not an image. The message is only the reason, without the name of the file."""


def read_image(path: Path) -> np.ndarray:
    """Decode an image file as OpenCV does, upright.

    EXIF orientation is applied, grey is converted to colour, alpha is dropped and 16 bits are reduced to 8.

    Returns:
        (H, W, 3) uint8 BGR.

    Raises:
        UnreadableImageError: the file cannot be decoded completely.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableImageError(error.strerror or str(error)) from None
    if not data:
        raise UnreadableImageError("empty file")
    if not data.startswith(_OPENCV_BEGINNINGS):
        return _decode_with_pillow(data)
    if not data.rstrip(b"\0").endswith(_COMPLETE_ENDINGS):
        _decode_with_pillow(data)  # older OpenCVs fill the missing part of a JPEG with grey and say nothing
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise UnreadableImageError(f"OpenCV cannot decode it ({error.err})") from None
    return _decode_with_pillow(data) if image is None else image


def _decode_with_pillow(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            return np.ascontiguousarray(np.asarray(upright)[:, :, ::-1])
    except UnidentifiedImageError:
        raise UnreadableImageError("not an image, or damaged") from None
    except Exception as error:  # its decoders raise whatever a damaged file leads them to
        raise UnreadableImageError(str(error) or type(error).__name__) from None


def resize_to_limit(image: np.ndarray, max_pixels: int) -> np.ndarray:
    """Resize an image of more than `max_pixels` pixels to that number, keeping its aspect ratio.

    Args:
        image: (H, W, 3).
        max_pixels: 0 is no limit.
    """
    height, width = image.shape[:2]
    if not max_pixels or height * width <= max_pixels:
        return image
    factor = math.sqrt(max_pixels / (height * width))
    size = (max(1, int(width * factor)), max(1, int(height * factor)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def write_image(path: Path, image: np.ndarray) -> None:
    """Encode an image in the format of the file's suffix and write it atomically.

    Args:
        path: its suffix must be one of `WRITABLE_SUFFIXES`, in any case; its folder is created.
        image: (H, W, 3) BGR or (H, W) grey, uint8.

    Raises:
        OSError: it cannot be written.
    """
    encodable, encoded = cv2.imencode(path.suffix.lower(), image)
    if not encodable:
        size = f"{image.shape[1]}x{image.shape[0]}"
        raise OSError(errno.EFBIG, f"{size} pixels cannot be encoded as {path.suffix}", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(encoded.tobytes())
