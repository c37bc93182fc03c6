"""Write a detector's network for ONNX Runtime: python -m models.export --experiment_name=NAME --output=FILE.

The file takes `images`, (B, H, W, 3) uint8 BGR of any number and size, and gives the raw outputs of the last stage, one
row a prior: `class_logits`, `box_deltas` and, where the model has them, `landmark_deltas`, `iou_logits`, `priors`. The
architecture, with anchors and variances to decode them by, is its metadata `model`, as JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from config import (
    DEFAULT_EXPERIMENT,
    ROOT,
    ConfigError,
    ModelConfig,
    RunOptions,
    UserError,
    WeightOptions,
    option,
    parse_flags,
)
from models.backend import OnnxBackend, TorchBackend, export_onnx, missing_onnx_packages, output_names
from models.detector import build_network
from models.fuse import fuse_batch_norm
from models.retinaface import RetinaFace
from utils.checkpoint import load_checkpoint, locate_checkpoint
from utils.cli import run
from utils.experiment import user_path
from utils.files import disk_errors

_CHECKED_SHAPES = ((1, 160, 160, 3), (2, 97, 210, 3))
_TOLERANCE = 1e-3  # of logits and deltas: a hundredth of a pixel in a box of 100


@dataclass(frozen=True)
class ExportOptions:
    """What is written."""

    output: str = option("detector.onnx", "file to write; one that is there is replaced")


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse_flags(__doc__ or "", (RunOptions(), WeightOptions(), ExportOptions(), ModelConfig), argv)
    if missing := missing_onnx_packages():
        raise ConfigError(f"ONNX needs {', '.join(missing)}; pip install them")
    name = flags.apply(RunOptions()).experiment_name or DEFAULT_EXPERIMENT
    checkpoint = load_checkpoint(
        locate_checkpoint(ROOT / "experiments", name, flags.apply(WeightOptions()).model_weight), flags
    )
    network = fuse_batch_norm(build_network(checkpoint))
    output = user_path(flags.apply(ExportOptions()).output)
    if not output.parent.is_dir():
        raise ConfigError(f"--output={output}: there is no folder {output.parent}; make it, or choose another")
    with disk_errors(output):
        export_onnx(network, output)
    difference = largest_difference(network, output)
    if difference > _TOLERANCE:
        raise UserError(f"{output}: its outputs differ from PyTorch's by {difference:.2g}; do not use it")
    size = output.stat().st_size / 1e6
    print(f"{output}: {checkpoint.path.name}, {size:.1f} MB; outputs equal PyTorch's up to {difference:.1g}")


@torch.inference_mode()
def largest_difference(network: RetinaFace, graph: Path) -> float:
    """Between any outputs of a network and of its graph, for noise of two sizes; relative where they exceed 1."""
    in_torch, in_onnx = TorchBackend(network), OnnxBackend(graph)
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for shape in _CHECKED_SHAPES:
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        expected, found = in_torch(images), in_onnx(images)
        for name in output_names(network.config):
            value = getattr(expected, name)
            difference = (getattr(found, name) - value).abs() / value.abs().clamp(min=1)
            largest = max(largest, float(difference.max()))
    return largest


if __name__ == "__main__":
    run(main)
