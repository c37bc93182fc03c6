"""Detect faces in images: python inference.py --inference_dir=FOLDER --save_img. See README.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from config import (
    DATA,
    DEFAULT_EXPERIMENT,
    EXPERIMENTS,
    ComputeOptions,
    ExperimentConfig,
    InferenceOptions,
    ModelOverrides,
    RunOptions,
    WeightOptions,
)
from utils.options import Flags, parse_flags
from utils.results.masks import HeadMask, HeadSegmenter, InferenceResults
from utils.results.reports import EXPORT_FOLDER
from utils.runtime.cli import choose_device, run
from utils.runtime.files import OUTPUT_FOLDERS, user_path
from utils.runtime.sources import open_source
from utils.structures import Detections

if TYPE_CHECKING:
    from engine.inference import InferenceRun
    from utils.runtime.distributed import DistributedContext

GROUPS = (
    RunOptions(),
    WeightOptions(),
    InferenceOptions(),
    ComputeOptions(),
    ExperimentConfig().inference,
    ModelOverrides(),
)


def main(argv: Sequence[str] | None = None) -> None:
    _infer(argv, lambda detections, heads: None)


def inference(argv: Sequence[str] | None = None) -> InferenceResults:
    """Run the command and return its results, for callers in Python. All masks are held in memory.

    With `--resume` or several processes, only the results that this call computed are returned.

    Raises:
        UserError: an option, the checkpoint or the input cannot be used; the message says what to do.
    """
    results = InferenceResults([], [], [], [], [])
    _infer(argv, results.add)
    return results


def _infer(argv: Sequence[str] | None, keep: Callable[[Detections, Sequence[HeadMask]], None]) -> None:
    flags = parse_flags(__doc__ or "", GROUPS, argv)
    # PyTorch takes seconds to import, so the flags are checked first.
    import torch

    from engine.inference import run_inference
    from utils.runtime.distributed import distributed_context, run_on_all

    # The processes exchange messages, not tensors, for which the CPU suffices.
    with distributed_context(torch.device("cpu")) as context, ExitStack() as stack:
        run_inference(run_on_all(lambda: resolve(flags, context, stack)), context, keep)


def resolve(flags: Flags, context: DistributedContext, stack: ExitStack) -> InferenceRun:
    """Open everything that a run needs; `stack` closes it."""
    from engine.inference import InferenceRun
    from models.checkpoint import load_checkpoint, locate_checkpoint
    from models.detector import FaceDetector
    from models.initialise import load_model

    options, compute = flags.apply(InferenceOptions()), flags.apply(ComputeOptions())
    device, name = choose_device(flags.apply(RunOptions()).gpu_num), flags.apply(RunOptions()).experiment_name
    path = locate_checkpoint(EXPERIMENTS, name or DEFAULT_EXPERIMENT, flags.apply(WeightOptions()).model_weight)
    checkpoint = load_checkpoint(path, flags.apply(ModelOverrides()))
    folder = user_path(options.inference_save_folder).absolute()
    # If the folder of the results is also the input, the images that earlier runs wrote there are skipped.
    exclude = {folder, *(folder / name for name in (*OUTPUT_FOLDERS, EXPORT_FOLDER))}
    source = open_source(options.inference_dir, DATA, exclude, options.max_frames)
    detector = FaceDetector(load_model(checkpoint).to(device), flags.apply(checkpoint.configuration.inference), compute)
    segmenter_model = user_path(options.segmenter_model) if options.segmenter_model else None
    inference_run = InferenceRun(
        name=(name or checkpoint.experiment_name(EXPERIMENTS)).replace("/", "_"),
        checkpoint=checkpoint,
        detector=detector,
        compute=compute,
        source=source,
        folder=folder,
        options=options,
        segmenter=stack.enter_context(HeadSegmenter(segmenter_model)) if options.mask else None,
        segmenter_model=segmenter_model,
    )
    inference_run.check(context)
    return inference_run


if __name__ == "__main__":
    run(main)
