"""Write a detector's network for ONNX Runtime: python export.py --experiment_name=NAME --output=FILE.

The file takes `images`, (B, H, W, 3) uint8 BGR of any number and size, and gives the raw outputs of the last stage, one
row a prior: `class_logits`, `box_deltas` and, where the model has them, `landmark_deltas`, `iou_logits`, `priors`. The
architecture, with anchors and variances to decode them by, is its metadata `model`, as JSON.

With --with_nms it takes one image, (1, H, W, 3), and gives its faces, best first: `boxes` (N, 4) xyxy in pixels,
`scores` and, where the model has them, `landmarks` (N, 5, 2).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import (
    DEFAULT_EXPERIMENT,
    EXPERIMENTS,
    ROOT,
    ConfigError,
    DetectionConfig,
    ExperimentConfig,
    Flags,
    ModelConfig,
    RunOptions,
    UserError,
    WeightOptions,
    option,
    parse_flags,
)
from models.backend import (
    OnnxBackend,
    TorchBackend,
    detector_graph,
    detector_output_names,
    missing_onnx_packages,
    network_graph,
    output_names,
)
from models.checkpoint import load_checkpoint, locate_checkpoint
from models.detector import FaceDetector, build_network
from models.fuse import fuse_batch_norm
from models.retinaface import RetinaFace
from utils.runtime.cli import run
from utils.runtime.experiment import user_path
from utils.runtime.files import disk_errors, replacing
from utils.runtime.images import read_image

_CHECKED_PICTURE = ROOT / "data/sample_widerface/images/astronaut.jpg"
_CHECKED_SHAPES = ((1, 160, 160, 3), (2, 97, 210, 3))
_PIXEL_TOLERANCE = 0.05
_TOLERANCE = 1e-3  # of logits and deltas: a hundredth of a pixel in a box of 100


@dataclass(frozen=True)
class ExportOptions:
    """What is written."""

    output: str = option("detector.onnx", "file to write; one that is there is replaced")
    with_nms: bool = option(False, "decode and suppress in the file, with the thresholds given here")


OPTIONS = (RunOptions(), WeightOptions(), ExportOptions(), ExperimentConfig().inference, ModelConfig)


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse_flags(__doc__ or "", OPTIONS, argv)
    options = flags.apply(ExportOptions())
    _refuse_idle_flags(flags, options)
    if missing := missing_onnx_packages():
        raise ConfigError(f"ONNX needs {', '.join(missing)}; pip install them")
    name = flags.apply(RunOptions()).experiment_name or DEFAULT_EXPERIMENT
    checkpoint = load_checkpoint(locate_checkpoint(EXPERIMENTS, name, flags.apply(WeightOptions()).model_weight), flags)
    network = fuse_batch_norm(build_network(checkpoint))
    detection = flags.apply((checkpoint.experiment or ExperimentConfig()).inference)
    output = user_path(options.output)
    if not output.parent.is_dir():
        raise ConfigError(f"--output={output}: there is no folder {output.parent}; make it, or choose another")
    graph = detector_graph(network, detection) if options.with_nms else network_graph(network)
    with disk_errors(output), replacing(output) as temporary:
        temporary.write_bytes(graph)
    if options.with_nms:
        difference, tolerance = largest_detection_difference(network, output, detection), _PIXEL_TOLERANCE
    else:
        difference, tolerance = largest_difference(network, output), _TOLERANCE
    if difference > tolerance:
        raise UserError(f"{output}: its outputs differ from PyTorch's by {difference:.2g}; do not use it")
    size = len(graph) / 1e6
    print(f"{output}: {checkpoint.path.name}, {size:.1f} MB; outputs equal PyTorch's up to {difference:.1g}")


def _refuse_idle_flags(flags: Flags, options: ExportOptions) -> None:
    """Thresholds are for a file that holds the suppression."""
    idle = sorted({item.name for item in dataclasses.fields(DetectionConfig)} & set(flags.given))
    if idle and not options.with_nms:
        raise ConfigError(f"--{idle[0]} does nothing without --with_nms; add it, or drop --{idle[0]}")


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


def largest_detection_difference(network: RetinaFace, graph: Path, detection: DetectionConfig) -> float:
    """Between boxes, landmarks and scores of `FaceDetector` and of a graph with suppression, for a sample picture.

    Infinite where they find another number of faces.
    """
    import onnxruntime  # an optional package

    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    image = read_image(_CHECKED_PICTURE)[:400]
    found = FaceDetector(network, detection).detect(image)
    names, values = detector_output_names(network.config), session.run(None, {"images": image[None]})
    largest = 0.0
    for name, value in zip(names, values, strict=True):
        expected = getattr(found, name).numpy()
        if value.shape != expected.shape:
            return math.inf
        largest = max(largest, float(np.abs(value - expected).max(initial=0)))
    return largest


if __name__ == "__main__":
    run(main)
