"""What the network is shown of labelled images in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from config import DataConfig
from utils.datasets.cache import KeptImage, open_images
from utils.datasets.labels import DatasetError, LabelledImage
from utils.datasets.sampler import SampleKey
from utils.datasets.transforms import Sample, augment, mosaic
from utils.runtime.images import UnreadableImageError
from utils.structures import BatchTargets, FaceTargets

Replaced = tuple[str, str]  # path of an image that cannot be read, and why


@dataclass(frozen=True)
class TrainingItem:
    """One crop, or four in a mosaic.

    Attributes:
        pixels: (3, S, S) uint8 BGR.
        targets: its faces.
        indices: of the image that it shows, or of the four.
        replaced: unreadable images in whose place they stand.
    """

    pixels: Tensor
    targets: FaceTargets
    indices: tuple[int, ...]
    replaced: tuple[Replaced, ...]


@dataclass(frozen=True)
class Batch:
    """B training items.

    Attributes:
        images: (B, 3, S, S) uint8 BGR.
        targets: the faces in them.
        indices: of the labelled images that are shown; more than B where there are mosaics.
        replaced: unreadable images in whose place some of them stand.
    """

    images: Tensor
    targets: BatchTargets
    indices: tuple[int, ...]
    replaced: tuple[Replaced, ...]

    def pin_memory(self) -> Batch:
        """For the loader: a copy in memory from which a CUDA device reads without waiting."""
        return Batch(self.images.pin_memory(), self.targets.pin_memory(), self.indices, self.replaced)


class FaceDataset(Dataset[TrainingItem]):
    """Augmented square crops of labelled images.

    An item depends on its key alone: not on the process that makes it, nor on the items before it.
    """

    def __init__(self, images: Sequence[LabelledImage], config: DataConfig, fill: Sequence[float]) -> None:
        """Open the images, which reads them all if they are to be kept in memory.

        Args:
            fill: BGR colour around images that are smaller than the crop.

        Raises:
            UserError: the folder for images kept on disk cannot be written to.
        """
        self.images = images
        self.config = config
        self.fill = fill
        self.files = open_images([image.path for image in images], config)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: SampleKey) -> TrainingItem:
        """The item of an image's index and a seed.

        Raises:
            DatasetError: no image can be read.
        """
        index, seed = key
        rng = np.random.default_rng(seed)
        replaced: list[Replaced] = []
        if rng.random() < self.config.mosaic_probability:
            others = rng.integers(len(self.images), size=3).tolist()
            indices, quarters = zip(
                *(self._crop(each, self.config.im_size // 2, rng, replaced) for each in (index, *others)), strict=True
            )
            return _as_item(mosaic(quarters), indices, replaced)
        index, sample = self._crop(index, self.config.im_size, rng, replaced)
        return _as_item(sample, (index,), replaced)

    def _crop(self, index: int, side: int, rng: np.random.Generator, replaced: list[Replaced]) -> tuple[int, Sample]:
        """The index of the image that is read, and its crop."""
        index, image = self._read(index, replaced)
        labelled, scale = self.images[index], image.scale_xy
        sample = Sample(
            image.pixels, labelled.boxes * np.tile(scale, 2), labelled.landmarks * scale, labelled.has_landmarks
        )
        return index, augment(sample, side, self.config, self.fill, rng)

    def _read(self, index: int, replaced: list[Replaced]) -> tuple[int, KeptImage]:
        """The image at `index`, or the next one that can be read; those that cannot join `replaced`."""
        for offset in range(len(self.images)):
            nearest = (index + offset) % len(self.images)
            path = self.images[nearest].path
            try:
                return nearest, self.files.read(path)
            except UnreadableImageError as reason:
                replaced.append((str(path), str(reason)))
        raise DatasetError(f"none of the {len(self.images)} training images can be read")


def _as_item(sample: Sample, indices: tuple[int, ...], replaced: Sequence[Replaced]) -> TrainingItem:
    pixels = torch.from_numpy(np.stack(cv2.split(sample.image)))  # five times as fast as to permute
    side = sample.image.shape[0]
    landmarks = np.where(sample.has_landmarks[:, None, None], sample.landmarks / side, 0)
    targets = FaceTargets(
        torch.from_numpy(sample.boxes / side).float(),
        torch.from_numpy(landmarks).float(),
        torch.from_numpy(sample.has_landmarks),
    )
    return TrainingItem(pixels, targets, indices, tuple(replaced))


def collate(items: Sequence[TrainingItem]) -> Batch:
    """Join items of one size."""
    return Batch(
        images=torch.stack([item.pixels for item in items]),
        targets=BatchTargets.of([item.targets for item in items]),
        indices=tuple(index for item in items for index in item.indices),
        replaced=tuple(dict.fromkeys(each for item in items for each in item.replaced)),
    )
