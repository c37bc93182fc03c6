"""Finding folders of labelled images, and reading their `train` and `val` parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.datasets.formats.annotations import upright_size
from utils.datasets.label_file import read_labels
from utils.datasets.labels import DatasetError, LabelledImage
from utils.runtime.files import candidate_paths, is_file, is_folder

_IMAGES_TO_CHECK = 100  # of which the size is read


def find_datasets(names: str, data_root: Path) -> list[Path]:
    """Find the comma-separated folders of `--dataset`; see `find_dataset`."""
    return [find_dataset(name, data_root) for name in list(filter(None, map(str.strip, names.split(",")))) or [""]]


def find_dataset(name: str, data_root: Path) -> Path:
    """Find a folder by its path, or by its name below `data_root`; see `candidate_paths`.

    Raises:
        DatasetError: the folder does not exist.
    """
    candidates = candidate_paths(name, data_root)
    found = next((folder for folder in candidates if is_folder(folder)), None)
    if found is None:
        raise DatasetError(f"--dataset {name}: no folder {' nor '.join(map(str, candidates))}; see data/README.md")
    return found


def part_of(folder: Path, split: str) -> Path | None:
    """The folder with the labels of `train` or `val`: a subfolder, or the dataset itself if it is not split."""
    return next((part for part in (folder / split, folder) if is_file(part / "label.txt")), None)


def read_split(folders: Sequence[Path], split: str) -> list[list[LabelledImage]]:
    """Read, by folder, the labelled images of its part `train` or `val`, or of the whole folder if it is not split.

    Raises:
        DatasetError: no folder has that part, a label file is malformed, or an image that it names does not exist.
    """
    parts = [part_of(folder, split) for folder in folders]
    if not any(parts):
        raise DatasetError(f"no {split}/label.txt in {', '.join(map(str, folders)) or 'no folder'}; see data/README.md")
    return [_read_part(part) if part else [] for part in parts]


def _read_part(part: Path) -> list[LabelledImage]:
    images = read_labels(part / "label.txt", part / "images")
    check_images_exist([image.path for image in images], part / "label.txt")
    return images


def check_images_exist(images: Sequence[Path], named_by: Path) -> None:
    """Check that all image files of a list exist.

    Raises:
        DatasetError: images are missing; the message says how many, gives the first, and the file that names it.
    """
    missing = [image for image in images if not is_file(image)]
    if missing:
        raise DatasetError(f"{named_by}: names {len(missing)} images that do not exist, first {missing[0]}")


def describe_faces_outside(images: Sequence[LabelledImage]) -> str | None:
    """Describe the faces of some of the images that lie outside of their image for the most part; None if none does."""
    counted = [image for image in images if not image.faces.ignored.all()]
    sample = counted[:: max(1, len(counted) // _IMAGES_TO_CHECK)]
    faces, outside = 0, list[Path]()
    for image in sample:
        try:
            size_xy = upright_size(image.path)
        except DatasetError:  # reading the image will report it
            continue
        boxes = image.faces.boxes[~image.faces.ignored]
        inside = (np.minimum(boxes[:, 2:], size_xy) - boxes[:, :2].clip(min=0)).clip(min=0).prod(axis=1)
        is_outside = inside < (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) / 2
        faces += len(boxes)
        outside += [image.path] * int(is_outside.sum())
    if not outside:
        return None
    return f"{len(outside)} of {faces} faces in {len(sample)} images lie outside of their image, first in {outside[0]}"
