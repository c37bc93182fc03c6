"""Datasets on disk, and what the network is shown of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from config import DataConfig
from utils.augment import Sample, augment, mosaic
from utils.experiment import user_path
from utils.images import UnreadableImageError, read_image
from utils.labels import DatasetError, LabelledImage, read_labels
from utils.structures import FaceTargets

_log = logging.getLogger(__name__)


def find_datasets(names: str, data_root: Path) -> list[Path]:
    """The folders that `--dataset` means: comma-separated, each below `data_root` or a path of its own.

    Raises:
        DatasetError: a folder does not exist.
    """
    folders = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        candidates = [data_root / name, user_path(name)]
        found = [folder for folder in candidates if folder.is_dir()]
        if not found:
            raise DatasetError(f"--dataset {name}: no folder {candidates[0]} nor {candidates[1]}")
        folders.append(found[0])
    return folders


def has_split(folders: Sequence[Path], split: str) -> bool:
    """Whether any of the folders has a part `train` or `val` of its own."""
    return any((folder / split / "label.txt").is_file() for folder in folders)


def _part_of(folder: Path, split: str) -> Path | None:
    """Where the labels of a split lie: in its own folder, or in the dataset's, if that is not divided."""
    return next((part for part in (folder / split, folder) if (part / "label.txt").is_file()), None)


def read_split(folders: Sequence[Path], split: str) -> list[LabelledImage]:
    """The labelled images of `train` or `val` in all folders that have that part, and in those that are not divided.

    Raises:
        DatasetError: no folder has it, a label file is malformed, or an image that it names does not exist.
    """
    labelled: list[LabelledImage] = []
    present = [part for folder in folders if (part := _part_of(folder, split))]
    if not present:
        raise DatasetError(f"no {split}/label.txt in {', '.join(map(str, folders)) or 'no folder'}; see data/README.md")
    for folder in present:
        images = read_labels(folder / "label.txt", folder / "images")
        missing = [image.path for image in images if not image.path.is_file()]
        if missing:
            raise DatasetError(
                f"{folder / 'label.txt'}: names {len(missing)} images that do not exist, first {missing[0]}"
            )
        labelled += images
    return labelled


class FaceDataset(Dataset[tuple[Tensor, FaceTargets]]):
    """Augmented square crops of labelled images.

    Items are ((3, S, S) uint8 BGR, `FaceTargets`). Randomness is drawn from torch's generator, so a worker's seed
    decides it.
    """

    def __init__(self, images: Sequence[LabelledImage], config: DataConfig, fill: Sequence[float]) -> None:
        """`fill` is the BGR colour around images that are smaller than the crop."""
        self.images = images
        self.config = config
        self.fill = fill

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, FaceTargets]:
        rng = np.random.default_rng(int(torch.randint(2**62, (1,))))
        if rng.random() < self.config.mosaic_probability:
            others = [int(other) for other in rng.integers(len(self.images), size=3)]
            sample = mosaic([self._crop(each, self.config.im_size // 2, rng) for each in (index, *others)])
        else:
            sample = self._crop(index, self.config.im_size, rng)
        pixels = torch.from_numpy(sample.image).permute(2, 0, 1).contiguous()
        side = sample.image.shape[0]
        targets = FaceTargets(
            torch.from_numpy(sample.boxes / side).float(),
            torch.from_numpy(sample.landmarks / side).float(),
            torch.from_numpy(sample.has_landmarks),
        )
        return pixels, targets

    def _crop(self, index: int, side: int, rng: np.random.Generator) -> Sample:
        labelled, image = self._read(index)
        sample = Sample(image, labelled.boxes, labelled.landmarks, labelled.has_landmarks)
        return augment(sample, side, self.config, self.fill, rng)

    def _read(self, index: int) -> tuple[LabelledImage, np.ndarray]:
        """The image at `index`, or the next one that can be read."""
        for offset in range(len(self.images)):
            labelled = self.images[(index + offset) % len(self.images)]
            try:
                return labelled, read_image(labelled.path)
            except UnreadableImageError as reason:
                _log.warning("warning: %s: %s; taking another image", labelled.path, reason)
        raise DatasetError(f"none of the {len(self.images)} training images can be read")


def collate(items: Sequence[tuple[Tensor, FaceTargets]]) -> tuple[Tensor, list[FaceTargets]]:
    """Stack the images; the faces stay a list, for their number varies."""
    images, targets = zip(*items, strict=True)
    return torch.stack(images), list(targets)
