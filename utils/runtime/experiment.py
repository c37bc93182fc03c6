"""The folder of an experiment: its configuration, checkpoints, logs and results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import ExperimentConfig
from utils.errors import ConfigError
from utils.options import from_dict, to_dict
from utils.runtime.files import numbered, write_text


@dataclass(frozen=True)
class Experiment:
    """The folder `experiments/<name>/`, which need not exist."""

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
        """Path of a checkpoint; `which` is `best` or `last`."""
        return self.folder / "ckpt" / f"{backbone}_ckpt-{which}.pth"

    @property
    def can_continue(self) -> bool:
        """Whether a state to continue training from exists, of any backbone."""
        return any((self.folder / "ckpt").glob("*ckpt-last.pth"))

    @property
    def for_training(self) -> Experiment:
        """This experiment, or the first of `<name>_2`, `<name>_3`, ... that training may write into.

        A folder with weights but no state to continue from, such as a published detector, is never written into.
        """
        experiments = map(Experiment, numbered(self.folder))
        return next(each for each in experiments if each.can_continue or not any(each.folder.glob("ckpt/*.pth")))


@dataclass(frozen=True)
class Recipe:
    """A published training recipe.

    Attributes:
        description: paper or repository that the recipe follows.
        published: published AP and its test protocol.
        experiment: architecture, losses, data, optimisation, thresholds and test protocol.
    """

    description: str
    published: str
    experiment: ExperimentConfig


def load_recipe(name: str, folder: Path) -> Recipe:
    """Read `<folder>/<name>.json`.

    Raises:
        ConfigError: the recipe does not exist or is malformed.
    """
    path = folder / f"{name}.json"
    known = sorted(file.stem for file in folder.glob("*.json"))
    if name not in known:
        raise ConfigError(f"--recipe={name}: no such recipe; choose from {', '.join(known)}")
    return from_dict(Recipe, _read_json(path), where=str(path))


def save_config(config: ExperimentConfig, path: Path) -> None:
    """Write the configuration of an experiment as JSON, atomically."""
    write_text(path, json.dumps(to_dict(config), indent=2) + "\n")


def load_config(path: Path) -> ExperimentConfig:
    """Read what `save_config` wrote, in this or an earlier version.

    Raises:
        ConfigError: the file is not JSON, or a field is unknown or has a value of the wrong kind.
    """
    return from_dict(ExperimentConfig, _read_json(path), where=str(path))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration ({error})") from None
