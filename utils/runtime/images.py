"""Reading and writing image files of all common formats, and recognising damaged ones."""

from __future__ import annotations

import errno
import importlib.util
import io
import math
import os
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.runtime.files import atomic_write

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .bmp .dib .gif .tif .tiff .webp .ppm .pgm .pbm .pnm .jp2 .avif .heic "
    ".heif".split()
)
# Formats of images that cannot be read; RAW files contain a small preview at most.
UNSUPPORTED_SUFFIXES = frozenset(
    ".cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .dng .orf .rw2 .raf .pef .srw .raw .x3f .psd .jxl .exr .hdr .svg".split()
)
UNSUPPORTED_REASON = "camera RAW, PSD, JPEG XL, EXR, HDR and SVG cannot be read; convert it to JPEG or PNG"
WRITABLE_SUFFIXES = frozenset(".jpg .jpeg .png .bmp .tif .tiff .webp".split())
_JPEG_END = b"\xff\xd9"
# Files with these endings are complete. Others of the formats that OpenCV decodes are checked by Pillow first.
_COMPLETE_ENDINGS = (_JPEG_END, b"IEND\xaeB`\x82")
# Beginnings of JPEG, PNG, BMP, TIFF and PNM, which OpenCV decodes. Pillow decodes all others, because OpenCV does not
# rotate WebP upright and crashes on damaged JPEG 2000.
_TIFF_BEGINNINGS = (b"II", b"MM")
_DEEP_BEGINNINGS = (b"\x89PNG", *_TIFF_BEGINNINGS, b"P")  # formats that may have more than 8 bits
_OPENCV_BEGINNINGS = (b"\xff\xd8", b"BM", *_DEEP_BEGINNINGS)
_HEIF_BRANDS = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"))
_CHANNELS = ((), (1,), (3,), (4,))
_MAX_UNIT_VALUE = 2.0  # values meant for 0 to 1 may overshoot after a filter or lossy compression
_MAX_PIXELS = 1 << 30  # OpenCV's limit


# Types that are accepted as an image in Python; see `as_bgr_uint8`.
ImageLike = np.ndarray | Image.Image | str | os.PathLike[str]


class UnreadableImageError(Exception):
    """A file is missing, damaged or not an image. The message is the reason, without the name of the file."""


def read_image(path: Path) -> np.ndarray:
    """Decode an image file as OpenCV does, upright.

    EXIF orientation is applied, grey is converted to colour and alpha is dropped. More than 8 bits are reduced to 8.

    Returns:
        (H, W, 3) uint8 BGR.

    Raises:
        UnreadableImageError: the file cannot be decoded completely.
    """
    return read_image_with_note(path)[0]


def read_image_with_note(path: Path) -> tuple[np.ndarray, str | None]:
    """`read_image`, and a note for the user or None; for example that the file has several pages."""
    if path.suffix.lower() in UNSUPPORTED_SUFFIXES:
        raise UnreadableImageError(UNSUPPORTED_REASON)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UnreadableImageError(getattr(error, "strerror", None) or str(error)) from None
    if not data:
        raise UnreadableImageError("empty file")
    is_special_png = data.startswith(b"\x89PNG") and (
        data[24:25] > b"\x08" or b"acTL" in data[: max(0, data.find(b"IDAT"))]
    )
    if data.startswith(_OPENCV_BEGINNINGS) and data.rstrip(b"\0").endswith(_COMPLETE_ENDINGS) and not is_special_png:
        return _decode_with_opencv(data), None
    try:
        # OpenCV would silently fill a missing part with grey; Pillow raises an error.
        pixels, note = _decode_with_pillow(data)
    except UnreadableImageError:
        if data.startswith(b"\xff\xd8") and _lacks_only_its_end(data):
            return _decode_with_opencv(data + _JPEG_END), "the end of the file is missing, but nothing of the image"
        if data.startswith(_TIFF_BEGINNINGS) and (deep := _decode_deep(data)) is not None:
            return deep, None  # Pillow reads no TIFF of floats in colour
        raise
    if data.startswith(_DEEP_BEGINNINGS) and (deep := _decode_deep(data)) is not None:
        return deep, note
    return (_decode_with_opencv(data) if data.startswith(_OPENCV_BEGINNINGS) else pixels), note


def _decode_with_opencv(data: bytes) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise UnreadableImageError(f"OpenCV cannot decode it ({error.err})") from None
    return _decode_with_pillow(data)[0] if image is None else image


def _decode_deep(data: bytes) -> np.ndarray | None:
    """Decode an image of more than 8 bits and reduce it to 8 by its range; None if OpenCV cannot, or it has 8 bits."""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error:
        return None
    return None if image is None or image.dtype == np.uint8 else to_8_bits(image)


