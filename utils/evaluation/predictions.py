"""Detections as WIDER FACE exchanges them: one text file an image, `<event>/<image>.txt`.

The first line is the image's name, the second the number of boxes; then a box a line, `x y width height score`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.runtime.files import atomic_write, one_line, shortened

_COLUMNS = 5


def prediction_file(folder: Path, name: str) -> Path:
    """Where the predictions of an image called `event/image` lie."""
    return folder / shortened(f"{name}.txt")


def write_predictions(folder: Path, name: str, rows: np.ndarray, *, integer_boxes: bool = False) -> None:
    """Write the predictions of one image, atomically.

    Args:
        folder: of all predictions; the event's folder in it is made.
        name: `event/image`.
        rows: (N, 5) x, y, width, height, score, in pixels.
        integer_boxes: cut the corners to whole pixels, as biubug6/Pytorch_Retinaface writes them.

    Raises:
        OSError: it cannot be written.
    """
    if integer_boxes:
        start, end = np.trunc(rows[:, :2]), np.trunc(rows[:, :2] + rows[:, 2:4])
        rows = np.concatenate([start, end - start, rows[:, 4:]], axis=1)
    line = "%d %d %d %d %.9g\n" if integer_boxes else "%.3f %.3f %.3f %.3f %.9g\n"
    path = prediction_file(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f"{one_line(path.stem)}\n{len(rows)}\n" + "".join(line % tuple(row) for row in rows.tolist())
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def read_predictions(folder: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The predictions of the named images that have a file; of those that have none, nothing.

    An empty file means no boxes.

    Returns:
        By name, (N, 5) float64 x, y, width, height, score, in the order of the file.

    Raises:
        UserError: a file cannot be read or is malformed; names the file, the line and what was expected.
    """
    predictions = {}
    for name in names:
        path = prediction_file(folder, name)
        try:
            predictions[name] = _parse(path.read_bytes(), path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return predictions


def _parse(text: bytes, path: Path) -> np.ndarray:
    """All boxes at once where the file is as it should be; otherwise line by line, to say which line is not."""
    _name, _, rest = text.partition(b"\n")
    count, _, body = rest.partition(b"\n")
    lines = body.strip().splitlines()
    if count.strip() == str(len(lines)).encode() and all(len(line.split()) == _COLUMNS for line in lines):
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # numpy's word for text that is no number
            try:
                values = np.fromstring(b" ".join(lines), sep=" ").reshape(-1, _COLUMNS)
            except (DeprecationWarning, ValueError):
                return _parse_lines(text, path)
        if np.isfinite(values).all():
            return values
    return _parse_lines(text, path)


def _parse_lines(text: bytes, path: Path) -> np.ndarray:
    lines = text.decode("utf-8", errors="replace").splitlines()
    count_line = lines[1].strip() if len(lines) > 1 else ""
    if not any(line.strip() for line in lines[1:]):
        return np.zeros((0, _COLUMNS))
    if not count_line.isdecimal():
        raise UserError(f"{path}:2: expected the number of boxes, got {count_line!r}")
    rows = []
    for number, line in enumerate(lines[2:], start=3):
        if line.strip():
            rows.append(_parse_box(line, f"{path}:{number}"))
    if len(rows) != int(count_line):
        raise UserError(f"{path}:2: says {count_line} boxes, but {len(rows)} follow; the file is incomplete")
    return np.array(rows, np.float64).reshape(-1, _COLUMNS)


def _parse_box(line: str, where: str) -> list[float]:
    """x, y, width, height and score; what stands behind them is read past."""
    try:
        row = [float(word) for word in line.split()[:_COLUMNS]]
    except ValueError:
        row = []
    if len(row) != _COLUMNS or not all(map(math.isfinite, row)):
        raise UserError(f"{where}: expected finite numbers x y width height score, got {line.strip()!r}")
    return row
