"""Reading and writing image files of all common formats, and recognising damaged ones."""

from __future__ import annotations

import errno
import importlib.util
import io
import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from utils.errors import lfs_pointer
from utils.runtime.files import atomic_write

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .bmp .dib .gif .tif .tiff .webp .ppm .pgm .pbm .pnm .jp2 .j2k .j2c .jpc "
    ".jpf .jpx .tga .avif .heic .heif .hif".split()
)
# Formats of images that cannot be read; RAW files contain a small preview at most.
UNSUPPORTED_SUFFIXES = frozenset(
    ".cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .dng .orf .rw2 .raf .pef .srw .raw .x3f .3fr .fff .rwl .rwz .gpr .iiq "
    ".mef .mos .mrw .erf .kdc .dcr .psd .psb .jxl .exr .hdr .svg".split()
)
UNSUPPORTED_REASON = "camera RAW, PSD, JPEG XL, EXR, HDR and SVG cannot be read; convert it to JPEG or PNG"
WRITABLE_SUFFIXES = frozenset(".jpg .jpeg .png .bmp .tif .tiff .webp".split())
_JPEG_END = b"\xff\xd9"
_LEAST_ZEROS = 64  # at the end of a file for which space was reserved, but not filled
# Files with these endings are complete. Others of the formats that OpenCV decodes are checked by Pillow first.
_COMPLETE_ENDINGS = (_JPEG_END, b"IEND\xaeB`\x82")
# Beginnings of JPEG, PNG, BMP, TIFF and PNM, which OpenCV decodes. Pillow decodes all others, because OpenCV does not
# rotate WebP upright and crashes on damaged JPEG 2000.
_TIFF_BEGINNINGS = (b"II", b"MM")
_DEEP_BEGINNINGS = (b"\x89PNG", *_TIFF_BEGINNINGS, b"P")  # formats that may have more than 8 bits
_OPENCV_BEGINNINGS = (b"\xff\xd8", b"BM", *_DEEP_BEGINNINGS)
_HEIF_BRANDS = tuple(b"ftyp" + brand for brand in b"heic heix hevc hevx heim heis mif1 msf1".split())
_AVIF_BRANDS = (b"ftypavif", b"ftypavis")
_CHANNELS = ((), (1,), (3,), (4,))
_MAX_UNIT_VALUE = 2.0  # values meant for 0 to 1 may overshoot after a filter or lossy compression
# Decoding one image may take so much memory, so that with the model it is less than 2 GB.
_MAX_DECODED_BYTES = 800_000_000
# Bytes that decoding takes for each pixel: with 8 and with 32 bits, and by Pillow.
_BYTES_PER_PIXEL, _FLOAT_BYTES_PER_PIXEL, _PILLOW_BYTES_PER_PIXEL = 6, 22, 16
# Less than the 6 and 11 that it takes: there are photographs of 200 megapixels, and of 102 with 16 bits.
_JPEG_BYTES_PER_PIXEL, _DEEP_BYTES_PER_PIXEL = 4, 7.8
_MAX_JPEG_PIXELS_PER_BYTE = 1024  # twice as many as Huffman codes can express
LARGE_PIXELS = 16_000_000  # images of more pixels are not read ahead; see `LargeImageError`
_ROWS_AT_ONCE = 256


# Types that are accepted as an image in Python; see `as_bgr_uint8`.
ImageLike = np.ndarray | Image.Image | str | os.PathLike[str]


class UnreadableImageError(Exception):
    """A file is missing, damaged or not an image. The message is the reason, without the name of the file."""


class LargeImageError(Exception):
    """An image is so large that only one at a time should be in memory."""


def read_image(path: Path) -> np.ndarray:
    """Decode an image file as OpenCV does, upright.

    EXIF orientation is applied, grey is converted to colour and alpha is dropped. More than 8 bits are reduced to 8.

    Returns:
        (H, W, 3) uint8 BGR.

    Raises:
        UnreadableImageError: the file cannot be decoded completely.
    """
    return read_image_with_note(path)[0]


