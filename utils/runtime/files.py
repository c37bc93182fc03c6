"""Paths that the user gives, folders, and files that are written atomically."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import BinaryIO

from utils.errors import UserError

_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")
_MAX_NAME_BYTES = 255  # limit of common file systems
# Folders of the images that a run writes; files elsewhere are never removed.
OUTPUT_FOLDERS = (
    *("result_images", "masks", "faces", "heads", "head_masks"),
    *("thumbnails", "crops", "aligned", "anonymized"),
)
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EINVAL)  # the last is that of a pattern on Windows


def user_path(text: str) -> Path:
    """Convert what the user typed to a path, with `~` expanded. The path need not exist.

    Raises:
        UserError: the path is empty, invalid or not accessible, or names the home of a user who does not exist.
    """
    if not text.strip():
        raise UserError("an empty name was given where a file or folder is expected; '.' is the current folder")
    try:
        path = Path(text).expanduser()
        path.stat()
    except RuntimeError:
        raise UserError(f"{text}: there is no such user") from None
    except (OSError, ValueError) as error:  # ValueError is a zero byte
        if not isinstance(error, OSError) or error.errno not in _ABSENT:
            raise UserError(f"{text}: cannot be used ({getattr(error, 'strerror', None) or error})") from None
    return path


def candidate_paths(name: str, data_root: Path) -> list[Path]:
    """The paths that a user's name may mean: the name itself and, unless absolute or `./...`, one in `data_root`.

    Raises:
        UserError: see `user_path`.
    """
    path = user_path(name)
    is_explicit = path.is_absolute() or re.match(r"\.{1,2}([/\\]|$)", name) is not None
    return [path.absolute()] if is_explicit else list(dict.fromkeys([path.absolute(), data_root / path]))


def missing(candidates: Sequence[Path]) -> str:
    """Part of an error message: that none of these paths exists."""
    return " and ".join(map(str, candidates)) + (" do not exist" if len(candidates) > 1 else " does not exist")


def make_folder(folder: Path) -> Path:
    """Create a folder and its parents if necessary.

    Raises:
        UserError: the folder cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror}); choose another folder") from None
    return folder


def path_exists(path: Path) -> bool:
    """Whether a file or folder exists; False if the path is invalid, for example because its name is too long."""
    return os.path.exists(path)  # noqa: PTH110


def is_file(path: Path) -> bool:
    """Whether a file exists; False if the path is invalid or not accessible, where `Path.is_file` raises."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: Path) -> bool:
    """Whether a folder exists; False if the path is invalid or not accessible, where `Path.is_dir` raises."""
    return os.path.isdir(path)  # noqa: PTH112


def is_utf8(path: Path) -> bool:
    """Whether a path is valid UTF-8. OpenCV ends the process where the path of a video is not."""
    return re.search("[\ud800-\udfff]", str(path)) is None


def read_lines(path: Path, errors: str = "strict") -> list[str]:
    """Read a text file in UTF-8, or in UTF-16, as PowerShell writes it, with a byte order mark or without one.

    The other characters at which `str.splitlines` ends a line, such as U+2028, may be part of a file name.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: the file is in neither encoding.
    """
    data, encoding = path.read_bytes(), "utf-8-sig"
    if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        encoding = "utf-16"
    elif b"\0" in data[:2]:  # half of an ASCII character
        encoding = "utf-16-be" if data[0] == 0 else "utf-16-le"
    return re.split("\r\n|\r|\n", data.decode(encoding, errors))


def one_line(name: str) -> str:
    """Escape in a file name all characters at which a reader may end a line."""
    return "".join(repr(each)[1:-1] if each.splitlines() == [""] else each for each in name)


def shortened(relative: str) -> str:
    """Shorten the last name of a relative path if file systems do not permit it; a digest makes it unique."""
    parent, separator, name = relative.rpartition("/")
    if len(os.fsencode(name)) <= _MAX_NAME_BYTES:
        return relative
    suffix = f"~{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}{PurePosixPath(name).suffix}"
    kept = os.fsencode(name)[: _MAX_NAME_BYTES - len(os.fsencode(suffix))].decode("utf-8", errors="ignore")
    return f"{parent}{separator}{kept}{suffix}"


def numbered(folder: Path) -> Iterator[Path]:
    """The folder itself, then `<folder>_2`, `<folder>_3`, ... without end."""
    yield folder
    yield from (folder.with_name(f"{folder.name}_{number}") for number in count(2))


def own_folder(folder: Path, owner: Path) -> Path:
    """Create or find the first of `folder`, `<folder>_2`, ... that is new or marked with the same owner.

    Raises:
        UserError: the folder cannot be created or written to.
    """
    content = os.fsencode(owner.resolve())
    marks = (candidate / ".made_for" for candidate in numbered(folder))
    mark = next(m for m in marks if not m.parent.exists() or (m.is_file() and m.read_bytes() == content))
    with disk_errors(make_folder(mark.parent)):
        mark.write_bytes(content)
    return mark.parent


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends, or is removed if the block fails.

    >>> with atomic_write(folder / "results.txt") as temporary:
    ...     temporary.write_text("complete")
    """
    # Unique across machines, and short, because the name of the file may have the maximum length.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a file in UTF-8 atomically; its folder is created.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)


def remove_temporary_files(folder: Path) -> None:
    """Remove what `atomic_write` of killed processes left below a folder. No other process may be writing there."""
    for parent, _, names in os.walk(folder):
        for name in names:
            if _TEMPORARY.fullmatch(name):
                (Path(parent) / name).unlink(missing_ok=True)


def try_lock(file: BinaryIO) -> bool:
    """Lock a file for this process until it is closed; False if another process has locked it.

    On Windows, and on file systems without locks, every process gets the lock.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


_lock_files: set[BinaryIO] = set()


@cache
def _close_locks_in_children() -> None:
    """Ensure that a worker which outlives this process holds no lock."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: [file.close() for file in _lock_files])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a folder, and lock it for this process, so that no two runs write there at the same time.

    Raises:
        UserError: another process has locked it, or it cannot be written to.
    """
    with disk_errors(make_folder(folder)):
        file = (folder / ".lock").open("ab")
    _close_locks_in_children()
    with file:
        if not try_lock(file):
            raise UserError(f"{folder}: another run is still writing there; end it, or wait for it")
        _lock_files.add(file)
        try:
            yield
        finally:
            _lock_files.remove(file)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn an `OSError` in this block, such as that of a full disk, into a `UserError` that names the file.

    The error names `folder` if the `OSError` names no file.
    """
    try:
        yield
    except OSError as error:
        named = error.filename2 or error.filename or folder  # filename2 is the new name in a failed renaming
        if _TEMPORARY.fullmatch(Path(os.fsdecode(named)).name):
            named = folder
        raise UserError(f"{os.fsdecode(named)}: cannot be written ({error.strerror or error})") from None
