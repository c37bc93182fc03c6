"""Tests of train.py, run as a user runs it: training, resuming, validation and error messages."""

from __future__ import annotations

import csv
import functools
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import train as script
from config import ROOT, ModelConfig
from engine.training import Trainer
from models.checkpoint import load_checkpoint
from models.image_pyramid import build_model
from tests.ground_truth import save_ground_truth
from tests.scripts import ScriptProcess, run_process, run_processes, run_script
from utils.runtime import logger
from utils.runtime.experiment import Experiment, load_config
from utils.runtime.files import locked

FAST = [
    "--gpu_num=-1",
    "--backbone=mobilenet0.25",
    "--im_size=64",
    "--batch_size=2",
    "--num_workers=0",
    "--eval_every=1",
]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Four images with bright squares as faces: one with landmarks, one without, two faces, and no face."""
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
    """A new experiment below experiments/, removed afterwards."""
    folder = ROOT / "experiments" / f"pytest_{os.getpid()}"
    request.addfinalizer(lambda: shutil.rmtree(folder, ignore_errors=True))
    return Experiment(folder)


def arguments(dataset: Path, experiment: Experiment, *flags: str) -> list[str]:
    return [f"--experiment_name={experiment.folder.name}", f"--dataset={dataset}", *FAST, *flags]


def draw_no_curves() -> None:
    """Do not plot the curves, which takes longer than the epochs."""
    logger._draw_curves = lambda path, rows: None


def train(dataset: Path, experiment: Experiment, *flags: str) -> subprocess.CompletedProcess[str]:
    """Train in this process."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(logger, "_draw_curves", logger._draw_curves)  # is restored afterwards
        draw_no_curves()
        result = run_script(script, *arguments(dataset, experiment, *flags))
    logging.getLogger(f"training.{experiment.log_folder}").handlers.clear()  # those of a run that failed
    return result


def table(experiment: Experiment) -> bytes:
    return (experiment.log_folder / "metrics.csv").read_bytes()


def log_lines(experiment: Experiment) -> list[str]:
    """Return the lines of the log without their times."""
    return [line[20:] for line in (experiment.log_folder / "logs.txt").read_text().splitlines()]


def losses(experiment: Experiment) -> list[float]:
    with (experiment.log_folder / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_training_writes_the_documented_files(dataset: Path, experiment: Experiment) -> None:
    flags = ["--epochs=3", "--num_anchor=2"]
    result = run_process("train", *arguments(dataset, experiment, *flags))
    assert result.returncode == 0, result.stderr
    assert f"4 training images on cpu, 1 process(es); dataset {dataset}; experiment" in result.stdout
    config = load_config(experiment.config_file)
    assert (config.train.epochs, config.model.num_anchor, config.data.im_size) == (3, 2, 64)
    for name in ("logs.txt", "metrics.csv", "curves.png"):
        assert (experiment.log_folder / name).stat().st_size > 0
    assert list(experiment.log_folder.glob("events.out.tfevents.*"))
    best = load_checkpoint(experiment.checkpoint("mobilenet0.25", "best"))
    assert best.model_config == config.model
    assert 0 <= best.training["val_ap"] <= 1
    assert len(losses(experiment)) == 3


def test_experiment_that_another_run_uses_is_refused(dataset: Path, experiment: Experiment) -> None:
    pytest.importorskip("fcntl")
    with locked(experiment.folder):
        result = train(dataset, experiment, "--epochs=1")
    assert result.returncode == 1
    assert f"error: {experiment.folder}: another run is still writing there" in result.stderr
    assert [path.name for path in experiment.folder.iterdir()] == [".lock"]


def test_run_killed_three_times_ends_with_the_same_weights(dataset: Path, experiment: Experiment) -> None:
    """Killed at any moment, also within an epoch, the same command resumes and ends like an uninterrupted run."""
    flags = ["--epochs=6", "--learning_rate=0.001", "--num_workers=1", "--ema_decay=0.9", "--save_minutes=0.0001"]
    last = experiment.checkpoint("mobilenet0.25", "last")
    for kill in range(3):
        process = ScriptProcess("train", *arguments(dataset, experiment, *flags), prepare=draw_no_curves)
        before = last.stat().st_mtime_ns if kill else 0
        deadline = time.monotonic() + 120
        while (last.stat().st_mtime_ns if last.exists() else 0) == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05 * kill)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    resumed = train(dataset, experiment, *flags)
    assert "continuing after epoch" in resumed.stdout

    uninterrupted = Experiment(experiment.folder / "uninterrupted")
    name = str(uninterrupted.folder.relative_to(ROOT / "experiments"))
    alone = train(dataset, experiment, *flags, f"--experiment_name={name}")
    assert alone.returncode == 0, alone.stderr
    assert table(experiment) == table(uninterrupted)
    assert len(losses(experiment)) == 6
    for which in ("best", "last"):
        ours, theirs = (
            load_checkpoint(each.checkpoint("mobilenet0.25", which)) for each in (experiment, uninterrupted)
        )
        assert all(torch.equal(ours.state[name], theirs.state[name]) for name in theirs.state)


