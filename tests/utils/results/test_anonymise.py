"""Tests of anonymising faces in images and videos."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest

from config import InferenceOptions
from utils.options import declarations
from utils.results.anonymise import add_audio, anonymise
from utils.results.masks import HeadMask

METHODS = declarations(InferenceOptions)["anonymize"].choices or ()
BOX = np.array([40.0, 30.0, 80.0, 90.0])


def noise(size_hw: tuple[int, int] = (120, 160)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*size_hw, 3), dtype=np.uint8)


def inside(scale: float) -> np.ndarray:
    """Return the mask (120, 160) of the scaled ellipse of `BOX`."""
    y, x = np.mgrid[:120, :160] + 0.5
    return ((x - 60) / (20 * scale)) ** 2 + ((y - 60) / (30 * scale)) ** 2 <= 1


@pytest.mark.parametrize("method", METHODS)
def test_ellipse_around_the_face_is_hidden_and_nothing_else(method: str) -> None:
    image = noise()
    hidden = anonymise(image, BOX[None], method)
    changed = (hidden != image).any(axis=2)
    assert changed[inside(1.0)].mean() > 0.99
    assert not changed[~inside(1.32)].any()
    assert (image == noise()).all()  # the input is not modified


@pytest.mark.parametrize("method", ["blur", "pixelate"])
def test_blur_and_pixelation_remove_details(method: str) -> None:
    """Fine stripes within the box lose their contrast."""
    stripes = np.zeros((120, 160, 3), np.uint8)
    stripes[:, ::4] = stripes[:, 1::4] = 255
    hidden = anonymise(stripes, BOX[None], method)
    assert stripes[50:70, 50:70].std() > 100
    assert hidden[50:70, 50:70].std() < 30


def test_solid_is_black() -> None:
    assert not anonymise(noise(), BOX[None], "solid")[inside(1.0)].any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "box", [[-20, -20, 30, 30], [150, 100, 200, 180], [300, 300, 320, 320], [5, 5, 6, 6], [0, 0, 160, 120]]
)
def test_faces_at_and_outside_the_border(method: str, box: list[float]) -> None:
    assert anonymise(noise(), np.array([box], np.float32), method).shape == (120, 160, 3)


def test_image_without_faces_is_unchanged() -> None:
    assert (anonymise(noise(), np.zeros((0, 4)), "blur") == noise()).all()


def test_mask_that_covers_the_face_is_used() -> None:
    """The right half of the region around the face is background and unchanged."""
    head = HeadMask((0, 0, 160, 120), (40, 30, 80, 90), np.full((120, 160), 255, np.uint8))
    head.head_mask[:, 82:] = 0
    changed = (anonymise(noise(), BOX[None], "solid", [head]) != noise()).any(axis=2)
    assert not changed[:, 82:].any()
    assert changed[inside(1.0)].mean() > 0.99
    assert changed[24, 36]  # a corner outside the ellipse


def test_mask_that_leaves_the_face_visible_is_not_used() -> None:
    empty = HeadMask((0, 0, 160, 120), (40, 30, 80, 90), np.zeros((120, 160), np.uint8))
    hidden = anonymise(noise(), BOX[None], "solid", [empty])
    assert (hidden == anonymise(noise(), BOX[None], "solid")).all()


# --------------------------------------------------------------------------------------------------- audio


def make_video(path: Path, *, frames: int = 10) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    for _ in range(frames):
        writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    return path


def streams(path: Path) -> list[str]:
    command = ["ffprobe", "-v", "error", "-show_entries", "stream=codec_type", "-of", "csv=p=0", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(not shutil.which("ffprobe"), reason="ffmpeg is not installed")
def test_audio_is_kept(tmp_path: Path) -> None:
    silent, source = make_video(tmp_path / "silent.mp4"), tmp_path / "source.mp4"
    command = ["ffmpeg", "-v", "error", "-i", str(silent), "-f", "lavfi", "-i", "sine=440:duration=1", str(source)]
    subprocess.run(command, check=True)
    assert add_audio(silent, source) is None
    assert streams(silent) == ["video", "audio"]
    assert int(cv2.VideoCapture(str(silent)).get(cv2.CAP_PROP_FRAME_COUNT)) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["silent.mp4", "source.mp4"]


@pytest.mark.skipif(not shutil.which("ffprobe"), reason="ffmpeg is not installed")
def test_source_without_audio_is_accepted(tmp_path: Path) -> None:
    video = make_video(tmp_path / "a.mp4")
    assert add_audio(video, make_video(tmp_path / "b.mp4")) is None
    assert streams(video) == ["video"]
    (tmp_path / "c.mp4").write_text("no video")
    assert "ffmpeg failed" in (add_audio(video, tmp_path / "c.mp4") or "")
    assert streams(video) == ["video"]


def test_missing_ffmpeg_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert add_audio(tmp_path / "a.mp4", tmp_path / "b.mp4") == "without sound, because ffmpeg is not installed"
