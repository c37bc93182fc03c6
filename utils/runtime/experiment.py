"""The folder of an experiment: where its configuration, checkpoints, logs and results are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from config import UserError


@dataclass(frozen=True)
class Experiment:
    """`experiments/<name>/`, whether it exists yet or not."""

    folder: Path

    @property
    def config_file(self) -> Path:
        return self.folder / "config.json"

    @property
    def log_folder(self) -> Path:
        return self.folder / "log"

    @property
    def results_folder(self) -> Path:
        return self.folder / "results"

    def checkpoint(self, backbone: str, which: str) -> Path:
        """`which` is `best` or `last`."""
        return self.folder / "ckpt" / f"{backbone}_ckpt-{which}.pth"


def user_path(text: str) -> Path:
    """A path that the user typed, with `~` expanded.

    Raises:
        UserError: it names the home of a user who does not exist.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: there is no such user") from None


def make_folder(folder: Path) -> Path:
    """Create a folder and its parents, or find it there.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror}); choose another folder") from None
    return folder
