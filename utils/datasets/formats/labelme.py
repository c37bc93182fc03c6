"""labelme: a JSON file per image, with a rectangle for each face and its landmarks as points of the same group."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from utils.datasets.formats.annotations import FACE, LANDMARK_NAMES, AnnotatedImage, face_label, shortest
from utils.datasets.labels import DatasetError, FaceRow, LabelledImage, labelled_image
from utils.runtime.files import write_text

_VERSION = "5.5.0"  # version of labelme that defines this format


def write_labelme(path: Path, images: Iterable[AnnotatedImage], folder: Path | None = None) -> None:
    """Write a folder of JSON files; they refer to the images in `folder`."""
    for image in images:
        file = path / PurePosixPath(image.name).with_suffix(".json")
        source = PurePosixPath(image.name).name
        if folder is not None:
            source = Path(os.path.relpath(folder.resolve() / image.name, file.parent.resolve())).as_posix()
        content: dict[str, Any] = {
            "version": _VERSION,
            "flags": {},
            "shapes": list(_shapes(image)),
            "imagePath": source,
            "imageData": None,
            "imageHeight": image.height,
            "imageWidth": image.width,
        }
        write_text(file, json.dumps(content, indent=2) + "\n")


def _shapes(image: AnnotatedImage) -> Iterator[dict[str, Any]]:
    for index in range(len(image.faces)):
        x1, y1, x2, y2 = shortest(image.faces.boxes[index])
        score = "" if image.scores is None else f"score {image.scores[index]:.3f}"
        flags = {"ignored": True} if image.faces.ignored[index] else {}
        yield _shape(FACE, "rectangle", [[x1, y1], [x2, y2]], index, score) | {"flags": flags}
        if image.faces.has_landmarks[index]:
            for name, point in zip(LANDMARK_NAMES, image.faces.landmarks[index], strict=True):
                yield _shape(name, "point", [shortest(point)], index, "")


def _shape(label: str, kind: str, points: list[list[float]], group: int, description: str) -> dict[str, Any]:
    values = {"label": label, "points": points, "group_id": group, "description": description}
    return {**values, "shape_type": kind, "flags": {}, "mask": None}


def read_labelme(path: Path, folder: Path | None = None) -> list[LabelledImage]:
    """Read the JSON files below a folder, or a single one. Rectangles with another label than `face` are left out.

    The path of an image is the path of its JSON file with the suffix of the image.

    Raises:
        DatasetError: there is no JSON file, or one is not in this format.
    """
    root = path if path.is_dir() else path.parent
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    if not files:
        raise DatasetError(f"{path}: holds no .json of labelme")
    return [_read_file(file, file.relative_to(root)) for file in files]


def _read_file(file: Path, relative: Path) -> LabelledImage:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        shapes = content["shapes"]
        suffix = PurePosixPath(str(content["imagePath"]).replace("\\", "/")).suffix
        rectangles = [shape for shape in shapes if shape["shape_type"] == "rectangle"]
        label = face_label([shape["label"] for shape in rectangles], str(file))
        rows = [_row(shape, shapes) for shape in rectangles if shape["label"] == label]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{file}: not in labelme's form ({type(error).__name__}: {error})") from None
    return labelled_image(relative.with_suffix(suffix), rows)


def _row(rectangle: dict[str, Any], shapes: list[dict[str, Any]]) -> FaceRow:
    (xa, ya), (xb, yb) = rectangle["points"]
    group = rectangle.get("group_id")
    members = [shape for shape in shapes if group is not None and shape.get("group_id") == group]
    points = {shape["label"]: shape["points"][0] for shape in members if shape["shape_type"] == "point"}
    landmarks = [points[name] for name in LANDMARK_NAMES] if points.keys() >= set(LANDMARK_NAMES) else None
    ignored = bool((rectangle.get("flags") or {}).get("ignored"))
    return FaceRow([min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb)], landmarks, ignored)
