"""Tests of the sources of images that --inference_dir names: folders, files, lists, patterns, videos and cameras."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.runtime.files import OUTPUT_FOLDERS
from utils.runtime.images import write_image
from utils.runtime.sources import ImageFiles, Source, SourceError, open_source, read_images


def save(path: Path, width: int = 3, height: int = 2) -> None:
    write_image(path, np.zeros((height, width, 3), np.uint8))


def open_path(path: Path, max_frames: int = 0) -> Source:
    return open_source(str(path), path.parent / "no-data", exclude={path / "results"}, max_frames=max_frames)


def names_of(source: Source) -> list[str]:
    return [image.name for image in source]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five frames of 48 x 32 of increasing brightness, at 10 frames per second."""
    path = tmp_path_factory.mktemp("video") / "my clip_v1.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (48, 32))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no mp4v")
    for level in range(5):
        writer.write(np.full((32, 48, 3), 50 * level, np.uint8))
    writer.release()
    return path


def test_folder_yields_its_images_sorted_by_path(tmp_path: Path) -> None:
    for name in ("b.jpg", "a b.PNG", "sub.d/ü.v1.JPeG", "sub.d/deep/c.webp", "sub.d/deep/notes.png.bak", "z.TIF"):
        save(tmp_path / Path(name).with_suffix(".png"))
        (tmp_path / Path(name).with_suffix(".png")).rename(tmp_path / name)
    source = open_path(tmp_path)
    expected = ["a b.PNG", "b.jpg", "sub.d/deep/c.webp", "sub.d/ü.v1.JPeG", "z.TIF"]
    assert names_of(source) == source.names == expected
    assert (source.total, source.frames_per_second) == (5, None)
    assert source.notes == [f"skipped {tmp_path}/sub.d/deep/notes.png.bak: its suffix is not that of an image"]
    assert all(image.pixels is not None and image.pixels.shape == (2, 3, 3) for image in source)


def test_hidden_files_results_and_loops_are_skipped(tmp_path: Path) -> None:
    for name in ("a.png", ".b.png", ".hidden/c.png", "results/a.png", "results/sub/a.png", "sub/results/d.png"):
        save(tmp_path / name)
    (tmp_path / "sub" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "sub" / "itself").symlink_to(tmp_path / "sub" / "itself")
    source = open_path(tmp_path)
    assert names_of(source) == ["a.png", "sub/results/d.png"]
    # The link to itself is neither a folder nor an image.
    assert f"skipped {tmp_path}/sub/itself: its suffix is not that of an image" in source.notes


def test_results_among_the_images_are_skipped(tmp_path: Path) -> None:
    for name in ("a.png", "result_images/a.png", "head_masks/a_0.png", "sub/faces/b.png"):
        save(tmp_path / name)
    exclude = {tmp_path, *(tmp_path / name for name in OUTPUT_FOLDERS)}
    source = open_source(str(tmp_path), tmp_path / "no-data", exclude, max_frames=0)
    assert names_of(source) == ["a.png", "sub/faces/b.png"]


def test_results_of_an_earlier_run_are_skipped_and_named(tmp_path: Path) -> None:
    for name in ("a.png", "out/mine.png", "out/result_images/a.png", "out/thumbnails/000000.png", "faces/b.png"):
        save(tmp_path / name)
    (tmp_path / "out/.records/exp").mkdir(parents=True)
    source = open_path(tmp_path)
    assert names_of(source) == ["a.png", "faces/b.png", "out/mine.png"]
    (note,) = source.notes
    reason = "results of an earlier run; --inference_dir may name this folder itself"
    assert note == f"skipped {tmp_path}/out/result_images and 1 more: {reason}"
    assert names_of(open_path(tmp_path / "out/result_images")) == ["a.png"]
    assert names_of(open_path(tmp_path / "out")) == ["mine.png"]


def test_results_of_an_earlier_run_match_a_pattern_only_if_it_names_their_folder(tmp_path: Path) -> None:
    for name in ("a.png", "out/mine.png", "out/result_images/a.png", "out/faces/sub/b.png", "photos/faces/c.png"):
        save(tmp_path / name)
    (tmp_path / "out/.records/exp").mkdir(parents=True)
    source = open_path(tmp_path / "**/*.png")
    assert names_of(source) == ["a.png", "out/mine.png", "photos/faces/c.png"]
    (note,) = source.notes
    reason = "results of an earlier run; --inference_dir may name this folder itself"
    assert note == f"skipped {tmp_path}/out/faces/sub/b.png and 1 more: {reason}"
    assert names_of(open_path(tmp_path / "*/faces/**/*.png")) == ["out/faces/sub/b.png", "photos/faces/c.png"]
    assert open_path(tmp_path / "out/result_images/*.png").names == ["a.png"]
    with pytest.raises(SourceError, match="no image matches it"):
        open_path(tmp_path / "out/*/*/b.png")


