"""What the network is shown of labelled images in training."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from config import DataConfig
from utils.augment import Sample, augment, mosaic
from utils.images import UnreadableImageError, read_image
from utils.labels import DatasetError, LabelledImage
from utils.structures import FaceTargets

_log = logging.getLogger(__name__)


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