def test_metrics_depend_on_the_seed_and_not_on_the_number_of_workers(dataset: Path, experiment: Experiment) -> None:
    flags = ["--epochs=2", "--mosaic_probability=0.5"]
    assert train(dataset, experiment, *flags, "--num_workers=0").returncode == 0
    first = table(experiment)
    lines = log_lines(experiment)
    shutil.rmtree(experiment.folder)
    assert train(dataset, experiment, *flags, "--num_workers=2", "--resume=False").returncode == 0
    assert table(experiment) == first
    assert log_lines(experiment) == lines
    assert train(dataset, experiment, *flags, "--seed=1", "--resume=False").returncode == 0
    assert table(experiment) != first


@pytest.mark.parametrize(("batch_size", "number"), [(1, signal.SIGINT), (4, signal.SIGTERM)])
def test_interrupted_run_says_how_to_resume(
    dataset: Path, experiment: Experiment, batch_size: int, number: signal.Signals
) -> None:
    """Within an epoch or, if it has a single step, between two epochs; workers receive the signal as well."""
    flags = ["--epochs=500", "--save_minutes=0", f"--batch_size={batch_size}", "--num_workers=1"]
    process = ScriptProcess("train", *arguments(dataset, experiment, *flags), prepare=os.setsid)
    deadline = time.monotonic() + 120
    while not experiment.checkpoint("mobilenet0.25", "last").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, number)
    result = process.wait()
    assert result.returncode == 130, result.stderr
    assert "the same command continues from here" in result.stdout
    assert "Traceback" not in result.stderr
    done = load_checkpoint(experiment.checkpoint("mobilenet0.25", "last")).training["epoch"]
    resumed = train(dataset, experiment, f"--epochs={done + 1}", f"--batch_size={batch_size}")
    assert f"continuing after epoch {done}" in resumed.stdout


@pytest.mark.parametrize(
    "more", [["--batch_size=4"], ["--batch_size=2", "--accumulate=2", "--freeze_backbone_epochs=1"]], ids=len
)
def test_two_processes_train_the_same_weights_as_one(dataset: Path, experiment: Experiment, more: list[str]) -> None:
    """Batch normalisation is frozen, because on the CPU each process would have its own statistics."""
    flags = ["--epochs=3", "--freeze_bn", "--learning_rate=0.001", "--ema_decay=0.5", *more]
    alone = train(dataset, experiment, *flags)
    assert alone.returncode == 0, alone.stderr
    shared = Experiment(experiment.folder / "shared")
    name = f"--experiment_name={shared.folder.relative_to(ROOT / 'experiments')}"
    result = run_processes("train", 2, *arguments(dataset, experiment, *flags, name))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch 3: ") == 1
    with (experiment.log_folder / "metrics.csv").open() as one, (shared.log_folder / "metrics.csv").open() as two:
        for row, other in zip(csv.DictReader(one), csv.DictReader(two), strict=True):
            values = {name: float(value) for name, value in row.items()}
            assert {name: float(value) for name, value in other.items()} == pytest.approx(values, rel=1e-3, abs=1e-6)
    states = [load_checkpoint(each.checkpoint("mobilenet0.25", "last")).state for each in (experiment, shared)]
    assert all(torch.allclose(states[0][name], states[1][name], atol=1e-5) for name in states[0])


def stop_at_the_first_save() -> None:
    save = Trainer._save_last

    def save_and_stop(self: Trainer) -> None:
        save(self)
        raise KeyboardInterrupt

    Trainer._save_last = save_and_stop  # type: ignore[method-assign]


