"""Tests of videos with a variable frame rate and with a rotation, as phones record them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.runtime.sources import VideoFrames

pytestmark = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg, which makes the videos, is not installed")


def ffmpeg(*arguments: object) -> None:
    subprocess.run(["ffmpeg", "-v", "error", "-y", *map(str, arguments)], check=True)


def test_timestamps_are_read_from_the_file(tmp_path: Path) -> None:
    """Three frames a tenth of a second apart, then three half a second apart."""
    image = tmp_path / "image.png"
    cv2.imwrite(str(image), np.zeros((48, 64, 3), np.uint8))
    durations = [0.1, 0.1, 0.1, 0.5, 0.5, 0.5]
    (tmp_path / "list.txt").write_text("".join(f"file {image}\nduration {each}\n" for each in durations))
    ffmpeg("-f", "concat", "-safe", 0, "-i", tmp_path / "list.txt", "-vsync", "vfr", tmp_path / "clip.mp4")
    times = [frame.seconds for frame in VideoFrames(tmp_path / "clip.mp4", "clip", max_frames=0)]
    np.testing.assert_allclose(np.array(times[:6], float), [0, 0.1, 0.2, 0.3, 0.8, 1.3], atol=0.041)


def test_frames_are_upright(tmp_path: Path) -> None:
    """A phone held upright stores wide frames and a rotation."""
    writer = cv2.VideoWriter(str(tmp_path / "wide.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    for _ in range(3):
        writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    ffmpeg("-i", tmp_path / "wide.mp4", "-c", "copy", "-metadata:s:v", "rotate=90", tmp_path / "upright.mp4")
    (first, *_) = VideoFrames(tmp_path / "upright.mp4", "upright", max_frames=0)
    assert first.pixels is not None
    assert first.pixels.shape == (64, 48, 3)
