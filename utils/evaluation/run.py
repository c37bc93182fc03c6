"""The predictions of one measurement in their folder, and how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import ConfigError, DetectionConfig, ProtocolConfig, UserError
from utils.evaluation.predictions import prediction_file
from utils.runtime.experiment import make_folder
from utils.runtime.files import disk_errors, replacing
from utils.runtime.manifest import first_difference, read_object

_FOLDER = "predictions"
_RUN_FILE = "run.json"  # beside the folder, for evaluators of others take all that lies in it for an event


@dataclass(frozen=True)
class EvaluationRun:
    """Predictions and their origin.

    Attributes:
        experiment: the name under which results are filed.
        folder: holds `<event>/<image>.txt`.
        checkpoint: the file's name, or None where it is not known.
        protocol: one line for people.
        settings: all that the predictions depend on, for scripts and to continue with.
    """

    experiment: str
    folder: Path
    checkpoint: str | None
    protocol: str
    settings: Mapping[str, Any]

    @classmethod
    def given(cls, folder: Path, experiment: str | None) -> EvaluationRun:
        """Predictions that are there already; those of our own say how they were made.

        Raises:
            UserError: there is no such folder.
        """
        if not folder.is_dir():
            raise UserError(f"--pred_dir {folder}: no such folder")
        folder = folder.resolve()
        saved = read_object(folder.parent / _RUN_FILE) if folder.name == _FOLDER else {}
        name = experiment or saved.get("experiment") or folder.name
        protocol = saved.get("protocol") or f"as the predictions in {folder} were made"
        return cls(name, folder, saved.get("checkpoint"), protocol, saved.get("settings", {}))

    @classmethod
    def of_detector(
        cls, results: Path, experiment: str, checkpoint: str, protocol: str, settings: Mapping[str, Any]
    ) -> EvaluationRun:
        """Predictions that are to be made below the folder `results`."""
        return cls(experiment, results / _FOLDER, checkpoint, protocol, settings)

    @property
    def files(self) -> list[Path]:
        """The prediction files that are there."""
        return list(self.folder.rglob("*.txt"))

    def begin(self, names: Sequence[str], *, resume: bool) -> list[str]:
        """Make the folder ready.

        Args:
            names: of all images.
            resume: keep what an interrupted run left, instead of removing it.

        Returns:
            The names that have predictions already.

        Raises:
            ConfigError: predictions are to be kept that were made in another way.
            UserError: the folder cannot be written to.
        """
        with disk_errors(make_folder(self.folder)):
            former = self.files
            run_file = self.folder.parent / _RUN_FILE
            if resume and former:
                self._check_same(read_object(run_file).get("settings"))
                return [name for name in names if prediction_file(self.folder, name).is_file()]
            for file in former:
                file.unlink()
            with replacing(run_file) as temporary:
                values = {
                    "experiment": self.experiment,
                    "checkpoint": self.checkpoint,
                    "protocol": self.protocol,
                    "settings": self.settings,
                }
                temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            return []

    def _check_same(self, saved: Mapping[str, Any] | None) -> None:
        if saved is None:
            raise ConfigError(f"--resume: {self.folder} does not say how its predictions were made; drop --resume")
        changed = first_difference(saved, self.settings)
        if changed is not None:
            raise ConfigError(
                f"--resume: the predictions in {self.folder} were made with {changed}; repeat the flags of that run, "
                "or drop --resume"
            )


def describe_protocol(protocol: ProtocolConfig, detection: DetectionConfig) -> str:
    """All that a figure depends on besides the network, in one line."""
    size = {"original": "original size", "vga": "VGA (640x640, padded)"}.get(protocol.protocol, protocol.protocol)
    passes = [name for name, on in (("flip", protocol.flip), ("multi-scale", protocol.multi_scale)) if on]
    parts = [
        size,
        " + ".join([*passes, "box voting"]) if passes else "single pass",
        f"score > {detection.confidence_threshold}",
        f"NMS {detection.nms_threshold}",
        f"top-k {detection.top_k}" if detection.top_k else "no top-k",
        *([f"{detection.keep_top_k} kept"] if detection.keep_top_k else []),
        "integer boxes" if protocol.integer_boxes else "boxes with decimals",
        "clipped" if detection.clip_boxes else "not clipped",
    ]
    return ", ".join(parts)
