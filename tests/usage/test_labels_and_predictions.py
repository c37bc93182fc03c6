"""Tests of labels and predictions in unexpected formats or places, and of where test.py writes its results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import cv2
import numpy as np
import pytest

import test
from config import DEFAULT_EXPERIMENT, ROOT, DataConfig, EvaluationOptions
from engine.evaluation import prediction_rows
from engine.training_state import TrainingData
from models.detector import FaceDetector
from tests.scripts import run_script
from train import describe_faces, describe_validation, open_data
from utils.datasets.folders import describe_faces_outside, read_split
from utils.datasets.label_file import read_labels
from utils.datasets.labels import DatasetError
from utils.errors import UserError
from utils.evaluation.ground_truth import EvaluationSet, open_evaluation_set
from utils.evaluation.prediction_set import PredictionSet
from utils.evaluation.predictions import write_predictions
from utils.evaluation.suspected_form import suspected_form
from utils.evaluation.wider_eval import GroundTruth
from utils.runtime.files import locked

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
    """Return the modification times of all files of experiments, except those that other tests write."""
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


def test_faces_outside_of_their_image_are_reported(tmp_path: Path) -> None:
    """The image is 100 x 80; a quarter of the second face is inside, and the last face is ignored."""
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


def test_labels_without_a_face_that_counts_are_reported(tmp_path: Path) -> None:
    make_dataset(tmp_path, ["a.png"], [[*BOXES[0], 1]])
    with pytest.raises(DatasetError, match=r"--dataset .*: nothing to learn; faces: 0 used, .* 1 marked to be ignored"):
        open_data(DataConfig(dataset=str(tmp_path)), [tmp_path])
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


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-8-sig"])
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


def corners_of(boxes: np.ndarray) -> np.ndarray:
    return np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])


def centres_of(boxes: np.ndarray) -> np.ndarray:
    return np.hstack([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]])


@pytest.mark.parametrize(
    ("change", "box_format"),
    [
        (lambda box: box, None),
        (corners_of, "its boxes look like corners"),
        (lambda box: box / 100, "its boxes look normalised"),
        (centres_of, "its boxes look like centres"),
        (lambda box: box + 200, None),
        (lambda box: box[:0], None),
    ],
)
def test_other_box_formats_are_suspected(tmp_path: Path, change: object, box_format: str | None) -> None:
    faces = opened(make_dataset(tmp_path, ["a.png"]))
    rows = change(np.array(BOXES))  # type: ignore[operator]
    predictions = {"a": np.hstack([rows, np.full((len(rows), 1), 0.9)])}
    found = suspected_form(predictions, faces)
    assert found == box_format if box_format is None else found and found.startswith(box_format)


def with_scores(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Apply a change to the boxes of predictions."""
    return lambda rows: np.hstack([change(rows[:, :4]), rows[:, 4:]])


def small_faces(scale: float = 1.0) -> tuple[EvaluationSet, dict[str, np.ndarray]]:
    """Return ground truth of 30 images, and predictions: the faces with noise, and twice as many false boxes."""
    generator = np.random.default_rng(0)
    truths, predictions = [], {}
    for name in map(str, range(30)):
        boxes = np.hstack([generator.uniform(0, 900, (8, 2)), generator.uniform(20, 90, (8, 2))]) * scale
        others = np.hstack([generator.uniform(0, 900, (16, 2)), generator.uniform(20, 90, (16, 2))]) * scale
        moved = boxes + generator.normal(0, 0.1, boxes.shape) * boxes[:, [2, 3, 2, 3]]
        truths.append(GroundTruth(name, boxes, {"all": np.ones(8, bool)}))
        predictions[name] = np.hstack([np.vstack([moved, others]), generator.random((24, 1))])
    return EvaluationSet(truths, None, Path("labels"), official=False), predictions


