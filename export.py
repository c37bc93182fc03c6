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

from collections.abc import Sequence

from config import (
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
from utils.errors import ConfigError, FlagError, UserError
from utils.options import declarations, parse_flags
from utils.runtime.cli import run
from utils.runtime.files import atomic_write, disk_errors, user_path

GROUPS = (RunOptions(), WeightOptions(), ExportOptions(), ExperimentConfig().inference, ModelOverrides())
# Largest permitted differences from PyTorch: of detections in pixels, and of logits and deltas. A delta that differs by
# 1e-3 moves a box of 100 pixels by 0.01.
_PIXEL_TOLERANCE = 0.05
_TOLERANCE = 1e-3


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse_flags(__doc__ or "", GROUPS, argv)
    options = flags.apply(ExportOptions())
    idle = sorted(set(declarations(PostprocessConfig)) & set(flags.given))
    if idle and not options.with_nms:
        raise FlagError(f"--{idle[0]} has no effect without --with_nms; add it, or drop --{idle[0]}")
    # PyTorch takes seconds to import, so the flags are checked first.
    from models.backend import fuse_batch_norm
    from models.checkpoint import load_checkpoint, locate_checkpoint
    from models.initialise import load_model
    from models.onnx_check import largest_detection_difference, largest_difference
    from models.onnx_graph import detector_graph, missing_onnx_packages, raw_graph

    if missing := missing_onnx_packages():
        raise ConfigError(f"ONNX needs {', '.join(missing)}; pip install them")
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


if __name__ == "__main__":
    run(main)
