"""Writing the results of inference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from config import InferenceOptions
from utils.errors import ConfigError, UserError
from utils.results.face_files import FaceFiles
from utils.results.files import ResultFiles, Summary, remove_output
from utils.results.masks import HeadMask
from utils.results.own_files import OwnFiles
from utils.results.records import Record, RecordStore
from utils.results.reports import write_exports, write_inference_page
from utils.runtime.distributed import SINGLE_PROCESS, DistributedContext, run_on_all, run_on_main
from utils.runtime.files import OUTPUT_FOLDERS, disk_errors, is_utf8, make_folder, remove_temporary_files
from utils.runtime.manifest import first_difference, require_same_settings
from utils.structures import Detections


@dataclass(frozen=True)
class RunStart:
    """State at the start of a run.

    Attributes:
        settings: settings of the main process that the results depend on.
        done: (N,) positions of the images that an earlier run processed, ascending.
        threads: number of threads to compute with, if results depend on it.
        is_complete: whether the earlier run processed all images.
        note: message for the user, or empty.
    """

    settings: Mapping[str, Any]
    done: np.ndarray
    threads: int | None
    is_complete: bool
    note: str


class ResultWriter(AbstractContextManager["ResultWriter"]):
    """Context manager that writes results as they are made, and the final files at the end.

    Drawings, masks and crops are written at once. Everything else is appended to a `RecordStore`, from which the main
    process makes the final files when all processes have finished. The files depend neither on the number of
    processes nor on interruptions.

    `<experiment>_inference_results.txt` has the format of the original: the name of an image, then `x1 y1 x2 y2 score`
    for each face. `results.jsonl` has one line per image with all its results, `results.json` also has the settings.
    """

    def __init__(
        self,
        folder: Path,
        experiment_name: str,
        settings: Mapping[str, Any],
        *,
        names: Sequence[str] = (),
        options: InferenceOptions = InferenceOptions(page=False),  # noqa: B008, frozen
        images: Path | None = None,
        video: Path | None = None,
        frames_per_second: float | None = None,
        threads: int | None = None,
        context: DistributedContext = SINGLE_PROCESS,
    ) -> None:
        """Begin or continue a run; a collective call of all processes.

        Args:
            folder: folder of the results, which is created.
            experiment_name: name of the table and of the records.
            settings: everything that the results depend on; `results.json` begins with them.
            names: names of all images, if known. They give crops of images whose names differ only in the suffix
                different names, and ensure that no image is missed.
            options: options that select what is written, and whether the results of an interrupted run are kept.
            images: folder of the images that are read; None for a video or camera.
            video: video file whose frames are processed, for its audio.
            frames_per_second: frame rate of a video or camera; None for images.
            threads: number of threads that compute, if results depend on it.
            context: rank and number of processes.

        Raises:
            ConfigError: the results to be kept were made with other settings.
            UserError: the folder cannot be written to, or takes no video.
        """
        self.folder = folder
        self.summary = Summary()
        self.context = context
        self.notes: list[str] = []  # for the user, when the writer is closed
        self._settings = settings
        self._options, self._images, self._is_video = options, images, frames_per_second is not None
        self._count = len(names)
        self._files = ResultFiles(folder, experiment_name)
        self._store = RecordStore(folder / ".records" / experiment_name)
        needs_names = options.save_img or options.anonymize
        if needs_names and self._is_video and not is_utf8(folder):
            raise UserError(
                f"{folder}: OpenCV writes no video where the path is not valid UTF-8; choose another folder"
            )
        lower_names = frozenset(name.lower() for name in names) if needs_names else frozenset[str]()
        self._face_files = FaceFiles(folder, options, frames_per_second, video, lower_names)
        # Number of images of each name, with and without suffix: `a.jpg` and `a.png` share `a`.
        has_crops = options.save_mask or options.save_crops
        labels = (label for name in names for label in {name.lower(), _stem(name).lower()}) if has_crops else ()
        self._name_counts = Counter(labels)
        self._next_position = 0
        self.start: RunStart = run_on_main(lambda: self._begin(threads))
        run_on_all(self._check_settings_of_main)
        self._records = run_on_all(self._open_shard)

    def _begin(self, threads: int | None) -> RunStart:
        resume = self._options.resume
        with disk_errors(make_folder(self.folder)):
            self._files.check_writable(_image_folders(self._options))
            if self._store.in_use:
                raise UserError(f"{self.folder}: another run is still writing there; end it, or wait for it")
            run, index = self._store.run, self._store.index()
            done = index.positions[index.is_read]
            is_complete = bool(self._count) and len(done) == self._count
            if resume:
                for saved in [run] if run else [other.run for other in self._store.complete_others]:
                    require_same_settings(saved.get("settings", {}), self._settings, self.folder)
            if resume and run:
                for name in OUTPUT_FOLDERS:
                    remove_temporary_files(self.folder / name)
                note = f"{'all' if is_complete else len(done)} images are done already"
                if unread := len(index) - len(done):  # perhaps a network drive was away
                    note += f"; {unread} that could not be read {'is' if unread == 1 else 'are'} tried again"
                return RunStart(self._settings, done, run.get("threads"), is_complete, note)
            note = "replacing the results of an earlier run" if self._files.exist else ""
            if len(index) and not run.get("complete"):
                note = f"replacing {len(index)} results of a run that was interrupted (--resume keeps them)"
            # Former files stay until this run is complete, which removes those that it does not replace. Files of other
            # sources and experiments are kept.
            former: list[str] = []
            if (source := run.get("settings", {}).get("source")) == self._settings.get("source"):
                former = sorted({name for record in index for name in record.files} | set(run.get("former_files", [])))
            elif note and source:
                note += f" of {source}, whose images stay unless these have the same names"
            self._store.begin({"settings": self._settings, "threads": threads, "former_files": former})
            return RunStart(self._settings, np.arange(0), threads, False, note)

    def _check_settings_of_main(self) -> None:
        """Check that this process has the settings of the main one."""
        other = first_difference(self.start.settings, self._settings)
        if other is not None:
            raise ConfigError(
                f"the processes differ: process 0 has {other.name} {other.saved!r}, process {self.context.rank} has "
                f"{other.asked!r}"
            )

    def _open_shard(self) -> Any:
        with disk_errors(self.folder):
            return self._store.open_shard(self.context.rank)

    def add(
        self,
        name: str,
        image: np.ndarray,
        detections: Detections,
        heads: Sequence[HeadMask] | None = None,
        position: int | None = None,
        note: str | None = None,
        tracks: Sequence[int] | None = None,
        seconds: float | None = None,
    ) -> None:
        """Write the results of one image.

        Args:
            name: name of the image.
            image: (H, W, 3) uint8 BGR.
            detections: faces of the image.
            heads: head mask of each face, or None without `--mask`.
            position: index of the image among all images; None means the next one.
            note: remark for the user; see `Record`.
            tracks: id of each face over the frames of a video.
            seconds: time since the beginning of the video.

        Raises:
            UserError: a file cannot be written; what was written before is complete.
        """
        with disk_errors(self.folder):
            place = self._place(position)
            written = self._face_files.write(place, name, self._crop_stem(name), image, detections, heads)
            faces = self._describe_faces(detections, heads, written.faces, tracks)
            entry = {"name": name, "width": image.shape[1], "height": image.shape[0], "faces": faces, **written.entry}
            if seconds is not None:
                entry["seconds"] = round(seconds, 3)
            self._add_record(Record(place, name, entry, _table_rows(detections), written.files, note=note))

    def skip(self, name: str, reason: str, position: int | None = None) -> None:
        """Record why an image could not be read; see `add`."""
        with disk_errors(self.folder):
            self._add_record(Record(self._place(position), name, problem=reason))

    def close(self) -> None:
        """Wait for all processes, and make the final files of a complete run.

        Raises:
            UserError: the files cannot be written, or results are missing.
        """
        run_on_all(self._close_shard)
        run_on_main(lambda: self._finish(is_complete=True))

    def abandon(self) -> None:
        """End an interrupted run: keep the records for `--resume`, and make the final files from them.

        With several processes no final files are made, because the others may still be writing.
        """
        with suppress(UserError):  # the exception that is propagating caused this one
            self._close_shard()
            if self.context.world_size == 1:
                # A video cannot be resumed, so these results are final.
                self._finish(is_complete=self._is_video)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _close_shard(self) -> None:
        with disk_errors(self.folder):
            note = self._face_files.close()
            self.notes += [note] if note else []
            self._records.close()

    def _finish(self, *, is_complete: bool) -> None:
        with disk_errors(self.folder):
            if is_complete:
                self._store.compact()
            records = self._store.index()
            if is_complete and self._count and len(records) != self._count:
                raise UserError(
                    f"{self.folder}: holds results of {len(records)} of {self._count} images; --resume does the rest"
                )
            self.summary = self._files.write(self._settings, records, self.start.done)
            if self._options.page:
                write_inference_page(self.folder, self._settings, records, self.summary, self._images)
            kept = write_exports(self.folder, self._options.export, records, self._images)
            if kept:
                more = f" and {len(kept) - 1} more" if len(kept) > 1 else ""
                self.notes.append(f"{kept[0]}{more}: edited, or not written by a run, and therefore kept")
            if is_complete:
                stale = set(self._store.run.get("former_files", []))
                for record in records if stale else ():
                    stale.difference_update(record.files)
                remove_output(self.folder, stale)
                OwnFiles(self.folder).forget_empty_folders()
                # results.json may have belonged to another experiment with a complete run here. Its images stay.
                for other in self._store.complete_others:
                    other.remove()
                self._store.mark_complete()

    def _place(self, position: int | None) -> int:
        place = self._next_position if position is None else position
        self._next_position = place + 1
        return place

    def _add_record(self, record: Record) -> None:
        self._records.add(record)
        self.summary.add(record)

    def _describe_faces(
        self,
        detections: Detections,
        heads: Sequence[HeadMask] | None,
        files: Sequence[Mapping[str, str]],
        tracks: Sequence[int] | None,
    ) -> list[dict[str, Any]]:
        """The faces of one image for `results.json`, with the files of each."""
        faces: list[dict[str, Any]] = detections.to_dict()["faces"]
        for index, face in enumerate(faces):
            face["box"], face["score"] = _rounded(face["box"]), round(face["score"], 6)
            if face["landmarks"] is not None:
                face["landmarks"] = [_rounded(point) for point in face["landmarks"]]
            if heads is not None:
                face |= {"head_box": heads[index].head_box, "face_box_in_head": heads[index].face_box}
            if files[index] or self._options.save_mask:
                face["files"] = files[index]
            if tracks is not None:
                face["track"] = tracks[index]
        return faces

    def _crop_stem(self, name: str) -> str:
        return name if self._name_counts[_stem(name).lower()] > 1 else _stem(name)


def _image_folders(options: InferenceOptions) -> list[str]:
    """Those of `OUTPUT_FOLDERS` into which a run with these options writes."""
    folders = ["thumbnails"] if options.page else []
    folders += ["result_images"] if options.save_img else []
    folders += ["masks", "faces", "heads", "head_masks"] if options.save_mask else []
    folders += [{"plain": "crops"}.get(kind, kind) for kind in options.save_crops]
    return [*folders, "anonymized"] if options.anonymize is not None else folders


def _table_rows(detections: Detections) -> list[str]:
    faces = zip(detections.boxes.tolist(), detections.scores.tolist(), strict=True)
    return [f"{' '.join(str(int(value)) for value in box)} {score:f}" for box, score in faces]


def _stem(name: str) -> str:
    """The name without its last suffix."""
    return str(PurePosixPath(name).with_suffix(""))


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in values]
