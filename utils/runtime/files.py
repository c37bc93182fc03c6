"""Writing files whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from config import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends, or vanishes if the block fails.

    >>> with replacing(folder / "results.txt") as temporary:
    ...     temporary.write_text("complete")
    """
    # Short, for the file's own name may be as long as names can be; and of this block alone, on all machines.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove what `replacing` left below a folder in processes that were killed. No other may be writing there."""
    for parent, _, names in os.walk(folder):
        for name in names:
            if re.fullmatch(r"\.[0-9a-f]{16}\.tmp", name):
                (Path(parent) / name).unlink(missing_ok=True)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what goes wrong with files in this block, such as a full disk, into a `UserError` that names the file.

    `folder` is named where the error itself names no file.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written ({error.strerror or error})") from None
