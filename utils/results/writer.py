"""The files that inference leaves."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import cv2
import numpy as np

from config import ConfigError, UserError
from utils.results.drawing import draw_detections
from utils.results.files import OUTPUT_FOLDERS, ResultFiles, Summary
from utils.results.masks import Head, cut
from utils.results.records import PartFile, Record, ResultParts
from utils.runtime.distributed import ALONE, Processes, done_by_main, in_step
from utils.runtime.experiment import make_folder
from utils.runtime.files import disk_errors, remove_temporaries
from utils.runtime.images import WRITABLE_SUFFIXES, write_image
from utils.runtime.manifest import first_difference
from utils.structures import Detections


@dataclass(frozen=True)
class Start:
    """What is there when a run begins.

    Attributes:
        about: what the results depend on, as the main process has it.
        done: (N,) positions of pictures that an earlier run has done, ascending.
        threads: that compute, where results depend on their number.
        is_finished: the earlier run did everything and its final files stand.
        note: for the user, or empty.
    """

    about: Mapping[str, Any]
    done: np.ndarray
    threads: int | None
    is_finished: bool = False
    note: str = ""


class ResultWriter:
    """Writes results as they come, and the final files at the end; a context manager.

    Pictures, masks and crops get their names at once. The rest goes to `<experiment>.parts/`, a line a picture; when
    all processes have done their shares, the main one makes the final files from it and removes it. They are the same
    whichever process did what, and whether it was interrupted.

    `<experiment>_inference_results.txt` is the original's format: an image's name, then `x1 y1 x2 y2 score` a face.
    `results.jsonl` has all that is known of a picture in a line, `results.json` the same and the facts of the run.
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
        threads: int | None = None,
        resume: bool = False,
        processes: Processes = ALONE,
    ) -> None:
        """Begin a run, or go on with one; all processes do so together.

        Args:
            folder: where results go; it is made.
            about: all that the results depend on; `results.json` begins with it.
            names: of all pictures where they are known, so that those that differ by their suffix alone get crops of
                different names, and that none is forgotten.
            frames_per_second: of a video; its drawings become one video instead of pictures.
            threads: that compute, where results depend on their number.
            resume: keep what an interrupted run left.

        Raises:
            ConfigError: results are to be kept that were made in another way.
            UserError: the folder cannot be written to.
        """
        self.folder = folder
        self.summary = Summary()
        self.processes = processes
        self._about = about
        self._count = len(names)
        self._files = ResultFiles(folder, experiment_name)
        self._parts = ResultParts(folder / f"{experiment_name}.parts")
        self._save_images = save_images
        self._save_masks = save_masks
        self._frames_per_second = frames_per_second
        self._video: cv2.VideoWriter | None = None
        # How many pictures bear a name, with or without its suffix: `a.jpg` and `a.png` share `a`.
        labels = (label for name in names for label in {name.lower(), _stem(name).lower()}) if save_masks else ()
        self._name_counts = Counter(labels)
        self._next_position = 0
        self.start: Start = done_by_main(lambda: self._begin(threads, resume))
        in_step(self._check_like_main)
        self._part = None if self.start.is_finished else in_step(self._open_part)

    def _begin(self, threads: int | None, resume: bool) -> Start:
        with disk_errors(make_folder(self.folder)):
            self._files.check_writable()
            if self._parts.in_use:
                raise UserError(f"{self._parts.folder}: another run is still writing there; end it, or wait for it")
            run = self._parts.run
            if resume and run:
                self._check_same(run.get("about", {}))
                for name in OUTPUT_FOLDERS:
                    remove_temporaries(self.folder / name)
                done = self._parts.index().positions
                return Start(self._about, done, run.get("threads"), note=f"{len(done)} images are done already")
            if resume and self._files.exist:
                self._check_same(self._files.about())
                if self._files.count() == self._count:
                    self._parts.remove()
                    return Start(self._about, np.arange(self._count), threads, True, "all images are done already")
            note = self._make_way()
            self._parts.begin({"about": self._about, "threads": threads})
            return Start(self._about, np.arange(0), threads, note=note)

    def _make_way(self) -> str:
        """Remove what an interrupted run left; what a complete one left stands until this run is complete as well.

        Returns:
            What is replaced, for the user.
        """
        abandoned = self._parts.index()
        kept = self._files.listed_pictures() if len(abandoned) else set()
        for record in abandoned:
            self._files.remove_pictures({name for name in record.files if name not in kept})
        if len(abandoned):
            return f"replacing {len(abandoned)} results of a run that was interrupted (--resume keeps them)"
        return "replacing the results of an earlier run" if self._files.exist else ""

    def _check_same(self, saved: Mapping[str, Any]) -> None:
        changed = first_difference(saved, self._about)
        if changed is not None:
            raise ConfigError(
                f"--resume: the results in {self.folder} were made with {changed}; repeat the flags of that run, or "
                "drop --resume"
            )

    def _check_like_main(self) -> None:
        """What one process finds must be what another would."""
        other = first_difference(self.start.about, self._about)
        if other is not None:
            raise ConfigError(
                f"the processes differ: process 0 has {other.name} {other.saved!r}, process "
                f"{self.processes.rank} has {other.asked!r}"
            )

    def _open_part(self) -> PartFile:
        with disk_errors(self.folder):
            return self._parts.open(self.processes.rank)

    def add(
        self,
        name: str,
        image: np.ndarray,
        detections: Detections,
        heads: Sequence[Head] | None = None,
        position: int | None = None,
    ) -> None:
        """Write one picture's results.

        Args:
            heads: an entry a face, or None without `--mask`.
            position: the picture's place among all; None is behind the last one.

        Raises:
            UserError: a file cannot be written; what was written before is complete.
        """
        with disk_errors(self.folder):
            self._record(self._written(self._place(position), name, image, detections, heads))

    def skip(self, name: str, reason: str, position: int | None = None) -> None:
        """Note why a picture could not be read; see `add`."""
        with disk_errors(self.folder):
            self._record(Record(self._place(position), name, problem=reason))

    def close(self) -> None:
        """Wait until all processes have done their shares, and make the final files of a complete run.

        Raises:
            UserError: they cannot be written, or results are missing.
        """
        if self._part is None:
            return
        in_step(self._close_part)
        done_by_main(lambda: self._finish(is_complete=True))

    def abandon(self) -> None:
        """End a run that was interrupted: keep what there is for `--resume`, and make the final files of it.

        Of several processes none makes them, for the others may still be writing.
        """
        if self._part is None:
            return
        with suppress(UserError):  # what is being raised is the cause of this
            self._close_part()
            if self.processes.count == 1:
                self._finish(is_complete=False)

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _close_part(self) -> None:
        with disk_errors(self.folder):
            if self._video is not None:
                self._video.release()
                os.replace(self._video_path.with_suffix(".tmp.mp4"), self._video_path)
                self._video = None
            if self._part is not None:
                self._part.close()

    def _finish(self, *, is_complete: bool) -> None:
        with disk_errors(self.folder):
            records = self._parts.index()
            if is_complete and self._count and len(records) != self._count:
                raise UserError(
                    f"{self._parts.folder}: holds results of {len(records)} of {self._count} images; "
                    "--resume does the rest"
                )
            self.summary = self._files.write(self._about, records, self.start.done)
            # The frames of a video cannot be continued, so nothing is kept for that.
            if is_complete or self._frames_per_second is not None:
                self._parts.remove()

    def _place(self, position: int | None) -> int:
        place = self._next_position if position is None else position
        self._next_position = place + 1
        return place

    def _record(self, record: Record) -> None:
        assert self._part is not None, "a finished run takes no more"
        self._part.add(record)
        self.summary.add(record)

    def _written(
        self, position: int, name: str, image: np.ndarray, detections: Detections, heads: Sequence[Head] | None
    ) -> Record:
        """Write the pictures of one picture; what there is to record of it."""
        boxes, scores = detections.boxes.tolist(), detections.scores.tolist()
        faces, rows, files = [], [], []
        for index, (box, score) in enumerate(zip(boxes, scores, strict=True)):
            face: dict[str, Any] = {"box": _rounded(box), "score": round(score, 6), "landmarks": None}
            if detections.landmarks is not None:
                face["landmarks"] = [_rounded(point) for point in detections.landmarks[index].tolist()]
            if heads is not None:
                face |= {"head_box": heads[index].head_box, "face_box_in_head": heads[index].face_box}
                if self._save_masks:
                    face["files"] = self._write_crops(f"{self._crop_stem(name)}_{index}.png", image, heads[index])
                    files += face["files"].values()
            faces.append(face)
            rows.append(f"{' '.join(str(int(value)) for value in box)} {score:f}")
        if self._save_images:
            files += self._write_drawing(name, draw_detections(image, detections))
        entry = {"name": name, "width": image.shape[1], "height": image.shape[0], "faces": faces}
        return Record(position, name, entry, rows, files)

    def _write_crops(self, file_name: str, image: np.ndarray, head: Head) -> dict[str, str]:
        """Face mask, face, head and head mask as PNG; empty ones, of faces outside the image, are not written."""
        head_pixels = cut(image, head.head_box)
        crops = {
            "masks": head.face_mask,
            "faces": cut(head_pixels, head.face_box),
            "heads": head_pixels,
            "head_masks": head.head_mask,
        }
        return {kind: self._write(f"{kind}/{file_name}", pixels) for kind, pixels in crops.items() if pixels.size}

    def _write_drawing(self, name: str, drawing: np.ndarray) -> list[str]:
        """The files that this makes: of a video, one with its first frame."""
        if self._frames_per_second is not None:
            return self._write_frame(name, drawing)
        is_writable = PurePosixPath(name).suffix.lower() in WRITABLE_SUFFIXES
        return [self._write(f"result_images/{name if is_writable else f'{name}.png'}", drawing)]

    def _write_frame(self, name: str, drawing: np.ndarray) -> list[str]:
        files = []
        if self._video is None:
            files = [f"result_images/{name.rsplit('_', 1)[0]}.mp4"]
            self._open_video(files[0], drawing)
        assert self._video is not None
        self._video.write(drawing)
        return files

    def _open_video(self, relative: str, frame: np.ndarray) -> None:
        self._video_path = self.folder / relative
        temporary = make_folder(self._video_path.parent) / self._video_path.with_suffix(".tmp.mp4").name
        codec = cv2.VideoWriter.fourcc(*"mp4v")
        video = cv2.VideoWriter(
            str(temporary), codec, self._frames_per_second or 25.0, (frame.shape[1], frame.shape[0])
        )
        if not video.isOpened():
            raise OSError(errno.EIO, f"OpenCV cannot encode it at {self._frames_per_second} frames/s", relative)
        self._video = video

    def _write(self, relative: str, pixels: np.ndarray) -> str:
        write_image(self.folder / relative, pixels)
        return relative

    def _crop_stem(self, name: str) -> str:
        return name if self._name_counts[_stem(name).lower()] > 1 else _stem(name)


def _stem(name: str) -> str:
    """The name without its last suffix."""
    return str(PurePosixPath(name).with_suffix(""))


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in values]
