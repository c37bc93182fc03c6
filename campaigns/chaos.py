"""Disturbed runs of training, inference and evaluation: killed, out of disk space, without their data, clock set back.

The same command, with `--resume`, must then write what an undisturbed run writes: the same bytes, and for training the
same checkpoints and the same table.
"""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch

from campaigns.harness import Finished, Tally, run_command, run_isolated
from config import DATA, EXPERIMENTS
from models.checkpoint import content_digest

_FAST = "mobilenet0.25_anc2_casT_fpn3"
_IMAGES = 16
_TRAINING = "--backbone=mobilenet0.25 --im_size=64 --batch_size=4 --num_workers=0 --epochs=3 --eval_every=3"
# Makes time.time() jump back by days a moment after the start.
_WITH_CLOCK_SET_BACK = (
    "import runpy, sys, time; real, start = time.time, time.time() + float(sys.argv.pop(1)); del sys.argv[0]; "
    "time.time = lambda: real() - 1e6 * (real() > start); sys.path.insert(0, ''); "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


@dataclass
class Task:
    """A command that is disturbed.

    Attributes:
        arguments: arguments of Python, without the folder of the results.
        processes: number of processes.
        flag: name of the flag for the folder of the results.
        resume: flags that resume the command.
        expected: files of an undisturbed run.
        first_seconds: time until the first file.
        seconds: time until the end.
    """

    arguments: Sequence[str]
    processes: int
    flag: str
    resume: Sequence[str] = ("--resume",)
    expected: dict[str, bytes] = field(default_factory=dict)
    first_seconds: float = 0.0
    seconds: float = 0.0

    def command(self, out: Path, *more: str) -> list[str]:
        name = str(out.relative_to(EXPERIMENTS)) if self.flag == "--experiment_name" else str(out)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        return [*(launcher if self.processes > 1 else []), *self.arguments, f"{self.flag}={name}", *more]

    def run(self, out: Path, *more: str, started: Callable[[int], object] = lambda pid: None) -> Finished:
        """Run the command; a single process is forked instead of started in a new interpreter."""
        command = self.command(out, *more)
        if self.processes > 1:
            return run_command(command, started=started)
        main = importlib.import_module(command[0].removesuffix(".py")).main
        return run_isolated(lambda: main(command[1:]), started=started)

    def results(self, out: Path) -> dict[str, bytes]:
        """Return the files that must not differ: all of them, or for training and evaluation those without times."""
        if self.flag == "--inference_save_folder":
            return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        if self.flag == "--output_dir":
            return {str(path.relative_to(out)): path.read_bytes() for path in (out / "predictions").rglob("*.txt")}
        found = {path.name: _digest(path) for path in (out / "ckpt").glob("*.pth")}
        return {**found, "metrics.csv": (out / "log/metrics.csv").read_bytes()}

    def measure(self, out: Path) -> None:
        """Run undisturbed, and store the results and times."""
        start, first = time.monotonic(), list[float]()

        def watch(pid: int) -> None:
            _wait_for_files(pid, out)
            first.append(time.monotonic() - start)

        finished = self.run(out, started=lambda pid: threading.Thread(target=watch, args=(pid,)).start())
        if finished.status:
            raise RuntimeError(finished.output)
        self.expected, self.seconds, self.first_seconds = self.results(out), time.monotonic() - start, first[0]


Disturbance = Callable[[Task, Path, Path, np.random.Generator], Finished]


def kill(task: Task, out: Path, data: Path, generator: np.random.Generator) -> Finished:
    """Kill all processes, or one of several, at a random moment after the first file."""

    def later(pid: int) -> None:
        _wait_for_files(pid, out)
        time.sleep(generator.uniform(0, task.seconds - task.first_seconds))
        chosen = [pid, *_children(pid)]
        for each in chosen[-1:] if len(chosen) > 2 and generator.random() < 0.5 else chosen:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)

    return task.run(out, started=lambda pid: threading.Thread(target=later, args=(pid,)).start())


def fill_disk(task: Task, out: Path, data: Path, generator: np.random.Generator) -> Finished:
    """Fill the disk at a random moment; where no file system can be mounted, limit the size of a file instead."""
    size = sum(map(len, task.expected.values())) if task.flag != "--experiment_name" else 12 << 20
    kilobytes = max(4, int(generator.uniform(0, 1.2) * size / 1024))
    python = shlex.join([sys.executable, *task.command(out)])
    saved = out.with_name(f"{out.name}_saved")
    mount = f"mount -t tmpfs -o size={kilobytes}k none {out}"
    mounted = f"{mount} && {{ {python}; status=$?; cp -r {out} {saved}; exit $status; }}"
    out.mkdir(parents=True)
    can_mount = (
        subprocess.run(["unshare", "-rm", "true"], check=False).returncode == 0 if shutil.which("unshare") else False
    )
    shell_command = (
        ["unshare", "-rm", "sh", "-c", mounted] if can_mount else ["sh", "-c", f"ulimit -f {kilobytes}; {python}"]
    )
    finished = run_command(["-c", "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])", *shell_command])
    if saved.exists():
        out.rmdir()
        saved.rename(out)
    return finished


