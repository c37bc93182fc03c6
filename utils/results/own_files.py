"""Files under fixed names that a run replaces only if a run wrote them as they stand, so that no edit is lost."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.runtime.files import atomic_write, write_text
from utils.runtime.manifest import file_digest, read_object

_FOLDER = "folder"  # in place of a digest


@dataclass(frozen=True)
class OwnFiles:
    """The files that runs wrote below a folder; `<folder>/.records/written.json` has their digests by name.

    Methods raise `OSError` if a file is inaccessible.
    """

    folder: Path

    @property
    def _list(self) -> Path:
        return self.folder / ".records" / "written.json"

    def _read(self) -> dict[str, list[str]]:
        return {name: digests for name, digests in read_object(self._list).items() if isinstance(digests, list)}

    @property
    def is_new(self) -> bool:
        """Whether there is no list: no run, or only runs of earlier versions, wrote below the folder."""
        return not self._list.exists()

    def adopt(self, paths: Iterable[Path]) -> None:
        """List existing files, and folders, that runs of earlier versions wrote without listing them."""
        self._save({self._name(path): [_digest(path)] for path in paths if os.path.lexists(path)} | self._read())

    def is_as_written(self, path: Path) -> bool | None:
        """Whether a run wrote a file as it stands; None if no run wrote a file of this name."""
        digests = self._read().get(self._name(path))
        return None if digests is None else _digest(path) in digests

    def check(self, paths: Iterable[Path]) -> None:
        """Check that these files may be replaced.

        Raises:
            UserError: a file was not written by a run, or was edited since.
        """
        for path in paths:
            if os.path.lexists(path) and not self.is_as_written(path):
                raise UserError(
                    f"{path}: was not written by a run, or was edited since, and is kept; move it, or choose another "
                    "folder for the results"
                )

    def claim_folders(self, folders: Sequence[Path]) -> None:
        """Check that each of these folders is absent, empty or one of a run, and list them as those of a run.

        Raises:
            UserError: one has other content.
        """
        self.check(path for path in folders if path.is_file() or not _is_empty(path))
        digests = {self._name(path): [_digest(path) if path.exists() else _FOLDER] for path in folders}
        if (written := self._read()) | digests != written:
            self._save(written | digests)

    def forget_empty_folders(self) -> None:
        """Take folders from the list of which a run removed all files."""
        written = self._read()
        names = [name for name, digests in written.items() if digests == [_FOLDER] and _is_empty(self.folder / name)]
        self._save({name: digests for name, digests in written.items() if name not in names})

    @contextmanager
    def replaced(self, *paths: Path) -> Iterator[Sequence[Path]]:
        """Temporary paths that replace these files when the block ends; see `atomic_write` and `check`."""
        with ExitStack() as stack:
            temporaries = [stack.enter_context(atomic_write(path)) for path in paths]
            yield temporaries
            self.check(self._claim(dict(zip(paths, temporaries, strict=True))))
        self._settle(paths)

    def replace_all(self, staged: Path, target: Path) -> list[Path]:
        """Move a file, or all files below a folder, to `target`; returns the files there that are kept instead."""
        sources = [path for path in staged.rglob("*") if path.is_symlink() or not path.is_dir()]
        files = {target / path.relative_to(staged): path for path in (sources if staged.is_dir() else [staged])}
        kept = self._claim(files)
        for path in files.keys() - kept:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(files[path], path)
        self._settle(files.keys() - kept)
        return kept

    def _claim(self, files: Mapping[Path, Path]) -> list[Path]:
        """List the new contents of files, given by their paths, before they replace the old ones.

        A run that is killed in between leaves a file whose digest is listed, whether it was replaced or not.

        Returns:
            The paths of files that must not be replaced.
        """
        written, kept = self._read(), []
        for path, content in files.items():
            name, new = self._name(path), _digest(content)
            present = [_digest(path)] if os.path.lexists(path) else []
            if all(digest in (new, *written.get(name, ())) for digest in present):
                written[name] = [*present, new]
            else:
                kept.append(path)
        self._save(written)
        return kept

    def _settle(self, paths: Iterable[Path]) -> None:
        """Forget the former contents of files that were replaced."""
        written = self._read()
        self._save(written | {name: written[name][-1:] for name in map(self._name, paths)})

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _save(self, written: Mapping[str, Sequence[str]]) -> None:
        write_text(self._list, json.dumps(written, indent=0, sort_keys=True) + "\n")


def _digest(path: Path) -> str:
    """Digest of a file, the target of a link, or a word for a folder."""
    if path.is_symlink():
        return f"link to {path.readlink()}"
    return _FOLDER if path.is_dir() else file_digest(path)


def _is_empty(folder: Path) -> bool:
    """Whether a folder has no files, or does not exist."""
    return not any(names for _, _, names in os.walk(folder))
