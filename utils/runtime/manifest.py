"""What results depend on, as plain JSON: read from a file, and compared before an interrupted run is continued."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Difference(NamedTuple):
    """A setting that is not what it was; `name` has dots where settings are nested."""

    name: str
    saved: Any
    asked: Any

    def __str__(self) -> str:
        return f"{self.name} {_brief(self.saved)}, now it is {_brief(self.asked)}"


def first_difference(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> Difference | None:
    """The first setting of `asked` that `saved` lacks or has otherwise; tuples count as the lists that JSON makes."""
    for name, value in json.loads(json.dumps(asked)).items():
        former = saved.get(name)
        if isinstance(former, Mapping) and isinstance(value, Mapping):
            inner = first_difference(former, value)
            if inner is not None:
                return inner._replace(name=f"{name}.{inner.name}")
        elif former != value:
            return Difference(name, former, value)
    return None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def digest_of_file(path: Path) -> str:
    """SHA-256 of the content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."
