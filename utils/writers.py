"""The files that inference leaves."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import cv2
import numpy as np

from config import UserError
from utils.draw import draw_detections
from utils.experiment import make_folder
from utils.files import disk_errors
from utils.images import WRITABLE_SUFFIXES, write_image
from utils.masks import Head, cut
from utils.structures import Detections

# All pictures that a run writes lie here, so nothing else that a results.json lists is ours to remove.
OUTPUT_FOLDERS = ("result_images/", "masks/", "faces/", "heads/", "head_masks/")


@dataclass
class Summary:
    """What a run did."""

    images: int = 0
    faces: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)  # name and reason

    def describe(self, seconds: float) -> str:
        """For the user, a line for the whole and one for each picture that was skipped."""
        rate = self.images / max(seconds, 1e-9)
        lines = [f"{self.images} images, {self.faces} faces in {seconds:.1f} s ({rate:.1f} images/s)"]
        return "\n".join([*lines, *(f"skipped {name}: {reason}" for name, reason in self.skipped)])


class ResultWriter:
    """Writes results as they come, under temporary names until `close`.

    `<experiment>_inference_results.txt` is the original's format: an image's name, then `x1 y1 x2 y2 score` a face.
    `results.json` has everything. Pictures, masks and crops go to folders beside them.
    """

    def __init__(
        self,
        folder: Path,
        experiment_name: str,
        about: Mapping[str, Any],
        *,
        names: Sequence[str] = (),
        save_images: bool = False,
        save_masks: bool = False,
        frames_per_second: float | None = None,
    ) -> None:
        """Open the files.

        Args:
            folder: where results go; it is made.
            about: facts of the run that go into `results.json` as they are.
            names: of all pictures, so that those that differ by their suffix alone get crops of different names.
            frames_per_second: of a video; its drawings become one video instead of pictures.

        Raises:
            UserError: the folder cannot be written to.
        """
        self.folder = make_folder(folder)
        self.summary = Summary()
        self._save_images = save_images
        self._save_masks = save_masks
        self._frames_per_second = frames_per_second
        self._video: cv2.VideoWriter | None = None
        # How many pictures bear a name, with or without its suffix: `a.jpg` and `a.png` share `a`.
        self._name_counts = Counter(label for name in names for label in {name.lower(), _stem(name).lower()})
        self._text_path = folder / f"{experiment_name}_inference_results.txt"
        self._json_path = folder / "results.json"
        self._files: set[str] = set()  # written by this run, relative to the folder
        self._former_files = _files_of(self._json_path)
        self.replaces = self._text_path.exists() or self._json_path.exists()
        # A file's name may hold bytes that are no text: the table repeats them, JSON escapes them.
        self._text = _open_temporary(self._text_path, errors="surrogateescape")
        self._json = _open_temporary(self._json_path, errors="backslashreplace")
        self._json.write("{\n" + "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in about.items()))
        self._json.write('"images": [')

    def add(self, name: str, image: np.ndarray, detections: Detections, heads: Sequence[Head] | None = None) -> None:
        """Write one picture's results; `heads` has an entry a face, or is None without `--mask`.

        Raises:
            UserError: a file cannot be written; what was written before is complete.
        """
        with disk_errors(self.folder):
            self._add(name, image, detections, heads)

    def skip(self, name: str, reason: str) -> None:
        self.summary.skipped.append((name, reason))

    def close(self) -> None:
        """Finish the files, give them their names, and remove what an earlier run left and this one did not renew.

        Raises:
            UserError: they cannot be written.
        """
        with disk_errors(self.folder):
            self._close()

    def _close(self) -> None:
        skipped = [{"name": name, "reason": reason} for name, reason in self.summary.skipped]
        self._json.write(f'\n],\n"skipped": {json.dumps(skipped, ensure_ascii=False)},\n')
        if self._video is not None:
            self._video.release()
            os.replace(self._video_path.with_suffix(".tmp.mp4"), self._video_path)
        self._json.write(f'"files": {json.dumps(sorted(self._files), ensure_ascii=False)}\n}}\n')
        for file, path in ((self._text, self._text_path), (self._json, self._json_path)):
            file.close()
            os.replace(file.name, path)
        for stale in self._former_files - self._files:
            (self.folder / stale).unlink(missing_ok=True)

    def _add(self, name: str, image: np.ndarray, detections: Detections, heads: Sequence[Head] | None) -> None:
        boxes, scores = detections.boxes.tolist(), detections.scores.tolist()
        lines = [name]
        faces = []
        for index, (box, score) in enumerate(zip(boxes, scores, strict=True)):
            face: dict[str, Any] = {"box": _rounded(box), "score": round(score, 6), "landmarks": None}
            if detections.landmarks is not None:
                face["landmarks"] = [_rounded(point) for point in detections.landmarks[index].tolist()]
            if heads is not None:
                face |= {"head_box": heads[index].head_box, "face_box_in_head": heads[index].face_box}
                if self._save_masks:
                    face["files"] = self._write_crops(f"{self._crop_stem(name)}_{index}.png", image, box, heads[index])
            faces.append(face)
            lines.append(f"{' '.join(str(int(value)) for value in box)} {score:f}")
        self._text.write("\n".join(lines) + "\n")
        entry = {"name": name, "width": image.shape[1], "height": image.shape[0], "faces": faces}
        self._json.write(("," if self.summary.images else "") + "\n" + json.dumps(entry, ensure_ascii=False))
        if self._save_images:
            self._write_drawing(name, draw_detections(image, detections))
        self.summary.images += 1
        self.summary.faces += len(detections)

    def _write_crops(self, file_name: str, image: np.ndarray, box: Sequence[float], head: Head) -> dict[str, str]:
        """Face mask, face, head and head mask as PNG; empty ones, of faces outside the image, are not written."""
        head_pixels = cut(image, head.head_box)
        crops = {
            "masks": head.face_mask,
            "faces": cut(head_pixels, head.face_box),
            "heads": head_pixels,
            "head_masks": head.head_mask,
        }
        return {kind: self._write(f"{kind}/{file_name}", pixels) for kind, pixels in crops.items() if pixels.size}

    def _write_drawing(self, name: str, drawing: np.ndarray) -> None:
        if self._frames_per_second is not None:
            self._write_frame(name, drawing)
        elif PurePosixPath(name).suffix.lower() in WRITABLE_SUFFIXES:
            self._write(f"result_images/{name}", drawing)
        else:
            self._write(f"result_images/{name}.png", drawing)

    def _write_frame(self, name: str, drawing: np.ndarray) -> None:
        if self._video is None:
            relative = f"result_images/{name.rsplit('_', 1)[0]}.mp4"
            self._video_path = self.folder / relative
            temporary = make_folder(self._video_path.parent) / self._video_path.with_suffix(".tmp.mp4").name
            size = (drawing.shape[1], drawing.shape[0])
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            video = cv2.VideoWriter(str(temporary), codec, self._frames_per_second or 25.0, size)
            if not video.isOpened():
                raise OSError(errno.EIO, f"OpenCV cannot encode it at {self._frames_per_second} frames/s", relative)
            self._video = video
            self._files.add(relative)
        self._video.write(drawing)

    def _write(self, relative: str, pixels: np.ndarray) -> str:
        write_image(self.folder / relative, pixels)
        self._files.add(relative)
        return relative

    def _crop_stem(self, name: str) -> str:
        return name if self._name_counts[_stem(name).lower()] > 1 else _stem(name)


def _stem(name: str) -> str:
    """The name without its last suffix."""
    return str(PurePosixPath(name).with_suffix(""))


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in values]


def _open_temporary(path: Path, errors: str) -> TextIO:
    try:
        return path.with_name(path.name + ".tmp").open("w", encoding="utf-8", errors=errors)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None


def _files_of(results: Path) -> set[str]:
    """The files that an earlier run says it wrote; none if there was no such run or its list cannot be read."""
    try:
        files = [PurePosixPath(name) for name in json.loads(results.read_text(encoding="utf-8"))["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {name for name in map(str, files) if name.startswith(OUTPUT_FOLDERS) and "/.." not in name}
