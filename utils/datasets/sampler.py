"""The order of the training images, and the seeds of their augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from utils.errors import ConfigError

# Index of an image, and the seed of its augmentation.
SampleKey = tuple[int, int]


class EpochSampler(Sampler[SampleKey]):
    """This process's share of the keys of each epoch.

    The keys of all processes depend only on the seed and the epoch. A step takes the next `batch_size * world_size` of
    them, so several processes learn from the same images in each step as one process with the whole batch. An epoch
    ends with the last complete step, and has at least one.
    """

    def __init__(
        self,
        image_count: int,
        batch_size: int,
        *,
        seed: int,
        weights: Sequence[float] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Prepare for epoch 0.

        Args:
            image_count: number of images, at least 1.
            batch_size: batch size of one process; reduced if there are fewer images than one step needs.
            seed: seed of the order and of the augmentation.
            weights: relative frequency of each image, drawn with replacement; None draws each image once.
        """
        super().__init__()
        self.batch_size = min(batch_size, max(image_count // world_size, 1))
        self.image_count = image_count
        self.seed = seed
        self.weights = None if weights is None else np.array(weights, np.float64)
        self.rank = rank
        self.world_size = world_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch to iterate over.

        Args:
            epoch: number of the epoch.
            start: number of keys of the epoch, over all processes, already used; an incomplete step is repeated.
        """
        step = self.batch_size * self.world_size
        self._epoch = epoch
        self._start = start // step * step
        self._end = max(self.image_count // step, 1) * step

    def __len__(self) -> int:
        """Number of keys of this process from `start` to the end of the epoch."""
        return max(self._end - self._start, 0) // self.world_size

    def __iter__(self) -> Iterator[SampleKey]:
        rng = np.random.default_rng((self.seed % 2**64, self._epoch))
        order = self._draw_images(rng)
        seeds = rng.integers(2**63, size=len(order))
        own = slice(self._start + self.rank, self._end, self.world_size)
        return iter(list(zip(order[own].tolist(), seeds[own].tolist(), strict=True)))

    def _draw_images(self, rng: np.random.Generator) -> np.ndarray:
        """Draw indices of all images, or enough for one step if there are fewer."""
        count = max(self.image_count, self._end)
        if self.weights is None:
            return np.resize(rng.permutation(self.image_count), count)
        return rng.choice(self.image_count, size=count, p=self.weights / self.weights.sum())


def image_weights(dataset_weights: Sequence[float], image_counts: Sequence[int]) -> list[float] | None:
    """The weight of each image, folder after folder, or None without weights.

    Raises:
        ConfigError: the number of weights differs from the number of folders.
    """
    if not dataset_weights:
        return None
    if len(dataset_weights) != len(image_counts):
        raise ConfigError(
            f"--dataset_weights has {len(dataset_weights)} weights for the {len(image_counts)} folders of --dataset; "
            "give one for each, or none"
        )
    pairs = zip(dataset_weights, image_counts, strict=True)
    return [weight for weight, count in pairs for _ in range(count)]
