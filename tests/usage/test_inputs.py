"""Tests of unusual inputs: paths, lists, rotated videos, deep images and damaged files."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from config import ROOT
from utils.datasets.folders import find_dataset
from utils.datasets.labels import DatasetError
from utils.runtime.files import candidate_paths
from utils.runtime.images import UnreadableImageError, read_image, read_image_with_note
from utils.runtime.pixels import to_8_bits
from utils.runtime.sources import SourceError, VideoFrames, open_source

ASTRONAUT = ROOT / "data/sample_widerface/images/astronaut.jpg"
WIDTH, HEIGHT = 64, 48


def scene() -> np.ndarray:
    """Return (48, 64, 3) BGR, bright in the top left corner."""
    image = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
    image[:16, :16] = 220
    return image


def grey() -> np.ndarray:
    return cv2.cvtColor(read_image(ASTRONAUT), cv2.COLOR_BGR2GRAY)


def names(name: str, data: Path) -> list[str]:
    return list(open_source(name, data, set(), 0).names)


# -------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("name", "opened"),
    [(".", "here.png"), ("./", "here.png"), ("./set", "mine.png"), ("..", "here.png"), ("set", "mine.png")],
)
def test_relative_paths_refer_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, opened: str
) -> None:
    for file in ("data/data.png", "data/set/data.png", "work/here.png", "work/set/mine.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / file), scene())
    monkeypatch.chdir(tmp_path / "work")
    source = open_source(name, tmp_path / "data", {tmp_path / "data"}, 0)
    assert opened in {Path(each).name for each in source.names}
    assert not any(each.startswith("data") for each in source.names)
    assert Path(source.description).is_absolute()
    if name.startswith("."):
        assert candidate_paths(name, tmp_path / "data") == [(tmp_path / "work" / name).absolute()]


def test_name_that_means_one_path_in_the_data_folder_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert candidate_paths("foo", tmp_path) == [tmp_path / "foo"]
    with pytest.raises(DatasetError, match=f"no folder {tmp_path}/foo; see"):
        find_dataset("foo", tmp_path)


@pytest.mark.parametrize("name", ["", "  "])
def test_empty_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(Exception, match="an empty name was given"):
        open_source(name, tmp_path, set(), 0)


@pytest.mark.parametrize("name", ["20240102", "./gone", "/gone/there"])
def test_missing_path_is_named_once(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match="not exist") as exc_info:
        open_source(name, tmp_path, set(), 0)
    candidates = [str(path) for path in candidate_paths(name, tmp_path)]
    assert len(set(candidates)) == len(candidates)
    assert str(exc_info.value).endswith(
        ": " + " and ".join(candidates) + f" do{'es' * (len(candidates) == 1)} not exist"
    )


def test_skipped_files_of_a_folder_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("lost+found", "results"):
        (tmp_path / folder).mkdir()
    cv2.imwrite(str(tmp_path / "a.png"), scene())
    for name in ("clip.MTS", "shot.CR2", "shot2.nef", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "lost+found", target_is_directory=True)
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    source = open_source(str(tmp_path), tmp_path, {tmp_path / "results"}, 0)
    assert source.names == ["a.png"]
    notes = "\n".join(source.notes)
    for text in (
        "lost+found: cannot be read",
        "link: a link",
        "results: results are",
        "clip.MTS: a video",
        "and 1 more: ",
    ):
        assert text in notes
    with pytest.raises(SourceError, match="cannot be read"):
        open_source(str(tmp_path / "lost+found"), tmp_path, set(), 0)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_list_may_be_written_by_powershell(tmp_path: Path, encoding: str) -> None:
    cv2.imwrite(str(tmp_path / "ü.png"), scene())
    (tmp_path / "list.txt").write_bytes("ü.png\r\n".encode(encoding))
    assert names(str(tmp_path / "list.txt"), tmp_path) == ["ü.png"]


def test_names_from_a_list_never_lead_out_of_the_results(tmp_path: Path) -> None:
    for folder in ("in", "other"):
        (tmp_path / folder).mkdir()
        cv2.imwrite(str(tmp_path / folder / "a.png"), scene())
    (tmp_path / "in/list.txt").write_text(f"a.png\n../other/a.png\n{'x' * 300}.png\na\0b.png\nc\0d/e.png\n")
    source = open_source(str(tmp_path / "in/list.txt"), tmp_path, set(), 0)
    assert all(".." not in Path(name).parts for name in source.names)
    assert [image.pixels is not None for image in source] == [True, True, False, False, False]


def test_only_line_breaks_separate_the_names_of_a_list(tmp_path: Path) -> None:
    listed = ["a\u2028b.png", "c\x0cd.png", "e\x85f.png"]
    (tmp_path / "list.txt").write_text("\n".join(listed), encoding="utf-8")
    assert names(str(tmp_path / "list.txt"), tmp_path) == listed


# ------------------------------------------------------------------------------------------------- videos


def rotated_video(path: Path, degrees: int) -> Path:
    """Write a video with a display rotation, as phones do, by replacing the matrix in the header of its track."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (WIDTH, HEIGHT))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no mp4v")
    for _ in range(2):
        writer.write(scene())
    writer.release()
    data = bytearray(path.read_bytes())
    cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    values = (cosine * one, sine * one, 0, -sine * one, cosine * one, 0, 0, 0, 1 << 30)
    data[matrix : matrix + 36] = struct.pack(">9i", *values)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotated_video_is_read_upright(tmp_path: Path, degrees: int) -> None:
    frames = [image.pixels for image in VideoFrames(rotated_video(tmp_path / "a.mp4", degrees), "a", 0)]
    expected = np.rot90(scene(), {90: -1, 180: 2, 270: 1}[degrees])
    assert len(frames) == 2
    for frame in frames:
        assert frame is not None
        assert frame.shape == expected.shape
        assert np.abs(frame.astype(int) - expected).mean() < 10


