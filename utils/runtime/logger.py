"""The log of a training run: text lines, a table of metrics, TensorBoard events and a plot of the curves."""

from __future__ import annotations

import csv
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from utils.evaluation.wider_eval import Curve
from utils.runtime.files import atomic_write

_CURVE_POINTS = 100


class RunLog:
    """Writes `logs.txt`, `metrics.csv`, `curves.png` and TensorBoard events into a folder, and lines to the terminal.

    A resumed run appends; rows of epochs that are trained again are replaced. Apart from the time of day, two runs
    with the same seed write the same files; speeds are only printed on the terminal.

    Raises:
        OSError: a file cannot be written; all methods may raise this.
    """

    def __init__(self, folder: Path | None) -> None:
        """`folder` must exist; None, for processes other than the main one, records nothing."""
        self.folder = folder
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import, and only training needs it

        self._tensorboard = SummaryWriter(str(folder))
        self._logger = logging.getLogger(f"training.{folder}")
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        handlers: dict[str, logging.Handler] = {
            "%(asctime)s %(message)s%(aside)s": logging.StreamHandler(sys.stdout),
            "%(asctime)s %(message)s": _FileHandler(folder / "logs.txt", encoding="utf-8"),
        }
        for line_format, handler in handlers.items():
            handler.setFormatter(logging.Formatter(line_format, "%Y-%m-%d %H:%M:%S"))
            self._logger.addHandler(handler)
        self._rows: dict[int, dict[str, float]] = _read_table(folder / "metrics.csv")

    def line(self, text: str, aside: str = "") -> None:
        """Write a line; `aside` is appended to it on the terminal only."""
        if self.folder:
            self._logger.info(text, extra={"aside": aside})

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        """Record loss and learning rate within an epoch; steps are counted over all epochs."""
        if self.folder:
            self._tensorboard.add_scalar("step/mean_loss", loss, step)
            self._tensorboard.add_scalar("step/learning_rate", learning_rate, step)

    def image(self, name: str, image: np.ndarray, epoch: int) -> None:
        """Record an (H, W, 3) uint8 BGR image."""
        if self.folder:
            self._tensorboard.add_image(name, np.ascontiguousarray(image[:, :, ::-1]), epoch, dataformats="HWC")

    def curves(self, curves: Mapping[str, Curve], epoch: int) -> None:
        """Record precision and recall by subset."""
        if not self.folder:
            return
        for subset, curve in curves.items():
            shown = np.linspace(0, len(curve.recall) - 1, _CURVE_POINTS).round().astype(int)[::-1]  # lowest score first
            precision, recall = curve.precision[shown], curve.recall[shown]
            hits = recall * curve.faces
            false = np.divide(hits * (1 - precision), precision, out=np.zeros_like(hits), where=precision > 0)
            counts = (hits, false, np.zeros_like(hits), curve.faces - hits)
            self._tensorboard.add_pr_curve_raw(
                f"validation/{subset}", *counts, precision, recall, epoch, num_thresholds=_CURVE_POINTS
            )

    def epoch(self, epoch: int, metrics: Mapping[str, float], images_per_second: float) -> None:
        """Record the means of an epoch, counted from 1."""
        if not self.folder:
            return
        for name, value in {**metrics, "images_per_second": images_per_second}.items():
            self._tensorboard.add_scalar(name, value, epoch)
        self._tensorboard.flush()
        self._rows = {number: row for number, row in self._rows.items() if number < epoch}
        self._rows[epoch] = dict(metrics)
        _write_table(self.folder / "metrics.csv", self._rows)
        _draw_curves(self.folder / "curves.png", self._rows)
        means = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.line(f"epoch {epoch}: {means}", aside=f"  ({images_per_second:.1f} images/s)")

    def close(self) -> None:
        if not self.folder:
            return
        self._tensorboard.close()
        for handler in list(self._logger.handlers):
            self._logger.removeHandler(handler)
            handler.close()


class _FileHandler(logging.FileHandler):
    """Raises errors such as a full disk, which `logging` would only print."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, the name is logging's
        raise  # called while the error is being handled


def _read_table(path: Path) -> dict[int, dict[str, float]]:
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {int(row.pop("epoch")): {name: float(value) for name, value in row.items() if value} for row in rows}


def _write_table(path: Path, rows: Mapping[int, Mapping[str, float]]) -> None:
    columns = ["epoch", *dict.fromkeys(name for row in rows.values() for name in row)]
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({"epoch": epoch, **row} for epoch, row in sorted(rows.items()))


def _draw_curves(path: Path, rows: Mapping[int, Mapping[str, float]]) -> None:
    """Plot losses above and validation metrics below, by epoch."""
    from matplotlib.figure import Figure  # instead of pyplot, which may need a display

    figure = Figure(figsize=(8, 7), layout="constrained")
    losses, validation = figure.subplots(2, 1, sharex=True)
    names = dict.fromkeys(name for row in rows.values() for name in row)
    for name in names:
        axes = validation if name.startswith("val/") else losses
        if name.startswith(("stage", "val/")) or name == "loss":
            points = [(epoch, row[name]) for epoch, row in sorted(rows.items()) if name in row]
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else "")
    losses.set(ylabel="training loss", yscale="log")
    validation.set(xlabel="epoch", ylabel="validation")
    for axes in (losses, validation):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
