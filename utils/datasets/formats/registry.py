"""The annotation formats of other tools, by name."""

from __future__ import annotations

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
    """Check that no two images would have the same annotation file.

    Raises:
        UserError: two images would; the message names them.
    """
    needed = [name for name in formats if FORMATS[name].has_file_per_image]
    if not needed:
        return
    counts = Counter(PurePosixPath(name).with_suffix("") for name in names)
    shared = next((stem for stem, number in counts.items() if number > 1), None)
    if shared is not None:
        raise UserError(
            f"--export {needed[0]}: several images are named {shared}.*, and share one file there; rename one, or drop "
            f"{needed[0]}"
        )
