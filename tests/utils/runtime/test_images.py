"""Tests of reading, resizing and writing images."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from config import ROOT
from utils.runtime.images import UnreadableImageError, read_image, read_image_with_note, write_image
from utils.runtime.pixels import resize_to_limit

HEIGHT, WIDTH = 40, 64


def four_colours() -> np.ndarray:
    """Return (40, 64, 3) BGR with another colour in each quarter, so that all eight orientations differ."""
    image = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    image[:20, :32] = (0, 0, 255)
    image[:20, 32:] = (0, 255, 0)
    image[20:, :32] = (255, 0, 0)
    return image


def noise() -> np.ndarray:
    """Return an image that does not compress, so that every part of its file matters."""
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def encode(image: np.ndarray, kind: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[:, :, ::-1]).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def assert_shows(image: np.ndarray, expected: np.ndarray, tolerance: float = 8.0) -> None:
    assert image.shape == expected.shape
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - expected).mean() <= tolerance


@pytest.mark.parametrize("part", [0.001, 0.1, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000"])
def test_truncated_file_is_refused(tmp_path: Path, kind: str, part: float) -> None:
    data = encode(noise(), kind)
    path = tmp_path / "cut.jpg"
    path.write_bytes(data)
    assert read_image(path).shape == (HEIGHT, WIDTH, 3)
    path.write_bytes(data[: max(1, int(part * len(data)))])
    with pytest.raises(UnreadableImageError, match=r"\w"):
        read_image(path)


@pytest.mark.parametrize("missing", [3, 50])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_without_its_last_pixels_is_refused(tmp_path: Path, progressive: bool, missing: int) -> None:
    path = tmp_path / "cut.jpg"
    path.write_bytes(encode(noise(), "JPEG", progressive=progressive)[:-missing])
    with pytest.raises(UnreadableImageError):
        read_image(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"this is text\n", "not an image"),
        (b"PNG? no, text\n", "not an image"),
        (b"\xff\xd8\xff\xd9", "not an image"),
        (b"\0" * 100, "not an image"),
        (b"\0\0\0\x1cftypisom", "not an image; if it is a video, give it the suffix .mp4"),
        (b"\0\0\0\x1cftypqt  ", "not an image; if it is a video, give it the suffix .mp4"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer, .*: git lfs pull"),
    ],
)
def test_file_that_is_not_an_image_is_refused_with_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=reason) as exc_info:
        read_image(path)
    assert str(path) not in str(exc_info.value)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError, match="No such file"):
        read_image(tmp_path / "a.jpg")
    with pytest.raises(UnreadableImageError, match="directory"):
        read_image(tmp_path)


def test_damage_inside_an_avif_is_refused(tmp_path: Path) -> None:
    if ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow has no AVIF")
    data = bytearray(encode(noise(), "AVIF"))
    start = data.index(b"mdat") + 4  # the coded image, for which the decoder raises RuntimeError
    data[start:] = b"\xaa" * (len(data) - start)
    path = tmp_path / "a.avif"
    path.write_bytes(data)
    with pytest.raises(UnreadableImageError):
        read_image(path)


@pytest.mark.parametrize("tail", [bytes(99), b"\n", b"more bytes", b"\xff\xd8"], ids=["zeros", "line", "text", "start"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_trailing_bytes_are_accepted(tmp_path: Path, kind: str, tail: bytes) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encode(four_colours(), kind) + tail)
    assert_shows(read_image(path), four_colours())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied(tmp_path: Path, kind: str, orientation: int) -> None:
    stored = four_colours()
    # EXIF 5-8 exchange the axes; the inverses of 6 and 8 are each other, the rest invert themselves.
    stored = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "rotated"
    path.write_bytes(encode(stored, kind, exif=exif))
    assert_shows(read_image(path), four_colours())


def test_sample_with_orientation_6_is_read_upright(sample_folder: Path) -> None:
    path = sample_folder / "exif_orientation_6.jpg"
    with Image.open(path) as stored:
        assert stored.getexif()[0x0112] == 6
        upright = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))[:, :, ::-1]
        assert (stored.height, stored.width) == (upright.shape[1], upright.shape[0])
    assert_shows(read_image(path), upright)


@pytest.fixture
def sample_folder() -> Path:
    return ROOT / "data" / "sample_widerface" / "images"


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"), ("GIF", "P"), ("WEBP", "RGBA"), ("TIFF", "RGBA"), ("BMP", "RGB")],
)
def test_colours_survive_every_mode(tmp_path: Path, kind: str, mode: str) -> None:
    path = tmp_path / "a.b c.ümlaut.JPG"
    path.write_bytes(encode(four_colours(), kind, mode))
    assert_shows(read_image(path), four_colours())


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "L"), ("PNG", "L"), ("PNG", "LA"), ("TIFF", "L"), ("PPM", "L")])
def test_grey_becomes_colour(tmp_path: Path, kind: str, mode: str) -> None:
    path = tmp_path / "grey"
    path.write_bytes(encode(np.full((3, 5, 3), 100, np.uint8), kind, mode))
    assert read_image(path).tolist() == [[[100, 100, 100]] * 5] * 3


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_sixteen_bits_become_eight(tmp_path: Path, channels: tuple[int, ...], suffix: str) -> None:
    path = tmp_path / "deep"
    pixels = np.full((3, 5, *channels), 128 * 257, np.uint16)
    path.write_bytes(cv2.imencode(suffix, pixels)[1].tobytes())
    assert read_image(path).tolist() == [[[128, 128, 128]] * 5] * 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_one_pixel(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "one"
    path.write_bytes(encode(np.full((1, 1, 3), 255, np.uint8), kind))
    assert read_image(path).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("name", ["a.png", "two words.PNG", "ü/日本.v1.Bmp", ".png.tiff"])
def test_lossless_file_reads_as_it_was_written(tmp_path: Path, name: str) -> None:
    write_image(tmp_path / name, noise())
    assert np.array_equal(read_image(tmp_path / name), noise())
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [Path(name).name]


def test_failed_write_keeps_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "wide.jpg"
    write_image(path, np.zeros((1, 2, 3), np.uint8))
    with pytest.raises(OSError, match="70000x1 pixels"):  # JPEG ends at 65500
        write_image(path, np.zeros((1, 70_000, 3), np.uint8))
    assert read_image(path).shape == (1, 2, 3)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        write_image(tmp_path / "file" / "a.png", np.zeros((1, 1, 3), np.uint8))


@pytest.mark.parametrize(
    ("max_pixels", "expected"), [(0, (40, 90)), (3600, (40, 90)), (900, (20, 45)), (3599, (39, 89)), (1, (1, 1))]
)
def test_reduced_image_keeps_its_aspect_ratio(max_pixels: int, expected: tuple[int, int]) -> None:
    assert resize_to_limit(np.zeros((40, 90, 3), np.uint8), max_pixels).shape == (*expected, 3)


def test_damaged_jpeg_has_a_note_and_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """libjpeg, where OpenCV calls it, prints a warning that names no file, and returns a partly grey image."""
    data = (ROOT / "data/sample_widerface/images/astronaut.jpg").read_bytes()
    half, last = len(data) // 2, len(data) - 2
    files = {
        "half": data[:half] + bytes(4 * len(data)),
        "padded": data + bytes(1000),
        "whole": data,
        "cut": data[:half] + data[last:],
        "hole": data[:half] + data[half + 400 :],
    }
    notes = {}
    for name, content in files.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
        image, notes[name] = read_image_with_note(tmp_path / f"{name}.jpg")
        assert image.shape == (512, 512, 3)
    assert notes.pop("whole") is notes.pop("padded") is None
    assert all(note and note.startswith("damaged; a part of the image may be wrong (") for note in notes.values())
    assert notes["half"] == "damaged; a part of the image may be wrong (Premature end of JPEG file)"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9, 255])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_has_the_pixels_of_opencv(tmp_path: Path, mode: str, progressive: bool, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = cv2.GaussianBlur(noise(), (0, 0), 2)[:, :37]
    (tmp_path / "a.jpg").write_bytes(encode(image, "JPEG", mode, exif=exif, progressive=progressive, subsampling=2))
    assert np.array_equal(read_image(tmp_path / "a.jpg"), cv2.imread(str(tmp_path / "a.jpg")))


def test_jpeg_with_damaged_exif_is_read(tmp_path: Path) -> None:
    data = encode(four_colours(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    (tmp_path / "a.jpg").write_bytes(data)
    assert_shows(read_image(tmp_path / "a.jpg"), four_colours())
