"""Write a detector for ONNX Runtime: python export.py --experiment_name=NAME --output=FILE.

The file takes `images`, (B, H, W, 3) uint8 BGR of any number and size, and returns the raw outputs of the last stage,
one row per prior: `class_logits`, `box_deltas` and, where the model has them, `landmark_deltas`, `iou_logits` and
`priors`. Its metadata `model` is the architecture as JSON, with the anchors and variances needed for decoding. The file
does not reduce large images, in which close-ups are missed: its metadata `max_pixels` is the number of pixels to which
the caller has to reduce them, as inference.py does.

With --with_nms it takes one image, (1, H, W, 3), and returns its faces, best first: `boxes` (N, 4) xyxy in pixels,
`scores` and, where the model has them, `landmarks` (N, 5, 2). Images of more than --max_pixels are reduced within the
file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torchvision.ops import box_iou

from config import (
    DATA,
    DEFAULT_EXPERIMENT,
    EXPERIMENTS,
    ComputeOptions,
    ExperimentConfig,
    ExportOptions,
    ModelOverrides,
    PostprocessConfig,
    RunOptions,
    WeightOptions,
)
from models.backend import OnnxBackend, TorchBackend, fuse_batch_norm
from models.checkpoint import load_checkpoint, locate_checkpoint
from models.detector import FaceDetector
from models.initialise import load_model
from models.onnx_graph import detector_graph, detector_output_names, missing_onnx_packages, output_names, raw_graph
from models.retinaface import RetinaFace
from utils.errors import ConfigError, UserError
from utils.options import Flags, declarations, parse_flags
from utils.runtime.cli import run
from utils.runtime.files import atomic_write, disk_errors, user_path
from utils.runtime.images import read_image

GROUPS = (RunOptions(), WeightOptions(), ExportOptions(), ExperimentConfig().inference, ModelOverrides())
_CHECKED_IMAGE = DATA / "sample_widerface/images/astronaut.jpg"
_CHECKED_SHAPES = ((1, 160, 160, 3), (2, 97, 210, 3))
_PIXEL_TOLERANCE = 0.05
_MIN_IOU = 0.9  # for reduced images, because the two resizing filters differ slightly
_TOLERANCE = 1e-3  # for logits and deltas: 0.01 pixels in a box of 100 pixels


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse_flags(__doc__ or "", GROUPS, argv)
    options = flags.apply(ExportOptions())
    _check(flags, options)
    name = flags.apply(RunOptions()).experiment_name or DEFAULT_EXPERIMENT
    path = locate_checkpoint(EXPERIMENTS, name, flags.apply(WeightOptions()).model_weight)
    checkpoint = load_checkpoint(path, flags.apply(ModelOverrides()))
    if not checkpoint.model_config.has_onnx_graph:
        raise ConfigError(f"{path}: has deformable convolutions, which ONNX lacks; such a model cannot be exported")
    model, config = fuse_batch_norm(load_model(checkpoint)), flags.apply(checkpoint.configuration.inference)
    output = user_path(options.output)
    if output.is_dir():
        raise ConfigError(f"--output={output}: is a folder; give the name of a file in it, such as {output}/faces.onnx")
    if not output.parent.is_dir():
        raise ConfigError(f"--output={output}: there is no folder {output.parent}; create it, or choose another")
    limit = options.max_pixels
    graph = detector_graph(model, config, limit) if options.with_nms else raw_graph(model, limit)
    with disk_errors(output), atomic_write(output) as temporary:
        temporary.write_bytes(graph)
    if options.with_nms:
        compute = ComputeOptions("torch", max_pixels=options.max_pixels)
        difference, tolerance = largest_detection_difference(model, output, config, compute), _PIXEL_TOLERANCE
    else:
        difference, tolerance = largest_difference(model, output), _TOLERANCE
    if difference > tolerance:
        raise UserError(f"{output}: its outputs differ from PyTorch's by {difference:.2g}; do not use it")
    size = len(graph) / 1e6
    print(f"{output}: {path.name}, {size:.1f} MB; outputs equal PyTorch's up to {difference:.1g}")


def _check(flags: Flags, options: ExportOptions) -> None:
    """Reject thresholds without --with_nms, and report missing packages."""
    idle = sorted(set(declarations(PostprocessConfig)) & set(flags.given))
    if idle and not options.with_nms:
        raise ConfigError(f"--{idle[0]} has no effect without --with_nms; add it, or drop --{idle[0]}")
    if missing := missing_onnx_packages():
        raise ConfigError(f"ONNX needs {', '.join(missing)}; pip install them")


@torch.inference_mode()
def largest_difference(model: RetinaFace, graph: Path) -> float:
    """Largest difference between the outputs of a model and of its graph, for noise of two sizes; relative above 1."""
    in_torch, in_onnx = TorchBackend(model), OnnxBackend(graph, model.priors)
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for shape in _CHECKED_SHAPES:
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        expected, found = in_torch(images), in_onnx(images)
        for name in output_names(model.model_config):
            value = getattr(expected, name)
            difference = (getattr(found, name) - value).abs() / value.abs().clamp(min=1)
            largest = max(largest, float(difference.max()))
    return largest


def largest_detection_difference(
    model: RetinaFace, graph: Path, config: PostprocessConfig, compute: ComputeOptions
) -> float:
    """Largest difference between the detections of `FaceDetector` and of a graph with suppression.

    The result is infinite if they find different numbers of faces in the sample image, or if their boxes overlap too
    little in the same image enlarged beyond `max_pixels`. If the sample image is missing, noise replaces it.
    """
    import onnxruntime  # an optional package

    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    noise = np.random.default_rng(0).integers(0, 256, (400, 512, 3), np.uint8)
    image = read_image(_CHECKED_IMAGE)[:400] if _CHECKED_IMAGE.is_file() else noise
    detector = FaceDetector(model, config, compute)
    if compute.max_pixels:
        factor = math.sqrt(2 * compute.max_pixels / image[..., 0].size)
        large = cv2.resize(image, None, fx=factor, fy=factor)
        found, boxes = detector.detect(large), torch.from_numpy(session.run(None, {"images": large[None]})[0])
        if len(found) != len(boxes) or (len(boxes) and box_iou(found.boxes, boxes).max(dim=1).values.min() < _MIN_IOU):
            return math.inf
    found = detector.detect(image)
    names, values = detector_output_names(model.model_config), session.run(None, {"images": image[None]})
    largest = 0.0
    for name, value in zip(names, values, strict=True):
        expected = getattr(found, name).numpy()
        if value.shape != expected.shape:
            return math.inf
        largest = max(largest, float(np.abs(value - expected).max(initial=0)))
    return largest


if __name__ == "__main__":
    run(main)