def test_two_processes_that_stop_within_an_epoch_have_its_mean_losses(dataset: Path, experiment: Experiment) -> None:
    flags = ["--epochs=1", "--freeze_bn", "--mosaic_probability=0.5"]
    assert run_processes("train", 2, *arguments(dataset, experiment, *flags)).returncode == 0
    whole = table(experiment)
    flags += ["--resume=False", "--save_minutes=0.00001"]
    stopped = run_processes("train", 2, *arguments(dataset, experiment, *flags), prepare=stop_at_the_first_save)
    assert stopped.returncode == 130
    assert load_checkpoint(experiment.checkpoint("mobilenet0.25", "last")).training["position"] == 2
    resumed = run_processes("train", 2, *arguments(dataset, experiment, *flags, "--resume"))
    assert "continuing after epoch 0 and 2 images of the next" in resumed.stdout
    assert table(experiment) == whole


def test_full_disk_ends_in_one_line_with_the_checkpoint_intact(dataset: Path, experiment: Experiment) -> None:
    """Files are limited to 100 kB, which is enough for logs but not for checkpoints."""
    assert train(dataset, experiment, "--epochs=1").returncode == 0
    last = experiment.checkpoint("mobilenet0.25", "last")
    before = last.read_bytes()
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    result = ScriptProcess("train", *arguments(dataset, experiment, "--epochs=2"), prepare=limit).wait()
    assert result.returncode == 1
    assert "cannot be written" in result.stderr
    assert "the previous checkpoint is intact" in result.stderr
    assert "Traceback" not in result.stderr
    assert last.read_bytes() == before
    assert {path.name for path in last.parent.iterdir()} == {last.name, last.name.replace("last", "best")}


def test_loss_that_is_not_finite_names_the_images(dataset: Path, experiment: Experiment) -> None:
    result = train(dataset, experiment, "--epochs=9", "--learning_rate=1e15", "--warmup_epochs=0")
    assert result.returncode == 1
    assert "has no finite gradient; the last checkpoint is kept" in result.stderr
    assert str(dataset / "train/images") in result.stderr
    assert result.stderr.count("\n") == 1
    last = experiment.checkpoint("mobilenet0.25", "last")
    if last.exists():
        assert all(torch.isfinite(tensor).all() for tensor in load_checkpoint(last).state.values())


def test_unreadable_image_is_named_once_and_counted(dataset: Path, experiment: Experiment) -> None:
    broken = dataset / "train/images/1.png"
    broken.write_bytes(broken.read_bytes()[:50])
    result = train(dataset, experiment, "--epochs=3")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("warning: ") == 1
    assert "1 training images could not be read: " in result.stdout
    assert str(broken) in result.stdout.splitlines()[-2]


def test_training_stops_early_without_progress(dataset: Path, experiment: Experiment) -> None:
    """With a learning rate near zero and frozen statistics, no validation improves on the first."""
    flags = ["--epochs=9", "--patience=2", "--learning_rate=1e-12", "--freeze_bn"]
    result = train(dataset, experiment, *flags)
    assert "no improvement in 2 validations: stopping early" in result.stdout
    assert len(losses(experiment)) == 3
    again = train(dataset, experiment, *flags)
    assert again.returncode == 0, again.stderr
    assert len(losses(experiment)) == 3


def test_backbone_is_frozen_in_the_first_epochs_only(dataset: Path, experiment: Experiment) -> None:
    flags = ["--freeze_backbone_epochs=1", "--weight_decay=0.1", "--fine_levels=2", "--fine_channels=8,12"]
    assert train(dataset, experiment, "--epochs=1", *flags).returncode == 0
    last = experiment.checkpoint("mobilenet0.25", "last")
    torch.manual_seed(0)
    start = build_model(load_checkpoint(last).model_config).state_dict()
    frozen = load_checkpoint(last).state
    backbones = [[name for name in start if name.startswith(part)] for part in ("backbone.", "upsampled_backbone.")]
    assert all(torch.equal(start[name], frozen[name]) for names in backbones for name in names)
    assert not all(torch.equal(start[name], frozen[name]) for name in start)
    assert train(dataset, experiment, "--epochs=2", *flags).returncode == 0
    trained = load_checkpoint(last).state
    assert not any(all(torch.equal(start[name], trained[name]) for name in names) for names in backbones)


def test_accumulated_batches_make_one_step(dataset: Path, experiment: Experiment) -> None:
    """Four images in batches of one: three batches make the first step, the last makes the second."""
    flags = ["--batch_size=1", "--accumulate=3", "--ema_decay=0.5", "--freeze_bn"]
    result = train(dataset, experiment, "--epochs=1", *flags)
    assert result.returncode == 0, result.stderr
    last = load_checkpoint(experiment.checkpoint("mobilenet0.25", "last"))
    assert int(last.training["averaged"]["n_averaged"]) == 2