def test_mts_is_a_video(tmp_path: Path) -> None:
    rotated_video(tmp_path / "a.mp4", 180).rename(tmp_path / "a.MTS")
    assert isinstance(open_source(str(tmp_path / "a.MTS"), tmp_path, set(), 0), VideoFrames)


# ------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(
    "values",
    [
        np.array([0, 128, 255], np.int32),
        np.array([0, 128 / 255, 1], np.float32),
        np.array([0, 128, 255], np.float64),
        np.array([0, 128 * 257, 65535], np.uint16),
        np.array([0, 128 * 257, 65535], np.int32),
        np.array([-100.0, -100 + 1000 * 128 / 255, 900.0], np.float32),
        np.array([np.nan, 128, 255], np.float32),
        np.array([0, 128 / 255, 1], np.float16),
    ],
)
def test_any_range_becomes_8_bits(values: np.ndarray) -> None:
    assert np.abs(to_8_bits(values).astype(int) - [0, 128, 255]).max() <= 1
    assert to_8_bits(np.array([False, True])).tolist() == [0, 255]
    assert to_8_bits(np.zeros((0, 3), np.float32)).shape == (0, 3)


@pytest.mark.parametrize(
    "kind", ["j2k16", "int32", "float1", "float255", "float_colour", "uint16", "uint16_colour", "png12", "pgm16"]
)
def test_deep_images_are_read_like_8_bit_images(tmp_path: Path, kind: str) -> None:
    image, path = grey(), tmp_path / ("a.jp2" if kind == "j2k16" else "a.tif")
    deep = image.astype(np.uint16) * 257
    if kind == "j2k16":
        Image.fromarray(deep).save(path)
    elif kind == "png12":
        path = path.with_suffix(".png")
        cv2.imwrite(str(path), (deep >> 4).astype(np.uint16))
    elif kind == "pgm16":
        path = path.with_suffix(".pgm")
        cv2.imwrite(str(path), deep)
    elif kind == "int32":
        Image.fromarray(deep.astype(np.int32)).save(path)
    elif kind.startswith("float"):
        values = image.astype(np.float32) / (1 if kind == "float255" else 255)
        cv2.imwrite(str(path), cv2.merge([values] * 3) if "colour" in kind else values)
    else:
        cv2.imwrite(str(path), cv2.merge([deep] * 3) if "colour" in kind else deep)
    found = read_image(path)
    assert found.shape == (*image.shape, 3)
    assert np.abs(found.astype(int) - image[..., None]).mean() < 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_only_the_first_frame_is_read_with_a_note(tmp_path: Path, kind: str) -> None:
    first, second = (Image.fromarray(np.full((HEIGHT, WIDTH, 3), level, np.uint8)) for level in (50, 200))
    first.save(tmp_path / "a.img", kind, save_all=True, append_images=[second])
    first.save(tmp_path / "one.img", kind)
    image, note = read_image_with_note(tmp_path / "a.img")
    assert note == "only the first of its 2 frames or pages was looked at"
    assert abs(int(image.mean()) - 50) < 5
    assert read_image_with_note(tmp_path / "one.img")[1] is None


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_without_its_end_marker_is_read_and_half_of_it_is_not(tmp_path: Path, progressive: bool) -> None:
    buffer = io.BytesIO()
    Image.open(ASTRONAUT).save(buffer, "JPEG", progressive=progressive)
    path, data = tmp_path / "a.jpg", buffer.getvalue()
    path.write_bytes(data)
    whole = read_image(path)
    for missing in (1, 2):
        path.write_bytes(data[:-missing])
        image, note = read_image_with_note(path)
        assert np.array_equal(image, whole)
        assert note == "the end of the file is missing, but nothing of the image"
    for part in (0.3, 0.5, 0.9, 0.99):
        path.write_bytes(data[: int(part * len(data))])
        with pytest.raises(UnreadableImageError):
            read_image(path)


def test_trailing_bytes_of_a_large_jpeg_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pixel limit of Pillow, lowered here, does not apply."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = tmp_path / "a.jpg"
    path.write_bytes(ASTRONAUT.read_bytes() + b"more")
    image, note = read_image_with_note(path)
    assert np.array_equal(image, read_image(ASTRONAUT))
    assert note is None


@pytest.mark.parametrize("name", ["a.CR2", "a.dng", "a.psd", "a.jxl"])
def test_preview_in_a_raw_file_is_not_taken_for_the_photograph(tmp_path: Path, name: str) -> None:
    Image.fromarray(scene()).save(tmp_path / name, "TIFF")
    with pytest.raises(UnreadableImageError, match="convert it to JPEG"):
        read_image(tmp_path / name)


def test_heic_is_read_upright(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pixels = cv2.resize(read_image(ASTRONAUT), (256, 192))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
    pillow_heif.register_heif_opener()
    rotated = cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE)
    Image.fromarray(rotated[:, :, ::-1]).save(tmp_path / "a.heic", exif=exif.tobytes(), quality=95)
    image = read_image(tmp_path / "a.heic")
    assert image.shape == pixels.shape
    assert np.abs(image.astype(int) - pixels).mean() < 4


def test_heic_without_the_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("PIL.Image.open", Mock(side_effect=UnidentifiedImageError))  # others may have registered it
    with pytest.raises(UnreadableImageError, match="pip install pillow-heif"):
        read_image(path)
