"""The folder of predictions to be evaluated, and the settings with which they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import PostprocessConfig, ProtocolConfig
from utils.errors import ConfigError, UserError
from utils.evaluation.predictions import prediction_file
from utils.runtime.files import disk_errors, make_folder, write_text
from utils.runtime.manifest import read_object, require_same_settings

PREDICTION_FOLDER = "predictions"  # below the folder of the results
_RUN_FILE = "run.json"  # beside the folder, because other evaluators treat everything inside it as an event


@dataclass(frozen=True)
class PredictionSet:
    """Predictions and the settings with which they were made.

    Attributes:
        experiment: name of the folder of the results.
        folder: folder of the files `<event>/<image>.txt`.
        checkpoint: name of the checkpoint file, or None if it is unknown.
        protocol: test protocol in one line.
        settings: everything that the predictions depend on.
    """

    experiment: str
    folder: Path
    checkpoint: str | None
    protocol: str
    settings: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path, experiment: str | None) -> PredictionSet:
        """Open existing predictions; a file beside the folder describes those that this project made.

        Raises:
            UserError: there is no such folder.
        """
        if not folder.is_dir():
            raise UserError(f"--pred_dir {folder}: no such folder")
        folder = folder.resolve()
        saved = read_object(folder.parent / _RUN_FILE) if folder.name == PREDICTION_FOLDER else {}
        name = experiment or saved.get("experiment") or folder.name
        protocol = saved.get("protocol") or f"as the predictions in {folder} were made"
        return cls(name, folder, saved.get("checkpoint"), protocol, saved.get("settings", {}))

    @property
    def files(self) -> list[Path]:
        """The prediction files that exist."""
        return list(self.folder.rglob("*.txt"))

    def begin(self, names: Sequence[str], *, resume: bool) -> list[str]:
        """Create the folder, or continue an interrupted run.

        Args:
            names: names of all images.
            resume: whether to keep the predictions of an interrupted run instead of removing them.

        Returns:
            Names of the images that have predictions already.

        Raises:
            ConfigError: the predictions to be kept were made with other settings.
            UserError: the folder cannot be written to.
        """
        with disk_errors(make_folder(self.folder)):
            former = self.files
            run_file = self.folder.parent / _RUN_FILE
            if resume and former:
                self._check_same(read_object(run_file).get("settings"))
                return [name for name in names if prediction_file(self.folder, name).is_file()]
            if former and not run_file.is_file():
                raise UserError(f"{former[0]}: was not written by test.py and is kept; choose another --output_dir")
            for file in former:
                file.unlink()
            values = {
                "experiment": self.experiment,
                "checkpoint": self.checkpoint,
                "protocol": self.protocol,
                "settings": self.settings,
            }
            write_text(run_file, json.dumps(values, indent=2) + "\n")
            return []

    def _check_same(self, saved: Mapping[str, Any] | None) -> None:
        if saved is None:
            raise ConfigError(f"--resume: {self.folder} does not say how its predictions were made; drop --resume")
        require_same_settings(saved, self.settings, self.folder)


def describe_protocol(protocol: ProtocolConfig, config: PostprocessConfig) -> str:
    """Describe in one line everything but the model that an AP depends on."""
    size = {"original": "original size", "vga": "VGA (640x640, padded)"}.get(protocol.protocol, protocol.protocol)
    passes = [name for name, on in (("flip", protocol.flip), ("multi-scale", protocol.multi_scale)) if on]
    parts = [
        size,
        " + ".join([*passes, "box voting"]) if passes else "single pass",
        f"score > {config.confidence_threshold}",
        f"NMS {config.nms_threshold}",
        f"top-k {config.top_k}" if config.top_k else "no top-k",
        *([f"{config.keep_top_k} kept"] if config.keep_top_k else []),
        "integer boxes" if protocol.integer_boxes else "boxes with decimals",
        "clipped" if config.clip_boxes else "not clipped",
    ]
    return ", ".join(parts)
