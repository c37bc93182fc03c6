"""What the annotation formats of other tools have in common."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from utils.datasets.labels import DatasetError, LabelledImage
from utils.structures import LANDMARKS_PER_FACE, Faces

FACE = "face"
LANDMARK_NAMES = ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth")
_ROTATED_EXIF = (5, 6, 7, 8)  # orientations in which width and height are exchanged


@dataclass(frozen=True)
class AnnotatedImage:
    """An image with faces, as it is written for other tools.

    Attributes:
        name: path relative to the folder of the images, with forward slashes.
        width: in pixels, of the upright image.
        height: likewise.
        faces: in pixels.
        scores: (N,) of detections; None for labels.
    """

    name: str
    width: int
    height: int
    faces: Faces
    scores: np.ndarray | None = None


class FaceRow(NamedTuple):
    """One face that was read: its corners, its landmarks as (5, 2) or None, and whether it is ignored."""

    box: Sequence[float]
    landmarks: Sequence[Sequence[float]] | None = None
    ignored: bool = False


def labelled_image(name: str, rows: Sequence[FaceRow]) -> LabelledImage:
    """An image with the faces that were read; faces without area are left out."""
    boxes = np.array([row.box for row in rows], np.float32).reshape(-1, 4)
    known = np.array([row.landmarks is not None for row in rows], bool)
    unknown = np.zeros((LANDMARKS_PER_FACE, 2))
    landmarks = np.array([unknown if row.landmarks is None else row.landmarks for row in rows], np.float32)
    ignored = np.array([row.ignored for row in rows], bool)
    faces = Faces(boxes, landmarks.reshape(-1, LANDMARKS_PER_FACE, 2), known, ignored)
    has_area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]) & np.isfinite(boxes).all(axis=1)
    return LabelledImage(Path(name), faces.select(has_area))


def with_size(labelled: LabelledImage, images: Path) -> AnnotatedImage:
    """Add the size of the image file below `images`.

    Raises:
        DatasetError: the file does not exist or is no image.
    """
    width, height = upright_size(images / labelled.path)
    return AnnotatedImage(labelled.path.as_posix(), width, height, labelled.faces)


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of an image after its EXIF orientation is applied; only the header is read.

    Raises:
        DatasetError: the file does not exist or is no image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            rotated = image.getexif().get(0x0112) in _ROTATED_EXIF
    except Exception as error:  # Pillow raises whatever a damaged file leads it to
        raise DatasetError(f"{path}: its size cannot be read ({type(error).__name__}); give --images") from None
    return (height, width) if rotated else (width, height)


def face_label(labels: Collection[str], where: str) -> str | None:
    """The label of faces among those of a file: `face`, in any case, or the only one. None where there is none.

    Raises:
        DatasetError: there are several, and none is `face`.
    """
    distinct = sorted(set(labels))
    faces = [label for label in distinct if label.lower() == FACE]
    if faces or len(distinct) <= 1:
        return next(iter(faces or distinct), None)
    raise DatasetError(f"{where}: none of its labels is {FACE!r}: {', '.join(distinct[:8])}; rename that of the faces")


def shortest(values: np.ndarray) -> list[float]:
    """Numbers of any shape as a flat list of the shortest decimals that are read back as the same float32."""
    return [float(str(value)) for value in np.asarray(values, np.float32).ravel()]
