"""Tests that the memory of inference.py does not grow with the number of images or frames."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from config import ROOT
from utils.runtime.images import read_image

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured in Linux's units")
_FAST = "mobilenet0.25_anc2_casT_fpn3"
_MAX_EXTRA_MEGABYTES = 16  # for the allocator, whose peaks vary by up to 12, and the name of each image
_SIZE_WH = (128, 96)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return cv2.resize(read_image(ROOT / "data/sample_widerface/images/astronaut.jpg"), _SIZE_WH)


def peak_megabytes(*flags: str) -> float:
    """Return the peak memory of a run of inference.py."""
    command = [sys.executable, "inference.py", "--gpu_num=-1", f"--experiment_name={_FAST}", *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.stderr is not None
        assert process.returncode == 0, process.stderr.read()
    return usage.ru_maxrss / 1024


def test_memory_stays_flat_over_thousands_of_images(image: np.ndarray, tmp_path: Path) -> None:
    """All images together have 92 MB of pixels."""
    peaks = []
    for count in (200, 2_500):
        folder = tmp_path / str(count)
        folder.mkdir()
        cv2.imwrite(str(folder / "00000.png"), image)
        for number in range(1, count):
            os.link(folder / "00000.png", folder / f"{number:05d}.png")
        peaks.append(peak_megabytes(f"--inference_dir={folder}", f"--inference_save_folder={tmp_path}/{count}_out"))
        lines = (tmp_path / f"{count}_out/results.jsonl").read_text().splitlines()
        assert len(lines) == count
    assert peaks[1] - peaks[0] < _MAX_EXTRA_MEGABYTES


def test_memory_stays_flat_over_a_long_video(image: np.ndarray, tmp_path: Path) -> None:
    """All frames together have 55 MB of pixels."""
    peaks = []
    for count in (100, 1_500):
        path = tmp_path / f"{count}.mp4"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 25, _SIZE_WH)
        for number in range(count):
            writer.write(np.roll(image, number, axis=1))
        writer.release()
        flags = (f"--inference_dir={path}", f"--inference_save_folder={tmp_path}/{count}_out", "--save_img")
        peaks.append(peak_megabytes(*flags))
        drawn = cv2.VideoCapture(str(tmp_path / f"{count}_out/result_images/{count}.mp4"))
        assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == count
    assert peaks[1] - peaks[0] < _MAX_EXTRA_MEGABYTES
