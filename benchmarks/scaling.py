"""Speed and memory of inference.py against the number of images and processes: python -m benchmarks.scaling.

Images are synthetic: shifted and reduced copies of a sample, in two sizes that alternate every eight images. Each run
is the full command, start-up included, on the CPU with one thread per process. The memory is that of the largest
process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np

from config import ROOT
from utils.runtime.cli import run

# Prints the peak memory of the largest process after a run, in KiB on Linux and in bytes on macOS.
_WITH_PEAK = (
    "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
)


@dataclass(frozen=True)
class Run:
    """One run: seconds from start to end, peak memory in MB, and the content of its files by name."""

    seconds: float
    peak_megabytes: float
    files: dict[str, bytes]


def make_images(folder: Path, count: int, size_wh: tuple[int, int]) -> None:
    """Write JPEGs of the sample's face; every second block of eight has three quarters of the height."""
    sample = cv2.imread(str(ROOT / "data/sample_widerface/images/astronaut.jpg"))[:300, 60:460]
    reduced = cv2.resize(sample, size_wh, interpolation=cv2.INTER_AREA)
    for number in range(count):
        image = np.roll(reduced, 3 * number % size_wh[0], axis=1)
        cv2.imwrite(str(folder / f"{number:07d}.jpg"), image if number // 8 % 2 == 0 else image[: size_wh[1] * 3 // 4])


def measure(images: Path, out: Path, processes: int, flags: Sequence[str], threads: int = 1) -> Run:
    """Run inference.py on a folder, with the given number of threads per process."""
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    )
    command = [sys.executable, *launcher, "inference.py", "--gpu_num=-1", f"--inference_dir={images}"]
    command += [f"--inference_save_folder={out}", *flags]
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", _WITH_PEAK, *command],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    seconds = time.perf_counter() - start
    files = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return Run(seconds, int(result.stdout) / (1024 if sys.platform == "linux" else 1024**2), files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000], help="images (default: 100 1000)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="processes (default: 1 2 4)")
    parser.add_argument("--width", type=int, default=160, help="width of the images (default: 160)")
    parser.add_argument("--height", type=int, default=120, help="height of the images (default: 120)")
    parser.add_argument("flags", nargs="*", help="flags for inference.py, after --")
    arguments = parser.parse_args()
    print(f"{'images':>8}{'processes':>11}{'seconds':>9}{'images/s':>10}{'peak, MB':>10}  same files")
    for count in arguments.counts:
        with TemporaryDirectory() as folder:
            images = Path(folder) / "in"
            images.mkdir()
            make_images(images, count, (arguments.width, arguments.height))
            first: Run | None = None
            for processes in arguments.processes:
                found = measure(images, Path(folder) / f"out{processes}", processes, arguments.flags)
                first = first or found
                same = "yes" if found.files == first.files else "NO"
                speed = f"{found.seconds:>9.1f}{count / found.seconds:>10.1f}{found.peak_megabytes:>10.0f}"
                print(f"{count:>8,}{processes:>11}{speed}  {same}", flush=True)


if __name__ == "__main__":
    run(main)
