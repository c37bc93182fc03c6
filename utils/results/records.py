"""Results while they come: a line of JSON a picture in a file a process, from which the final files are made.

    <save>/<name>.parts/run.json    what the results depend on
    <save>/<name>.parts/0.jsonl     records of process 0, one a line

Each line is handed to the system as soon as its picture is done. So a process that dies loses nothing but the picture
at hand, whose line may be torn; such a line counts as if it were not there.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from utils.runtime.files import replacing
from utils.runtime.manifest import read_object

_RUN_FILE = "run.json"


@dataclass(frozen=True)
class Record:
    """What was found in one picture.

    Attributes:
        position: the picture's place among all, from 0.
        entry: what `results.json` says of it, or None if it could not be read.
        rows: of its faces in the table.
        files: pictures that were written of it, relative to the folder of the results.
        problem: why it could not be read.
    """

    position: int
    name: str
    entry: dict[str, Any] | None = None
    rows: Sequence[str] = ()
    files: Sequence[str] = ()
    problem: str | None = None

    @property
    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode("ascii") + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Record | None:
        """None where the line is torn, or no record."""
        try:
            return cls(**json.loads(line))
        except (ValueError, TypeError):
            return None


@dataclass(frozen=True)
class RecordIndex:
    """Where the records lie, in the order of their positions: 20 bytes a picture, whatever was found in it.

    Attributes:
        positions: (N,) of the pictures, ascending, none twice.
        parts: (N,) which of `paths` has the record.
        offsets: (N,) where its line begins, in bytes.
    """

    paths: Sequence[Path]
    positions: np.ndarray
    parts: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[Record]:
        """The records, read one by one.

        Raises:
            OSError: they cannot be read.
        """
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("rb")) for path in self.paths]
            for part, offset in zip(self.parts, self.offsets, strict=True):
                files[part].seek(offset)
                record = Record.parse(files[part].readline())
                assert record is not None, "the index has none but records that could be read"
                yield record


class PartFile:
    """The records of one process, behind those that an earlier run left there."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")
        _lock(self._file)
        if self._file.tell():
            self._file.write(b"\n")  # ends a line that was torn

    def add(self, record: Record) -> None:
        """Write a record, and hand it to the system at once."""
        self._file.write(record.line)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lock(file: BinaryIO) -> bool:
    """Keep a file to this process until it is closed; False if another has done so.

    Windows, and disks that know no locks, let everyone have it.
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


@dataclass(frozen=True)
class ResultParts:
    """The folder of the parts, whether it exists or not. What goes wrong with its files is an `OSError`."""

    folder: Path

    @property
    def run(self) -> dict[str, Any]:
        """What `begin` was told; empty where there is no run."""
        return read_object(self.folder / _RUN_FILE)

    @property
    def in_use(self) -> bool:
        """Whether a process is adding to them, such as one that outlived the launcher that started it."""
        for path in self.folder.glob("*.jsonl"):
            with path.open("ab") as file:
                if not _lock(file):
                    return True
        return False

    def begin(self, run: Mapping[str, Any]) -> None:
        """Make the folder anew, for results that depend on `run`."""
        self.remove()
        self.folder.mkdir(parents=True)
        with replacing(self.folder / _RUN_FILE) as temporary:
            temporary.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")

    def open(self, rank: int) -> PartFile:
        """The file of one process, to add to."""
        self.folder.mkdir(parents=True, exist_ok=True)  # also where a shared disk has yet to show it
        return PartFile(self.folder / f"{rank}.jsonl")

    def index(self) -> RecordIndex:
        """All records that were written whole. Of two of one picture the later counts."""
        paths = sorted(self.folder.glob("*.jsonl"))
        positions, parts, offsets = array("q"), array("i"), array("q")
        for part, path in enumerate(paths):
            with path.open("rb") as file:
                offset = 0
                for line in file:
                    record = Record.parse(line)
                    if record is not None:
                        positions.append(record.position)
                        parts.append(part)
                        offsets.append(offset)
                    offset += len(line)
        # The first of equals is what `unique` keeps.
        unique, last = np.unique(np.array(positions, np.int64)[::-1], return_index=True)
        chosen = len(positions) - 1 - last
        return RecordIndex(paths, unique, np.array(parts, np.int32)[chosen], np.array(offsets, np.int64)[chosen])

    def remove(self) -> None:
        """Remove the folder, `run.json` first: without it the rest is no run that could be continued by mistake."""
        (self.folder / _RUN_FILE).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