def test_damaged_images_are_yielded_with_their_problem(tmp_path: Path) -> None:
    save(tmp_path / "good.png")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    problems = {image.name: image.problem for image in open_path(tmp_path)}
    assert problems == {
        "empty.jpg": "empty file",
        "gone.jpg": "No such file or directory",
        "good.png": None,
        "text.png": "not an image, or damaged",
    }
    assert [image.name for image in open_path(tmp_path) if image.pixels is None] == [
        "empty.jpg", "gone.jpg", "text.png"
    ]  # fmt: skip


def test_skipped_files_are_named_with_the_reason(tmp_path: Path) -> None:
    for suffix in ("mpo", "HIF", "j2k", "jpx", "tga", "psb", "3fr", "rwl", "gpr", "qt", "lrv", "m2t", "xyz", "txt"):
        (tmp_path / f"a.{suffix}").touch()
    source = open_path(tmp_path)
    assert source.names == ["a.HIF", "a.j2k", "a.jpx", "a.mpo", "a.tga"]
    expected = {
        "camera RAW": {"psb", "3fr", "rwl", "gpr"},
        "a video": {"qt", "lrv", "m2t"},
        "its suffix": {"xyz", "txt"},
    }
    for reason, suffixes in expected.items():
        (note,) = [note for note in source.notes if f": {reason}" in note]
        assert any(f"/a.{suffix} and {len(suffixes) - 1} more: " in note for suffix in suffixes)


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SourceError, match=r"holds no image \(looked for .*\.jpg"):
        open_path(tmp_path)


def test_single_file_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    save(tmp_path / "a.png", width=5, height=2)
    (tmp_path / "a.png").rename(tmp_path / ".photo")
    source = open_path(tmp_path / ".photo")
    (image,) = source
    assert (image.name, source.names, source.total) == (".photo", [".photo"], 1)
    assert image.pixels is not None
    assert image.pixels.shape == (2, 5, 3)


def test_names_are_searched_in_the_working_folder_and_then_in_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "data" / "set" / "in_data.png")
    save(tmp_path / "set" / "here.png")
    save(tmp_path / "only_here" / "here.png")
    monkeypatch.chdir(tmp_path)
    opened = [open_source(name, tmp_path / "data", set(), 0).names for name in ("set/", "only_here")]
    assert opened == [["here.png"], ["here.png"]]
    assert open_source("set", tmp_path / "data", set(), 0).description == str(tmp_path / "set")


@pytest.mark.parametrize("pattern", ["ph [1]/*.png", "ph [1]/[ab].png", "*[[]1]/**/*.png"])
def test_brackets_in_a_folder_name_are_taken_literally(tmp_path: Path, pattern: str) -> None:
    for name in ("ph [1]/a.png", "ph [1]/b.png", "ph 1/c.png"):
        save(tmp_path / name)
    assert open_source(pattern, tmp_path, set(), 0).names == ["a.png", "b.png"]


@pytest.mark.parametrize("name", ["nowhere", "nowhere.mp4", "-1", "²"])
def test_missing_source_is_refused_with_both_paths(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match=f"--inference_dir {name}: .*/{name} and .*data/{name} do not exist"):
        open_source(name, tmp_path / "data", set(), 0)


def test_missing_camera_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="camera97: cannot be opened; no such camera"):
        open_source("97", tmp_path, set(), 0)


def test_video_yields_numbered_frames(video: Path) -> None:
    source = open_path(video)
    assert (source.total, source.names) == (5, [])
    assert source.frames_per_second == pytest.approx(10)
    images = list(source)
    assert [image.name for image in images] == [f"my clip_v1_00000{number}.jpg" for number in range(1, 6)]
    levels = [float(image.pixels.mean()) for image in images if image.pixels is not None]
    assert levels == pytest.approx([0, 50, 100, 150, 200], abs=8)
    assert images[0].pixels is not None
    assert images[0].pixels.shape == (32, 48, 3)


@pytest.mark.parametrize(("max_frames", "expected"), [(2, 2), (5, 5), (9, 5)])
def test_video_stops_after_max_frames(video: Path, max_frames: int, expected: int) -> None:
    source = open_path(video, max_frames)
    assert source.total == expected
    assert len(names_of(source)) == expected


