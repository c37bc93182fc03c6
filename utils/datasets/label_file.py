"""Reading the text formats of labels (RetinaFace, SCRFD, WIDER FACE), and writing label.txt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.datasets.labels import DatasetError, FaceRow, LabelledImage, as_flag, check_units, labelled_image
from utils.runtime.files import is_utf8, read_lines, write_text
from utils.runtime.images import IMAGE_SUFFIXES
from utils.structures import LANDMARKS_PER_FACE

_BOX_VALUES = 4
_LANDMARK_VALUES = 3 * LANDMARKS_PER_FACE  # x, y and a flag for each landmark
_FACE_VALUES = _BOX_VALUES + _LANDMARK_VALUES
_MAX_FLOAT32 = float(np.finfo(np.float32).max)


def read_labels(label_file: Path, images: Path) -> list[LabelledImage]:
    """Read a label file. Its first line determines the format; its paths are relative to the folder `images`.

    - RetinaFace: `# path`, then one line per face: `x y w h`, optionally followed by 1 if the face is ignored, or by
      `x y flag` for each of five landmarks. After landmarks a score may follow, or a score and a difficulty, as in
      SNU_FaceDetection.
    - SCRFD and libfacedetection (labelv2): `# path width height`, then one line per face: corners `x1 y1 x2 y2`,
      optionally followed by 1 if the face is ignored, or by five landmarks, after which one more number may follow.
    - WIDER FACE: the path, a line with the number of faces, then one line per face: `x y w h` and six attributes. Faces
      marked invalid are ignored; an image without faces may have one line of zeros.

    Landmarks of -1 are unknown. Faces without area are left out. An image may have no faces. If an image is named
    twice, its faces are joined.

    Raises:
        DatasetError: the file is malformed; the message names the file, the line and what was expected.
    """
    lines = _read_lines(label_file)
    if not lines:
        raise DatasetError(f"{label_file}: names no image; expected lines like '# folder/image.jpg'")
    rows_of: dict[Path, list[FaceRow]] = {}
    for name, rows in _parse(lines):
        rows_of.setdefault(images / name, []).extend(rows)
    labelled = [labelled_image(path, rows) for path, rows in rows_of.items()]
    check_units([image.faces for image in labelled], label_file)
    return labelled


def write_labels(path: Path, images: Sequence[LabelledImage], root: Path) -> None:
    """Write label.txt in RetinaFace's format; `read_labels(path, root)` inverts it.

    Raises:
        DatasetError: the format cannot represent the name of an image.
        OSError: the file cannot be written.
    """
    write_text(path, "".join(_format_image(image, root) for image in images))


# -------------------------------------------------------------------------------------------------- reading


class _Line(NamedTuple):
    where: str  # file:number
    text: str


_NamedFaces = tuple[str, list[FaceRow]]  # the name of an image and its faces


@dataclass(frozen=True)
class _HashForm:
    """A format in which `#` and the path of an image precede its faces.

    Attributes:
        header: example of a header line.
        meanings: meaning of the values of a face, by their number.
        corners: whether faces are given by two corners instead of a corner and a size.
    """

    header: str
    meanings: Mapping[int, str]
    corners: bool


_RETINAFACE = _HashForm(
    header="# folder/image.jpg",
    meanings={
        _BOX_VALUES: "x y w h",
        _BOX_VALUES + 1: "with 1 if it is to be ignored",
        _FACE_VALUES: "with five landmarks x y flag",
        _FACE_VALUES + 1: "with a score too",
        _FACE_VALUES + 2: "with a difficulty too",
    },
    corners=False,
)
_LABEL_V2 = _HashForm(
    header="# folder/image.jpg width height",
    meanings={
        _BOX_VALUES: "x1 y1 x2 y2",
        _BOX_VALUES + 1: "with 1 if it is to be ignored",
        _FACE_VALUES: "with five landmarks x y flag",
        _FACE_VALUES + 1: "with one more",
    },
    corners=True,
)
_WIDER_MEANINGS = {10: "x y w h blur expression illumination invalid occlusion pose"}
_WIDER_INVALID = 7  # index of `invalid` among them

_SUFFIXES = tuple(sorted(IMAGE_SUFFIXES))
_IMAGE_AND_SIZE = re.compile(rf"(.*(?:{'|'.join(map(re.escape, _SUFFIXES))}))\s+\d+\s+\d+", re.IGNORECASE)


def _read_lines(label_file: Path) -> list[_Line]:
    """Read the lines that are not blank."""
    try:
        lines = read_lines(label_file)
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{label_file}: cannot be read ({error})") from None
    file = str(label_file)
    return [_Line(f"{file}:{number}", line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def _parse(lines: Sequence[_Line]) -> list[_NamedFaces]:
    """Parse the lines in the format that the first line determines."""
    where, first = lines[0]
    if first.startswith("#"):
        return _parse_hash_format(lines, _split_header(first)[1])
    if _is_image_path(first):
        return _parse_wider(lines)
    raise DatasetError(
        f"{where}: expected '{_RETINAFACE.header}', '{_LABEL_V2.header}' or, in WIDER FACE's form, 'folder/image.jpg' "
        f"before the first face, got {first!r}"
    )


def _parse_hash_format(lines: Sequence[_Line], form: _HashForm) -> list[_NamedFaces]:
    images: list[_NamedFaces] = []
    for line in lines:
        if line.text.startswith("#"):
            images.append((_parse_header(line, form), []))
        else:
            images[-1][1].append(_parse_face(line, form))
    return images


def _split_header(text: str) -> tuple[str, _HashForm]:
    """Split a `#` line into the path and the format to which the line belongs."""
    rest = text[1:].strip()
    sized = _IMAGE_AND_SIZE.fullmatch(rest)
    return (sized[1], _LABEL_V2) if sized else (rest, _RETINAFACE)


def _parse_header(line: _Line, form: _HashForm) -> str:
    name, own = _split_header(line.text)
    if own is not form:
        raise DatasetError(f"{line.where}: expected '{form.header}' as in the first line, got {line.text!r}")
    if not name:
        raise DatasetError(f"{line.where}: expected '{form.header}', got {line.text!r}")
    return name


def _parse_face(line: _Line, form: _HashForm) -> FaceRow:
    values = _parse_numbers(line, form.meanings)
    box = values[:_BOX_VALUES] if form.corners else _corners(values)
    if len(values) == _BOX_VALUES + 1:
        meaning = f"after {form.meanings[_BOX_VALUES]} in pixels, whether the face is ignored"
        return FaceRow(box, ignored=as_flag(values[_BOX_VALUES], meaning, line.where))
    points = values[_BOX_VALUES:_FACE_VALUES]
    landmarks = list(zip(points[::3], points[1::3], strict=True))
    is_known = bool(landmarks) and all(x >= 0 and y >= 0 for x, y in landmarks)
    return FaceRow(box, landmarks if is_known else None)


def _parse_wider(lines: Sequence[_Line]) -> list[_NamedFaces]:
    blocks: list[tuple[_Line, list[_Line]]] = []
    for line in lines:
        if _is_image_path(line.text):
            blocks.append((line, []))
        else:
            blocks[-1][1].append(line)
    return [(image.text, _parse_wider_faces(image, below)) for image, below in blocks]


def _parse_wider_faces(image: _Line, below: Sequence[_Line]) -> list[FaceRow]:
    if not below:
        raise DatasetError(f"{image.where}: expected the number of faces in the line below {image.text}, got none")
    if not re.fullmatch(r"\d{1,9}", below[0].text):
        raise DatasetError(f"{below[0].where}: expected the number of faces of {image.text}, got {below[0].text!r}")
    count = int(below[0].text)
    faces = [_parse_numbers(face, _WIDER_MEANINGS) for face in below[1:]]
    if count == 0 and len(faces) == 1 and not any(faces[0]):
        return []
    if len(faces) != count:
        raise DatasetError(f"{below[0].where}: expected {count} faces below for {image.text}, got {len(faces)}")
    return [
        FaceRow(_corners(face), ignored=as_flag(face[_WIDER_INVALID], "for invalid, number 8", row.where))
        for row, face in zip(below[1:], faces, strict=True)
    ]


def _is_image_path(text: str) -> bool:
    return text.lower().endswith(_SUFFIXES) and not text.startswith("#")


def _parse_numbers(line: _Line, meanings: Mapping[int, str]) -> list[float]:
    try:
        values = list(map(float, line.text.split()))
    except ValueError:
        raise DatasetError(f"{line.where}: expected numbers, got {line.text!r}") from None
    if not all(-_MAX_FLOAT32 <= value <= _MAX_FLOAT32 for value in values):
        raise DatasetError(f"{line.where}: expected finite numbers, got {line.text!r}")
    if len(values) not in meanings:
        expected = " or ".join(f"{count} numbers ({meaning})" for count, meaning in meanings.items())
        raise DatasetError(f"{line.where}: expected {expected}, got {len(values)}")
    return values


def _corners(values: Sequence[float]) -> list[float]:
    """Convert `x y w h ...` to `x1 y1 x2 y2`."""
    x, y, width, height = values[:_BOX_VALUES]
    return [x, y, x + width, y + height]


# -------------------------------------------------------------------------------------------------- writing


def _format_image(image: LabelledImage, root: Path) -> str:
    # A path that is not below the root is read back as it is, if it is absolute.
    name = image.path.relative_to(root) if image.path.is_relative_to(root) else image.path
    if not is_utf8(name) or re.search("[\r\n]", str(name)):
        raise DatasetError(f"{image.path}: its name is not valid UTF-8 or contains a line break; rename it")
    faces = image.faces
    landmarks = [
        row if known else None for row, known in zip(_decimals(faces.landmarks), faces.has_landmarks, strict=True)
    ]
    rows = zip(_decimals(faces.boxes), landmarks, faces.ignored, strict=True)
    return "".join(line + "\n" for line in [f"# {name.as_posix()}", *(_format_face(*row) for row in rows)])


def _format_face(box: Sequence[Decimal], landmarks: Sequence[Decimal] | None, ignored: bool) -> str:
    left, top, right, bottom = box
    # Decimals, because the difference of two short ones is short and exact: 0.3 - 0.1 is 0.2.
    words = [_plain(value) for value in (left, top, right - left, bottom - top)]
    if ignored:
        words.append("1")
    elif landmarks:
        for x, y in zip(landmarks[::2], landmarks[1::2], strict=True):
            words += [_plain(x), _plain(y), "0"]
    return " ".join(words)


def _decimals(values: np.ndarray) -> list[list[Decimal]]:
    """Convert (N, ...) float32 to N lists of the shortest decimals that are read back as the same values."""
    return [[Decimal(word) for word in row.ravel().tolist()] for row in values.astype(str)]


def _plain(value: Decimal) -> str:
    return f"{value.normalize():f}"
