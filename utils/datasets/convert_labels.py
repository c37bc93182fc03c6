"""Convert WIDER FACE as it is downloaded, or a single label file of any format, for train.py and test.py:

    python -m utils.datasets.convert_labels FOLDER
    python -m utils.datasets.convert_labels labels.txt --to label.txt

or convert between the formats of other tools and label.txt:

    python -m utils.datasets.convert_labels annotations.xml --from cvat --to label.txt
    python -m utils.datasets.convert_labels label.txt --to coco --output faces.json

See data/README.md.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import box_iou

from config import ROOT
from utils.datasets.formats.annotations import with_size
from utils.datasets.formats.registry import FORMATS, check_names
from utils.datasets.label_file import read_labels, write_labels
from utils.datasets.labels import LabelledImage, check_units, describe_labels
from utils.errors import UserError
from utils.options import Parser
from utils.runtime.cli import run
from utils.runtime.files import atomic_write, disk_errors, is_file, is_folder, make_folder, path_exists, user_path

_MATCH_IOU = 0.5


@dataclass(frozen=True)
class Part:
    """One output: `write(source, target)` creates it and returns a short description of the target."""

    source: Path
    target: Path
    write: Callable[[Path, Path], str]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    source = user_path(arguments.source)
    landmarks = user_path(arguments.landmarks) if arguments.landmarks is not None else None
    if (arguments.source_format or arguments.to in FORMATS) and path_exists(source):
        parts = [part_of_annotations(source, arguments)]
    elif is_folder(source):
        to = user_path(arguments.to) if arguments.to is not None else ROOT / "data" / "widerface"
        parts = parts_of_wider_face(source, to, landmarks, arguments.copy)
    elif is_file(source):
        parts = [part_of_label_file(source, arguments.to, landmarks, arguments.copy)]
    else:
        raise UserError(f"{source}: no such file or folder")
    write_parts(parts, arguments.overwrite)


def parts_of_wider_face(folder: Path, to: Path, landmarks: Path | None, copy: bool) -> list[Part]:
    """The outputs for the unpacked archives of WIDER FACE, some of which may be absent."""
    parts = []
    for split in ("train", "val"):
        convert = partial(convert_labels, landmarks=landmarks if split == "train" else None)
        labels = folder / "wider_face_split" / f"wider_face_{split}_bbx_gt.txt"
        parts.append(Part(folder / f"WIDER_{split}" / "images", to / split / "images", copy_files if copy else link))
        parts.append(Part(labels, to / split / "label.txt", convert))
        if landmarks and split == "train" and not is_file(labels):
            raise UserError(f"--landmarks is for the faces of {labels}, which does not exist")
    return [*parts, Part(folder / "eval_tools" / "ground_truth", to / "val" / "gt", copy_files)]


def part_of_annotations(source: Path, arguments: argparse.Namespace) -> Part:
    """The output for annotations in a format of `FORMATS`, or for labels that are converted to one."""
    target_format = arguments.to if arguments.to in FORMATS else None
    output = arguments.output if target_format else arguments.to
    if arguments.landmarks or arguments.copy:
        raise UserError("--landmarks and --copy do nothing with --from and with --to=FORMAT; drop them")
    if output is None:
        missing = "--output must name" if target_format else "--to must be a form, or name"
        raise UserError(f"{source}: {missing} the file or folder to write")
    convert = partial(
        convert_annotations,
        source_format=arguments.source_format,
        target_format=target_format,
        images=user_path(arguments.images) if arguments.images is not None else None,
    )
    return Part(source, user_path(output), convert)


def part_of_label_file(source: Path, to: str | None, landmarks: Path | None, copy: bool) -> Part:
    if to is None:
        raise UserError(f"{source} is a file: --to must name the file to write")
    if copy:
        raise UserError(f"{source} is a file: --copy, which is for images, has no effect; drop it")
    if is_folder(user_path(to)):
        raise UserError(f"--to {to}: is a folder; name the file to write")
    return Part(source, user_path(to), partial(convert_labels, landmarks=landmarks))


def write_parts(parts: Sequence[Part], overwrite: bool) -> None:
    """Write the parts whose source exists, and print one line for each.

    Raises:
        UserError: no source exists, or a target exists and must not be replaced, or a target cannot be written.
    """
    present = [part for part in parts if path_exists(part.source)]
    if not present:
        raise UserError(f"nothing of WIDER FACE found; looked for {', '.join(str(part.source) for part in parts)}")
    kept = [part.target for part in present if path_exists(part.target) or part.target.is_symlink()]
    if kept and not overwrite:
        raise UserError(f"{', '.join(map(str, kept))}: exists already; add --overwrite, or choose another --to")
    for part in parts:
        if part not in present:
            print(f"{part.target}: skipped, because {part.source} does not exist")
            continue
        make_folder(part.target.parent)
        with disk_errors(part.target):
            result = part.write(part.source, part.target)
        print(f"{part.target}: {result}", flush=True)


# -------------------------------------------------------------------------------------------------- labels


def convert_labels(source: Path, target: Path, landmarks: Path | None) -> str:
    """Write labels of any format as label.txt, with the landmarks of another file if one is given."""
    images = read_labels(source, Path())
    if landmarks:
        images = add_landmarks(images, read_labels(landmarks, Path()))
        if not any(image.faces.has_landmarks.any() for image in images):
            raise UserError(f"{landmarks}: has no landmarks for any face of {source}")
    write_labels(target, images, Path())
    return describe_labels(images)


def convert_annotations(
    source: Path, target: Path, *, source_format: str | None, target_format: str | None, images: Path | None
) -> str:
    """Convert annotations between the formats of other tools and label.txt.

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
    labelled = FORMATS[source_format].read(source, images) if source_format else read_labels(source, Path())
    check_units([image.faces for image in labelled], source)
    if target_format is None:
        write_labels(target, labelled, Path())
    else:
        folder = images or source.parent / "images"
        check_names([target_format], [image.path.as_posix() for image in labelled])
        FORMATS[target_format].write(target, [with_size(image, folder) for image in labelled], folder)
    return describe_labels(labelled)


