"""Many small images and a long video in one process: memory and open files stay flat, and time grows linearly."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from campaigns.harness import Tally, run_command
from config import DATA

_SIZE_WH = (64, 48)
# The name of an image takes a few hundred bytes, and times are noisy.
_MAX_EXTRA_MEGABYTES, _MAX_EXTRA_FILES, _MAX_TIME_RATIO = 60, 8, 1.5
_LINKS = 10_000  # file systems limit the number of hard links to a file, ext4 to 65,000
_FLAGS = ("--gpu_num=-1", "--experiment_name=mobilenet0.25_anc2_casT_fpn3")


def run_soak(seed: int, count: int, folder: Path) -> Tally:
    """Compare runs on `count` images, and on half as many frames, with runs on a half and a tenth of them."""
    tally, generator = Tally(), np.random.default_rng(seed)
    face = cv2.imread(str(DATA / "sample_widerface/images/astronaut.jpg"))[:256, 100:356]
    image = np.roll(cv2.resize(face, _SIZE_WH), int(generator.integers(64)), axis=1)
    for kind, largest in (("images", count), ("frames", count // 2)):
        sizes = (largest // 10, largest // 2, largest)
        peaks, files, seconds = zip(*(_measure(kind, size, folder, image, tally) for size in sizes), strict=True)
        early, late = (1000 * (seconds[i + 1] - seconds[i]) / (sizes[i + 1] - sizes[i]) for i in (0, 1))
        text = f"{sizes[0]} to {largest} {kind}: {peaks[0]:.0f} to {peaks[2]:.0f} MB, "
        text += f"{files[0]} to {files[2]} open files, "
        text += f"{early:.2f} ms for each of the first half, {late:.2f} ms of the second"
        print(f"  {text}", flush=True)
        is_flat = peaks[2] - peaks[0] < _MAX_EXTRA_MEGABYTES and files[2] - files[0] < _MAX_EXTRA_FILES
        tally.require(is_flat and late < _MAX_TIME_RATIO * early, text)
    return tally


def _measure(kind: str, count: int, folder: Path, image: np.ndarray, tally: Tally) -> tuple[float, int, float]:
    """Return the peak memory in MB, the largest number of open files, and the seconds of a run."""
    source = folder / f"{count}{'.mp4' if kind == 'frames' else ''}"
    if kind == "frames":
        writer = cv2.VideoWriter(str(source), cv2.VideoWriter.fourcc(*"mp4v"), 25, _SIZE_WH)
        for number in range(count):
            writer.write(np.roll(image, number, axis=1))
        writer.release()
    else:
        source.mkdir()
        for number in range(count):
            path = source / f"{number:07d}.png"
            if number % _LINKS == 0:
                written = path
                cv2.imwrite(str(written), image)
            else:
                os.link(written, path)
    counts, start = [0], time.monotonic()

    def watch(pid: int) -> None:
        while (open_files := _count_open_files(pid)) is not None:
            counts.append(open_files)
            time.sleep(0.2)

    command: Sequence[str] = [
        "inference.py",
        *_FLAGS,
        f"--inference_dir={source}",
        f"--inference_save_folder={folder}/o",
    ]
    finished = run_command(
        command, 3600 + count, started=lambda pid: threading.Thread(target=watch, args=(pid,)).start()
    )
    tally.add(f"{count} {kind}", finished)
    seconds = time.monotonic() - start
    return finished.peak_megabytes, max(counts), seconds


def _count_open_files(pid: int) -> int | None:
    try:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return None
