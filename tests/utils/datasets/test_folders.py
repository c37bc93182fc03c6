"""Tests of finding datasets and reading their splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from utils.datasets.folders import find_datasets, read_split
from utils.datasets.labels import DatasetError
from utils.runtime.images import write_image


def make_split(folder: Path, faces_of: dict[str, str], size_hw: tuple[int, int] = (64, 64)) -> None:
    """Write a split with grey images and the given label lines."""
    for name in faces_of:
        write_image(folder / "images" / name, np.full((*size_hw, 3), 100, np.uint8))
    lines = [f"# {name}\n{faces}\n" for name, faces in faces_of.items()]
    (folder / "label.txt").write_text("".join(lines), encoding="utf-8")


def test_datasets_are_found_below_the_root_or_by_path(tmp_path: Path) -> None:
    for name in ("data/faces", "data/more faces", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    root = tmp_path / "data"
    assert find_datasets("faces/", root) == [root / "faces"]
    assert find_datasets(f"faces, more faces,,{tmp_path}/elsewhere", root) == [
        root / "faces",
        root / "more faces",
        tmp_path / "elsewhere",
    ]
    with pytest.raises(DatasetError, match=r"--dataset absent: no folder .*/absent nor .*data/absent;"):
        find_datasets("faces,absent", root)


def test_split_is_read_from_every_folder_that_has_it(tmp_path: Path) -> None:
    make_split(tmp_path / "a" / "train", {"1.png": "1 2 3 4", "sub/2.png": ""})
    make_split(tmp_path / "b" / "train", {"ü 3.png": "5 6 7 8"})
    make_split(tmp_path / "b" / "val", {"4.png": ""})
    folders = [tmp_path / "a", tmp_path / "b"]
    train = read_split(folders, "train")
    assert [[image.path.name for image in part] for part in train] == [["1.png", "2.png"], ["ü 3.png"]]
    assert [[len(image.faces) for image in part] for part in train] == [[1, 0], [1]]
    nothing, (image,) = read_split(folders, "val")
    assert nothing == []
    assert image.path == tmp_path / "b" / "val" / "images" / "4.png"


def test_missing_split_and_missing_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no val/label\.txt in .*; see data/README\.md"):
        read_split([tmp_path], "val")
    make_split(tmp_path / "val", {"a.png": "", "b.png": "", "c.png": ""})
    for name in ("b.png", "c.png"):
        (tmp_path / "val" / "images" / name).unlink()
    with pytest.raises(DatasetError, match=r"label\.txt: names 2 images that do not exist, first .*b\.png"):
        read_split([tmp_path], "val")
    (tmp_path / "val" / "label.txt").write_text(f"# {'x' * 300}.png\n")
    with pytest.raises(DatasetError, match=r"names 1 images that do not exist, first .*xxx\.png"):
        read_split([tmp_path], "val")