def add_landmarks(images: Sequence[LabelledImage], others: Sequence[LabelledImage]) -> list[LabelledImage]:
    """Copy landmarks from `others` to the matching faces of `images`; images correspond by their path."""
    other_of = {other.path: other for other in others}
    return [_with_landmarks(image, other_of[image.path]) if image.path in other_of else image for image in images]


def _with_landmarks(image: LabelledImage, other: LabelledImage) -> LabelledImage:
    indices, partners = match_faces(image.faces.boxes, other.faces.boxes)
    # Faces without landmarks take part in the matching; otherwise their boxes could match those of other faces.
    known = other.faces.has_landmarks[partners]
    landmarks, has_landmarks = image.faces.landmarks.copy(), image.faces.has_landmarks.copy()
    landmarks[indices[known]] = other.faces.landmarks[partners[known]]
    has_landmarks[indices[known]] = True
    return LabelledImage(image.path, replace(image.faces, landmarks=landmarks, has_landmarks=has_landmarks))


def match_faces(boxes: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pair boxes that overlap at an IoU of 0.5 or more: one to one, best overlap first.

    Args:
        boxes: (N, 4) float32 xyxy.
        others: (M, 4) likewise.

    Returns:
        Indices (K,) into `boxes` and (K,) into `others`.
    """
    overlaps = box_iou(torch.from_numpy(boxes), torch.from_numpy(others)).numpy()
    candidates = np.argwhere(overlaps >= _MATCH_IOU)
    best_first = np.argsort(-overlaps[tuple(candidates.T)], kind="stable")
    partner_of: dict[int, int] = {}
    taken: set[int] = set()
    for box, other in candidates[best_first].tolist():
        if box not in partner_of and other not in taken:
            partner_of[box] = other
            taken.add(other)
    return np.array(list(partner_of), int), np.array(list(partner_of.values()), int)


# --------------------------------------------------------------------------------------------------- files


def link(source: Path, target: Path) -> str:
    """Make a symbolic link, replacing an existing link; a folder of images is never deleted."""
    if target.is_dir() and not target.is_symlink():
        raise UserError(f"{target}: is a folder; remove it to make a link instead, or add --copy to copy into it")
    with atomic_write(target) as temporary:
        temporary.symlink_to(source.resolve(), target_is_directory=True)
    return f"link to {source}"


def copy_files(source: Path, target: Path) -> str:
    """Copy the files of a folder into another; other files there are kept."""
    if target.is_symlink():
        target.unlink()  # copies would otherwise be written to the target of the link
    files = [path for path in source.rglob("*") if path.is_file()]
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(copy) as temporary:
            shutil.copyfile(file, temporary)
    return f"{len(files)} files copied from {source}"


# ------------------------------------------------------------------------------------------------- command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m utils.datasets.convert_labels", description=__doc__)
    parser.add_argument(
        "source",
        help="the folder in which WIDER_train.zip, WIDER_val.zip, wider_face_split.zip and perhaps eval_tools.zip were "
        "unpacked, or a label file",
    )
    forms = ", ".join(FORMATS)
    parser.add_argument(
        "--to",
        help="the dataset's folder (default: data/widerface), or the label.txt to write, or the form of what --output "
        f"names: {forms}",
    )
    parser.add_argument(
        "--from",
        dest="source_format",
        choices=tuple(FORMATS),
        help=f"form of the source: {forms} (default: a label file, whose form is recognised)",
    )
    parser.add_argument("--output", metavar="PATH", help="the file or folder to write, with --to=FORM")
    parser.add_argument(
        "--images", metavar="FOLDER", help="folder that the images are relative to (default: images beside the source)"
    )
    parser.add_argument(
        "--landmarks", metavar="FILE", help="labels with landmarks, which are copied to the faces that match at IoU 0.5"
    )
    parser.add_argument("--copy", action="store_true", help="copy the images instead of linking to them")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
