"""train.py as a user runs it: from a folder of labelled pictures to a detector, killed and continued on the way."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from config import ROOT, ExperimentConfig, ModelConfig
from tests.ground_truth import save_ground_truth
from utils.checkpoint import load_checkpoint
from utils.experiment import Experiment

FAST = ["--gpu_num=-1", "--backbone=mobilenet0.25", "--im_size=64", "--batch_size=2", "--num_workers=0"]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Four pictures with a bright square for a face: with landmarks, without, two faces, and none."""
    squares: list[list[tuple[int, int, int]]] = [[(20, 10, 24)], [(50, 30, 40)], [(5, 5, 20), (60, 40, 30)], []]
    for split in ("train", "val"):
        images = tmp_path / split / "images"
        images.mkdir(parents=True)
        lines: list[str] = []
        for number, faces in enumerate(squares):
            image = np.full((80, 100, 3), 60, np.uint8)
            lines.append(f"# {number}.png")
            for x, y, side in faces:
                image[y : y + side, x : x + side] = 220
                points = " ".join(f"{x + side / 2} {y + side / 2} 0" for _ in range(5)) if number != 1 else ""
                lines.append(f"{x} {y} {side} {side} {points}".strip())
            cv2.imwrite(str(images / f"{number}.png"), image)
        (tmp_path / split / "label.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> Experiment:
    """A name of its own below experiments/, removed afterwards."""
    folder = ROOT / "experiments" / f"pytest_{os.getpid()}"
    request.addfinalizer(lambda: shutil.rmtree(folder, ignore_errors=True))
    return Experiment(folder)


def command(dataset: Path, experiment: Experiment, *flags: str) -> list[str]:
    name = f"--experiment_name={experiment.folder.name}"
    return [sys.executable, "train.py", name, f"--dataset={dataset}", *FAST, *flags]


def train(dataset: Path, experiment: Experiment, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(dataset, experiment, *flags), cwd=ROOT, capture_output=True, text=True, check=False)


def losses(experiment: Experiment) -> list[float]:
    with (experiment.log_folder / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_training_leaves_what_the_readme_says(dataset: Path, experiment: Experiment) -> None:
    result = train(dataset, experiment, "--epochs=3", "--num_anchor=2")
    assert result.returncode == 0, result.stderr
    config = ExperimentConfig.load(experiment.config_file)
    assert (config.train.epochs, config.model.num_anchor, config.data.im_size) == (3, 2, 64)
    for name in ("logs.txt", "metrics.csv", "curves.png"):
        assert (experiment.log_folder / name).stat().st_size > 0
    assert list(experiment.log_folder.glob("events.out.tfevents.*"))
    best = load_checkpoint(experiment.checkpoint("mobilenet0.25", "best"))
    assert best.model == config.model
    assert 0 <= best.training["val_ap"] <= 1
    assert len(losses(experiment)) == 3


def test_killed_run_continues_as_if_undisturbed(dataset: Path, experiment: Experiment) -> None:
    """Kill -9 somewhere in the run; the same command goes on and ends with the losses of a run left alone."""
    undisturbed = Experiment(experiment.folder / "undisturbed")
    flags = ["--epochs=6", "--learning_rate=0.001", "--num_workers=1", "--ema_decay=0.9", "--freeze_bn"]
    process = subprocess.Popen(command(dataset, experiment, *flags), cwd=ROOT, stdout=subprocess.DEVNULL)
    last = experiment.checkpoint("mobilenet0.25", "last")
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done_before_the_kill = load_checkpoint(last).training["epoch"]

    resumed = train(dataset, experiment, *flags)
    assert f"continuing after epoch {done_before_the_kill}" in resumed.stdout
    name = str(undisturbed.folder.relative_to(ROOT / "experiments"))
    alone = train(dataset, experiment, *flags, f"--experiment_name={name}")
    assert alone.returncode == 0, alone.stderr
    assert len(losses(experiment)) == 6
    assert losses(experiment) == losses(undisturbed)


def test_average_can_begin_in_the_middle_of_a_run(dataset: Path, experiment: Experiment) -> None:
    assert train(dataset, experiment, "--epochs=1").returncode == 0
    result = train(dataset, experiment, "--epochs=2", "--ema_decay=0.5")
    assert result.returncode == 0, result.stderr
    last = load_checkpoint(experiment.checkpoint("mobilenet0.25", "last"))
    assert int(last.training["averaged"]["n_averaged"]) == 2  # the steps of the second epoch


def test_official_ground_truth_is_what_validates(dataset: Path, experiment: Experiment) -> None:
    images = dataset / "val/images/0--Event"
    images.mkdir()
    shutil.move(dataset / "val/images/0.png", images / "0.jpg")  # as WIDER FACE names them
    save_ground_truth(dataset / "val/gt", {"0--Event": {"0": [[20, 10, 24, 24, 0, 1, 1]]}})
    result = train(dataset, experiment, "--epochs=1")
    assert result.returncode == 0, result.stderr
    assert f"validation: mean of easy, medium and hard AP on the 1 images of {dataset / 'val/gt'}" in result.stdout
    with (experiment.log_folder / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    subsets = [float(row[f"val/ap_{subset}"]) for subset in ("easy", "medium", "hard")]
    assert float(row["val/ap"]) == pytest.approx(sum(subsets) / 3)


def test_started_from_a_detector_it_begins_where_that_one_stood(
    dataset: Path, experiment: Experiment, shared: Path
) -> None:
    weights = shared / "weights/mobilenet0.25_Final.pth"
    flags = ["--epochs=1", "--model_version=tina", "--cascade=True", f"--pretrained_detector={weights}"]
    result = train(dataset, experiment, *flags)
    assert result.returncode == 0, result.stderr
    assert "12 tensors start at random" in result.stdout  # weight and bias of the IoU branch, two stages, three levels
    model = ExperimentConfig.load(experiment.config_file).model
    assert (model.num_anchor, model.cascade, model.score_exponent) == (2, True, ModelConfig.score_exponent)


def test_without_validation_images_the_newest_epoch_is_the_best(dataset: Path, experiment: Experiment) -> None:
    shutil.rmtree(dataset / "val")
    result = train(dataset, experiment, "--epochs=2")
    assert result.returncode == 0, result.stderr
    assert "no val/ with label.txt or gt/" in result.stdout
    assert load_checkpoint(experiment.checkpoint("mobilenet0.25", "best")).training["epoch"] == 2


def test_saved_architecture_cannot_be_changed_on_the_way(dataset: Path, experiment: Experiment) -> None:
    assert train(dataset, experiment, "--epochs=1").returncode == 0
    before = experiment.config_file.read_text()
    result = train(dataset, experiment, "--epochs=2", "--num_anchor=2")
    assert result.returncode == 1
    assert "another architecture" in result.stderr
    assert "Traceback" not in result.stderr
    assert json.loads(experiment.config_file.read_text()) == json.loads(before)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset=nowhere"], "nowhere"),
        (["--pretrained_backbone=nowhere.pth"], "--pretrained_backbone nowhere.pth: no such file"),
        (["--pretrained_detector=nowhere.pth"], "nowhere.pth: cannot be read"),
        (["--epochs=0"], "--epochs must be positive"),
        (["--pretrained_detector=a", "--pretrained_backbone=b"], "drop --pretrained_backbone"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    dataset: Path, experiment: Experiment, flags: list[str], message: str
) -> None:
    result = train(dataset, experiment, *flags)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_malformed_label_is_refused_with_its_line(dataset: Path, experiment: Experiment) -> None:
    labels = dataset / "train/label.txt"
    labels.write_text(labels.read_text().replace("# 2.png", "1 2 3"))
    result = train(dataset, experiment)
    assert result.returncode == 1
    assert f"{labels}:5: expected 4 numbers" in result.stderr
