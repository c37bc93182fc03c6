"""A static page of images with their faces, which opens without a server, a network or other software than a browser.

The template, its style and its script lie in `templates/`. All data are embedded in the page; images are files
beside it. All input, such as the names of images, is escaped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from utils.errors import UserError
from utils.results.own_files import OwnFiles

PAGE_NAME = "index.html"
_GENERATOR = "retinaface results"  # distinguishes generated pages from files of the user
_IMAGES_PER_FILE = 10_000  # a browser opens a page of this size in about a second


@dataclass(frozen=True)
class Table:
    """A table above the images."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class PageHead:
    """Everything on a page besides the images.

    Attributes:
        title: title of the page.
        summary: one line below the title.
        lowest_score: lower end of the threshold slider.
        threshold: initial value of the threshold slider.
        settings: names and values in the footer.
        metrics: names and values in large type.
        figures: URLs of images, relative to the page.
        tables: tables beside the figures.
        kinds: labels of the kinds of faces that the user can hide, by the `kind` of the faces, which is also their
            class in page.css; empty if all faces are of one kind.
    """

    title: str
    summary: str
    lowest_score: float
    threshold: float
    settings: Sequence[tuple[str, object]] = ()
    metrics: Sequence[tuple[str, object]] = ()
    figures: Sequence[str] = ()
    tables: Sequence[Table] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)


def write_page(folder: Path, head: PageHead, entries: Iterable[Mapping[str, Any]], count: int) -> Path:
    """Write index.html, and index_2.html and so on for more than 10,000 images.

    Args:
        folder: folder of the page.
        head: content around the images.
        entries: for each image, `name`, and `skipped`, the reason, or `width`, `height`, `thumbnail` and `source`,
            URLs relative to the page, and `faces`. A face has a `box` and, if known, `score`, `landmarks`, `kind`,
            `files` (URLs by kind) and `track`. Entries are iterated over once and not held in memory.
        count: number of entries.

    Returns:
        The path of index.html.

    Raises:
        OSError: the page cannot be written.
        UserError: see `check_page_is_ours`.
    """
    own = OwnFiles(folder)
    numbers = range(max(1, math.ceil(count / _IMAGES_PER_FILE)))
    # The label of every file by its name.
    parts = {f"index_{n + 1}.html" if n else PAGE_NAME: f"from {n * _IMAGES_PER_FILE + 1}" for n in numbers}
    template = _environment().get_template("page.html.j2")
    remaining = iter(entries)
    for name in parts:
        path = folder / name
        images = islice(remaining, _IMAGES_PER_FILE)
        stream = template.stream(head=head, entries=images, parts=parts, file=name, generator=_GENERATOR)
        if own.is_as_written(path) is None and _is_ours(path):
            own.adopt([path])
        with own.replaced(path) as (temporary,), temporary.open("w", encoding="utf-8") as file:
            file.writelines(stream)
    for path in _former_parts(folder, len(parts)):
        path.unlink()
    return folder / PAGE_NAME


def check_page_is_ours(folder: Path) -> None:
    """Check that no index.html by a person or another program, and none that was edited, would be replaced.

    Raises:
        UserError: there is such an index.html; the message says what to do instead.
    """
    path = folder / PAGE_NAME
    if path.exists() and not _is_ours(path):
        raise UserError(
            f"{path}: is not a page of results, or was edited since; move it, choose another folder for the results, "
            "or add --page=False"
        )


def file_url(path: Path, folder: Path) -> str:
    """The URL of a file relative to `folder`, or an absolute one where they share no root, as on two drives."""
    try:
        relative = os.path.relpath(path.absolute(), folder.absolute())
    except ValueError:
        return path.absolute().as_uri()
    return relative_url(Path(relative).as_posix())


def relative_url(path: str) -> str:
    """The URL of a path with forward slashes. A colon in its first part is not interpreted as the end of a scheme."""
    return quote(os.fsencode(path if path.startswith(".") else f"./{path}"))


def settings_rows(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """Flatten nested settings to pairs of a name, joined by dots, and a value."""
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
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    # A file name may contain bytes that are not text; they are shown escaped.
    environment.finalize = lambda value: value if isinstance(value, Markup) else _as_text(value)
    return environment


def _as_text(value: object) -> object:
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value


def _former_parts(folder: Path, parts: int) -> Iterator[Path]:
    """Further parts that an earlier page with more images left."""
    for path in folder.glob("index_*.html"):
        number = path.stem.removeprefix("index_")
        if number.isdecimal() and int(number) > parts and _is_ours(path):
            yield path


def _is_ours(path: Path) -> bool:
    """Whether a run wrote this file as it stands; those of earlier versions are recognised by their generator."""
    try:
        is_as_written = OwnFiles(path.parent).is_as_written(path)
        if is_as_written is not None:
            return is_as_written
        with path.open("rb") as file:
            return f'<meta name="generator" content="{_GENERATOR}">'.encode() in file.read(2000)
    except OSError:  # a folder, or not readable
        return False