def read_image_with_note(path: Path, *, allow_large: bool = True) -> tuple[np.ndarray, str | None]:
    """`read_image`, and a note for the user or None; for example that the file has several pages.

    Raises:
        LargeImageError: the image is large, and `allow_large` is False. Nothing has been decoded.
    """
    if path.suffix.lower() in UNSUPPORTED_SUFFIXES:
        raise UnreadableImageError(UNSUPPORTED_REASON)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UnreadableImageError(getattr(error, "strerror", None) or str(error)) from None
    if not data:
        raise UnreadableImageError("empty file")
    width, height, bytes_per_pixel = _read_header(data)
    if width * height * bytes_per_pixel > _MAX_DECODED_BYTES:
        raise UnreadableImageError(f"{width}x{height} pixels are too many to decode; reduce it or cut it into parts")
    if data.startswith(b"\xff\xd8") and width * height > _MAX_JPEG_PIXELS_PER_BYTE * len(data):
        raise UnreadableImageError(f"{width}x{height} pixels cannot be in {len(data)} bytes")
    if width * height > LARGE_PIXELS and not allow_large:
        raise LargeImageError
    if data.startswith(b"\x89PNG") and not _has_its_chunks(data):
        raise UnreadableImageError("a part of the file is missing")
    if not data.startswith(_OPENCV_BEGINNINGS):
        return _decode_with_pillow(data)
    is_special_png = data.startswith(b"\x89PNG") and (
        data[24:25] > b"\x08" or b"acTL" in data[: max(0, data.find(b"IDAT"))]
    )
    note = None
    if not data.rstrip(b"\0").endswith(_COMPLETE_ENDINGS) or is_special_png:
        try:
            # OpenCV would silently fill a missing part with grey; Pillow raises an error.
            note = _check_with_pillow(data)
            if data.startswith(b"\xff\xd8") and data.endswith(bytes(_LEAST_ZEROS)):
                note = "the file ends in zeros instead of its last part, where the image may be grey"
        except UnreadableImageError:
            if data.startswith(b"\xff\xd8") and width * height < LARGE_PIXELS and _lacks_only_its_end(data):
                return _decode_with_opencv(data + _JPEG_END), "the end of the file is missing, but nothing of the image"
            # Pillow reads no TIFF of floats in colour.
            if data.startswith(_TIFF_BEGINNINGS) and (deep := _imdecode(data)) is not None and deep.dtype != np.uint8:
                return to_8_bits(deep), None
            raise
    return _decode_with_opencv(data), note


def _read_header(data: bytes) -> tuple[int, int, float]:
    """Width, height, and the number of bytes that decoding takes for each pixel; zeros where they are unknown."""
    try:
        if data.startswith(b"\x89PNG"):
            return (*struct.unpack(">II", data[16:24]), _DEEP_BYTES_PER_PIXEL if data[24] > 8 else _BYTES_PER_PIXEL)
        if data.startswith(_TIFF_BEGINNINGS):
            stream = io.BytesIO(data)
            tags = TiffImagePlugin.ImageFileDirectory_v2(stream.read(8))
            stream.seek(tags.next)
            tags.load(stream)
            depth = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
            taken: float = _BYTES_PER_PIXEL if depth <= 8 else _DEEP_BYTES_PER_PIXEL
            taken = _FLOAT_BYTES_PER_PIXEL if depth > 16 else taken
            return int(tags[TiffImagePlugin.IMAGEWIDTH]), int(tags[TiffImagePlugin.IMAGELENGTH]), taken
        with _open_with_pillow(data) as image:
            taken = _JPEG_BYTES_PER_PIXEL if data.startswith(b"\xff\xd8") else _PILLOW_BYTES_PER_PIXEL
            taken = _DEEP_BYTES_PER_PIXEL if data.startswith((b"BM", b"P")) else taken
            return image.width, image.height, taken
    except Exception:  # decoding will report it
        return 0, 0, 0


def _has_its_chunks(data: bytes) -> bool:
    """Whether the chunks of a PNG end within the file. OpenCV allocates what their headers say, up to 4 GB."""
    start = 8
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        start += length + 12
        if kind == b"IEND":
            break
    return start <= len(data)


def _imdecode(data: bytes) -> np.ndarray | None:
    """Decode with OpenCV, (H, W, 3) BGR of any type; None if it cannot."""
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error:
        return None


def _decode_with_opencv(data: bytes) -> np.ndarray:
    image = _imdecode(data)
    return _decode_with_pillow(data)[0] if image is None else to_8_bits(image)


def _open_with_pillow(data: bytes) -> Image.Image:
    Image.MAX_IMAGE_PIXELS = None  # `_read_header` serves to check the size, before anything is decoded
    if data[4:12] in _HEIF_BRANDS and importlib.util.find_spec("pillow_heif"):
        import pillow_heif  # an optional package

        pillow_heif.register_heif_opener()
    return Image.open(io.BytesIO(data))


