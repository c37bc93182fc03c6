"""Reading label.txt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import UserError
from utils.landmarks import LANDMARKS_PER_FACE

_BOX_VALUES = 4
_LANDMARK_VALUES = 3 * LANDMARKS_PER_FACE  # x, y and a flag for each


class DatasetError(UserError):
    """A dataset's folder or labels are missing or malformed."""


@dataclass(frozen=True)
class LabelledImage:
    """An image file and its faces.

    Attributes:
        path: of the image file.
        boxes: (N, 4) float32 xyxy in pixels, of positive area.
        landmarks: (N, 5, 2) float32 x, y in pixels; zeros for faces without.
        has_landmarks: (N,) bool.
    """

    path: Path
    boxes: np.ndarray
    landmarks: np.ndarray
    has_landmarks: np.ndarray


def read_labels(label_file: Path, images: Path) -> list[LabelledImage]:
    """Read labels in the RetinaFace format.

    `# path` names an image below `images`; each line under it is a face: `x y w h`, or `x y w h` and, for each of
    five landmarks, `x y flag`, or the same and a score. Landmarks of -1 are unknown. Faces without area are left out;
    an image may have no faces.

    Raises:
        DatasetError: names the file, the line and what was expected.
    """
    try:
        lines = label_file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{label_file}: cannot be read ({error})") from None
    faces_of: dict[Path, list[np.ndarray]] = {}
    faces: list[np.ndarray] | None = None
    for number, line in enumerate(lines, start=1):
        if line.startswith("#"):
            faces = faces_of.setdefault(images / line[1:].strip(), [])
        elif line.strip():
            if faces is None:
                raise DatasetError(f"{label_file}:{number}: a face before the first '# image path' line")
            faces.append(_parse_face(line, f"{label_file}:{number}"))
    if not faces_of:
        raise DatasetError(f"{label_file}: names no image; expected lines like '# folder/image.jpg'")
    return [_labelled_image(path, faces) for path, faces in faces_of.items()]


def _parse_face(line: str, where: str) -> np.ndarray:
    """19 values: the box and the landmarks with their flags, -1 where unknown."""
    try:
        values = np.array(line.split(), dtype=np.float32)
    except ValueError:
        raise DatasetError(f"{where}: expected numbers, got {line.strip()!r}") from None
    if not np.isfinite(values).all():
        raise DatasetError(f"{where}: expected finite numbers, got {line.strip()!r}")
    complete = _BOX_VALUES + _LANDMARK_VALUES
    if len(values) == _BOX_VALUES:
        return np.concatenate([values, np.full(_LANDMARK_VALUES, -1, np.float32)])
    if len(values) in (complete, complete + 1):
        return values[:complete]
    raise DatasetError(
        f"{where}: expected 4 numbers (x y w h), {complete} (with five landmarks x y flag) or {complete + 1} "
        f"(with a score), got {len(values)}"
    )


def _labelled_image(path: Path, faces: list[np.ndarray]) -> LabelledImage:
    values = np.stack(faces) if faces else np.zeros((0, _BOX_VALUES + _LANDMARK_VALUES), np.float32)
    values = values[(values[:, 2] > 0) & (values[:, 3] > 0)]
    corner, size = values[:, :2], values[:, 2:4]
    points = values[:, _BOX_VALUES:].reshape(-1, LANDMARKS_PER_FACE, 3)[:, :, :2]
    has_landmarks = (points >= 0).all(axis=(1, 2))
    landmarks = np.where(has_landmarks[:, None, None], points, 0)
    return LabelledImage(path, np.concatenate([corner, corner + size], axis=1), landmarks, has_landmarks)
