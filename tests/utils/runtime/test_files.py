"""Tests of user paths and of locking folders."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.runtime.files import is_file, is_folder, locked, path_exists, user_path

needs_locks = pytest.mark.skipif(os.name == "nt", reason="Windows has no fcntl")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x" * 300, "File name too long"),
        ("x/" * 3000, "File name too long"),
        ("a\0b", "null byte"),
        (" ", "empty name"),
    ],
)
def test_invalid_path_is_refused(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        user_path(text)


def test_path_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("gone", "gone/below", "file/below"):
        assert user_path(str(tmp_path / name)) == tmp_path / name


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "gone"])
def test_invalid_path_does_not_exist(tmp_path: Path, name: str) -> None:
    assert not (path_exists(tmp_path / name) or is_file(tmp_path / name) or is_folder(tmp_path / name))


@needs_locks
def test_folder_is_locked_for_one_run_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new/folder"
    message = "folder: another run is still writing there; end it, or wait for it"
    with locked(folder), locked(tmp_path), pytest.raises(UserError, match=message):
        locked(folder).__enter__()
    with locked(folder):
        pass


@needs_locks
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
