"""Tests of the training dataset: items, batches, mosaics, caches and damaged images."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from config import DataConfig, ExperimentConfig, ModelConfig
from tests.engine.helpers import WITHOUT_AUGMENTATION
from utils.datasets.face_dataset import Batch, FaceDataset, collate
from utils.datasets.folders import read_split
from utils.datasets.labels import DatasetError
from utils.datasets.loader import build_loader
from utils.datasets.sampler import EpochSampler
from utils.runtime.images import write_image

PLAIN = replace(WITHOUT_AUGMENTATION, im_size=64, num_workers=DataConfig.num_workers)


def make_split(folder: Path, faces_of: dict[str, str], size_hw: tuple[int, int] = (64, 64)) -> None:
    """Write a split with grey images and the given label lines."""
    for name in faces_of:
        write_image(folder / "images" / name, np.full((*size_hw, 3), 100, np.uint8))
    lines = [f"# {name}\n{faces}\n" for name, faces in faces_of.items()]
    (folder / "label.txt").write_text("".join(lines), encoding="utf-8")


def open_dataset(folder: Path, config: DataConfig = PLAIN, fill: tuple[int, int, int] = (0, 0, 0)) -> FaceDataset:
    return FaceDataset(list(chain.from_iterable(read_split([folder], "train"))), config, fill)


def test_item_has_the_image_and_its_normalised_faces(tmp_path: Path) -> None:
    make_split(tmp_path / "train", {"a.png": "16 0 32 16 " + "32 8 0 " * 5})
    item = open_dataset(tmp_path)[0, 0]
    assert item.images.shape == (1, 3, 64, 64)
    assert item.images.dtype == torch.uint8
    assert item.targets.boxes.tolist() == [[0.25, 0, 0.75, 0.25]]
    assert item.targets.landmarks.tolist() == [[[0.5, 0.125]] * 5]
    assert item.targets.has_landmarks.tolist() == [True]
    assert item.indices == (0,)
    assert item.replaced == ()


def test_batch_of_images_that_are_not_square_with_no_and_one_face(tmp_path: Path) -> None:
    make_split(tmp_path / "train", {"a.png": "", "b.png": "10 10 20 20"}, size_hw=(48, 96))
    dataset = open_dataset(tmp_path)
    assert len(dataset) == 2
    batch = collate([dataset[0, 0], dataset[1, 0]])
    assert batch.images.shape == (2, 3, 64, 64)
    assert (batch.images == 100).all()
    assert batch.indices == (0, 1)
    assert batch.targets.counts == (0, 1)
    assert (batch.targets.boxes[:, 3] - batch.targets.boxes[:, 1]).tolist() == pytest.approx([20 / 48])
    assert batch.targets.landmarks.tolist() == [[[0, 0]] * 5]


def test_batch_without_any_face(tmp_path: Path) -> None:
    make_split(tmp_path / "train", {"a.png": ""})
    targets = collate([open_dataset(tmp_path)[0, 0]]).targets
    assert (targets.boxes.shape, targets.landmarks.shape, targets.counts) == ((0, 4), (0, 5, 2), (0,))


def test_fill_surrounds_an_image_that_is_smaller_than_the_crop(tmp_path: Path) -> None:
    make_split(tmp_path / "train", {"a.png": ""}, size_hw=(32, 32))
    config = replace(PLAIN, crop_scales=(2.0,))
    (pixels,) = open_dataset(tmp_path, config, fill=(10, 20, 30))[0, 0].images
    outside = pixels[:, (pixels == torch.tensor([10, 20, 30])[:, None, None]).all(dim=0)]
    assert outside.shape[1] / 64**2 == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize(("order", "fill"), [("bgr", [10, 20, 30]), ("rgb", [30, 20, 10])])
def test_fill_is_the_mean_of_the_model_in_bgr(order: str, fill: list[int], tmp_path: Path) -> None:
    """`pixel_mean` is in the channel order of the model; images are BGR."""
    make_split(tmp_path / "train", {"a.png": ""}, size_hw=(32, 32))
    (images,) = read_split([tmp_path], "train")
    model = ModelConfig(channel_order=order, pixel_mean=(10.0, 20.0, 30.0))
    data = replace(PLAIN, crop_scales=(4.0,), num_workers=0)
    loader = build_loader(images, ExperimentConfig(model=model, data=data), EpochSampler(1, 1, seed=0), False)
    (pixels,) = next(iter(loader)).images
    assert (pixels == torch.tensor(fill)[:, None, None]).all(dim=0).float().mean() > 0.9


def write_noise(folder: Path, count: int, size_hw: tuple[int, int] = (50, 70)) -> None:
    """Write random training images, each with a face of 10 x 10 pixels at (20, 20)."""
    rng = np.random.default_rng(0)
    for number in range(count):
        write_image(folder / "train" / "images" / f"{number}.png", rng.integers(0, 256, (*size_hw, 3), np.uint8))
    lines = [f"# {number}.png\n20 20 10 10 {'25 25 0 ' * 5}\n" for number in range(count)]
    (folder / "train" / "label.txt").write_text("".join(lines))


def assert_equal(item: Batch, other: Batch) -> None:
    assert torch.equal(item.images, other.images)
    assert torch.equal(item.targets.boxes, other.targets.boxes)
    assert torch.equal(item.targets.landmarks, other.targets.landmarks)


ALL_AUGMENTATIONS = DataConfig(
    im_size=32,
    mosaic_probability=0.5,
    rotation_degrees=30,
    colour_probability=1,
    blur_probability=0.5,
    jpeg_probability=0.5,
)


def test_item_depends_only_on_its_key(tmp_path: Path) -> None:
    write_noise(tmp_path, 3)
    dataset = open_dataset(tmp_path, ALL_AUGMENTATIONS)
    first = dataset[1, 5]
    torch.manual_seed(9)
    np.random.seed(9)
    assert dataset[2, 5] is not None
    assert_equal(dataset[1, 5], first)
    assert not torch.equal(dataset[1, 6].images, first.images)


@pytest.mark.parametrize("start", [0, 4])
def test_batches_do_not_depend_on_workers_or_resuming(tmp_path: Path, start: int) -> None:
    write_noise(tmp_path, 8)
    dataset = open_dataset(tmp_path, ALL_AUGMENTATIONS)

    def batches(workers: int, start: int) -> list[Batch]:
        sampler = EpochSampler(8, 2, seed=0)
        sampler.set_epoch(3, start)
        return list(DataLoader(dataset, 2, sampler=sampler, num_workers=workers, collate_fn=collate))

    for batch, expected in zip(batches(2, start), batches(0, 0)[start // 2 :], strict=True):
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.targets.boxes, expected.targets.boxes)
        assert batch.indices == expected.indices


def test_mosaic_reports_its_four_images(tmp_path: Path) -> None:
    make_split(tmp_path / "train", {"a.png": "", "b.png": "0 0 64 64"})
    item = open_dataset(tmp_path, replace(PLAIN, mosaic_probability=1))[1, 0]
    assert item.indices[0] == 1
    assert len(item.indices) == 4
    assert item.targets.boxes[0].tolist() == [0, 0, 0.5, 0.5]
    assert len(item.targets) == sum(item.indices)
    assert len(collate([item, item]).indices) == 8


def test_damaged_image_is_reported_and_replaced_by_the_next(tmp_path: Path) -> None:
    make_split(tmp_path / "train", {"a.png": "0 0 32 32", "b.png": "", "c.png": "0 0 16 16"})
    damaged = tmp_path / "train" / "images" / "c.png"
    damage(damaged)
    dataset = open_dataset(tmp_path)
    item = dataset[2, 0]
    assert item.targets.boxes.tolist() == [[0, 0, 0.5, 0.5]]  # of a.png, which follows the last
    assert item.indices == (0,)
    ((name, reason),) = item.replaced
    assert name == str(damaged)
    assert reason
    assert len(dataset[1, 0].targets) == 0
    assert collate([item, dataset[1, 0], item]).replaced == item.replaced  # once per batch


def test_dataset_of_damaged_images_is_an_error(tmp_path: Path) -> None:
    make_split(tmp_path / "train", {"a.png": "1 2 3 4", "b.png": ""})
    for name in ("a.png", "b.png"):
        damage(tmp_path / "train" / "images" / name)
    with pytest.raises(DatasetError, match="none of the 2 training images can be read"):
        open_dataset(tmp_path)[0, 0]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_cache_does_not_change_the_items(tmp_path: Path, kind: str) -> None:
    write_noise(tmp_path, 2)
    plain, cached = (open_dataset(tmp_path, DataConfig(im_size=32, cache=each)) for each in ("none", kind))
    for key in ((0, 1), (1, 2), (0, 1)):
        assert_equal(cached[key], plain[key])


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("kind", ["ram", "disk"])
@pytest.mark.parametrize(
    "method", [each for each in ("fork", "spawn") if each in multiprocessing.get_all_start_methods()]
)
def test_cache_works_in_worker_processes(tmp_path: Path, kind: str, method: str) -> None:
    write_noise(tmp_path, 2)
    dataset = open_dataset(tmp_path, replace(PLAIN, im_size=32, cache=kind))
    loader = DataLoader(
        dataset,
        2,
        sampler=EpochSampler(2, 2, seed=0),
        num_workers=1,
        collate_fn=collate,
        multiprocessing_context=method,
    )
    (batch,) = loader
    assert batch.images.shape == (2, 3, 32, 32)
    assert sorted(batch.indices) == [0, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")
def test_pinned_batch_is_the_same(tmp_path: Path) -> None:
    write_noise(tmp_path, 1)
    batch = collate([open_dataset(tmp_path)[0, 0]])
    pinned = batch.pin_memory()
    assert pinned.images.is_pinned()
    assert pinned.targets.boxes.is_pinned()
    assert torch.equal(pinned.images, batch.images)


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])
