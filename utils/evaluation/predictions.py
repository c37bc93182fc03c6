"""Detections as WIDER FACE exchanges them: one text file per image, `<event>/<image>.txt`.

The first line is the image's name, the second the number of boxes; then one box per line, `x y width height score`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.runtime.files import one_line, shortened, write_text

_COLUMNS = 5


def prediction_file(folder: Path, name: str) -> Path:
    """Path of the predictions of an image named `event/image`."""
    return folder / shortened(f"{name}.txt")


def write_predictions(folder: Path, name: str, rows: np.ndarray, *, integer_boxes: bool = False) -> None:
    """Write the predictions of one image, atomically.

    Args:
        folder: folder of all predictions; the folder of the event is created in it.
        name: name of the image, `event/image`.
        rows: (N, 5) x, y, width, height, score, in pixels.
        integer_boxes: truncate the corners to whole pixels, as biubug6/Pytorch_Retinaface writes them.

    Raises:
        OSError: the file cannot be written.
    """
    if integer_boxes:
        start, end = np.trunc(rows[:, :2]), np.trunc(rows[:, :2] + rows[:, 2:4])
        rows = np.concatenate([start, end - start, rows[:, 4:]], axis=1)
    line = "%d %d %d %d %.9g\n" if integer_boxes else "%.3f %.3f %.3f %.3f %.9g\n"
    path = prediction_file(folder, name)
    text = f"{one_line(path.stem)}\n{len(rows)}\n" + line * len(rows) % tuple(rows.flatten().tolist())
    write_text(path, text, errors="surrogateescape")


def read_predictions(folder: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Read the predictions of the named images; images without a file are absent from the result.

    An empty file means no boxes.

    Returns:
        (N, 5) float64 x, y, width, height, score, in the order of the file, by the name of the image.

    Raises:
        UserError: a file is unreadable or malformed; the message names the file, the line and what was expected.
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
    """Parse all boxes at once; if that fails, line by line, to report the line that is malformed."""
    _name, _, rest = text.partition(b"\n")
    count, _, body = rest.partition(b"\n")
    lines = body.strip().splitlines()
    if count.strip() == str(len(lines)).encode() and all(len(line.split()) == _COLUMNS for line in lines):
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # NumPy's warning about text that is not a number
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
    """Parse x, y, width, height and score; further values are ignored."""
    try:
        row = [float(word) for word in line.split()[:_COLUMNS]]
    except ValueError:
        row = []
    if len(row) != _COLUMNS or not all(map(math.isfinite, row)):
        raise UserError(f"{where}: expected finite numbers x y width height score, got {line.strip()!r}")
    return row
