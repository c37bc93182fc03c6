"""Tests of the training log, its table and its TensorBoard events, also after resuming."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from utils.evaluation.wider_eval import Curve
from utils.runtime.images import read_image
from utils.runtime.logger import RunLog

pytest.importorskip("tensorboard")


def record(folder: Path, epochs: Mapping[int, Mapping[str, float]]) -> None:
    log = RunLog(folder)
    for epoch, metrics in epochs.items():
        log.epoch(epoch, metrics, images_per_second=12.34)
    log.close()


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_epoch_is_a_row_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, {1: {"loss": 2.5, "stage1/box": 1.0}, 2: {"loss": 1.25, "stage1/box": 0.5}})
    assert table(tmp_path) == [
        {"epoch": "1", "loss": "2.5", "stage1/box": "1.0"},
        {"epoch": "2", "loss": "1.25", "stage1/box": "0.5"},
    ]
    lines = (tmp_path / "logs.txt").read_text(encoding="utf-8").splitlines()
    assert [line[20:] for line in lines] == ["epoch 1: loss 2.5  stage1/box 1", "epoch 2: loss 1.25  stage1/box 0.5"]
    assert capsys.readouterr().out.splitlines() == [f"{line}  (12.3 images/s)" for line in lines]
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert read_image(tmp_path / "curves.png").shape[0] > 100
    assert not list(tmp_path.glob("*.tmp"))


def test_metric_of_some_epochs_leaves_the_others_blank(tmp_path: Path) -> None:
    record(tmp_path, {1: {"loss": 2.0}, 2: {"loss": 1.0, "val/ap50": 0.5}, 3: {"loss": 0.5}})
    assert [row["val/ap50"] for row in table(tmp_path)] == ["", "0.5", ""]


def test_resumed_run_keeps_earlier_rows_and_replaces_repeated_ones(tmp_path: Path) -> None:
    record(tmp_path, {1: {"loss": 9.0}, 2: {"loss": 8.0, "val/ap50": 0.1}, 3: {"loss": 7.0}, 4: {"loss": 6.0}})
    record(tmp_path, {3: {"loss": 5.0}})
    assert [(row["epoch"], row["loss"], row["val/ap50"]) for row in table(tmp_path)] == [
        ("1", "9.0", ""),
        ("2", "8.0", "0.1"),
        ("3", "5.0", ""),
    ]
    assert len((tmp_path / "logs.txt").read_text(encoding="utf-8").splitlines()) == 5


def test_run_opened_and_closed_changes_no_row(tmp_path: Path) -> None:
    record(tmp_path, {1: {"loss": 9.0}})
    before = (tmp_path / "metrics.csv").read_bytes()
    record(tmp_path, {})
    assert (tmp_path / "metrics.csv").read_bytes() == before


@pytest.mark.filterwarnings("ignore:Data has no positive values")
@pytest.mark.parametrize("loss", [0.0, float("nan"), float("inf")])
def test_zero_and_non_finite_values_can_be_logged(tmp_path: Path, loss: float) -> None:
    record(tmp_path, {1: {"loss": loss, "val/ap50": 0.0}})
    record(tmp_path, {2: {"loss": 1.0}})
    assert [row["loss"] for row in table(tmp_path)] == [str(loss), "1.0"]


def test_closed_log_releases_its_files(tmp_path: Path) -> None:
    record(tmp_path, {1: {"loss": 1.0}})
    assert logging.getLogger(f"training.{tmp_path}").handlers == []
    record(tmp_path, {2: {"loss": 0.5}})
    assert (tmp_path / "logs.txt").read_text(encoding="utf-8").count("epoch 2") == 1


def test_lines_may_contain_any_text(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.line("100% of ünïcode %s")
    log.close()
    assert (tmp_path / "logs.txt").read_text(encoding="utf-8").endswith("100% of ünïcode %s\n")


def test_curves_and_images_are_written_to_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    log = RunLog(tmp_path)
    log.curves({"hard": Curve(np.linspace(1, 0.5, 1000), np.linspace(0, 0.8, 1000), faces=10)}, epoch=3)
    log.image("validation/0", np.full((4, 6, 3), (255, 0, 0), np.uint8), epoch=3)
    log.step(7, 2.5, 0.01)
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert {"validation/hard"} <= set(events.Tags()["tensors"])
    assert events.Tags()["images"] == ["validation/0"]
    (step,) = events.Scalars("step/mean_loss")
    assert (step.step, step.value) == (7, 2.5)


def test_log_without_a_folder_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(None)
    log.line("text")
    log.step(1, 1.0, 0.1)
    log.epoch(1, {"loss": 1.0}, 5.0)
    log.curves({}, 1)
    log.image("a", np.zeros((1, 1, 3), np.uint8), 1)
    log.close()
    assert capsys.readouterr().out == ""


def test_full_disk_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "logs.txt").symlink_to("/dev/full")
    log = RunLog(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        log.line("text")
