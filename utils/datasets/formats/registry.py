"""The annotation formats of other tools, by name."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from utils.datasets.formats.annotations import AnnotatedImage
from utils.datasets.formats.coco import read_coco, write_coco
from utils.datasets.formats.cvat import read_cvat, write_cvat
from utils.datasets.formats.labelme import read_labelme, write_labelme
from utils.datasets.formats.table import read_csv, write_csv
from utils.datasets.formats.yolo import read_yolo, write_yolo
from utils.datasets.labels import LabelledImage
from utils.errors import UserError


@dataclass(frozen=True)
class Format:
    """The writer and the reader of an annotation format.

    Attributes:
        file: name of the file or folder among the exports of a run.
        write: function of `(path, images, folder of the images or None)`; iterates over the images once or twice, and
            raises an `OSError` if a file cannot be written.
        read: function of `(path, folder of the images or None)`; the paths of the images are relative to that folder.
        has_file_per_image: whether each image has a file, named after the image without its suffix.
    """

    file: str
    write: Callable[[Path, Iterable[AnnotatedImage], Path | None], None]
    read: Callable[[Path, Path | None], list[LabelledImage]]
    has_file_per_image: bool = False


FORMATS = {
    "coco": Format("coco.json", write_coco, read_coco),
    "yolo": Format("yolo", write_yolo, read_yolo, has_file_per_image=True),
    "csv": Format("faces.csv", write_csv, read_csv),
    "cvat": Format("cvat", write_cvat, read_cvat),
    "labelme": Format("labelme", write_labelme, read_labelme, has_file_per_image=True),
}


def check_names(formats: Sequence[str], names: Iterable[str]) -> None:
    """Check that each image has an annotation file of its own, inside the folder of the annotations.

    Raises:
        UserError: an image has none; the message names it.
    """
    needed = [name for name in formats if FORMATS[name].has_file_per_image]
    if not needed:
        return
    paths = [PurePosixPath(os.path.normpath(name)) for name in names]
    outside = next((path for path in paths if path.is_absolute() or path.parts[:1] == ("..",)), None)
    if outside is not None:
        raise UserError(
            f"{outside}: is outside the folder of the images, where {needed[0]} cannot name a file after it; name "
            "images relative to their folder, or choose a format with one file for all images"
        )
    counts = Counter(path.with_suffix("") for path in paths)
    shared = next((stem for stem, number in counts.items() if number > 1), None)
    if shared is not None:
        raise UserError(
            f"--export {needed[0]}: several images are named {shared}.*, and share one file there; rename one, or drop "
            f"{needed[0]}"
        )
