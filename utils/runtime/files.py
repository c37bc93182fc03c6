"""Paths that the user gives, folders, and files that are written atomically."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from utils.errors import UserError


def user_path(text: str) -> Path:
    """A path as the user typed it, with `~` expanded.

    Raises:
        UserError: it names the home of a user who does not exist.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: there is no such user") from None


def make_folder(folder: Path) -> Path:
    """Create a folder and its parents if necessary.

    Raises:
        UserError: it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror}); choose another folder") from None
    return folder


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends, or is removed if the block fails.

    >>> with atomic_write(folder / "results.txt") as temporary:
    ...     temporary.write_text("complete")
    """
    # Short, because the name of the file may be as long as names can be, and unique across machines.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary_files(folder: Path) -> None:
    """Remove what `atomic_write` of killed processes left below a folder. No other process may be writing there."""
    for parent, _, names in os.walk(folder):
        for name in names:
            if re.fullmatch(r"\.[0-9a-f]{16}\.tmp", name):
                (Path(parent) / name).unlink(missing_ok=True)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raise a `UserError` that names the file where writing fails in this block, as with a full disk.

    `folder` is named where the error itself names no file.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written ({error.strerror or error})") from None