def make_unwritable(task: Task, out: Path, data: Path, generator: np.random.Generator) -> Finished:
    """Make the folders of the results read-only at a random moment."""

    def later(pid: int) -> None:
        _wait_for_files(pid, out)
        time.sleep(generator.uniform(0, task.seconds - task.first_seconds))
        _set_mode(out, 0o555)

    # Root ignores permissions, so `run_command` drops that capability.
    command = task.command(out)
    finished = run_command(command, started=lambda pid: threading.Thread(target=later, args=(pid,)).start())
    time.sleep(task.seconds - task.first_seconds)
    _set_mode(out, 0o755)
    return finished


def take_data_away(task: Task, out: Path, data: Path, generator: np.random.Generator) -> Finished:
    """Move the folder of the images away at a random moment, and back a moment later."""
    away = data.with_name("away")
    back = threading.Event()

    def later(pid: int) -> None:
        time.sleep(generator.uniform(0, task.seconds))
        data.rename(away)
        time.sleep(generator.uniform(0, task.seconds / 2))
        away.rename(data)
        back.set()

    finished = task.run(out, started=lambda pid: threading.Thread(target=later, args=(pid,)).start())
    back.wait()
    if finished.status == 0:  # missing images were reported, or replaced by others
        shutil.rmtree(out)
    return finished


def set_clock_back(task: Task, out: Path, data: Path, generator: np.random.Generator) -> Finished:
    """Set the clock back by days at a random moment."""
    if task.processes > 1:
        return run_command(task.command(out))
    moment = str(generator.uniform(0, task.seconds))
    return run_command(["-c", _WITH_CLOCK_SET_BACK, moment, *task.command(out)])


def disturb(disturbance: Disturbance, several: bool = False) -> Callable[[int, int, Path], Tally]:
    """Make a campaign that disturbs every task of one process, or of several, `count` times."""

    def campaign(seed: int, count: int, folder: Path) -> Tally:
        tally, generator, data = Tally(), np.random.default_rng(seed), make_dataset(folder / "data")
        experiments = EXPERIMENTS / f"campaign_{os.getpid()}"
        try:
            tasks = {name: task for name, task in make_tasks(data).items() if (task.processes > 1) == several}
            for name, task in tasks.items():
                base = experiments if task.flag == "--experiment_name" else folder / name.replace(" ", "_")
                task.measure(base / f"{task.processes}_undisturbed")
                for number in range(count):
                    out = base / f"{task.processes}_{number}"
                    finished = disturbance(task, out, data, generator)
                    killed = disturbance is kill and finished.status and "Traceback" not in finished.output
                    if killed or (disturbance is kill and task.processes > 1):
                        tally.counts["killed"] += 1
                    else:
                        tally.add(f"{name} {number}", finished)
                    # torchrun reports each process that ends with an error at length.
                    again = task.run(out, *(task.resume if out.exists() else ()))
                    tally.require(again.status == 0, f"{name} {number}, again: {again.output[-2000:]}")
                    if again.status == 0:
                        found = task.results(out)
                        others = [
                            key
                            for key in found.keys() | task.expected.keys()
                            if found.get(key) != task.expected.get(key)
                        ]
                        tally.others["resumed to the same bytes"] += not others
                        tally.require(
                            not others, f"{name} {number}: differs from an undisturbed run in {sorted(others)[:5]}"
                        )
        finally:
            shutil.rmtree(experiments, ignore_errors=True)
        return tally

    return campaign


def make_tasks(data: Path) -> dict[str, Task]:
    """Return the commands to disturb, by name."""
    training = ["train.py", "--gpu_num=-1", f"--dataset={data}", *_TRAINING.split(), "--save_minutes=0.0001"]
    weights = ["--gpu_num=-1", f"--model_weight={EXPERIMENTS / _FAST}/ckpt/mobilenet0.25_ckpt-best.pth"]
    inference = ["inference.py", *weights, f"--inference_dir={data}/val/images", "--save_img"]
    tasks = {f"training {n}": Task(training, n, "--experiment_name", resume=()) for n in (1, 2)}
    tasks |= {f"inference {n}": Task(inference, n, "--inference_save_folder") for n in (1, 3)}
    return {**tasks, "evaluation 1": Task(["test.py", *weights, f"--dataset={data}"], 1, "--output_dir")}


def make_dataset(folder: Path) -> Path:
    """Write a dataset for training and validation whose images show one face at different places."""
    face = cv2.imread(str(DATA / "sample_widerface/images/astronaut.jpg"))[:256, 100:356]
    for split in ("train", "val"):
        images = folder / split / "images"
        images.mkdir(parents=True)
        lines = []
        for number in range(_IMAGES):
            image = np.roll(cv2.resize(face, (128, 96 if number % 5 else 112)), 3 * number, axis=1)
            cv2.imwrite(str(images / f"{number:02d}.png"), image)
            lines.append(f"# {number:02d}.png\n40 20 40 50\n")
        (folder / split / "label.txt").write_text("".join(lines))
    return folder


def _digest(path: Path) -> bytes:
    content = torch.load(path, weights_only=True)
    return content_digest({name: content[name] for name in ("model", "averaged") if name in content}).encode()


def _wait_for_files(pid: int, folder: Path) -> None:
    """Wait until there is a file below a folder, or the process has ended."""
    while not any(path.is_file() for path in folder.rglob("*")) and Path(f"/proc/{pid}").exists():
        time.sleep(0.01)


def _children(pid: int) -> list[int]:
    """Return all descendants of a process, children first."""
    try:
        own = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*own, *(below for child in own for below in _children(child))]


def _set_mode(folder: Path, mode: int) -> None:
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        path.chmod(mode)
