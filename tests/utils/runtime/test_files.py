"""Folders that a run has for itself."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.runtime.files import locked

pytest.importorskip("fcntl")


def test_folder_is_locked_for_one_run_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new/folder"
    message = "folder: another run is still writing there; end it, or wait for it"
    with locked(folder), locked(tmp_path), pytest.raises(UserError, match=message):
        locked(folder).__enter__()
    with locked(folder):
        pass


def test_worker_that_outlives_a_run_locks_nothing(tmp_path: Path) -> None:
    started, start = os.pipe()
    with locked(tmp_path):
        worker = os.fork()
        if not worker:
            os.write(start, b".")
            signal.pause()
        os.read(started, 1)
    try:
        with locked(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
