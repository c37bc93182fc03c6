"""Runs scripts as a user does: in the process of the tests, in a subprocess, or in several processes."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import TextIO

import torch

from config import ROOT
from utils.runtime.cli import run

# Starts processes that have imported the scripts already, which takes longer than most of their runs.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["inference", "train", "test", "engine.inference", "engine.training", "torch.utils.tensorboard"]
)


def run_script(script: ModuleType, *flags: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `python SCRIPT.py FLAGS` in this process, which saves the seconds that importing PyTorch takes.

    Returns its exit status and output. An exception that the script does not handle is raised.
    """
    argv, status, previous_folder = [str(flag) for flag in flags], 0, Path.cwd()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        with ExitStack() as stack:
            stack.enter_context(_redirected(1, output.fileno()))
            stack.enter_context(_redirected(2, errors.fileno()))
            stack.enter_context(_shown_warnings())
            stack.callback(os.chdir, previous_folder)
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            os.chdir(cwd)
            try:
                run(lambda: script.main(argv))
            except SystemExit as exit_request:
                status = exit_request.code if isinstance(exit_request.code, int) else int(exit_request.code is not None)
                if isinstance(exit_request.code, str):
                    print(exit_request.code, file=sys.stderr)
        written = [_read_all(file.fileno()) for file in (output, errors)]
    return subprocess.CompletedProcess([script.__name__, *argv], status, *written)


def run_process(script: str, *flags: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `python SCRIPT.py FLAGS`."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


class ScriptProcess:
    """`python SCRIPT.py FLAGS` in a process that is forked from one that has imported the scripts.

    Args:
        prepare: called in the process before the script; an importable function, or a `functools.partial` of one.
        environment: variables that are set in addition to those of the tests.
    """

    def __init__(
        self,
        script: str,
        *flags: object,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        method = multiprocessing.get_start_method()
        arguments = (script, [str(flag) for flag in flags], self._streams, environment or {}, prepare, method)
        self._process = _SERVER.Process(target=_run_forked, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Wait until it has ended, and return its exit status and output."""
        self._process.join()
        written = [path.read_text(encoding="utf-8") if path.exists() else "" for path in self._streams]
        self._folder.cleanup()
        return subprocess.CompletedProcess([], int(self._process.exitcode or 0), *written)


def run_processes(
    script: str, count: int, *flags: object, prepare: Callable[[], object] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script in several processes, with the variables that torchrun sets. Their outputs are joined."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    processes = [
        ScriptProcess(script, *flags, environment=together | {"RANK": str(n), "LOCAL_RANK": str(n)}, prepare=prepare)
        for n in range(count)
    ]
    results = [process.wait() for process in processes]
    status = next((result.returncode for result in results if result.returncode), 0)
    return subprocess.CompletedProcess(
        [], status, "".join(result.stdout for result in results), "".join(result.stderr for result in results)
    )


def _run_forked(
    script: str,
    argv: list[str],
    streams: list[Path],
    environment: Mapping[str, str],
    prepare: Callable[[], object] | None,
    start_method: str,
) -> None:
    multiprocessing.set_start_method(start_method, force=True)  # of the script's own workers
    for number, path in enumerate(streams, start=1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    # A shell that runs the tests in the background makes them ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update({"OMP_NUM_THREADS": "1", **environment})
    os.chdir(ROOT)
    if prepare is not None:
        prepare()
    run(lambda: importlib.import_module(script).main(argv))


@contextmanager
def _redirected(number: int, target: int) -> Iterator[None]:
    """Redirect standard output (1) or error (2) of Python and native libraries to `target`."""
    redirect = redirect_stdout if number == 1 else redirect_stderr
    saved = os.dup(number)
    os.dup2(target, number)
    try:
        with open(number, "w", encoding="utf-8", closefd=False) as stream, redirect(stream):
            yield
    finally:
        os.dup2(saved, number)
        os.close(saved)


@contextmanager
def _shown_warnings() -> Iterator[None]:
    """Write warnings to standard error, as Python does and pytest does not."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))

    with warnings.catch_warnings():
        warnings.showwarning = show
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        yield


def _read_all(file: int) -> str:
    os.lseek(file, 0, os.SEEK_SET)
    with open(file, encoding="utf-8", closefd=False) as stream:
        return stream.read()
