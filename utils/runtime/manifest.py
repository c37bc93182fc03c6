"""The settings that results depend on, saved beside them and compared before an interrupted run is continued."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from utils.errors import ConfigError

# Types of the entries that are used without a further check.
_KINDS = (("settings", dict), ("former_files", list), ("experiment", str), ("protocol", str))


class Difference(NamedTuple):
    """A setting that differs; the parts of a nested `name` are joined by dots."""

    name: str
    saved: Any
    asked: Any

    def __str__(self) -> str:
        return f"{self.name} {_brief(self.saved)}, now it is {_brief(self.asked)}"


def first_difference(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> Difference | None:
    """The first setting of `asked` that differs in `saved`. Tuples equal the lists that JSON makes of them."""
    for name, value in json.loads(json.dumps(asked)).items():
        former = saved.get(name)
        if isinstance(former, Mapping) and isinstance(value, Mapping):
            inner = first_difference(former, value)
            if inner is not None:
                return inner._replace(name=f"{name}.{inner.name}")
        elif former != value:
            return Difference(name, former, value)
    return None


def require_same_settings(saved: Mapping[str, Any], asked: Mapping[str, Any], results: Path) -> None:
    """Check that a run to be continued has the same settings.

    Raises:
        ConfigError: a setting differs; the message names the results and the first such setting.
    """
    changed = first_difference(saved, asked)
    if changed is not None:
        raise ConfigError(
            f"--resume: the results in {results} were made with {changed}; repeat the flags of that run, or drop "
            "--resume"
        )


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object of a file that describes a run; returns an empty dictionary if it is damaged or absent."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_run = isinstance(values, dict) and all(isinstance(values.get(name, kind()), kind) for name, kind in _KINDS)
    return values if is_run else {}


def file_digest(path: Path) -> str:
    """SHA-256 of the content of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."
