"""Runs scripts as a user does: in the process of the tests, in a subprocess, or in several processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import TextIO

import torch

from config import ROOT
from utils.runtime.cli import run

_FORK = """
import importlib, os, socket, sys, torchvision
from utils.runtime.cli import run
script, count = importlib.import_module(sys.argv[1]), int(sys.argv[2])
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
children = []
for rank in range(count):
    child = os.fork()
    if not child:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        run(lambda: script.main(sys.argv[3:]))
        sys.exit()
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))
"""


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


def run_processes(script: str, count: int, *flags: object) -> subprocess.CompletedProcess[str]:
    """Run a script in several processes, as torchrun does; they are forked after importing it once."""
    command = [sys.executable, "-c", _FORK, script, str(count), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


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
