"""Reports made from the records of a run: the page, and annotations for other tools."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.datasets.formats.annotations import AnnotatedImage
from utils.datasets.formats.registry import FORMATS
from utils.datasets.labels import FaceRow, labelled_image
from utils.results.files import Summary
from utils.results.own_files import OwnFiles
from utils.results.page import PageHead, file_url, relative_url, settings_rows, write_page
from utils.results.records import RecordIndex

EXPORT_FOLDER = "exports"


def write_inference_page(
    folder: Path, settings: Mapping[str, Any], records: RecordIndex, summary: Summary, images: Path | None
) -> None:
    """Write the page of a run; `images` is the folder of the images that were read, None for a video or camera."""
    threshold = float(settings.get("detection", {}).get("confidence_threshold", 0.0))
    counts = f"{summary.images} images, {summary.faces} faces, {len(summary.skipped)} skipped"
    if images is None:
        counts = f"{summary.images} frames, {summary.faces} faces; one frame a second is shown"
    name, source = settings.get("experiment", ""), settings.get("source", "")
    head = PageHead(
        title=f"Faces in {Path(source).name or source}",
        summary=f"{counts}; detector {name}",
        lowest_score=threshold,
        threshold=threshold,
        settings=settings_rows(settings),
    )
    write_page(folder, head, _page_entries(folder, records, images), len(records))


def _page_entries(folder: Path, records: RecordIndex, images: Path | None) -> Iterator[dict[str, Any]]:
    for record in records:
        entry = record.entry
        if entry is None:
            yield {"name": record.name, "skipped": record.problem or "unreadable"}
        elif "thumbnail" in entry:
            if images is None:
                source = relative_url(entry["thumbnail"])
            elif "anonymized" in entry:
                source = relative_url(entry["anonymized"])
            else:
                source = file_url(images / record.name, folder)
            yield {
                **{key: entry[key] for key in ("name", "width", "height", "seconds") if key in entry},
                "thumbnail": relative_url(entry["thumbnail"]),
                "source": source,
                "faces": [_page_face(face) for face in entry["faces"]],
            }


def _page_face(face: Mapping[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {"box": face["box"], "score": round(face["score"], 4)}
    if face.get("landmarks"):
        shown["landmarks"] = face["landmarks"]
    if "track" in face:
        shown["track"] = face["track"]
    kinds = [kind for kind in ("head_masks", "aligned") if kind in face.get("files", {})]
    if kinds:
        shown["files"] = {kind.replace("_", " ").rstrip("s"): relative_url(face["files"][kind]) for kind in kinds}
    return shown


def write_exports(folder: Path, formats: Sequence[str], records: RecordIndex, images: Path | None) -> list[Path]:
    """Write annotations in these formats of `FORMATS` below `exports/`; see `write_inference_page` for `images`.

    Returns:
        Annotations of the user, or edited by the user, which are kept.
    """
    kept = []
    for name in formats:
        # Beside the final files, because annotations refer to images by relative paths.
        staged = folder / EXPORT_FOLDER / ".new"
        _remove(staged)  # of a run that was killed
        staged.parent.mkdir(exist_ok=True)
        try:
            FORMATS[name].write(staged, _AnnotatedRecords(records), images)
            kept += OwnFiles(folder).replace_all(staged, staged.with_name(FORMATS[name].file))
        finally:
            _remove(staged)
    return kept


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _AnnotatedRecords:
    """The images that could be read; may be iterated over several times."""

    records: RecordIndex

    def __iter__(self) -> Iterator[AnnotatedImage]:
        for record in self.records:
            if record.entry is not None:
                # A box without area, such as of a face at the border, is not a label.
                faces = [f for f in record.entry["faces"] if f["box"][2] > f["box"][0] and f["box"][3] > f["box"][1]]
                rows = [FaceRow(face["box"], face["landmarks"]) for face in faces]
                labelled = labelled_image(Path(record.name), rows).faces
                scores = np.array([face["score"] for face in faces])
                tracks = [face["track"] for face in faces] if any("track" in face for face in faces) else None
                size = record.entry["width"], record.entry["height"]
                yield AnnotatedImage(record.name, *size, labelled, scores, tracks)
