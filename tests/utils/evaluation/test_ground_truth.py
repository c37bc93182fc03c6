"""Tests of opening evaluation and validation sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from utils.errors import UserError
from utils.evaluation.ground_truth import open_evaluation_set, open_validation_set


def make_dataset(folder: Path, labels: str, *names: str) -> Path:
    for name in names:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).touch()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "label.txt").write_text(labels)
    return folder


def test_all_labelled_faces_count(tmp_path: Path) -> None:
    make_dataset(tmp_path / "val", "# a/1.jpg\n10 20 30 40\n# 2.png\n", "a/1.jpg", "2.png")
    faces = open_evaluation_set(tmp_path, None, need_images=True)
    assert not faces.official
    assert faces.names == ["a/1", "2"]
    assert faces.images == [tmp_path / "val/images/a/1.jpg", tmp_path / "val/images/2.png"]
    assert [truth.boxes.tolist() for truth in faces.truths] == [[[10, 20, 30, 40]], []]
    assert faces.evaluate({"a/1": np.array([[10, 20, 30, 40, 0.9]])}).average_precisions == {"all": pytest.approx(1)}


def test_false_boxes_in_own_images_without_faces_count(tmp_path: Path) -> None:
    make_dataset(tmp_path, "# 1.jpg\n10 20 30 40\n# 2.jpg\n", "1.jpg", "2.jpg")
    faces = open_evaluation_set(tmp_path, None, need_images=True)
    rows = {"1": np.array([[10, 20, 30, 40, 0.5]]), "2": np.array([[0, 0, 9, 9, 0.9]])}
    assert faces.evaluate(rows).average_precisions == {"all": pytest.approx(0.5)}


def test_images_that_differ_by_their_suffix_keep_it(tmp_path: Path) -> None:
    make_dataset(tmp_path, "# 1.jpg\n# 1.png\n# 2.jpg\n")
    assert open_evaluation_set(tmp_path, None, need_images=False).names == ["1.jpg", "1.png", "2"]


def test_official_ground_truth_takes_precedence(tmp_path: Path, shared: Path) -> None:
    folder = shared / "data/widerface"
    faces = open_evaluation_set(folder, None, need_images=True)
    assert faces.official
    assert (len(faces.truths), faces.largest_subset, faces.source) == (400, "hard", folder / "val/gt")
    counts = {
        name: int(sum(truth.subsets[name].sum() for truth in faces.truths)) for name in ("easy", "medium", "hard")
    }
    assert counts == {"easy": 909, "medium": 1652, "hard": 4169}
    whole = open_evaluation_set(None, folder / "gt_full", need_images=False)
    assert len(whole.truths) == 3226
    assert whole.images is None
    with pytest.raises(UserError, match=r"gt_full: names 2826 images that do not exist, first .*jpg"):
        open_evaluation_set(folder, folder / "gt_full", need_images=True)
    with pytest.raises(UserError, match="no folder val/images"):
        open_evaluation_set(tmp_path, folder / "gt_full", need_images=True)


def test_missing_ground_truth_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no val/gt with the official \.mat files and no val/label\.txt; give --gt_dir"
    ):
        open_evaluation_set(tmp_path, None, need_images=True)
    make_dataset(tmp_path, "# 1.jpg\n")
    with pytest.raises(UserError, match=r"label\.txt: names 1 images that do not exist"):
        open_evaluation_set(tmp_path, None, need_images=True)


def test_first_dataset_with_a_val_folder_is_used_for_validation(tmp_path: Path) -> None:
    undivided = make_dataset(tmp_path / "a", "# 1.jpg\n", "1.jpg")
    make_dataset(tmp_path / "b/val", "# 2.jpg\n", "2.jpg")
    assert open_validation_set([undivided]) is None
    found = open_validation_set([undivided, tmp_path / "b"])
    assert found is not None
    assert found.names == ["2"]


def test_sample_of_the_official_images_is_the_one_of_the_readme(shared: Path) -> None:
    """The 400 images of the README are the first 401 without one that is a sample image of this repository."""
    whole = open_evaluation_set(None, shared / "data/widerface/gt_full", need_images=False)
    sample = whole.sample(401)
    development = open_evaluation_set(shared / "data/widerface", None, need_images=True)
    assert set(sample.names) - set(development.names) == {"0--Parade/0_Parade_marchingband_1_311"}
    assert len(sample.names) == 401
    assert sample.names == [name for name in whole.names if name in set(sample.names)]
    assert development.sample(3).images == [
        path
        for path, name in zip(development.images or (), development.names, strict=True)
        if name in development.sample(3).names
    ]
