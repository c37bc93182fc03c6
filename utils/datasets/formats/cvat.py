"""CVAT for images 1.1: one XML file with a box for each face, and its landmarks as points of the same group.

https://docs.cvat.ai/docs/manual/advanced/xml_format/
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from utils.datasets.formats.annotations import FACE, AnnotatedImage, face_label, shortest
from utils.datasets.labels import DatasetError, FaceRow, LabelledImage, labelled_image
from utils.runtime.files import atomic_write, write_text
from utils.structures import LANDMARKS_PER_FACE

_LANDMARKS = "landmarks"
_NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # not even as a character reference
# The labels of a CVAT task that accepts the file, in CVAT's "Raw" format.
_LABELS = [
    {
        "name": FACE,
        "type": "rectangle",
        "attributes": [
            {"name": "score", "mutable": False, "input_type": "text", "default_value": "", "values": [""]},
            {
                "name": "ignored",
                "mutable": False,
                "input_type": "checkbox",
                "default_value": "false",
                "values": ["false"],
            },
        ],
    },
    {"name": _LANDMARKS, "type": "points", "attributes": []},
]


def write_cvat(path: Path, images: Iterable[AnnotatedImage], folder: Path | None = None) -> None:
    """Write a folder with annotations.xml, and labels.json to paste into the task; `folder` is unused.

    Control characters in the names of images, which XML lacks, are escaped as in Python.
    """
    write_text(path / "labels.json", json.dumps(_LABELS, indent=2) + "\n")
    with (
        atomic_write(path / "annotations.xml") as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.write('<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n')
        groups = count(1)
        for number, image in enumerate(images):
            file.write(ElementTree.tostring(_image_element(number, image, groups), encoding="unicode") + "\n")
        file.write("</annotations>\n")


def _image_element(number: int, image: AnnotatedImage, groups: Iterator[int]) -> ElementTree.Element:
    image_name = _NOT_IN_XML.sub(lambda found: repr(found[0])[1:-1], image.name)
    size = {"width": str(image.width), "height": str(image.height)}
    element = ElementTree.Element("image", {"id": str(number), "name": image_name, **size})
    for index in range(len(image.faces)):
        corners = dict(zip(("xtl", "ytl", "xbr", "ybr"), map(_text, shortest(image.faces.boxes[index])), strict=True))
        common = {"source": "auto" if image.scores is not None else "manual", "occluded": "0", "z_order": "0"}
        common["group_id"] = str(next(groups))
        box = ElementTree.SubElement(element, "box", {"label": FACE, **common, **corners})
        attributes = {"ignored": str(bool(image.faces.ignored[index])).lower()}
        if image.scores is not None:
            attributes["score"] = f"{image.scores[index]:.4f}"
        for name, value in attributes.items():
            ElementTree.SubElement(box, "attribute", {"name": name}).text = value
        if image.faces.has_landmarks[index]:
            points = ";".join(",".join(map(_text, shortest(point))) for point in image.faces.landmarks[index])
            ElementTree.SubElement(element, "points", {"label": _LANDMARKS, **common, "points": points})
    return element


def _text(value: float) -> str:
    return f"{value:g}" if value == int(value) and abs(value) < 1e5 else repr(value)


def read_cvat(path: Path, folder: Path | None = None) -> list[LabelledImage]:
    """Read an annotations.xml, or the one in a folder. Boxes with another label than `face` are left out.

    Five points are the landmarks of the box of their group, or of the one box that contains them all.

    Raises:
        DatasetError: the file is not in this format.
    """
    file = path / "annotations.xml" if path.is_dir() else path
    try:
        root = ElementTree.parse(file).getroot()
        images = root.findall("image")
        if not images and root.find("track") is not None:
            raise DatasetError(f"{file}: has the tracks of a video; export it as 'CVAT for images 1.1'")
        label = face_label([box.attrib["label"] for box in root.iter("box")], str(file))
        return [_read_image(image, label) for image in images]
    except (OSError, ElementTree.ParseError, KeyError, ValueError) as error:
        raise DatasetError(f"{file}: not annotations in CVAT's form ({type(error).__name__}: {error})") from None


def _read_image(image: ElementTree.Element, label: str | None) -> LabelledImage:
    boxes = [box for box in image.findall("box") if box.attrib["label"] == label]
    corners = np.array([[float(box.attrib[key]) for key in ("xtl", "ytl", "xbr", "ybr")] for box in boxes]).reshape(
        -1, 4
    )
    landmarks: dict[int, list[list[float]]] = {}
    for points in image.findall("points"):
        values = [[float(value) for value in point.split(",")] for point in points.attrib["points"].split(";")]
        owner = _owner(points, values, boxes, corners)
        if len(values) == LANDMARKS_PER_FACE and owner is not None:
            landmarks[owner] = values
    rows = [FaceRow(corners[i], landmarks.get(i), _is_ignored(box)) for i, box in enumerate(boxes)]
    return labelled_image(Path(image.attrib["name"]), rows)


def _owner(
    points: ElementTree.Element, values: list[list[float]], boxes: list[ElementTree.Element], corners: np.ndarray
) -> int | None:
    """Index of the box that points belong to."""
    group = points.attrib.get("group_id", "0")
    grouped = [i for i, box in enumerate(boxes) if group != "0" and box.attrib.get("group_id", "0") == group]
    if not grouped:
        xy = np.array(values)
        inside = (xy >= corners[:, None, :2]).all(axis=(1, 2)) & (xy <= corners[:, None, 2:]).all(axis=(1, 2))
        grouped = np.flatnonzero(inside).tolist()
    return grouped[0] if len(grouped) == 1 else None


def _is_ignored(box: ElementTree.Element) -> bool:
    return any(a.attrib.get("name") == "ignored" and (a.text or "").lower() == "true" for a in box.findall("attribute"))
