"""From folders with label.txt to the batches that the network sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from config import DataConfig
from utils.dataset_folder import read_split
from utils.datasets import FaceDataset, collate
from utils.images import write_image
from utils.labels import DatasetError

PLAIN = DataConfig(im_size=64, min_crop_scale=1, max_crop_scale=1, flip_probability=0, colour_probability=0)


def make_split(folder: Path, faces_of: dict[str, str], size_hw: tuple[int, int] = (64, 64)) -> None:
    """`train` or `val` with grey images and the given label lines."""
    for name in faces_of:
        write_image(folder / "images" / name, np.full((*size_hw, 3), 100, np.uint8))
    lines = [f"# {name}\n{faces}\n" for name, faces in faces_of.items()]
    (folder / "label.txt").write_text("".join(lines), encoding="utf-8")


def test_item_is_the_image_and_its_faces_as_parts_of_it(tmp_path: Path) -> None:
    make_split(tmp_path / "train", {"a.png": "16 0 32 16 " + "32 8 0 " * 5})
    pixels, faces = FaceDataset(read_split([tmp_path], "train"), PLAIN, fill=(0, 0, 0))[0]
    assert pixels.shape == (3, 64, 64)
    assert pixels.dtype == torch.uint8
    assert faces.boxes.tolist() == [[0.25, 0, 0.75, 0.25]]
    assert faces.landmarks.tolist() == [[[0.5, 0.125]] * 5]
    assert faces.has_landmarks.tolist() == [True]


def test_batch_of_images_without_faces_with_one_and_not_square(tmp_path: Path) -> None:
    make_split(tmp_path / "train", {"a.png": "", "b.png": "10 10 20 20"}, size_hw=(48, 96))
    dataset = FaceDataset(read_split([tmp_path], "train"), PLAIN, fill=(0, 0, 0))
    assert len(dataset) == 2
    images, faces = collate([dataset[0], dataset[1]])
    assert images.shape == (2, 3, 64, 64)
    assert (images == 100).all()
    assert [len(image_faces) for image_faces in faces] == [0, 1]
    assert faces[0].boxes.shape == (0, 4)
    assert faces[0].landmarks.shape == (0, 5, 2)
    assert (faces[1].boxes[:, 3] - faces[1].boxes[:, 1]).tolist() == pytest.approx([20 / 48])


def test_fill_surrounds_an_image_that_is_smaller_than_the_crop(tmp_path: Path) -> None:
    make_split(tmp_path / "train", {"a.png": ""}, size_hw=(32, 32))
    config = DataConfig(im_size=64, min_crop_scale=2, max_crop_scale=2, flip_probability=0, colour_probability=0)
    pixels, _ = FaceDataset(read_split([tmp_path], "train"), config, fill=(10, 20, 30))[0]
    outside = pixels[:, (pixels == torch.tensor([10, 20, 30])[:, None, None]).all(dim=0)]
    assert outside.shape[1] / 64**2 == pytest.approx(0.75, abs=0.05)


def test_torch_seed_decides_the_augmentation(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    write_image(tmp_path / "train" / "images" / "a.png", noise)
    (tmp_path / "train" / "label.txt").write_text("# a.png\n20 20 10 10\n")
    dataset = FaceDataset(read_split([tmp_path], "train"), DataConfig(im_size=32), fill=(0, 0, 0))

    def pixels(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return dataset[0][0]

    assert torch.equal(pixels(1), pixels(1))
    assert not torch.equal(pixels(1), pixels(2))


def test_damaged_image_is_named_and_the_next_takes_its_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_split(tmp_path / "train", {"a.png": "0 0 32 32", "b.png": "", "c.png": "0 0 16 16"})
    damage(tmp_path / "train" / "images" / "c.png")
    dataset = FaceDataset(read_split([tmp_path], "train"), PLAIN, fill=(0, 0, 0))
    assert dataset[2][1].boxes.tolist() == [[0, 0, 0.5, 0.5]]  # of a.png, which follows the last
    (warning,) = caplog.messages
    assert "c.png: " in warning
    assert len(dataset[1][1]) == 0
    assert len(caplog.messages) == 1


def test_images_that_are_all_damaged_are_an_error(tmp_path: Path) -> None:
    make_split(tmp_path / "train", {"a.png": "1 2 3 4", "b.png": ""})
    for name in ("a.png", "b.png"):
        damage(tmp_path / "train" / "images" / name)
    dataset = FaceDataset(read_split([tmp_path], "train"), PLAIN, fill=(0, 0, 0))
    with pytest.raises(DatasetError, match="none of the 2 training images can be read"):
        dataset[0]


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])
