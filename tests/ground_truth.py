"""Writes ground truth in the .mat format of WIDER FACE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.io import savemat

from utils.evaluation.wider_eval import SUBSETS

Faces = Sequence[Sequence[float]]  # x, y, width, height, and 1 if the face counts in each of easy, medium and hard


def cells(values: Sequence[object]) -> np.ndarray:
    """Return a column of Matlab cells."""
    column = np.empty((len(values), 1), object)
    for number, value in enumerate(values):
        column[number, 0] = value
    return column


def save_ground_truth(folder: Path, events: Mapping[str, Mapping[str, Faces]]) -> None:
    """Write the faces of every event and image to four files with the nesting and keys of the official ones."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [[np.array(faces, float).reshape(-1, 7) for faces in event.values()] for event in events.values()]
    names = {
        "event_list": cells(list(events)),
        "file_list": cells([cells(list(event)) for event in events.values()]),
        "face_bbx_list": cells([cells([faces[:, :4] for faces in event]) for event in images]),
    }
    savemat(folder / "wider_face_val.mat", names)
    for number, subset in enumerate(SUBSETS):
        kept = [[np.flatnonzero(faces[:, 4 + number])[:, None] + 1 for faces in event] for event in images]
        savemat(folder / f"wider_{subset}_val.mat", {"gt_list": cells([cells(event) for event in kept])})