@pytest.mark.parametrize("part", [0.0, 0.3])
def test_broken_video_is_refused(video: Path, tmp_path: Path, part: float) -> None:
    broken = tmp_path / "broken.MP4"
    shutil.copy(video, broken)
    broken.write_bytes(video.read_bytes()[: int(part * video.stat().st_size)])
    with pytest.raises(SourceError, match=r"broken\.MP4: (cannot be opened; not a video|holds no frame)"):
        names_of(open_path(broken))


def test_video_that_ends_early_is_named(tmp_path: Path) -> None:
    path, cut = tmp_path / "whole.avi", tmp_path / "cut.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (320, 240))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no MJPG")
    for _ in range(20):
        writer.write(np.random.default_rng(0).integers(0, 255, (240, 320, 3), np.uint8))
    writer.release()
    data = path.read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    whole, limited, broken = open_path(path), open_path(path, 3), open_path(cut)
    assert [len(names_of(source)) for source in (whole, limited)] == [20, 3]
    assert list(whole.notes) == list(limited.notes) == []
    count = len(names_of(broken))
    assert 0 < count < 18
    assert list(broken.notes) == [f"{cut}: ends after {count} of 20 frames; perhaps damaged"]


def test_pattern_matches_images_in_any_depth(tmp_path: Path) -> None:
    for name in ("a.png", "sub/b.png", "sub/deep/c.png"):
        save(tmp_path / name)
    (tmp_path / "sub/notes.txt").touch()
    assert open_path(tmp_path / "*.png").names == ["a.png"]
    assert open_path(tmp_path / "**/*").names == ["a.png", "sub/b.png", "sub/deep/c.png"]
    assert names_of(open_path(tmp_path / "sub/**/*.png")) == ["b.png", "deep/c.png"]
    with pytest.raises(SourceError, match="no image matches it"):
        open_path(tmp_path / "*.jpg")


def test_list_yields_images_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths relative to the working folder or to the list, an absolute path, a duplicate, and a missing file."""
    for name in ("here/a.png", "lists/b.png", "far/c.png"):
        save(tmp_path / name)
    file = tmp_path / "lists/all.txt"
    file.write_text(f"a.png\n\nb.png\n{tmp_path}/far/c.png\na.png\ngone.png\n")
    monkeypatch.chdir(tmp_path / "here")
    source = open_path(file)
    assert source.names == ["here/a.png", "lists/b.png", "far/c.png", "lists/gone.png"]
    assert [image.problem for image in source] == [None, None, None, "No such file or directory"]
    file.write_text("\n")
    with pytest.raises(SourceError, match="names no image; expected one path per line"):
        open_path(file)


def test_images_are_prefetched_and_keep_their_order(tmp_path: Path) -> None:
    files = [(f"{number}.png", tmp_path / f"{number}.png") for number in range(12)]
    for number, (_, path) in enumerate(files):
        save(path, width=number + 1)
    given: list[str] = []

    def counted() -> Iterator[tuple[str, Path]]:
        for name, path in files:
            given.append(name)
            yield name, path

    images = read_images(counted())
    assert next(images).name == "0.png"
    assert len(given) == 3  # one was yielded, and two are being read
    widths = [image.pixels.shape[1] for image in images if image.pixels is not None]
    assert widths == list(range(2, 13))
    assert list(read_images([])) == []


def test_images_can_be_read_by_position(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        save(tmp_path / name)
    source = open_path(tmp_path)
    assert isinstance(source, ImageFiles)
    assert [(image.name, image.position) for image in source.read([0, 2])] == [("a.png", 0), ("c.png", 2)]
    assert list(source.read([])) == []
    assert [image.position for image in source] == [0, 1, 2]


def test_digest_depends_on_the_paths_and_their_order(tmp_path: Path) -> None:
    for name in ("x/a.png", "y/a.png"):
        save(tmp_path / name)
    lists = {"one": "x/a.png\n", "other": "y/a.png\n", "both": "x/a.png\ny/a.png\n", "turned": "y/a.png\nx/a.png\n"}
    digests = set()
    for name, lines in lists.items():
        (tmp_path / f"{name}.txt").write_text(lines)
        source = open_source(str(tmp_path / f"{name}.txt"), tmp_path / "no-data", set(), max_frames=0)
        assert isinstance(source, ImageFiles)
        digests.add(source.digest())
    assert len(digests) == 4
