"""The images and faces on which a detector is evaluated."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from config import ROOT
from utils.datasets.folders import check_images_exist, part_of
from utils.datasets.label_file import read_labels
from utils.datasets.labels import DatasetError, LabelledImage
from utils.evaluation.localisation import landmark_errors
from utils.evaluation.wider_eval import Evaluation, GroundTruth, bootstrap, evaluate, load_ground_truth
from utils.structures import Detections, Faces

ALL_FACES = "all"
Value = TypeVar("Value")


@dataclass(frozen=True)
class EvaluationSet:
    """The faces of each image, and the subsets in which they count.

    Attributes:
        truths: ground truth of each image.
        images: image files in the same order; None if there is no folder of images.
        source: folder or file of the faces.
        labelled: labelled faces of each image, in the same order, which may have landmarks; None for the official
            faces, which have none.
        official: whether these are the faces and subsets of the official WIDER FACE evaluation. Otherwise there is one
            subset, `ALL_FACES`, and boxes in images without faces are false.
    """

    truths: Sequence[GroundTruth]
    images: Sequence[Path] | None
    source: Path
    official: bool
    labelled: Sequence[Faces] | None = None

    @property
    def source_name(self) -> str:
        """The source as results name it: relative to this repository if it lies inside."""
        return (self.source.relative_to(ROOT) if self.source.is_relative_to(ROOT) else self.source).as_posix()

    @property
    def names(self) -> list[str]:
        return [truth.name for truth in self.truths]

    @property
    def largest_subset(self) -> str:
        """The subset that holds all others."""
        return list(self.truths[0].subsets)[-1]

    @property
    def faces_counted(self) -> int:
        """Number of the faces in the largest subset."""
        return sum(int(truth.subsets[self.largest_subset].sum()) for truth in self.truths)

    def sample(self, count: int) -> EvaluationSet:
        """The images whose file names, without folders, have the smallest SHA-1; the same ones on every machine."""

        files = [f"{name.split('/')[-1]}.jpg" for name in self.names]
        digests = [hashlib.sha1(os.fsencode(file)).hexdigest() for file in files]
        chosen = sorted(sorted(range(len(digests)), key=digests.__getitem__)[:count])

        def part_of_all(values: Sequence[Value] | None) -> list[Value] | None:
            return None if values is None else [values[index] for index in chosen]

        return replace(
            self,
            truths=[self.truths[index] for index in chosen],
            images=part_of_all(self.images),
            labelled=part_of_all(self.labelled),
        )

    def evaluate(self, predictions: dict[str, np.ndarray]) -> Evaluation:
        """See `wider_eval.evaluate`."""
        return evaluate(predictions, self.truths, count_negatives=not self.official)

    def landmark_errors(self, detections: Mapping[str, Detections]) -> np.ndarray | None:
        """Landmark errors of all detected faces; None if no face has labelled landmarks.

        Args:
            detections: detections by the name of the image; images without an entry are left out.
        """
        if self.labelled is None or not any(faces.has_landmarks.any() for faces in self.labelled):
            return None
        pairs = [(faces, detections.get(name)) for faces, name in zip(self.labelled, self.names, strict=True)]
        errors = [landmark_errors(found, faces) for faces, found in pairs if found is not None]
        return np.concatenate([np.zeros(0), *errors])

    def standard_errors(self, predictions: dict[str, np.ndarray], samples: int) -> dict[str, float]:
        """Standard errors of the average precisions; see `wider_eval.bootstrap`."""
        drawn = bootstrap(predictions, self.truths, count_negatives=not self.official, samples=samples)
        return {subset: float(values.std(ddof=1)) for subset, values in drawn.items()}


def open_evaluation_set(dataset: Path | None, gt_dir: Path | None, *, need_images: bool) -> EvaluationSet:
    """Open the official ground truth if there is any, otherwise the labelled faces.

    Args:
        dataset: a folder with `val/images` and either `val/gt`, the official `.mat` files, or `val/label.txt`; or one
            that is not split, with `images` and `label.txt`. None if only `gt_dir` is used.
        gt_dir: folder of the official `.mat` files, if it is another one.
        need_images: whether every image must exist.

    Raises:
        UserError: there is no ground truth, it is malformed, or an image that it names does not exist.
    """
    own = dataset / "val" / "gt" if dataset else None
    official = gt_dir or (own if own and own.is_dir() else None)
    if official:
        truths = load_ground_truth(official)
        folder = dataset / "val" / "images" if dataset else None
        images = [folder / f"{truth.name}.jpg" for truth in truths] if folder and folder.is_dir() else None
        found = EvaluationSet(truths, images, official, official=True)
    elif dataset and (part := part_of(dataset, "val")):
        labelled = read_labels(part / "label.txt", part / "images")
        found = EvaluationSet(
            _ground_truths(labelled, part / "images"),
            [image.path for image in labelled],
            part / "label.txt",
            official=False,
            labelled=[image.faces for image in labelled],
        )
    else:
        raise DatasetError(
            f"{dataset or '--dataset'}: no val/gt with the official .mat files and no val/label.txt; "
            "give --gt_dir, or see data/README.md"
        )
    if need_images:
        if found.images is None:
            raise DatasetError(f"{dataset}: no folder val/images with the images of {found.source}; see data/README.md")
        check_images_exist(found.images, found.source)
    return found


def open_validation_set(datasets: Sequence[Path]) -> EvaluationSet | None:
    """Open the validation set of the first folder that has a `val` part; None if no folder has one.

    Raises:
        UserError: its ground truth is malformed, or an image that it names does not exist.
    """
    for dataset in datasets:
        if (dataset / "val" / "gt").is_dir() or (dataset / "val" / "label.txt").is_file():
            return open_evaluation_set(dataset, gt_dir=None, need_images=True)
    return None


def _ground_truths(labelled: Sequence[LabelledImage], folder: Path) -> list[GroundTruth]:
    """Convert labels to ground truths named without suffix, as in WIDER FACE, unless names differ only in the suffix.

    Images outside the folder are named by their absolute path, so that files named after them never leave the folder
    of the results.
    """
    root = Path(os.path.normpath(folder.absolute()))
    absolute = [Path(os.path.normpath(image.path.absolute())) for image in labelled]
    paths = [p.relative_to(root) if p.is_relative_to(root) else p.relative_to(p.anchor) for p in absolute]
    counts = Counter(path.with_suffix("") for path in paths)
    truths = []
    for path, image in zip(paths, labelled, strict=True):
        name = path.with_suffix("") if counts[path.with_suffix("")] == 1 else path
        corners, ends = image.faces.boxes[:, :2].astype(np.float64), image.faces.boxes[:, 2:].astype(np.float64)
        subsets = {ALL_FACES: ~image.faces.ignored}
        truths.append(GroundTruth(name.as_posix(), np.concatenate([corners, ends - corners], axis=1), subsets))
    return truths
