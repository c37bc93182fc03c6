"""Tests of test.py, run as a user runs it: evaluating a detector, resuming, and predictions of other detectors."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import cv2
import pytest

import test
from config import ROOT
from tests.scripts import ScriptProcess, run_processes, run_script

EXPERIMENT = "mobilenet0.25_anc2_casT_fpn3"  # five times as fast as the default
WEIGHTS = ROOT / f"experiments/{EXPERIMENT}/ckpt/mobilenet0.25_ckpt-best.pth"
SAMPLES = ROOT / "data/sample_widerface"


@pytest.fixture
def results(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The results folder of an experiment in an empty folder of experiments."""
    experiments = tmp_path_factory.mktemp("experiments")
    monkeypatch.setattr(test, "EXPERIMENTS", experiments)
    return experiments / "own/results"


def measure(results: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return run_script(test, f"--experiment_name={results.parent.name}", "--gpu_num=-1", *flags)


def arguments(results: Path, *flags: str) -> list[str]:
    """Return flags for a subprocess, in which the folder of experiments is not patched."""
    return [f"--output_dir={results}", "--gpu_num=-1", *flags]


def detector_flags(*flags: str) -> list[str]:
    return [f"--model_weight={WEIGHTS}", "--dataset=sample_widerface", *flags]


def test_own_dataset_is_evaluated_over_all_faces(results: Path) -> None:
    result = measure(results, *detector_flags("--save_errors=3"))
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert last.startswith("AP over all labelled faces, not the official WIDER FACE figure : ")
    report = json.loads((results / "results.json").read_text())
    assert report["official"] is False
    assert report["ap"]["all"] == pytest.approx(float(last.split()[-1]), abs=1e-4)
    assert report["settings"]["detection"]["confidence_threshold"] == 0.02
    assert sum(row["faces"] for row in report["recall_by_height"]) == report["faces"]["all"]
    assert (results / "results.txt").read_text().splitlines()[-1] == last
    for name in ("pr_curves.png", "errors.png"):
        assert cv2.imread(str(results / name)) is not None
    images = sorted(path.stem for path in (SAMPLES / "images").iterdir())
    assert sorted(path.stem for path in (results / "predictions").rglob("*.txt")) == images
    assert 0.9 < report["ap"]["all"] <= 1
    with (results.parents[1] / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["experiment"] == results.parent.name
    assert (row["images"], row["easy"]) == (str(len(images)), "")
    assert float(row["all"]) == pytest.approx(report["ap"]["all"], abs=1e-4)

    again = measure(results, f"--pred_dir={results / 'predictions'}", "--dataset=sample_widerface")
    assert again.stdout.splitlines()[-1] == last
    assert "score > 0.02" in again.stdout  # the settings are stored with our own predictions


def test_resume_detects_only_missing_images(results: Path) -> None:
    assert measure(results, *detector_flags()).returncode == 0
    predictions = sorted((results / "predictions").rglob("*.txt"))
    whole = json.loads((results / "results.json").read_text())["ap"]
    predictions[0].unlink()
    before = [path.stat().st_mtime_ns for path in predictions[1:]]
    result = measure(results, *detector_flags("--resume"))
    assert "\n1 images in " in result.stdout
    assert f"{len(predictions) - 1} from an earlier run" in result.stdout
    assert [path.stat().st_mtime_ns for path in predictions[1:]] == before
    assert json.loads((results / "results.json").read_text())["ap"] == whole

    other = measure(results, *detector_flags("--resume", "--nms_threshold=0.3"))
    assert other.returncode == 1
    assert "--resume: the results in" in other.stderr
    assert "were made with detection" in other.stderr
    assert other.stderr.count("\n") == 1
    assert [path.stat().st_mtime_ns for path in predictions[1:]] == before

    fresh = measure(results, *detector_flags("--nms_threshold=0.3"))
    assert f"replacing {len(predictions)} predictions of an earlier run" in fresh.stdout


def test_interrupted_run_can_be_evaluated_and_resumed(results: Path, tmp_path: Path) -> None:
    """After Ctrl-C the predictions so far can be evaluated, and --resume detects the rest."""
    (tmp_path / "images").mkdir()
    lines = []
    for number in range(16):
        shutil.copy(SAMPLES / "images/astronaut.jpg", tmp_path / f"images/{number}.jpg")
        lines.append(f"# {number}.jpg\n179 55 100 141\n")
    (tmp_path / "label.txt").write_text("".join(lines))
    flags = [f"--model_weight={WEIGHTS}", f"--dataset={tmp_path}", "--protocol=1600x2150"]
    process = ScriptProcess("test", *arguments(results, *flags))
    deadline = time.monotonic() + 120
    while not list((results / "predictions").rglob("*.txt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    result = process.wait()
    assert result.returncode == 130, result.stderr
    assert "of 16 images are done; --resume continues from here" in result.stdout
    done = len(list((results / "predictions").rglob("*.txt")))
    assert 0 < done < 16

    partial = measure(results, f"--pred_dir={results / 'predictions'}", f"--dataset={tmp_path}")
    assert partial.returncode == 0, partial.stderr
    assert f"{16 - done} of 16 images have no predictions and count as empty" in partial.stdout
    rest = measure(results, *flags, "--resume")
    assert f"{done} from an earlier run" in rest.stdout
    assert len(list((results / "predictions").rglob("*.txt"))) == 16


def test_two_processes_have_the_ap_of_one(results: Path) -> None:
    assert measure(results, *detector_flags()).returncode == 0
    single = json.loads((results / "results.json").read_text())
    result = run_processes("test", 2, *arguments(results, *detector_flags()))
    assert result.returncode == 0, result.stderr
    together = json.loads((results / "results.json").read_text())
    assert together["ap"] == pytest.approx(single["ap"], abs=1e-6)
    assert together["detected_in_this_run"] == single["detected_in_this_run"]


def test_unreadable_image_is_named_and_skipped(results: Path, tmp_path: Path) -> None:
    shutil.copytree(SAMPLES, tmp_path / "set")
    broken = tmp_path / "set/images/astronaut.jpg"
    broken.write_bytes(broken.read_bytes()[:1000])
    result = measure(results, f"--model_weight={WEIGHTS}", f"--dataset={tmp_path / 'set'}")
    assert result.returncode == 0, result.stderr
    assert "skipped astronaut: " in result.stdout
    report = json.loads((results / "results.json").read_text())
    assert [entry["name"] for entry in report["skipped"]] == ["astronaut"]
    assert report["without_predictions"] == ["astronaut"]


def test_predictions_of_another_detector_are_evaluated(results: Path, tmp_path: Path, shared: Path) -> None:
    """The predictions are the labelled faces of every second image."""
    lines = (shared / "data/widerface/val/label.txt").read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("#")]
    for start, end in list(zip(starts, [*starts[1:], len(lines)], strict=True))[::2]:
        name = lines[start][2:].removesuffix(".jpg")
        boxes = [f"{' '.join(line.split()[:4])} 0.9" for line in lines[start + 1 : end]]
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_text("\n".join([name, str(len(boxes)), *boxes]) + "\n")
    ground_truth = shared / "data/widerface/val/gt"
    result = measure(results, f"--pred_dir={tmp_path}", f"--gt_dir={ground_truth}", "--bootstrap=50")
    assert result.returncode == 0, result.stderr
    assert "200 of 400 images have no predictions and count as empty; first " in result.stdout
    words = result.stdout.splitlines()[-1].split()
    assert (words[:3], words[4:7], words[8:11]) == (["Easy", "AP", ":"], ["Medium", "AP", ":"], ["Hard", "AP", ":"])
    figures = [float(words[index]) for index in (3, 7, 11)]
    assert all(0.4 < figure < 0.6 for figure in figures)
    report = json.loads((results / "results.json").read_text())
    assert all(0.01 < error < 0.1 for error in report["ap_standard_errors"].values())
    assert list(report["ap"].values()) == pytest.approx(figures, abs=1e-4)


def test_biubug6_reaches_the_figures_of_its_own_evaluation(results: Path, shared: Path) -> None:
    """On the 400 development images, with integer boxes that are not clipped, as its program writes them."""
    flags = ["--integer_boxes", "--clip_boxes=False", f"--dataset={shared / 'data/widerface'}"]
    result = measure(results, f"--model_weight={shared / 'weights/mobilenet0.25_Final.pth'}", *flags)
    assert result.returncode == 0, result.stderr
    ap = json.loads((results / "results.json").read_text())["ap"]
    assert list(ap.values()) == pytest.approx([0.92036, 0.90573, 0.73636], abs=5e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pred_dir=nowhere", "--dataset=sample_widerface"], "--pred_dir nowhere: no such folder"),
        (
            ["--pred_dir=tests", "--dataset=sample_widerface"],
            "holds no predictions of these images",
        ),
        (["--pred_dir=tests", "--dataset=sample_widerface", "--flip"], "--flip has no effect with --pred_dir"),
        (["--pred_dir=tests", "--gt_dir=tests"], "tests: not the official ground truth"),
        (["--dataset=nowhere"], "--dataset nowhere: no folder"),
        ([f"--pred_dir={'x' * 300}", "--dataset=sample_widerface"], "cannot be used (File name too long)"),
        ([f"--dataset={'x' * 300}", "--gt_dir=tests", "--pred_dir=tests"], "cannot be used (File name too long)"),
        (["--dataset=tests"], "no val/label.txt"),
    ],
)
def test_user_errors_end_in_one_line(results: Path, flags: list[str], message: str) -> None:
    result = measure(results, *flags)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--protocol=huge", "invalid choice: 'huge'"),
        ("--save_errors=-1", "--save_errors must not be negative"),
        ("--confidence_threshold=2", "--confidence_threshold must lie in [0, 1]"),
    ],
)
def test_wrong_values_exit_with_status_2(results: Path, flag: str, message: str) -> None:
    result = measure(results, flag)
    assert result.returncode == 2
    assert message in result.stderr
