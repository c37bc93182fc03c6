"""The training images as the model sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from config import DataConfig
from utils.datasets.cache import open_images
from utils.datasets.labels import DatasetError, LabelledImage
from utils.datasets.sampler import SampleKey
from utils.datasets.transforms import Sample, augment, mosaic
from utils.runtime.images import UnreadableImageError
from utils.structures import FaceTargets

Replaced = tuple[str, str]  # path of an unreadable image, and why it is unreadable


@dataclass(frozen=True)
class Batch:
    """B training crops.

    Attributes:
        images: (B, 3, S, S) uint8 BGR.
        targets: faces of the crops.
        indices: indices of the labelled images in the crops; more than B if there are mosaics.
        replaced: unreadable images, which other images replaced.
    """

    images: Tensor
    targets: FaceTargets
    indices: tuple[int, ...]
    replaced: tuple[Replaced, ...]

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory, as the data loader asks for."""
        return Batch(self.images.pin_memory(), self.targets.pin_memory(), self.indices, self.replaced)


class FaceDataset(Dataset[Batch]):
    """Augmented square crops of labelled images, each as a batch of one.

    An item depends only on its key, not on the process that makes it or on the items before it.
    """

    def __init__(self, images: Sequence[LabelledImage], config: DataConfig, fill: Sequence[float]) -> None:
        """Open the images; `--cache=ram` reads them all.

        Args:
            images: labelled images to train on.
            config: augmentation and cache.
            fill: BGR colour around images that are smaller than the crop.

        Raises:
            UserError: the folder of the disk cache cannot be written to.
        """
        self.images = images
        self.config = config
        self.fill = fill
        self.read_image = open_images([image.path for image in images], config.cache)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: SampleKey) -> Batch:
        """Make the item of a key, the index of an image and a seed.

        Raises:
            DatasetError: no image can be read.
        """
        index, seed = key
        rng = np.random.default_rng(seed)
        replaced: list[Replaced] = []
        if rng.random() < self.config.mosaic_probability:
            others = rng.integers(len(self.images), size=3).tolist()
            side = self.config.im_size // 2
            indices, quarters = zip(*(self._crop(each, side, rng, replaced) for each in (index, *others)), strict=True)
            return _to_batch(mosaic(quarters), indices, replaced)
        index, sample = self._crop(index, self.config.im_size, rng, replaced)
        return _to_batch(sample, (index,), replaced)

    def _crop(self, index: int, side: int, rng: np.random.Generator, replaced: list[Replaced]) -> tuple[int, Sample]:
        """Return the index of the image that was read, and an augmented crop of it."""
        index, pixels = self._read(index, replaced)
        return index, augment(Sample(pixels, self.images[index].faces), side, self.config, self.fill, rng)

    def _read(self, index: int, replaced: list[Replaced]) -> tuple[int, np.ndarray]:
        """Read the image at `index`, or the next readable one; unreadable ones are added to `replaced`."""
        for offset in range(len(self.images)):
            candidate = (index + offset) % len(self.images)
            path = self.images[candidate].path
            try:
                return candidate, self.read_image(path)
            except UnreadableImageError as reason:
                replaced.append((str(path), str(reason)))
        raise DatasetError(f"none of the {len(self.images)} training images can be read")


def _to_batch(sample: Sample, indices: tuple[int, ...], replaced: Sequence[Replaced]) -> Batch:
    """Convert a sample to a batch of one."""
    images = torch.from_numpy(np.stack(cv2.split(sample.image))[None])  # five times as fast as permuting
    height, width = sample.image.shape[:2]
    return Batch(images, FaceTargets.from_faces(sample.faces, (height, width)), indices, tuple(replaced))


def collate(items: Sequence[Batch]) -> Batch:
    """Join batches of images of the same size."""
    return Batch(
        images=torch.cat([item.images for item in items]),
        targets=FaceTargets.join([item.targets for item in items]),
        indices=tuple(index for item in items for index in item.indices),
        replaced=tuple(dict.fromkeys(each for item in items for each in item.replaced)),
    )
