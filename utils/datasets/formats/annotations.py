"""Types and helpers that the annotation formats of other tools share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils.datasets.labels import DatasetError, LabelledImage
from utils.structures import Faces

FACE = "face"
LANDMARK_NAMES = ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth")
_ROTATED_EXIF = (5, 6, 7, 8)  # orientations in which width and height are exchanged


@dataclass(frozen=True)
class AnnotatedImage:
    """An image with faces, to be written for other tools.

    Attributes:
        name: path relative to the folder of the images, with forward slashes.
        width: width of the upright image in pixels.
        height: height of the upright image in pixels.
        faces: faces in pixels of the upright image.
        scores: (N,) scores of detections; None for labels.
        tracks: ids of the faces over the frames of a video; None without them.
    """

    name: str
    width: int
    height: int
    faces: Faces
    scores: np.ndarray | None = None
    tracks: Sequence[int] | None = None


def with_size(labelled: LabelledImage, images: Path) -> AnnotatedImage:
    """Add the size of the image file below `images`.

    Raises:
        DatasetError: the file does not exist or is not an image.
    """
    width, height = upright_size(images / labelled.path)
    return AnnotatedImage(labelled.path.as_posix(), width, height, labelled.faces)


def upright_size(path: Path) -> tuple[int, int]:
    """Read the width and height of an image, after EXIF orientation, from its header.

    Raises:
        DatasetError: the file does not exist or is not an image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            rotated = image.getexif().get(0x0112) in _ROTATED_EXIF
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise DatasetError(f"{path}: its size cannot be read ({type(error).__name__}); give --images") from None
    return (height, width) if rotated else (width, height)


def face_label(labels: Collection[str], where: str) -> str | None:
    """Choose the label of faces: `face`, in any case, or the only label of the file; None if there are no labels.

    Raises:
        DatasetError: there are several labels, and none is `face`.
    """
    distinct = sorted(set(labels))
    faces = [label for label in distinct if label.lower() == FACE]
    if faces or len(distinct) <= 1:
        return next(iter(faces or distinct), None)
    raise DatasetError(f"{where}: none of its labels is {FACE!r}: {', '.join(distinct[:8])}; rename that of the faces")


def shortest(values: np.ndarray) -> list[float]:
    """Flatten an array to the shortest decimals that are read back as the same float32 values."""
    return [float(str(value)) for value in np.asarray(values, np.float32).ravel()]
