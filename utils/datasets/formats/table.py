"""CSV: one row per face, for spreadsheets and scripts. An image without faces has a row with empty fields."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from utils.datasets.formats.annotations import LANDMARK_NAMES, AnnotatedImage, shortest
from utils.datasets.labels import DatasetError, FaceRow, LabelledImage, as_flag, labelled_image
from utils.runtime.files import atomic_write

_BOX = ("x1", "y1", "x2", "y2")
_LANDMARKS = tuple(f"{name}_{axis}" for name in LANDMARK_NAMES for axis in "xy")
_COLUMNS = ("image", "width", "height", *_BOX, "score", *_LANDMARKS, "ignored", "track")


def write_csv(path: Path, images: Iterable[AnnotatedImage], folder: Path | None = None) -> None:
    """Write the table; `folder` is unused."""
    with (
        atomic_write(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.DictWriter(file, _COLUMNS, restval="")
        writer.writeheader()
        for image in images:
            row: dict[str, object] = {"image": image.name, "width": image.width, "height": image.height}
            faces = image.faces
            if not len(faces):
                writer.writerow(row)
            for index in range(len(faces)):
                face = row | dict(zip(_BOX, shortest(faces.boxes[index]), strict=True))
                face["ignored"] = int(faces.ignored[index])
                if image.scores is not None:
                    face["score"] = f"{image.scores[index]:.6f}"
                if image.tracks is not None:
                    face["track"] = image.tracks[index]
                if faces.has_landmarks[index]:
                    face |= dict(zip(_LANDMARKS, shortest(faces.landmarks[index]), strict=True))
                writer.writerow(face)


def read_csv(path: Path, folder: Path | None = None) -> list[LabelledImage]:
    """Read a table with the columns `image`, `x1`, `y1`, `x2` and `y2`; the others are optional.

    Raises:
        DatasetError: a column is missing, or a field is not a number.
    """
    rows: dict[str, list[FaceRow]] = {}
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            table = csv.DictReader(file)
            missing = {"image", *_BOX} - set(table.fieldnames or ())
            if missing:
                raise DatasetError(f"{path}:1: expected a column {min(missing)}; has {table.fieldnames}")
            for row in table:
                faces = rows.setdefault(row["image"], [])
                if row["x1"]:
                    faces.append(_read_row(row, f"{path}:{table.line_num}"))
    except (OSError, csv.Error) as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from None
    return [labelled_image(Path(name), faces) for name, faces in rows.items()]


def _read_row(row: Mapping[str, str | None], where: str) -> FaceRow:
    try:
        box = [float(row[name] or "") for name in _BOX]
        points = [float(row.get(name) or "nan") for name in _LANDMARKS]
        ignored = float(row.get("ignored") or 0)
    except ValueError as error:
        raise DatasetError(f"{where}: {error}") from None
    known = all(value == value for value in points)  # NaN differs from itself
    return FaceRow(
        box,
        list(zip(points[::2], points[1::2], strict=True)) if known else None,
        as_flag(ignored, "for ignored", where),
    )
