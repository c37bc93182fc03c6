"""COCO: one JSON file with boxes, and landmarks as keypoints (https://cocodataset.org/#format-data)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from utils.datasets.formats.annotations import FACE, LANDMARK_NAMES, AnnotatedImage, face_label, shortest
from utils.datasets.labels import DatasetError, FaceRow, LabelledImage, labelled_image
from utils.runtime.files import atomic_write
from utils.structures import LANDMARKS_PER_FACE

_CATEGORY = {"id": 1, "name": FACE, "supercategory": "person", "keypoints": LANDMARK_NAMES, "skeleton": []}
_VISIBLE = 2


def write_coco(path: Path, images: Iterable[AnnotatedImage], folder: Path | None = None) -> None:
    """Write annotations; `images` is iterated over twice, and `folder` is unused.

    Ignored faces are crowds (`iscrowd` 1), so that pycocotools counts detections of them neither as true nor as false.
    """
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(f'{{"info": {{"description": "faces"}},\n"categories": {json.dumps([_CATEGORY])},\n"images": [')
        file.writelines(_separated(map(_image, count(1), images)))
        file.write('\n],\n"annotations": [')
        file.writelines(_separated(_annotations(images)))
        file.write("\n]}\n")


def _separated(values: Iterable[dict[str, Any]]) -> Iterator[str]:
    for number, value in enumerate(values):
        yield ("," if number else "") + "\n" + json.dumps(value)


def _image(identifier: int, image: AnnotatedImage) -> dict[str, Any]:
    return {"id": identifier, "file_name": image.name, "width": image.width, "height": image.height}


def _annotations(images: Iterable[AnnotatedImage]) -> Iterator[dict[str, Any]]:
    identifiers = count(1)
    for image_id, image in enumerate(images, start=1):
        for index in range(len(image.faces)):
            x1, y1, x2, y2 = (float(value) for value in image.faces.boxes[index])
            box = [
                *shortest(image.faces.boxes[index, :2]),
                *shortest(image.faces.boxes[index, 2:] - image.faces.boxes[index, :2]),
            ]
            annotation: dict[str, Any] = {
                "id": next(identifiers),
                "image_id": image_id,
                "category_id": _CATEGORY["id"],
                "bbox": box,
                "area": round((x2 - x1) * (y2 - y1), 2),
                "iscrowd": int(image.faces.ignored[index]),
                "segmentation": [],
            }
            known = bool(image.faces.has_landmarks[index])
            points = image.faces.landmarks[index] if known else []
            keypoints = [value for point in points for value in (*shortest(point), _VISIBLE)]
            annotation["keypoints"] = keypoints or [0] * (3 * LANDMARKS_PER_FACE)
            annotation["num_keypoints"] = LANDMARKS_PER_FACE if known else 0
            if image.scores is not None:
                annotation["score"] = round(float(image.scores[index]), 6)
            yield annotation


def read_coco(path: Path, folder: Path | None = None) -> list[LabelledImage]:
    """Read annotations of faces; those of other categories are left out.

    Faces have landmarks where they have five keypoints that are all labelled.

    Raises:
        DatasetError: the file is not in this format, or none of its categories is `face`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        categories = {category["id"]: category["name"] for category in content.get("categories", [])}
        used = {categories[annotation["category_id"]] for annotation in content["annotations"]}
        wanted = face_label(used, str(path))
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        rows: dict[Any, list[FaceRow]] = {identifier: [] for identifier in names}
        for annotation in content["annotations"]:
            if categories[annotation["category_id"]] == wanted:
                rows[annotation["image_id"]].append(_row(annotation))
        return [labelled_image(Path(name), rows[identifier]) for identifier, name in names.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path}: not annotations in COCO's form ({type(error).__name__}: {error})") from None


def _row(annotation: dict[str, Any]) -> FaceRow:
    x, y, width, height = map(float, annotation["bbox"])
    keypoints = annotation.get("keypoints") or []
    known = len(keypoints) == 3 * LANDMARKS_PER_FACE and all(keypoints[2::3])
    landmarks = list(zip(keypoints[::3], keypoints[1::3], strict=True)) if known else None
    return FaceRow(
        [x, y, x + width, y + height], landmarks, bool(annotation.get("iscrowd") or annotation.get("ignore"))
    )