@pytest.mark.parametrize(
    ("change", "box_format"),
    [
        (with_scores(corners_of), "corners x1 y1 x2 y2"),
        (with_scores(lambda box: corners_of(box)[:, [1, 0, 3, 2]]), "corners x1 y1 x2 y2 with y before x"),
        (with_scores(lambda box: box[:, [1, 0, 3, 2]]), "x y width height with y before x"),
        (with_scores(centres_of), "centres x y width height"),
        (with_scores(lambda box: box / 2), "x y width height at 0.5 times the size"),
        (with_scores(lambda box: corners_of(box) * 2), "corners x1 y1 x2 y2 at 2 times the size"),
        (with_scores(lambda box: box / 10), "percents of the image"),
        (lambda rows: np.hstack([np.zeros((24, 1)), rows[:, :4]]), "x y width height after a class or score"),
        (lambda rows: rows[:, [4, 0, 1, 2, 3]], "x y width height after a class or score"),
        (lambda rows: np.hstack([rows[:, 4:], corners_of(rows[:, :4])]), "corners x1 y1 x2 y2 after a class or score"),
    ],
)
def test_every_other_box_format_is_named(change: Callable[[np.ndarray], np.ndarray], box_format: str) -> None:
    faces, predictions = small_faces()
    assert suspected_form(predictions, faces) is None
    assert suspected_form({name: change(rows) for name, rows in predictions.items()}, faces) == (
        f"its boxes look like {box_format}"
    )


def test_corners_are_suspected_where_half_of_them_match_as_they_are() -> None:
    """Faces in the corner of the image have corners that nearly equal their sizes."""
    faces, _ = small_faces()
    truths = [
        replace(t, boxes=t.boxes * np.where(np.arange(8)[:, None] < 4, [0.005, 0.005, 1, 1], 1)) for t in faces.truths
    ]
    faces = replace(faces, truths=truths)
    rows = {t.name: np.hstack([corners_of(t.boxes), np.ones((8, 1))]) for t in truths}
    assert faces.evaluate(rows).average_precisions["all"] == pytest.approx(0.25)
    assert suspected_form(rows, faces) == "its boxes look like corners x1 y1 x2 y2"


def test_corners_of_a_weak_detector_and_classes_are_suspected() -> None:
    """Their AP is about 0 in any format."""
    faces, predictions = small_faces()
    corners = {name: np.hstack([corners_of(rows[8:, :4]), rows[8:, 4:]]) for name, rows in predictions.items()}
    assert suspected_form(corners, faces) == "its boxes look like corners"
    classes = {name: np.hstack([np.ones((16, 1)), rows[8:, :4]]) for name, rows in predictions.items()}
    assert suspected_form(classes, faces) == "its first numbers are all the same, like a class"


@pytest.fixture(scope="module")
def detected() -> tuple[EvaluationSet, dict[str, np.ndarray]]:
    """The sample images and what a shipped detector finds in them."""
    faces = open_evaluation_set(ROOT / "data/sample_widerface", None, need_images=True)
    detector = FaceDetector.from_checkpoint(WEIGHTS, confidence_threshold=0.02)
    found = {name: detector.detect(path) for name, path in zip(faces.names, faces.images or [], strict=True)}
    return faces, {name: prediction_rows(each) for name, each in found.items()}


@pytest.mark.parametrize("others", [0, 5])
@pytest.mark.parametrize("kept", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.2, 0.5, 1.0, 5.0])
def test_weak_detectors_are_not_suspected(
    noise: float, kept: float, others: int, detected: tuple[EvaluationSet, dict[str, np.ndarray]]
) -> None:
    """Boxes are moved by noise, dropped, and outnumbered by random ones."""
    generator = np.random.default_rng(0)
    faces, found = detected
    predictions = {}
    for name, rows in found.items():
        rows = rows[generator.random(len(rows)) < kept]
        rows[:, :4] += generator.normal(0, noise, (len(rows), 4)) * rows[:, [2, 3, 2, 3]]
        rows[:, 2:4] = rows[:, 2:4].clip(1)
        count = others * len(rows)
        random = np.hstack([generator.uniform(0, 500, (count, 2)), generator.uniform(10, 90, (count, 2))])
        predictions[name] = np.vstack([rows, np.hstack([random, generator.random((count, 1))])])
    assert suspected_form(predictions, faces) is None


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

    other = make_dataset(tmp_path / "other", ["a.png"], BOXES[:1])
    assert evaluate(tmp_path, f"--pred_dir={one}", f"--dataset={other}").returncode == 0
    assert {path.name for path in folder.iterdir()} == {name, f"{name}_2", f"{name}_3"}
    sources = [json.loads((path / "results.json").read_text())["ground_truth"] for path in sorted(folder.iterdir())]
    assert sources == [f"{each}/label.txt" for each in (dataset, dataset, other)]

    (tmp_path / "empty").mkdir()
    assert evaluate(tmp_path, f"--pred_dir={tmp_path}/empty", f"--dataset={dataset}").returncode == 1
    assert not (folder / "empty").exists()
    elsewhere = evaluate(tmp_path, f"--pred_dir={one}", f"--dataset={dataset}", f"--output_dir={tmp_path}/elsewhere")
    assert f"results are in {tmp_path}/elsewhere" in elsewhere.stdout
    assert (tmp_path / "elsewhere/results.csv").is_file()
    assert experiment_files() == before


