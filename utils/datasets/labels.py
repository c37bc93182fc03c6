"""Labelled images, whatever the format of their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import UserError
from utils.structures import LANDMARKS_PER_FACE, Faces

MAX_NORMALISED_SUM = 2.0  # the sum of a coordinate and a width, each at most 1


class DatasetError(UserError):
    """A dataset's folder or labels are missing or malformed."""


@dataclass(frozen=True)
class LabelledImage:
    """An image file and its labelled faces in pixels; `dropped` counts further faces, which have no area."""

    path: Path
    faces: Faces
    dropped: int = 0


class FaceRow(NamedTuple):
    """One face of a file: its corners, its landmarks as (5, 2) or None, and whether it is ignored."""

    box: Sequence[float]
    landmarks: Sequence[Sequence[float]] | None = None
    ignored: bool = False


def labelled_image(path: Path, rows: Sequence[FaceRow]) -> LabelledImage:
    """Build an image with the faces of a file; faces without area are dropped."""
    boxes = np.array([row.box for row in rows], np.float32).reshape(-1, 4)
    known = np.array([row.landmarks is not None for row in rows], bool)
    unknown = np.zeros((LANDMARKS_PER_FACE, 2))
    landmarks = np.array([unknown if row.landmarks is None else row.landmarks for row in rows], np.float32)
    ignored = np.array([row.ignored for row in rows], bool)
    faces = Faces(boxes, landmarks.reshape(-1, LANDMARKS_PER_FACE, 2), known, ignored)
    has_area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]) & np.isfinite(boxes).all(axis=1)
    kept = faces.select(has_area)
    return LabelledImage(path, kept, len(faces) - len(kept))


@dataclass(frozen=True)
class FaceCounts:
    """Numbers of the faces of a dataset.

    Attributes:
        used: faces to detect.
        with_landmarks: those of them that have landmarks.
        ignored: faces that are neither to be detected nor to be taken for background.
        dropped: further faces, which have no area.
    """

    used: int
    with_landmarks: int
    ignored: int
    dropped: int


def count_faces(images: Sequence[LabelledImage]) -> FaceCounts:
    """Count the faces of all images."""
    return FaceCounts(
        used=sum(int((~image.faces.ignored).sum()) for image in images),
        with_landmarks=sum(int((image.faces.has_landmarks & ~image.faces.ignored).sum()) for image in images),
        ignored=sum(int(image.faces.ignored.sum()) for image in images),
        dropped=sum(image.dropped for image in images),
    )


def describe_labels(images: Sequence[LabelledImage]) -> str:
    """Describe the images and faces of a label file in one line."""
    counts = count_faces(images)
    ignored = f", {counts.ignored} to be ignored" if counts.ignored else ""
    return f"{len(images)} images, {counts.used} faces, {counts.with_landmarks} with landmarks{ignored}"


def check_units(faces: Sequence[Faces], source: Path) -> None:
    """Raise a DatasetError if boxes or landmarks are normalised to 0..1 instead of in pixels."""
    boxes = [image.boxes for image in faces]
    landmarks = [image.landmarks[image.has_landmarks].reshape(-1, 2 * LANDMARKS_PER_FACE) for image in faces]
    for kind, values in (("boxes", boxes), ("landmarks", landmarks)):
        joined = np.concatenate(values) if values else np.zeros((0, 1))
        # Whole numbers are pixels, however small the faces are.
        if (joined % 1).any() and np.median(joined.max(axis=1)) <= MAX_NORMALISED_SUM:
            raise DatasetError(f"{source}: its {kind} are normalised to 0..1; expected pixels of the image")


def as_flag(value: float, meaning: str, where: str) -> bool:
    """Convert a number that must be 0 or 1; any other, such as a score, raises a DatasetError."""
    if value not in (0, 1):
        raise DatasetError(f"{where}: expected 0 or 1 {meaning}, got {value:g}")
    return bool(value)
