"""Tests of the sampler: the order of an epoch, resuming, sharding and weights."""

from __future__ import annotations

from collections import Counter

import pytest

from utils.datasets.sampler import EpochSampler, SampleKey, image_weights
from utils.errors import ConfigError


def keys_of(sampler: EpochSampler, epoch: int = 0, start: int = 0) -> list[SampleKey]:
    sampler.set_epoch(epoch, start)
    keys = list(sampler)
    assert len(keys) == len(sampler)
    return keys


def test_epoch_has_every_image_once_with_its_own_seed() -> None:
    keys = keys_of(EpochSampler(12, 4, seed=0))
    assert sorted(index for index, _ in keys) == list(range(12))
    assert len({seed for _, seed in keys}) == 12


def test_seed_and_epoch_determine_the_order() -> None:
    sampler = EpochSampler(12, 4, seed=1)
    first = keys_of(sampler, epoch=3)
    keys_of(sampler, epoch=4)
    assert keys_of(sampler, epoch=3) == keys_of(EpochSampler(12, 3, seed=1), epoch=3) == first
    assert keys_of(sampler, epoch=4) != first
    assert keys_of(EpochSampler(12, 4, seed=2), epoch=3) != first
    assert len(keys_of(EpochSampler(12, 4, seed=-1))) == 12


@pytest.mark.parametrize(("start", "skipped"), [(0, 0), (4, 4), (8, 8), (7, 4), (12, 12), (50, 12)])
def test_start_skips_finished_steps(start: int, skipped: int) -> None:
    sampler = EpochSampler(14, 4, seed=0)
    assert keys_of(sampler, 5, start) == keys_of(sampler, 5)[skipped:]


@pytest.mark.parametrize("start", [0, 6])
def test_processes_share_the_batches_of_one_process(start: int) -> None:
    """17 images: one process has two batches of six, three processes share each of them, two images each."""
    alone = keys_of(EpochSampler(17, 6, seed=0), 2, start)
    shares = [keys_of(EpochSampler(17, 2, seed=0, rank=rank, world_size=3), 2, start) for rank in range(3)]
    assert len(alone) == 12 - start
    for step in range(len(alone) // 6):
        together = [key for share in shares for key in share[2 * step : 2 * step + 2]]
        assert sorted(together) == sorted(alone[6 * step : 6 * step + 6])


@pytest.mark.parametrize(
    ("images", "batch_size", "world_size", "expected"),
    [(3, 8, 1, 3), (1, 8, 1, 1), (5, 4, 2, 2), (2, 4, 3, 1)],
    ids=["smaller than a batch", "one image", "a batch of each process", "fewer images than processes"],
)
def test_small_set_gives_one_batch(images: int, batch_size: int, world_size: int, expected: int) -> None:
    samplers = [EpochSampler(images, batch_size, seed=0, rank=r, world_size=world_size) for r in range(world_size)]
    assert {sampler.batch_size for sampler in samplers} == {expected}
    shares = [keys_of(sampler) for sampler in samplers]
    assert [len(share) for share in shares] == [expected] * world_size
    assert len({key for share in shares for key in share}) == expected * world_size


def test_weights_set_how_often_an_image_is_drawn() -> None:
    sampler = EpochSampler(400, 8, seed=0, weights=[3.0] * 200 + [1.0] * 200)
    keys = keys_of(sampler)
    assert len(keys) == 400
    assert sum(index < 200 for index, _ in keys) / 400 == pytest.approx(0.75, abs=0.05)
    assert max(Counter(index for index, _ in keys).values()) > 1
    assert keys_of(sampler) == keys


def test_weights_of_folders_become_those_of_their_images() -> None:
    assert image_weights((1, 0.25), [2, 3]) == [1, 1, 0.25, 0.25, 0.25]
    assert image_weights((1, 0.25), [0, 1]) == [0.25]
    assert image_weights((), [2, 3]) is None


def test_every_folder_needs_its_weight() -> None:
    with pytest.raises(ConfigError, match="has 1 weights for the 2 folders"):
        image_weights((1.0,), [2, 3])
