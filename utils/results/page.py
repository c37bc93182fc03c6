"""A static page of images with their faces, which opens without a server, a network or other software than a browser.

The template, its style and its script lie in `templates/`. All data stand in the page itself; images are files beside
it. Everything that comes from outside, such as the name of an image, is escaped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from utils.errors import UserError
from utils.runtime.files import atomic_write

PAGE_NAME = "index.html"
_GENERATOR = "retinaface results"  # tells a page of ours from one of the user's
_IMAGES_PER_FILE = 10_000  # a browser opens a page of this size in about a second
# None of these characters may stand in a <script>, whatever the JSON around them.
_SCRIPT_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class Table:
    """A table above the images."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class FaceKind:
    """A kind of faces that can be hidden: `key` is the value of a face's `kind`, and its class in page.css."""

    key: str
    label: str


@dataclass(frozen=True)
class PageHead:
    """Everything on a page besides the images.

    Attributes:
        title: of the page.
        summary: one line below it.
        lowest_score: where the slider of the threshold begins.
        threshold: where it stands at first.
        settings: names and values at the foot.
        metrics: names and values in large type.
        figures: URLs of images, relative to the page.
        tables: beside the figures.
        kinds: of faces; empty where all are of one kind.
    """

    title: str
    summary: str
    lowest_score: float
    threshold: float
    settings: Sequence[tuple[str, object]] = ()
    metrics: Sequence[tuple[str, object]] = ()
    figures: Sequence[str] = ()
    tables: Sequence[Table] = ()
    kinds: Sequence[FaceKind] = ()


@dataclass(frozen=True)
class _Part:
    file: str
    label: str


def write_page(folder: Path, head: PageHead, entries: Iterable[Mapping[str, Any]], count: int) -> Path:
    """Write index.html, and index_2.html and so on where there are more than 10,000 images.

    Args:
        folder: folder of the page.
        head: what stands around the images.
        entries: of each image `name`, and either `skipped`, the reason, or `width`, `height`, `thumbnail` and `source`,
            URLs relative to the page, and `faces`. A face has a `box`, and if known `score`, `landmarks`, `kind`,
            `files` (URLs by their kind) and `track`. They are read once and not held in memory.
        count: number of entries.

    Returns:
        The path of index.html.

    Raises:
        OSError: the page cannot be written.
    """
    parts = [
        _Part(PAGE_NAME if not number else f"index_{number + 1}.html", f"from {number * _IMAGES_PER_FILE + 1}")
        for number in range(max(1, math.ceil(count / _IMAGES_PER_FILE)))
    ]
    template = _environment().get_template("page.html.j2")
    remaining = iter(entries)
    for part in parts:
        stream = template.stream(
            head=head, entries=islice(remaining, _IMAGES_PER_FILE), parts=parts, file=part.file, generator=_GENERATOR
        )
        with atomic_write(folder / part.file) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(stream)
    for path in _former_parts(folder, len(parts)):
        path.unlink()
    return folder / PAGE_NAME


def check_page_is_ours(folder: Path) -> None:
    """Refuse to replace an index.html that a person or another program wrote.

    Raises:
        UserError: says what to do instead.
    """
    path = folder / PAGE_NAME
    if path.exists() and not _is_ours(path):
        raise UserError(f"{path}: is not a page of results; choose another folder for them, or add --page=False")


def file_url(path: Path, folder: Path) -> str:
    """The URL of a file relative to `folder`, or an absolute one where they share no root, as on two drives."""
    try:
        relative = os.path.relpath(path.absolute(), folder.absolute())
    except ValueError:
        return path.absolute().as_uri()
    return relative_url(Path(relative).as_posix())


def relative_url(path: str) -> str:
    """The URL of a path with forward slashes. A first part with a colon is not taken for a scheme."""
    return quote(os.fsencode(path if path.startswith(".") else f"./{path}"))


def settings_rows(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """Nested settings as names joined by dots, and values."""
    rows: list[tuple[str, object]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows += settings_rows(value, f"{prefix}{name}.")
        elif value is not None:
            rows.append((f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)))
    return rows


def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent / "templates", encoding="utf-8")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["json"] = _as_script_json
    # A file name may contain bytes that are not text; they are shown escaped.
    environment.finalize = lambda value: value if isinstance(value, Markup) else _as_text(value)
    return environment


def _as_script_json(value: object) -> Markup:
    """JSON in ASCII that cannot end the <script> around it."""
    text = json.dumps(value, separators=(",", ":")).translate(_SCRIPT_ESCAPES)
    return Markup(text)


def _as_text(value: object) -> object:
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value


def _former_parts(folder: Path, parts: int) -> Iterator[Path]:
    """Further parts of a page of more images."""
    for path in folder.glob("index_*.html"):
        number = path.stem.removeprefix("index_")
        if number.isdecimal() and int(number) > parts and _is_ours(path):
            yield path


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return f'<meta name="generator" content="{_GENERATOR}">'.encode() in file.read(2000)