@pytest.mark.parametrize("name", ["results.txt", "results.json", "errors.png", "index.html", "results.csv"])
def test_report_replaces_no_file_of_the_user(tmp_path: Path, name: str) -> None:
    dataset = make_dataset(tmp_path / "set", ["a.png"])
    predictions = make_predictions(tmp_path / "predicted", ["a"])
    out = tmp_path / "out"
    flags = [f"--pred_dir={predictions}", f"--dataset={dataset}", f"--output_dir={out}", "--save_errors=1"]
    out.mkdir()
    (out / name).write_text("mine")
    refused = evaluate(tmp_path, *flags)
    assert refused.returncode == 1
    assert f"error: {out / name}: " in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert {path.name for path in out.iterdir()} == {name, ".lock"}
    assert (out / name).read_text() == "mine"

    (out / name).unlink()
    assert [evaluate(tmp_path, *flags).returncode for _ in range(2)] == [0, 0]
    if name != "results.csv":  # rows are appended to it, which loses no edit
        (out / name).write_text("edited")
        assert evaluate(tmp_path, *flags).returncode == 1
        assert (out / name).read_text() == "edited"


@pytest.mark.parametrize("with_detector", [False, True])
def test_two_runs_do_not_write_to_one_folder(tmp_path: Path, with_detector: bool) -> None:
    """The second run would remove the predictions of the first."""
    pytest.importorskip("fcntl")
    dataset, out = make_dataset(tmp_path / "set", ["a.png"]), tmp_path / "out"
    predictions = make_predictions(out / "predictions", ["a"])
    (out / "run.json").write_text("{}")
    source = f"--model_weight={WEIGHTS}" if with_detector else f"--pred_dir={predictions}"
    with locked(out):
        result = evaluate(tmp_path, source, f"--dataset={dataset}", f"--output_dir={out}")
    assert result.returncode == 1
    assert f"error: {out}: another run is still writing there" in result.stderr
    assert {path.name for path in out.rglob("*")} == {"predictions", "a.txt", "run.json", ".lock"}


def test_report_of_an_earlier_version_is_replaced(tmp_path: Path) -> None:
    """Like the report of a shipped experiment, which has no list of written files."""
    dataset = make_dataset(tmp_path / "set", ["a.png"])
    predictions = make_predictions(tmp_path / "predicted", ["a"])
    flags = [f"--pred_dir={predictions}", f"--dataset={dataset}", f"--output_dir={tmp_path}/out"]
    assert evaluate(tmp_path, *flags, "--save_errors=1").returncode == 0
    (tmp_path / "out/.records/written.json").unlink()
    results = [evaluate(tmp_path, *flags), evaluate(tmp_path, *flags, "--save_errors=1")]
    assert [result.returncode for result in results] == [0, 0], results


def test_default_detector_does_not_write_to_the_experiments(tmp_path: Path) -> None:
    """If no image can be read, the error says so instead of reporting missing predictions."""
    before = experiment_files()
    dataset = make_dataset(tmp_path / "set", ["a.png"])
    result = evaluate(tmp_path, f"--dataset={dataset}")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "test_results" / DEFAULT_EXPERIMENT / "results.json").is_file()
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
