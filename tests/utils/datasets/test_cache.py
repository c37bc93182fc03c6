"""Tests of the image caches in memory and on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from utils.datasets.cache import cache_folder, open_images
from utils.errors import UserError
from utils.runtime.images import UnreadableImageError, write_image

KINDS = ["none", "ram", "disk"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_noise(path: Path, size_hw: tuple[int, int] = (30, 50), seed: int = 0) -> np.ndarray:
    image = np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), np.uint8)
    write_image(path, image)
    return image


def reader(path: Path, kind: str) -> Callable[[Path], np.ndarray]:
    return open_images([path], kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size_hw", [(1, 1), (30, 50), (7, 300)])
def test_pixels_are_those_of_the_file(tmp_path: Path, kind: str, size_hw: tuple[int, int]) -> None:
    image = write_noise(tmp_path / "a.png", size_hw)
    files = reader(tmp_path / "a.png", kind)
    for _ in range(2):
        pixels = files(tmp_path / "a.png")
        assert np.array_equal(pixels, image)
        assert not pixels.flags.writeable


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_second_read_comes_from_the_cache(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    image = write_noise(path)
    files = reader(path, kind)
    files(path)
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert np.array_equal(files(path), image)


def test_file_on_disk_is_an_array_that_numpy_reads(tmp_path: Path) -> None:
    image = write_noise(tmp_path / "a.png", (2, 3))
    reader(tmp_path / "a.png", "disk")(tmp_path / "a.png")
    (cached,) = cache_folder().iterdir()
    assert cached.suffix == ".npy"
    assert np.load(cached).tolist() == image.tolist()


def test_changed_file_is_read_again_in_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_noise(path)
    reader(path, "disk")(path)
    image = write_noise(path, (20, 20), seed=1)
    os.utime(path, ns=(1, 1))
    assert np.array_equal(reader(path, "disk")(path), image)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:9],
        lambda data: data[:-1],
        lambda data: bytes(len(data)),
        lambda data: data.replace(b"{", b"("),  # the header, which NumPy parses as Python
    ],
)
def test_damaged_cache_file_is_written_again(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "a.png"
    image = write_noise(path)
    files = reader(path, "disk")
    files(path)
    (cached,) = cache_folder().iterdir()
    whole = cached.read_bytes()
    cached.write_bytes(damage(whole))  # type: ignore[operator]
    assert np.array_equal(files(path), image)
    assert [file.read_bytes() for file in cache_folder().iterdir()] == [whole]


def test_images_are_read_despite_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    image = write_noise(tmp_path / "a.png")
    files = reader(tmp_path / "a.png", "disk")
    monkeypatch.setattr("utils.runtime.files.os.replace", fail)
    assert np.array_equal(files(tmp_path / "a.png"), image)
    assert list(cache_folder().iterdir()) == []


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="retinaface_images: cannot be written to"):
        reader(tmp_path / "a.png", "disk")


@pytest.mark.parametrize("kind", KINDS)
def test_reason_of_an_unreadable_image_is_kept(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UnreadableImageError, match="empty file"):
        reader(tmp_path / "a.png", kind)(tmp_path / "a.png")
    with pytest.raises(UnreadableImageError, match="No such file"):
        reader(tmp_path / "b.png", kind)(tmp_path / "b.png")


def test_memory_use_is_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_noise(tmp_path / "a.png")
    reader(tmp_path / "a.png", "ram")
    assert caplog.messages == ["--cache=ram: 1 images take 0.0 GB of memory"]


def test_default_folder_is_in_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "retinaface_images"
