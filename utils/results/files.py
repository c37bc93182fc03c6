"""The final files of inference, made from the records in one pass, so that memory does not grow with their number."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import numpy as np

from utils.errors import UserError
from utils.results.own_files import OwnFiles
from utils.results.records import Record, RecordIndex
from utils.runtime.files import OUTPUT_FOLDERS, one_line, shortened


@dataclass
class Summary:
    """Summary of a run.

    Attributes:
        images: number of images that could be read.
        faces: number of faces in them.
        skipped: name of each image that could not be read, and the reason.
        notes: name and note of each image that has a note.
        former: number of `images` that an earlier run processed.
    """

    images: int = 0
    faces: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    former: int = 0

    def add(self, record: Record, *, is_former: bool = False) -> None:
        if record.entry is None:
            self.skipped.append((record.name, record.problem or "unreadable"))
            return
        if record.note:
            self.notes.append((record.name, record.note))
        self.images += 1
        self.faces += len(record.rows)
        self.former += is_former

    def describe(self, seconds: float) -> str:
        """Describe the run in one line, and each image that was skipped or has a note in a further line."""
        rate = (self.images - self.former) / max(seconds, 1e-9)
        former = f" ({self.former} by an earlier run)" if self.former else ""
        lines = [f"{self.images} images{former}, {self.faces} faces in {seconds:.1f} s ({rate:.1f} images/s)"]
        lines += [f"note: {one_line(name)}: {note}" for name, note in self.notes]
        return "\n".join([*lines, *(f"skipped {one_line(name)}: {reason}" for name, reason in self.skipped)])


@dataclass(frozen=True)
class ResultFiles:
    """The table, `results.json` and `results.jsonl` in a folder; the files need not exist."""

    folder: Path
    experiment: str

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        """Paths of the table, of `results.json` and of `results.jsonl`."""
        names = (shortened(f"{self.experiment}_inference_results.txt"), "results.json", "results.jsonl")
        return self.folder / names[0], self.folder / names[1], self.folder / names[2]

    @property
    def exist(self) -> bool:
        return any(path.exists() for path in self.paths)

    def check_writable(self, image_folders: Sequence[str]) -> None:
        """Check that nothing of the user has the name of a file, or of a folder of images, to be written.

        Raises:
            UserError: a file or folder has such a name.
        """
        for path in self.paths:
            if path.is_dir():
                raise UserError(f"{path}: cannot be written (it is a folder); choose another folder for the results")
        own = OwnFiles(self.folder)
        if own.is_new and any(self.folder.glob(".records/*/run.json")):
            own.adopt([*self.paths, *(self.folder / name for name in OUTPUT_FOLDERS)])
        own.check(self.paths)
        own.claim_folders([self.folder / name for name in image_folders])

    def write(self, settings: Mapping[str, Any], records: RecordIndex, former: np.ndarray) -> Summary:
        """Make the files from the records. They replace the old files once all are complete.

        Args:
            settings: settings that the results depend on; `results.json` begins with them.
            records: records of all images.
            former: positions of the records that an earlier run made.

        Raises:
            OSError: a file cannot be written.
            UserError: the user has written one of them since the run began.
        """
        with OwnFiles(self.folder).replaced(*self.paths) as (table, whole, lines), ExitStack() as files:
            # A file name may contain bytes that are not text: the table keeps them, JSON escapes them.
            as_table = files.enter_context(table.open("w", encoding="utf-8", errors="surrogateescape"))
            as_lines = files.enter_context(lines.open("w", encoding="utf-8", errors="backslashreplace"))
            as_whole = files.enter_context(whole.open("w", encoding="utf-8", errors="backslashreplace"))
            return _write_results(settings, records, former, as_table, as_lines, as_whole)


def _write_results(
    settings: Mapping[str, Any], records: RecordIndex, former: np.ndarray, table: TextIO, lines: TextIO, whole: TextIO
) -> Summary:
    summary, files = Summary(), list[str]()
    whole.write("{\n" + "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in settings.items()))
    whole.write('"images": [')
    for record, is_former in zip(records, np.isin(records.positions, former), strict=True):
        entry = record.entry or {"name": record.name, "skipped": record.problem}
        line = json.dumps(entry, ensure_ascii=False)
        lines.write(line + "\n")
        if record.entry is not None:
            table.write("\n".join([one_line(record.name), *record.rows]) + "\n")
            whole.write(("," if summary.images else "") + "\n" + line)
        files += record.files
        summary.add(record, is_former=bool(is_former))
    skipped = [{"name": name, "reason": reason} for name, reason in summary.skipped]
    whole.write(f'\n],\n"skipped": {json.dumps(skipped, ensure_ascii=False)},\n')
    whole.write(f'"files": {json.dumps(files, ensure_ascii=False)}\n}}\n')
    return summary


def remove_output(folder: Path, names: set[str]) -> None:
    """Remove images that an earlier run wrote into `OUTPUT_FOLDERS`; other names are ignored."""
    for name in names:
        path = PurePosixPath(name)
        if path.parts[:1] and path.parts[0] in OUTPUT_FOLDERS and len(path.parts) > 1 and ".." not in path.parts:
            (folder / path).unlink(missing_ok=True)
