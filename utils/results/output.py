"""The outputs of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.results.face_files import FaceFileOptions
from utils.results.files import Summary
from utils.results.records import RecordIndex

# Called with the folder of the results, the settings, the records and their summary when the final files are made.
Report = Callable[[Path, Mapping[str, Any], RecordIndex, Summary], None]


@dataclass(frozen=True)
class OutputOptions:
    """Outputs for every image besides its record.

    Attributes:
        drawings: whether to write images, or a single video, with the detections drawn.
        crops: whether to write masks and crops of every face.
        frames_per_second: frame rate of a video; None for images.
        face_files: thumbnails, crops and anonymised images to write.
        reports: functions that are called in this order when the final files are made.
    """

    drawings: bool = False
    crops: bool = False
    frames_per_second: float | None = None
    face_files: FaceFileOptions = FaceFileOptions()  # noqa: RUF009, frozen
    reports: Sequence[Report] = ()
