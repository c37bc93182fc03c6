"""Reading and writing image files of all common formats, and recognising damaged ones."""

from __future__ import annotations

import errno
import importlib.util
import io
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from utils.errors import lfs_pointer
from utils.runtime.files import atomic_write
from utils.runtime.pixels import to_8_bits

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
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_LEAST_ZEROS = 64  # at the end of a file for which space was reserved, but not filled
# Files with these endings are complete. Others of the formats that OpenCV decodes are checked by Pillow first.
_COMPLETE_ENDINGS = (_JPEG_END, b"IEND\xaeB`\x82")
# Beginnings of JPEG, PNG, BMP, TIFF and PNM, which OpenCV decodes. Pillow decodes all others, because OpenCV does not
# rotate WebP upright and crashes on damaged JPEG 2000.
_TIFF_BEGINNINGS = (b"II", b"MM")
_DEEP_BEGINNINGS = (b"\x89PNG", *_TIFF_BEGINNINGS, b"P")  # formats that may have more than 8 bits
_OPENCV_BEGINNINGS = (_JPEG_START, b"BM", *_DEEP_BEGINNINGS)
_HEIF_BRANDS = tuple(b"ftyp" + brand for brand in b"heic heix hevc hevx heim heis mif1 msf1".split())
_AVIF_BRANDS = (b"ftypavif", b"ftypavis")
_CHANNELS = ((), (1,), (3,), (4,))
# Decoding one image may take so much memory, so that with the model it is less than 2 GB.
_MAX_DECODED_BYTES = 800_000_000
# Bytes that decoding takes for each pixel: with 8 and with 32 bits, and by Pillow.
_BYTES_PER_PIXEL, _FLOAT_BYTES_PER_PIXEL, _PILLOW_BYTES_PER_PIXEL = 6, 22, 16
# Less than the 6 and 11 that it takes: there are photographs of 200 megapixels, and of 102 with 16 bits.
_JPEG_BYTES_PER_PIXEL, _DEEP_BYTES_PER_PIXEL = 4, 7.8
_MAX_JPEG_PIXELS_PER_BYTE = 1024  # twice as many as Huffman codes can express
LARGE_PIXELS = 16_000_000  # images of more pixels are not read ahead; see `LargeImageError`


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
    if data.startswith(_JPEG_START) and width * height > _MAX_JPEG_PIXELS_PER_BYTE * len(data):
        raise UnreadableImageError(f"{width}x{height} pixels cannot be in {len(data)} bytes")
    if width * height > LARGE_PIXELS and not allow_large:
        raise LargeImageError
    if data.startswith(b"\x89PNG") and not _has_its_chunks(data):
        raise UnreadableImageError("a part of the file is missing")
    if not data.startswith(_OPENCV_BEGINNINGS):
        return _decode_with_pillow(data)
    if data.startswith(_JPEG_START) and (decoded := _decode_jpeg(data)) is not None:
        return decoded
    is_special_png = data.startswith(b"\x89PNG") and (
        data[24:25] > b"\x08" or b"acTL" in data[: max(0, data.find(b"IDAT"))]
    )
    note = None
    if not data.rstrip(b"\0").endswith(_COMPLETE_ENDINGS) or is_special_png:
        try:
            # OpenCV would silently fill a missing part with grey; Pillow raises an error.
            note = _check_with_pillow(data)
        except UnreadableImageError:
            # Pillow reads no TIFF of floats in colour.
            if data.startswith(_TIFF_BEGINNINGS) and (deep := _imdecode(data)) is not None and deep.dtype != np.uint8:
                return to_8_bits(deep), None
            raise
    pixels = _imdecode(data)
    return (to_8_bits(pixels), note) if pixels is not None else _decode_with_pillow(data)


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
            taken = _JPEG_BYTES_PER_PIXEL if data.startswith(_JPEG_START) else _PILLOW_BYTES_PER_PIXEL
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


def _decode_jpeg(data: bytes) -> tuple[np.ndarray, str | None] | None:
    """Decode a JPEG to the same pixels as OpenCV, whose libjpeg prints warnings without the name of the file.

    Returns:
        The image, and a note if the file is damaged; None if this decoder does not support the file.

    Raises:
        UnreadableImageError: the file ends before the image does.
    """
    note = None
    try:
        image = simplejpeg.decode_jpeg(data, "BGR")
    except ValueError as warning:
        try:
            image = simplejpeg.decode_jpeg(data, "BGR", strict=False)
        except ValueError:
            return None
        note = f"damaged; a part of the image may be wrong ({warning})"
        # Where space was reserved for the file but not filled, it ends in zeros.
        if str(warning).startswith("Premature end of JPEG file") and not data.endswith(bytes(_LEAST_ZEROS)):
            try:
                simplejpeg.decode_jpeg(data + _JPEG_END, "BGR")
            except ValueError:
                raise UnreadableImageError("the end of the file is missing, and with it a part of the image") from None
            note = "the end of the file is missing, but nothing of the image"
    return _upright(image, _orientation(data)), note


def _orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG; 1, which is upright, if there is none."""
    try:
        with _open_with_pillow(data) as image:
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
            return int(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged
        return 1


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an image, (H, W, 3), as its EXIF orientation says."""
    if 5 <= orientation <= 8:
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


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
