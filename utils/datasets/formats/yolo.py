"""YOLO-pose, as Ultralytics reads it: data.yaml, and a text file for every image with one line per face.

A line is `0 x y w h`, the centre and size of the face relative to the image, and `x y visibility` of five landmarks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np

from utils.datasets.formats.annotations import AnnotatedImage, upright_size
from utils.datasets.labels import DatasetError, FaceRow, LabelledImage, labelled_image
from utils.runtime.files import atomic_write, one_line, write_text
from utils.runtime.images import IMAGE_SUFFIXES
from utils.structures import LANDMARKS_PER_FACE, MIRRORED_LANDMARKS

_BOX_VALUES = 5  # including the class
_DATA = f"""\
# Faces with five landmarks, for Ultralytics: yolo pose train data=<path of this file> model=yolo11n-pose.pt
train: train.txt
val: train.txt
names:
  0: face
kpt_shape: [{LANDMARKS_PER_FACE}, 3]
flip_idx: {MIRRORED_LANDMARKS}
"""


def write_yolo(path: Path, images: Iterable[AnnotatedImage], folder: Path | None = None) -> None:
    """Write a folder with data.yaml, train.txt and `labels/`, and `images`, a link to the folder of the images.

    Boxes are clipped to the image. Ignored faces, which the format does not have, are left out, and so are the
    landmarks of a face if one of them lies outside the image.
    """
    names = []
    for image in images:
        write_text(path / "labels" / PurePosixPath(image.name).with_suffix(".txt"), "".join(_lines(image)))
        names.append(f"./images/{one_line(image.name)}\n")
    write_text(path / "train.txt", "".join(names), errors="surrogateescape")
    write_text(path / "data.yaml", _DATA)
    link = path / "images"
    if folder is not None and (link.is_symlink() or not link.exists()):
        with atomic_write(link) as temporary:
            temporary.symlink_to(os.path.relpath(folder.resolve(), path.resolve()), target_is_directory=True)


def _lines(image: AnnotatedImage) -> list[str]:
    size = np.array([image.width, image.height], np.float64)
    lines = []
    for index in np.flatnonzero(~image.faces.ignored):
        corners = np.clip(image.faces.boxes[index].reshape(2, 2) / size, 0, 1)
        centre, side = corners.mean(axis=0), corners[1] - corners[0]
        points = image.faces.landmarks[index] / size
        known = image.faces.has_landmarks[index] and ((points >= 0) & (points <= 1)).all()
        keypoints = [(x, y, 2) for x, y in points] if known else [(0, 0, 0)] * LANDMARKS_PER_FACE
        values = [*centre, *side, *(value for point in keypoints for value in point)]
        if (side > 0).all():
            lines.append(" ".join(["0", *(f"{value:.8g}" for value in values)]) + "\n")
    return lines


def read_yolo(path: Path, folder: Path | None = None) -> list[LabelledImage]:
    """Read a folder, or the folder of a data.yaml, with `labels/` and `images/`.

    Args:
        path: the folder or the data.yaml.
        folder: folder of the images, whose sizes are needed; None means `images` beside `labels`.

    Raises:
        DatasetError: there are no labels, a label has no image, or a line is malformed.
    """
    root = path if path.is_dir() else path.parent
    labels = root / "labels"
    files = sorted(labels.rglob("*.txt"))
    if not files:
        raise DatasetError(f"{labels}: holds no label; expected a .txt for every image")
    images = folder or root / "images"
    return [_read_image(file, file.relative_to(labels), images) for file in files]


def _read_image(file: Path, relative: Path, images: Path) -> LabelledImage:
    stem = images / relative.with_suffix("")
    same_stem = stem.parent.iterdir() if stem.parent.is_dir() else ()
    image = next((p for p in same_stem if p.stem == stem.name and p.suffix.lower() in IMAGE_SUFFIXES), None)
    if image is None:
        raise DatasetError(f"{file}: there is no image {stem}.*; --images names the folder of the images")
    size = upright_size(image)
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [_read_line(line, size, f"{file}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    return labelled_image(image.relative_to(images), rows)


def _read_line(line: str, size: tuple[int, int], where: str) -> FaceRow:
    try:
        values = [float(word) for word in line.split()]
    except ValueError:
        raise DatasetError(f"{where}: expected numbers, got {line!r}") from None
    # Predictions saved with their confidence have one more number.
    count = (len(values) - _BOX_VALUES) // LANDMARKS_PER_FACE
    if len(values) - _BOX_VALUES - count * LANDMARKS_PER_FACE not in (0, 1) or count not in (0, 2, 3):
        raise DatasetError(f"{where}: expected '0 x y w h' and perhaps five landmarks, got {len(values)} numbers")
    if values[0] != 0:
        raise DatasetError(f"{where}: expected class 0, the face, got {values[0]:g}")
    centre, side = np.array(values[1:3]) * size, np.array(values[3:5]) * size
    landmarks = None
    if count:
        points = np.array(values[_BOX_VALUES : _BOX_VALUES + count * LANDMARKS_PER_FACE]).reshape(-1, count)
        if points[:, 2:].all() and points[:, :2].any():
            landmarks = (points[:, :2] * size).tolist()
    return FaceRow([*(centre - side / 2), *(centre + side / 2)], landmarks)