def test_parameter_groups_and_optimizer_cannot_change_on_resume(dataset: Path, experiment: Experiment) -> None:
    assert train(dataset, experiment, "--epochs=1").returncode == 0
    result = train(dataset, experiment, "--epochs=2", "--backbone_rate_factor=0.1")
    assert result.returncode == 1
    assert "keep --new_rate_factor and --backbone_rate_factor as they were" in result.stderr
    other = train(dataset, experiment, "--epochs=2", "--optimizer=adamw")
    assert other.returncode == 1
    assert "was trained with --optimizer=sgd; keep it" in other.stderr


def test_resuming_with_more_epochs_follows_the_longer_schedule(dataset: Path, experiment: Experiment) -> None:
    flags = ["--schedule=cosine", "--warmup_epochs=0", "--learning_rate=0.01"]
    assert train(dataset, experiment, "--epochs=2", *flags).returncode == 0
    assert train(dataset, experiment, "--epochs=4", *flags).returncode == 0
    rates = [float(row["learning_rate"]) for row in csv.DictReader(table(experiment).decode().splitlines())]
    assert rates == pytest.approx([0.005, 0, 0.00146447, 0], abs=1e-8)


def test_show_batch_writes_a_contact_sheet_without_training(dataset: Path, experiment: Experiment) -> None:
    """It reads no weights, so that a ResNet downloads nothing."""
    result = train(dataset, experiment, "--show_batch=3", "--backbone=resnet18", "--pretrained_backbone=absent.pth")
    assert result.returncode == 0, result.stderr
    assert cv2.imread(str(experiment.log_folder / "batch.png")) is not None
    assert not (experiment.folder / "ckpt").exists()


def test_experiment_is_a_recipe(dataset: Path, experiment: Experiment) -> None:
    shipped = load_config(ROOT / "experiments/mobilenet0.25_anc2_casT_fpn3/config.json")
    name = f"--experiment_name={experiment.folder.name}"
    flags = ["--gpu_num=-1", f"--dataset={dataset}", "--dataset_weights=1", "--im_size=64", "--num_workers=0"]
    recipe = "--recipe=mobilenet0.25_anc2_casT_fpn3"
    absent = run_script(script, name, recipe, *flags)
    assert absent.returncode == 1
    assert f"error: {shipped.train.teacher}: " in absent.stderr
    weights = ROOT / "experiments/mobilenet0.25_anc2_casT_fpn3/ckpt/mobilenet0.25_ckpt-best.pth"
    result = run_script(script, name, recipe, *flags, f"--teacher={weights}", f"--pretrained_detector={weights}")
    assert result.returncode == 0, result.stderr
    config = load_config(experiment.config_file)
    assert (config.model, config.loss) == (shipped.model, shipped.loss)
    assert (config.train.learning_rate, config.train.epochs) == (shipped.train.learning_rate, shipped.train.epochs)


def test_finished_run_is_not_continued(dataset: Path, experiment: Experiment) -> None:
    assert train(dataset, experiment, "--epochs=1").returncode == 0
    again = train(dataset, experiment, "--epochs=1")
    assert again.returncode == 0
    assert "all 1 epochs are done; give more --epochs" in again.stdout
    assert "continuing" not in again.stdout


def test_weight_averaging_can_start_on_resume(dataset: Path, experiment: Experiment) -> None:
    assert train(dataset, experiment, "--epochs=1").returncode == 0
    result = train(dataset, experiment, "--epochs=2", "--ema_decay=0.5")
    assert result.returncode == 0, result.stderr
    last = load_checkpoint(experiment.checkpoint("mobilenet0.25", "last"))
    assert int(last.training["averaged"]["n_averaged"]) == 2  # the steps of the second epoch


