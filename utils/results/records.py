"""The records of a run: one line of JSON for every image, from which all final files are made.

    <results>/.records/<experiment>/run.json     settings of the results, and files that earlier runs left
    <results>/.records/<experiment>/0.jsonl      the records of process 0, appended one by one

A line is handed to the operating system as soon as its image is done, so a process that dies loses at most the image
in progress. An incomplete line is ignored.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.runtime.files import atomic_write, try_lock, write_text
from utils.runtime.manifest import read_object


@dataclass(frozen=True)
class Record:
    """The detections of one image.

    Attributes:
        position: index of the image among all images, from 0.
        name: name of the image.
        entry: entry of the image in `results.json`, or None if the image could not be read.
        rows: lines of its faces in the table.
        files: images written for it, relative to the folder of the results.
        problem: why the image could not be read.
        note: remark about an image that was read.
    """

    position: int
    name: str
    entry: dict[str, Any] | None = None
    rows: Sequence[str] = ()
    files: Sequence[str] = ()
    problem: str | None = None
    note: str | None = None

    @property
    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode("ascii") + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Record | None:
        """Parse the record of a line; None if the line is incomplete or not a record."""
        try:
            return cls(**json.loads(line))
        except (ValueError, TypeError):
            return None


@dataclass(frozen=True)
class RecordIndex:
    """Locations of the records, in the order of their positions. An entry takes 21 bytes.

    Attributes:
        paths: files of the records.
        positions: (N,) positions of the images, ascending and unique.
        shards: (N,) index in `paths` of the file that contains the record.
        offsets: (N,) byte at which its line starts.
        is_read: (N,) bool, whether the image could be read.
    """

    paths: Sequence[Path]
    positions: np.ndarray
    shards: np.ndarray
    offsets: np.ndarray
    is_read: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[Record]:
        """Read the records one by one.

        Raises:
            OSError: the records cannot be read.
        """
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("rb")) for path in self.paths]
            for shard, offset in zip(self.shards, self.offsets, strict=True):
                files[shard].seek(offset)
                record = Record.parse(files[shard].readline())
                assert record is not None, "the index contains only records that could be read"
                yield record


class RecordWriter:
    """Appends the records of one process to its file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")
        try_lock(self._file)
        if self._file.tell():
            self._file.write(b"\n")  # ends an incomplete line

    def add(self, record: Record) -> None:
        """Append a record, and hand it to the operating system at once."""
        self._file.write(record.line)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class RecordStore:
    """The folder of the records of a run, which need not exist. Methods raise `OSError` if a file is inaccessible."""

    folder: Path

    @property
    def run(self) -> dict[str, Any]:
        """The settings given to `begin`, or an empty dictionary if there is no run."""
        return read_object(self.folder / "run.json")

    @property
    def complete_others(self) -> list[RecordStore]:
        """The complete runs of other experiments with results in the same folder."""
        others = [RecordStore(folder) for folder in sorted(self.folder.parent.glob("*")) if folder != self.folder]
        return [other for other in others if other.run.get("complete")]

    @property
    def in_use(self) -> bool:
        """Whether a process is appending records, such as one that outlived the launcher that started it."""
        for path in self.folder.glob("*.jsonl"):
            with path.open("ab") as file:
                if not try_lock(file):
                    return True
        return False

    def begin(self, run: Mapping[str, Any]) -> None:
        """Remove the records and start a new run."""
        self.remove()
        self._write_run(run)

    def remove(self) -> None:
        # run.json is removed first, so that no incomplete remainder can be continued by mistake.
        (self.folder / "run.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def mark_complete(self) -> None:
        """Note that the final files were made, and that nothing is left of earlier runs."""
        self._write_run({**self.run, "former_files": [], "complete": True})

    def _write_run(self, run: Mapping[str, Any]) -> None:
        write_text(self.folder / "run.json", json.dumps(run, indent=2) + "\n")

    def open_shard(self, rank: int) -> RecordWriter:
        """Open the file of one process for appending."""
        self.folder.mkdir(parents=True, exist_ok=True)  # a network file system may make it visible late
        return RecordWriter(self.folder / f"{rank}.jsonl")

    def index(self) -> RecordIndex:
        """Index all complete records. If an image has two records, the later one is used."""
        paths = sorted(self.folder.glob("*.jsonl"))
        positions, shards, offsets, is_read = array("q"), array("i"), array("q"), array("b")
        for shard, path in enumerate(paths):
            with path.open("rb") as file:
                offset = 0
                for line in file:
                    record = Record.parse(line)
                    if record is not None:
                        positions.append(record.position)
                        shards.append(shard)
                        offsets.append(offset)
                        is_read.append(record.problem is None)
                    offset += len(line)
        # `unique` keeps the first of equal values.
        unique, last = np.unique(np.array(positions, np.int64)[::-1], return_index=True)
        chosen = len(positions) - 1 - last
        return RecordIndex(
            paths,
            positions=unique,
            shards=np.array(shards, np.int32)[chosen],
            offsets=np.array(offsets, np.int64)[chosen],
            is_read=np.array(is_read, np.bool_)[chosen],
        )

    def compact(self) -> None:
        """Sort all records into one file, so that the folder does not depend on the number of processes."""
        records = self.index()
        merged = self.folder / "0.jsonl"
        with atomic_write(merged) as temporary, temporary.open("wb") as file:
            for record in records:
                file.write(record.line)
        for path in records.paths:
            if path != merged:
                path.unlink()