@contextmanager
def _reasons(data: bytes) -> Iterator[None]:
    """Turn whatever Pillow raises in this block into an `UnreadableImageError`."""
    try:
        yield
    except UnidentifiedImageError:
        reason = lfs_pointer(data) or "not an image, or damaged"
        if data[4:12] in (*_HEIF_BRANDS, *_AVIF_BRANDS):
            reason = "HEIC or AVIF, which needs another package: pip install pillow-heif"
        elif data[4:8] == b"ftyp":
            reason = "not an image; if it is a video, give it the suffix .mp4"
        raise UnreadableImageError(reason) from None
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        raise UnreadableImageError(str(error) or type(error).__name__) from None


def _note_on_frames(image: Image.Image) -> str | None:
    frames = 1 if image.format in ("JPEG", "MPO") else getattr(image, "n_frames", 1)
    return f"only the first of its {frames} frames or pages was looked at" if frames > 1 else None


def _check_with_pillow(data: bytes) -> str | None:
    """Decode the image, or the first of several, only to see whether it is complete; returns a note if there are
    several."""
    with _reasons(data), _open_with_pillow(data) as image:
        note = _note_on_frames(image)
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))  # a JPEG takes less memory
        image.load()
        return note


def _decode_with_pillow(data: bytes) -> tuple[np.ndarray, str | None]:
    """Decode the image, or the first of several; also returns a note if there are several."""
    with _reasons(data), _open_with_pillow(data) as image:
        note = _note_on_frames(image)
        ImageOps.exif_transpose(image, in_place=True)
        return _pixels_of(image), note


def _pixels_of(image: Image.Image) -> np.ndarray:
    """Convert a Pillow image to (H, W, 3) uint8 BGR."""
    if image.mode.startswith(("I", "F")):  # Pillow's conversion would clip at 255
        return cv2.cvtColor(to_8_bits(np.asarray(image)), cv2.COLOR_GRAY2BGR)
    pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)


def as_bgr_uint8(image: ImageLike) -> np.ndarray:
    """Convert an image in any form that callers may pass to (H, W, 3) uint8 BGR.

    Args:
        image: an array of grey (H, W) or (H, W, 1), BGR (H, W, 3) or BGRA (H, W, 4), with values of any type and range
            (see `to_8_bits`); a PIL image, as it is stored; or the path of a file.

    Raises:
        TypeError, ValueError: the argument is not an image; the message says what is expected and what was given.
    """
    try:
        if isinstance(image, (str, os.PathLike)):
            return read_image(Path(image))
        if isinstance(image, Image.Image) and 0 not in image.size:
            with _reasons(b""):  # a file that Pillow opened is decoded only now
                return _pixels_of(image)
    except UnreadableImageError as reason:
        raise ValueError(f"{image}: {reason}") from None
    expected = "expected an image: an array (H, W, 3) BGR, (H, W, 4) BGRA or (H, W) grey, a PIL image, or a path"
    if isinstance(image, Image.Image):
        raise ValueError(f"{expected}; got a PIL image of {image.width}x{image.height} pixels")
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
    if not pixels.size:
        return pixels.astype(np.uint8)
    parts = [pixels[row : row + _ROWS_AT_ONCE] for row in range(0, len(pixels), _ROWS_AT_ONCE)]
    ranges = [(float(values.min()), float(values.max())) for values in map(_finite, parts)]
    low, high = min(0.0, *(each[0] for each in ranges)), max(0.0, *(each[1] for each in ranges))
    offset, limit, largest = 0.0, next((float(limit) for limit in (255, 4095, 65535) if high <= limit), 0.0), math.inf
    if low < 0 or high > 65535:
        offset, limit = low, high - low
    elif pixels.dtype == bool or (pixels.dtype.kind == "f" and high <= _MAX_UNIT_VALUE):
        limit, largest = 1.0, 1.0
    factor = 255 / limit
    result = np.empty(pixels.shape, np.uint8)
    for row, part in zip(range(0, len(pixels), _ROWS_AT_ONCE), parts, strict=True):
        result[row : row + _ROWS_AT_ONCE] = ((_finite(part) - offset).clip(max=largest) * factor).round()
    return result


def _finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float32), posinf=0, neginf=0)


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
