"""The final files of inference, made from records one by one, so that memory does not grow with their number."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import numpy as np

from config import UserError
from utils.results.records import Record, RecordIndex
from utils.runtime.files import replacing

# All pictures that a run writes lie here, so nothing else that a results.json lists is ours to remove.
OUTPUT_FOLDERS = ("result_images/", "masks/", "faces/", "heads/", "head_masks/")
# Lines of results.json begin like this. With them it can be read line by line.
_IMAGES, _FILES = '"images": [', '"files": ['


@dataclass
class Summary:
    """What a run did.

    Attributes:
        images: that could be read.
        skipped: name and reason of those that could not.
        former: how many of `images` an earlier run had done.
    """

    images: int = 0
    faces: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    former: int = 0

    def add(self, record: Record, *, is_former: bool = False) -> None:
        if record.entry is None:
            self.skipped.append((record.name, record.problem or "unreadable"))
            return
        self.images += 1
        self.faces += len(record.rows)
        self.former += is_former

    def describe(self, seconds: float) -> str:
        """For the user, a line for the whole and one for each picture that was skipped."""
        rate = (self.images - self.former) / max(seconds, 1e-9)
        former = f" ({self.former} by an earlier run)" if self.former else ""
        lines = [f"{self.images} images{former}, {self.faces} faces in {seconds:.1f} s ({rate:.1f} images/s)"]
        return "\n".join([*lines, *(f"skipped {name}: {reason}" for name, reason in self.skipped)])


@dataclass(frozen=True)
class ResultFiles:
    """The table, `results.json` and `results.jsonl` in a folder, whether they exist or not."""

    folder: Path
    experiment: str

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        """Of the table, `results.json` and `results.jsonl`."""
        names = (f"{self.experiment}_inference_results.txt", "results.json", "results.jsonl")
        return self.folder / names[0], self.folder / names[1], self.folder / names[2]

    @property
    def exist(self) -> bool:
        return any(path.exists() for path in self.paths)

    def check_writable(self) -> None:
        """Raises:
        UserError: something stands where a file must go.
        """
        for path in self.paths:
            if path.is_dir():
                raise UserError(f"{path}: cannot be written (it is a folder); choose another folder for the results")

    def write(self, about: Mapping[str, Any], records: RecordIndex, former: np.ndarray) -> Summary:
        """Make the files, and remove the pictures that `results.json` listed until now and the records do not.

        The files take their places when all of them are complete.

        Args:
            about: facts of the run, which `results.json` begins with.
            former: positions of the records that an earlier run made.

        Raises:
            OSError: a file cannot be written.
        """
        stale = self.listed_pictures()
        with ExitStack() as places:
            text, whole, lines = (places.enter_context(replacing(path)) for path in self.paths)
            with ExitStack() as files:
                # A file's name may hold bytes that are no text: the table repeats them, JSON escapes them.
                table = files.enter_context(text.open("w", encoding="utf-8", errors="surrogateescape"))
                as_lines = files.enter_context(lines.open("w", encoding="utf-8", errors="backslashreplace"))
                as_whole = files.enter_context(whole.open("w", encoding="utf-8", errors="backslashreplace"))
                summary = _write_results(about, records, former, table, as_lines, as_whole)
                _write_pictures(records, as_whole)
            for record in records if stale else ():
                stale.difference_update(record.files)
            # Before results.json forgets them: a run that is killed here does it when it is resumed.
            self.remove_pictures(stale)
        return summary

    def count(self) -> int:
        """Pictures that `results.jsonl` knows of."""
        try:
            with self.paths[2].open("rb") as file:
                return sum(1 for _ in file)
        except OSError:
            return 0

    def about(self) -> dict[str, Any]:
        """What `results.json` says of the run; empty where it is none of ours."""
        facts: list[str] = []
        with _lines_of(self.paths[1]) as lines:
            for line in lines:
                if line.startswith(_IMAGES):
                    return _object(f"{''.join(facts).rstrip().rstrip(',')}}}")
                facts.append(line)
        return {}

    def listed_pictures(self) -> set[str]:
        """The pictures that `results.json` says were written, by their paths in the folder."""
        with _lines_of(self.paths[1]) as lines:
            line = next((line for line in lines if line.startswith(_FILES)), "")
        return {name for name in _object(f"{{{line}}}").get("files", []) if _is_ours(name)}

    def remove_pictures(self, names: set[str]) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)


def _write_results(
    about: Mapping[str, Any], records: RecordIndex, former: np.ndarray, table: TextIO, lines: TextIO, whole: TextIO
) -> Summary:
    """The table, `results.jsonl`, and `results.json` but for its list of files."""
    summary = Summary()
    whole.write("{\n" + "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in about.items()))
    whole.write(_IMAGES)
    for record, is_former in zip(records, np.isin(records.positions, former), strict=True):
        entry = record.entry or {"name": record.name, "skipped": record.problem}
        line = json.dumps(entry, ensure_ascii=False)
        lines.write(line + "\n")
        if record.entry is not None:
            table.write("\n".join([record.name, *record.rows]) + "\n")
            whole.write(("," if summary.images else "") + "\n" + line)
        summary.add(record, is_former=bool(is_former))
    skipped = [{"name": name, "reason": reason} for name, reason in summary.skipped]
    whole.write(f'\n],\n"skipped": {json.dumps(skipped, ensure_ascii=False)},\n')
    return summary


def _write_pictures(records: RecordIndex, whole: TextIO) -> None:
    whole.write(_FILES)
    separator = ""
    for name in (name for record in records for name in record.files):
        whole.write(separator + json.dumps(name, ensure_ascii=False))
        separator = ", "
    whole.write("]\n}\n")


@contextmanager
def _lines_of(path: Path) -> Iterator[Iterator[str]]:
    """The lines of a text file, none where it cannot be read."""
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except OSError:
        yield iter(())
        return
    with file:
        yield file


def _object(text: str) -> dict[str, Any]:
    """The JSON object that the text is; empty where it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _is_ours(name: Any) -> bool:
    """Whether a picture that a results.json lists lies where only runs write."""
    if not isinstance(name, str):
        return False
    path = PurePosixPath(name)
    return str(path) == name and name.startswith(OUTPUT_FOLDERS) and ".." not in path.parts
