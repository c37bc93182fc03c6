"""Runs one case of a campaign in a separate process, and counts the outcomes."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from config import ROOT
from utils.runtime.cli import run

_LIMIT_SECONDS = 300.0  # a case that takes longer counts as hung
_POLL_SECONDS = 0.005
_ADDRESS_SPACE = 8 << 30  # a fault must not take all memory of the machine


@dataclass(frozen=True)
class Finished:
    """How a process ended.

    Attributes:
        status: exit status; negative for a signal.
        output: what it wrote to standard output and standard error.
        peak_megabytes: peak of its memory.
        hung: whether it was killed because it took too long.
    """

    status: int
    output: str
    peak_megabytes: float
    hung: bool = False

    @property
    def verdict(self) -> str:
        """`read` for success, `named` for a one-line error, `hung`, or `traceback` for anything else."""
        if self.hung:
            return "hung"
        errors = sum("error: " in line for line in self.output.splitlines())
        if "Traceback" not in self.output:
            if self.status == 0:
                return "read"
            if self.status in (1, 2) and errors == 1:
                return "named"
        return "traceback"


@dataclass
class Tally:
    """Outcomes of the cases of a campaign, other counts, and all violations of what the campaign requires."""

    counts: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    peak_megabytes: float = 0.0

    def add(self, case: str, finished: Finished) -> None:
        """Count a case, which must succeed or end with a one-line error."""
        self.counts[finished.verdict] += 1
        self.peak_megabytes = max(self.peak_megabytes, finished.peak_megabytes)
        if finished.verdict in ("hung", "traceback"):
            self.faults.append(f"{case}: {finished.verdict}, status {finished.status}: {finished.output[-1500:]}")

    def require(self, condition: bool, fault: str) -> None:
        """Record a fault unless `condition` holds."""
        if not condition:
            self.faults.append(fault)

    def __str__(self) -> str:
        counts = {end: self.counts[end] for end in ("read", "named", "hung", "traceback")} | self.counts | self.others
        ends = ", ".join(f"{count} {end}" for end, count in counts.items())
        return f"{sum(self.counts.values())} tried, {ends}, peak memory {self.peak_megabytes:.0f} MB"


def run_command(
    arguments: Sequence[str | Path],
    limit: float = _LIMIT_SECONDS,
    *,
    folder: Path = ROOT,
    started: Callable[[int], object] = lambda pid: None,
) -> Finished:
    """Run Python with these arguments, on the CPU; `started` is called with the process id."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile() as file:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
            preexec_fn=_limit,
        )
        started(process.pid)
        finished = _wait(process.pid, file, limit)
        process.returncode = finished.status
        return finished


def run_isolated(
    function: Callable[[], object],
    limit: float = _LIMIT_SECONDS,
    *,
    started: Callable[[int], object] = lambda pid: None,
) -> Finished:
    """Call a function like the `main` of a script in a forked process, which is faster than a new interpreter."""
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _run_child(function, file)
        started(pid)
        return _wait(pid, file, limit)


def _run_child(function: Callable[[], object], file: BinaryIO) -> None:
    status = 1
    try:
        os.setsid()
        _limit()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        run(cast(Callable[[], None], function))
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _limit() -> None:
    """Limit the memory of this process and, if it runs as root, make file permissions apply to it."""
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    if sys.platform == "linux":
        for capability in (1, 2):  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH; 24 is PR_CAPBSET_DROP
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


def _wait(pid: int, file: BinaryIO, limit: float) -> Finished:
    """Wait for a process that leads its session, and kill the session after `limit` seconds."""
    deadline, hung = time.monotonic() + limit, False
    while True:
        done, status, usage = os.wait4(pid, 0 if hung else os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            hung = True
            os.killpg(pid, signal.SIGKILL)
        else:
            time.sleep(_POLL_SECONDS)
    file.seek(0)
    peak = usage.ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
    return Finished(os.waitstatus_to_exitcode(status), file.read().decode(errors="replace"), peak, hung)


def mutate(data: bytes, generator: np.random.Generator) -> bytes:
    """Damage a file: truncate it, flip bits, change its header, or remove, duplicate or zero a part."""
    changed, size = bytearray(data), len(data)
    kind, start = generator.integers(6), int(generator.integers(size))
    end = min(size, start + int(generator.integers(1, max(2, size // 4))))
    if kind == 0:
        del changed[start:]
    elif kind == 1:
        for place in generator.integers(size, size=int(generator.integers(1, 20))):
            changed[place] ^= 1 << int(generator.integers(8))
    elif kind == 2:
        for place in generator.integers(min(size, 400), size=int(generator.integers(1, 8))):  # the header
            changed[place] = int(generator.choice([0, 1, 127, 128, 255, int(generator.integers(256))]))
    elif kind == 3:
        del changed[start:end]
    elif kind == 4:
        changed[start:start] = data[start:end]
    else:
        changed[start:end] = bytes(end - start)
    return bytes(changed)