def _decode_with_pillow(data: bytes) -> tuple[np.ndarray, str | None]:
    """Decode the image, or the first of several; also returns a note if there are several."""
    Image.MAX_IMAGE_PIXELS = _MAX_PIXELS
    try:
        if data[4:12] in _HEIF_BRANDS and importlib.util.find_spec("pillow_heif"):
            import pillow_heif  # an optional package

            pillow_heif.register_heif_opener()
        with Image.open(io.BytesIO(data)) as image:
            frames = 1 if image.format in ("JPEG", "MPO") else getattr(image, "n_frames", 1)
            note = f"only the first of its {frames} frames or pages was looked at" if frames > 1 else None
            return _pixels_of(ImageOps.exif_transpose(image)), note
    except UnidentifiedImageError:
        needs_package = data[4:8] == b"ftyp"
        reason = "HEIC or AVIF, which needs another package: pip install pillow-heif" if needs_package else None
        raise UnreadableImageError(reason or "not an image, or damaged") from None
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        raise UnreadableImageError(str(error) or type(error).__name__) from None


def _pixels_of(image: Image.Image) -> np.ndarray:
    """Convert a Pillow image to (H, W, 3) uint8 BGR."""
    if image.mode.startswith(("I", "F")):  # Pillow's conversion would clip at 255
        return cv2.cvtColor(to_8_bits(np.asarray(image)), cv2.COLOR_GRAY2BGR)
    return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])


def as_bgr_uint8(image: ImageLike) -> np.ndarray:
    """Convert an image in any form that callers may pass to (H, W, 3) uint8 BGR.

    Args:
        image: an array of grey (H, W) or (H, W, 1), BGR (H, W, 3) or BGRA (H, W, 4), with values of any type and range
            (see `to_8_bits`); a PIL image, as it is stored; or the path of a file.

    Raises:
        TypeError, ValueError: the argument is not an image; the message says what is expected and what was given.
    """
    if isinstance(image, (str, os.PathLike)):
        try:
            return read_image(Path(image))
        except UnreadableImageError as reason:
            raise ValueError(f"{image}: {reason}") from None
    if isinstance(image, Image.Image):
        return _pixels_of(image)
    expected = "expected an image: an array (H, W, 3) BGR, (H, W, 4) BGRA or (H, W) grey, a PIL image, or a path"
    if not isinstance(image, np.ndarray):
        raise TypeError(f"{expected}; got {type(image).__name__}")
    if image.dtype.kind not in "buif" or not image.size or image.ndim not in (2, 3) or image.shape[2:] not in _CHANNELS:
        raise ValueError(f"{expected}; got an array of shape {image.shape} and type {image.dtype}")
    pixels = to_8_bits(image)
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        return cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_GRAY2BGR)
    return pixels[:, :, :3] if pixels.flags.writeable else pixels[:, :, :3].copy()


def _lacks_only_its_end(data: bytes) -> bool:
    """Whether a JPEG lacks only its end marker, so that no pixel depends on missing bytes."""
    data = data[:-1] if data.endswith(b"\xff") else data
    try:
        image, *others = (_decode_with_pillow(data + tail + _JPEG_END)[0] for tail in (b"", b"\x55" * 64, b"\xaa" * 64))
    except UnreadableImageError:
        return False
    return all(np.array_equal(image, other) for other in others)


def to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Convert pixels of any type to uint8 by the range that they use: 0 to 1, 8, 12 or 16 bits, or any other."""
    if pixels.dtype == np.uint8:
        return pixels
    values = np.nan_to_num(pixels.astype(np.float32), posinf=0, neginf=0)
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if low < 0 or high > 65535:
        return ((values - low) * (255 / (high - low))).round().astype(np.uint8)
    if pixels.dtype == bool or (pixels.dtype.kind == "f" and high <= _MAX_UNIT_VALUE):
        return (values.clip(max=1) * 255).round().astype(np.uint8)
    limit = next(limit for limit in (255, 4095, 65535) if high <= limit)
    return (values * (255 / limit)).round().astype(np.uint8)


def limited_size(size_hw: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """Height and width of an image after `resize_to_limit`."""
    height, width = size_hw
    if not max_pixels or height * width <= max_pixels:
        return size_hw
    factor = math.sqrt(max_pixels / (height * width))
    return max(1, int(height * factor)), max(1, int(width * factor))


def resize_to_limit(image: np.ndarray, max_pixels: int) -> np.ndarray:
    """Resize an image of more than `max_pixels` pixels to that number, keeping its aspect ratio.

    Args:
        image: (H, W, 3).
        max_pixels: largest number of pixels; 0 means no limit.
    """
    size_hw = (image.shape[0], image.shape[1])
    limited_hw = limited_size(size_hw, max_pixels)
    return image if limited_hw == size_hw else cv2.resize(image, limited_hw[::-1], interpolation=cv2.INTER_AREA)


def write_image(path: Path, image: np.ndarray) -> None:
    """Encode an image in the format of the file's suffix and write it atomically.

    Args:
        path: file to write; its suffix must be one of `WRITABLE_SUFFIXES`, in any case. Its folder is created.
        image: (H, W, 3) BGR or (H, W) grey, uint8.

    Raises:
        OSError: the file cannot be written.
    """
    encodable, encoded = cv2.imencode(path.suffix.lower(), image)
    if not encodable:
        size = f"{image.shape[1]}x{image.shape[0]}"
        raise OSError(errno.EFBIG, f"{size} pixels cannot be encoded as {path.suffix}", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(encoded.tobytes())