def test_official_ground_truth_is_used_for_validation(dataset: Path, experiment: Experiment) -> None:
    images = dataset / "val/images/0--Event"
    images.mkdir()
    shutil.move(dataset / "val/images/0.png", images / "0.jpg")  # as in WIDER FACE
    save_ground_truth(dataset / "val/gt", {"0--Event": {"0": [[20, 10, 24, 24, 0, 1, 1]]}})
    result = train(dataset, experiment, "--epochs=1")
    assert result.returncode == 0, result.stderr
    assert f"validation: mean of easy, medium and hard AP on the 1 images of {dataset / 'val/gt'}" in result.stdout
    assert "false boxes per image, score from 0.5: " in result.stdout
    with (experiment.log_folder / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    subsets = [float(row[f"val/ap_{subset}"]) for subset in ("easy", "medium", "hard")]
    assert float(row["val/ap"]) == pytest.approx(sum(subsets) / 3)


def test_pretrained_detector_initialises_the_model(dataset: Path, experiment: Experiment, shared: Path) -> None:
    weights = shared / "weights/mobilenet0.25_Final.pth"
    flags = ["--epochs=1", "--model_version=tina", "--cascade=True", f"--pretrained_detector={weights}"]
    result = train(dataset, experiment, *flags)
    assert result.returncode == 0, result.stderr
    # Weight and bias of the IoU branch, two stages, three levels.
    assert "12 tensors are randomly initialised" in result.stdout
    model = load_config(experiment.config_file).model
    assert (model.num_anchor, model.cascade, model.score_exponent) == (2, True, ModelConfig.score_exponent)


def test_narrow_fine_levels_are_distilled_from_the_pretrained_detector(
    dataset: Path, experiment: Experiment, tmp_path: Path
) -> None:
    scales = ["--num_anchor=2", "--cascade=False", "--model_version=retina", "--fine_levels=2", "--coarse_share=0.3"]
    assert train(dataset, experiment, *scales, "--epochs=1").returncode == 0
    wide = tmp_path / "wide.pth"
    experiment.checkpoint("mobilenet0.25", "best").rename(wide)
    shutil.rmtree(experiment.folder)
    narrow = [f"--pretrained_detector={wide}", f"--teacher={wide}", "--fine_channels=8,12", "--context_share=0"]
    # Only new parameters are trained.
    rates = ["--learning_rate=1e-12", "--new_rate_factor=1e9", "--freeze_bn", "--epochs=2"]
    result = train(dataset, experiment, *scales, *narrow, *rates)
    assert result.returncode == 0, result.stderr
    with (experiment.log_folder / "metrics.csv").open() as file:
        first, second = (float(row["stage1/distil"]) for row in csv.DictReader(file))
    assert second < first
    before = load_checkpoint(wide).state
    after = load_checkpoint(experiment.checkpoint("mobilenet0.25", "last")).state
    assert after["upsampled_fpn.merge.0.0.weight"].shape == (8, 8, 3, 3)
    assert all(torch.allclose(after[name], before[name]) for name in before if name.startswith(("backbone.", "fpn.")))


def test_without_validation_the_last_epoch_is_the_best(dataset: Path, experiment: Experiment) -> None:
    shutil.rmtree(dataset / "val")
    result = train(dataset, experiment, "--epochs=2")
    assert result.returncode == 0, result.stderr
    assert "no val/ with label.txt or gt/" in result.stdout
    assert load_checkpoint(experiment.checkpoint("mobilenet0.25", "best")).training["epoch"] == 2


def test_architecture_cannot_change_on_resume(dataset: Path, experiment: Experiment) -> None:
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
        ([f"--dataset={'x' * 300}"], "cannot be used (File name too long)"),
        (["--pretrained_backbone=nowhere.pth"], "--pretrained_backbone nowhere.pth: no such file"),
        (["--pretrained_detector=nowhere.pth"], "nowhere.pth: cannot be read"),
        (["--pretrained_detector=a", "--pretrained_backbone=b"], "drop --pretrained_backbone"),
        (["--amp"], "--amp needs a CUDA device"),
        (["--sync_bn"], "--sync_bn needs several processes with a CUDA device each"),
        (["--best_metric=hard"], "--best_metric=hard needs the official ground truth"),
        (["--dataset_weights=1,2"], "--dataset_weights"),
    ],
)
def test_user_errors_end_in_one_line(dataset: Path, experiment: Experiment, flags: list[str], message: str) -> None:
    result = train(dataset, experiment, *flags)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--epochs=0", "--epochs must be positive, got 0"),
        (f"--experiment_name={'x' * 300}", "--experiment_name is too long"),
        ("--ema_decay=1", "--ema_decay must lie in [0, 1), got 1.0"),
    ],
)
def test_wrong_values_exit_with_status_2(dataset: Path, experiment: Experiment, flag: str, message: str) -> None:
    result = train(dataset, experiment, flag)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_malformed_label_is_refused_with_its_line(dataset: Path, experiment: Experiment) -> None:
    labels = dataset / "train/label.txt"
    labels.write_text(labels.read_text().replace("# 2.png", "1 2 3"))
    result = train(dataset, experiment)
    assert result.returncode == 1
    assert f"{labels}:5: expected 4 numbers" in result.stderr
