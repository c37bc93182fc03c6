"""Conversion between annotation formats, and to and from label.txt."""

from __future__ import annotations

from pathlib import Path

from utils.datasets.formats.annotations import with_size
from utils.datasets.formats.registry import FORMATS, check_names
from utils.datasets.labels import describe_labels, read_labels, write_labels


def convert_annotations(
    source: Path, target: Path, *, source_format: str | None, target_format: str | None, images: Path | None
) -> str:
    """Convert annotations, and return a short description of the target.

    Args:
        source: file or folder to read.
        target: file or folder to write.
        source_format: a name of `FORMATS`; None means a label file in any format of `read_labels`.
        target_format: a name of `FORMATS`; None means label.txt.
        images: folder that the images are relative to; None means `images` beside the source. It must exist where
            sizes of images are needed: for every target but label.txt, and for `yolo` as the source.

    Raises:
        DatasetError: the source is malformed, or an image that is needed does not exist.
        UserError: the target format cannot represent these images.
    """
    read = FORMATS[source_format].read if source_format else None
    labelled = read(source, images) if read else read_labels(source, Path())
    if target_format is None:
        write_labels(target, labelled, Path())
    else:
        folder = images or source.parent / "images"
        check_names([target_format], [image.path.as_posix() for image in labelled])
        FORMATS[target_format].write(target, [with_size(image, folder) for image in labelled], folder)
    return describe_labels(labelled)
