"""Labels and predictions in other forms and places than they should be, and where test.py leaves its results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

import cv2
import numpy as np
import pytest

import test
from config import ROOT, DataConfig, EvaluationOptions
from engine.training_state import TrainingData
from tests.scripts import run_script
from train import describe_faces, describe_validation, open_data
from utils.datasets.folders import describe_faces_outside, read_split
from utils.datasets.labels import DatasetError, read_labels
from utils.errors import UserError
from utils.evaluation.ground_truth import EvaluationSet, open_evaluation_set
from utils.evaluation.prediction_set import PredictionSet
from utils.evaluation.predictions import write_predictions
from utils.evaluation.report import suspected_form

BOXES: list[list[float]] = [[30.0, 20, 24, 28], [10, 50, 12, 15]]
WEIGHTS = ROOT / "experiments/mobilenet0.25_anc2_casT_fpn3/ckpt/mobilenet0.25_ckpt-best.pth"


def make_dataset(folder: Path, names: list[str], boxes: Sequence[Sequence[float]] | None = None) -> Path:
    lines: list[str] = []
    for name in names:
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((80, 100, 3), 90, np.uint8))
        lines += [f"# {name}", *(" ".join(str(value) for value in box) for box in (BOXES if boxes is None else boxes))]
    (folder / "label.txt").write_text("\n".join(lines) + "\n")
    return folder


def make_predictions(folder: Path, names: list[str], boxes: np.ndarray | None = None) -> Path:
    rows = np.array(BOXES) if boxes is None else boxes
    for name in names:
        write_predictions(folder, name, np.concatenate([rows, np.full((len(rows), 1), 0.9)], axis=1))
    return folder


def evaluate(cwd: Path, *flags: str) -> CompletedProcess[str]:
    return run_script(test, "--gpu_num=-1", *flags, cwd=cwd)


def experiment_files() -> dict[Path, int]:
    """When each file of the experiments was changed, but for those that other tests make meanwhile."""
    folders = [path for path in (ROOT / "experiments").iterdir() if not path.name.startswith("pytest_")]
    return {path: path.stat().st_mtime_ns for folder in folders for path in (folder, *folder.rglob("*"))}


def opened(dataset: Path) -> EvaluationSet:
    return open_evaluation_set(dataset, None, need_images=False)


# ------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "boxes", [[[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.5, 0.5]], [[0, 0.5, 0.5, 0.1, 1]], [[0.5, 0.5, 1, 1, 0]]]
)
def test_normalised_labels_are_refused(tmp_path: Path, boxes: list[list[float]]) -> None:
    make_dataset(tmp_path, ["a.png"], boxes)
    with pytest.raises(DatasetError, match=r"label\.txt: its boxes are normalised to 0\.\.1; expected pixels"):
        read_split([tmp_path], "train")
    assert read_labels(make_dataset(tmp_path, ["a.png"], [[1, 1, 2, 3]]) / "label.txt", tmp_path)


def test_normalised_landmarks_are_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path, ["a.png"], [[*BOXES[0], *[0.4, 0.3, 0] * 5], BOXES[1]])
    with pytest.raises(DatasetError, match=r"label\.txt: its landmarks are normalised to 0\.\.1; expected pixels"):
        read_split([tmp_path], "train")


def test_faces_outside_of_their_image_are_pointed_out(tmp_path: Path) -> None:
    """The image is 100 x 80; of the second face a quarter is inside, and the last is to be ignored."""
    boxes = [[90, 10, 20, 20], [90, 70, 20, 20], [200, 10, 9, 9], [200, 10, 9, 9, 1]]
    (images,) = read_split([make_dataset(tmp_path, ["a.png", "b.png"], boxes)], "train")
    found = describe_faces_outside(images)
    assert found == f"4 of 6 faces in 2 images lie outside of their image, first in {tmp_path}/images/a.png"
    predictions = make_predictions(tmp_path / "predictions", ["a", "b"])
    result = evaluate(tmp_path, f"--pred_dir={predictions}", f"--dataset={tmp_path}", "--save_errors=1")
    assert f"warning: {tmp_path}/label.txt: {found}" in result.stderr
    (inside,) = read_split([make_dataset(tmp_path, ["a.png"])], "train")
    assert describe_faces_outside(inside) is None
    (tmp_path / "images/a.png").write_bytes(b"no image")
    assert describe_faces_outside(images[:1]) is None


def test_labels_without_a_face_that_counts_are_pointed_out(tmp_path: Path) -> None:
    make_dataset(tmp_path, ["a.png"], [[*BOXES[0], 1]])
    with pytest.raises(DatasetError, match=r"--dataset .*: nothing to learn; faces: 0 used, .* 1 marked to be ignored"):
        open_data(DataConfig(dataset=str(tmp_path)))
    predictions = make_predictions(tmp_path / "predictions", ["a"])
    result = evaluate(tmp_path, f"--pred_dir={predictions}", f"--dataset={tmp_path}")
    assert f"no face of {tmp_path}/label.txt counts, so that the AP is 0" in result.stdout
    validation = describe_validation(TrainingData([], None, opened(tmp_path)))
    assert validation == f"validation: no face of {tmp_path}/label.txt counts, so that its AP is always 0"


def test_faces_that_are_used_and_dropped_are_counted(tmp_path: Path) -> None:
    points = [value for point in range(5) for value in (35 + point, 30, 0)]
    boxes = [[30, 20, 24, 28, *points], [1, 2, 0, 5], [1, 2, 3, -5], [1, 2, 30, 40, 1], [1, 2, 30, 40]]
    (images,) = read_split([make_dataset(tmp_path, ["a.png", "b.png"], boxes)], "train")
    expected = "faces: 4 used, 2 with landmarks, 2 marked to be ignored, 4 without area dropped"
    assert describe_faces(images) == expected


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_labels_may_be_written_by_powershell(tmp_path: Path, encoding: str) -> None:
    labels = make_dataset(tmp_path, ["a.png"]) / "label.txt"
    text = labels.read_text()
    labels.write_text(text, encoding=encoding)
    assert len(opened(tmp_path).truths) == 1


def test_images_outside_the_folder_have_names_inside_the_results(tmp_path: Path) -> None:
    names = ["in.png", "../../out/b.png", f"{tmp_path}/far/c.png", "x/../in2.png"]
    faces = opened(make_dataset(tmp_path / "set", names))
    root = tmp_path.relative_to(tmp_path.anchor).as_posix()
    assert faces.names == ["in", f"{root}/out/b", f"{root}/far/c", "in2"]
    assert faces.images is not None
    assert all(path.is_file() for path in faces.images)

    results = tmp_path / "results"
    result = evaluate(tmp_path, f"--model_weight={WEIGHTS}", f"--dataset={tmp_path}/set", f"--output_dir={results}")
    assert result.returncode == 0, result.stderr
    written = {
        path.relative_to(results / "predictions").with_suffix("").as_posix()
        for path in results.rglob("*.txt")
        if path.is_relative_to(results / "predictions")
    }
    assert written == set(faces.names)
    assert {path.name for path in tmp_path.iterdir()} == {"set", "out", "far", "results"}


# ------------------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize(
    ("change", "form"),
    [
        (lambda box: box, None),
        (lambda box: np.hstack([box[:, :2], box[:, :2] + box[:, 2:]]), "its boxes look like corners"),
        (lambda box: box / 100, "its boxes look normalised"),
        (lambda box: np.hstack([box[:, :2] + box[:, 2:] / 2, box[:, 2:]]), "its boxes look like centres"),
        (lambda box: box + 200, None),
        (lambda box: box[:0], None),
    ],
)
def test_other_forms_of_predictions_are_suspected(tmp_path: Path, change: object, form: str | None) -> None:
    faces = opened(make_dataset(tmp_path, ["a.png"]))
    rows = change(np.array(BOXES))  # type: ignore[operator]
    predictions = {"a": np.hstack([rows, np.full((len(rows), 1), 0.9)])}
    found = suspected_form(predictions, faces, faces.evaluate(predictions))
    assert found == form if form is None else found and found.startswith(form)


def test_reports_of_predictions_overwrite_neither_each_other_nor_an_experiment(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", ["a.png"])
    boxes = np.array(BOXES)
    corners = np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])
    name = "mobilenet0.25_pretrained"
    one = make_predictions(tmp_path / "one" / name, ["a"])
    two = make_predictions(tmp_path / "two" / name, ["a"], corners)
    before = experiment_files()
    results = [evaluate(tmp_path, f"--pred_dir={each}", f"--dataset={dataset}") for each in (one, two, one)]
    assert [result.returncode for result in results] == [0, 0, 0], results
    folder = tmp_path / "test_results"
    assert {path.name for path in folder.iterdir()} == {name, f"{name}_2"}
    aps = [json.loads((folder / each / "results.json").read_text())["ap"]["all"] for each in (name, f"{name}_2")]
    assert aps[0] == pytest.approx(1)
    assert aps[1] < 0.1
    assert (folder / name / "results.csv").read_text().count("\n") == 3
    assert f"warning: {two}: its boxes look like corners" in results[1].stderr
    assert results[0].stderr == ""

    (tmp_path / "empty").mkdir()
    assert evaluate(tmp_path, f"--pred_dir={tmp_path}/empty", f"--dataset={dataset}").returncode == 1
    assert not (folder / "empty").exists()
    elsewhere = evaluate(tmp_path, f"--pred_dir={one}", f"--dataset={dataset}", f"--output_dir={tmp_path}/elsewhere")
    assert f"results are in {tmp_path}/elsewhere" in elsewhere.stdout
    assert (tmp_path / "elsewhere/results.csv").is_file()
    assert experiment_files() == before


def test_detector_without_a_name_leaves_the_experiments_alone(tmp_path: Path) -> None:
    """A folder of which no image can be read says so, rather than that there are no predictions."""
    before = experiment_files()
    dataset = make_dataset(tmp_path / "set", ["a.png"])
    result = evaluate(tmp_path, f"--dataset={dataset}")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "test_results/mobilenet0.25_pretrained/results.json").is_file()
    (dataset / "images/a.png").write_bytes(b"no image")
    broken = evaluate(tmp_path, f"--dataset={dataset}", f"--model_weight={WEIGHTS}")
    assert broken.returncode == 1
    assert "none of its 1 images can be read; first a: not an image, or damaged" in broken.stderr
    assert experiment_files() == before


def test_text_files_of_others_are_not_taken_for_former_predictions(tmp_path: Path) -> None:
    mine = tmp_path / "predictions/event/label.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("dear")
    predicted = PredictionSet("exp", tmp_path / "predictions", "ckpt", "protocol", {})
    with pytest.raises(UserError, match=r"label\.txt: was not written by test\.py and is kept"):
        predicted.begin(["a"], resume=False)
    assert mine.read_text() == "dear"
    assert EvaluationOptions().output_dir is None
