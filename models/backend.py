"""Backends that compute the raw outputs of a trained model: PyTorch, `torch.compile` and ONNX Runtime."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from config import ComputeOptions
from models.onnx_graph import missing_onnx_packages, quiet_exporter, raw_graph
from models.retinaface import RetinaFace
from utils.errors import ConfigError
from utils.structures import StageOutput

_MAX_WORKERS = 4  # each needs memory for the activations of an image


class Backend(Protocol):
    """Computes the raw outputs of the last stage.

    Attributes:
        name: name of the backend, for the user.
        num_workers: recommended number of threads, each of which calls the backend of its own `for_worker`.
    """

    name: str
    num_workers: int

    def for_worker(self) -> Backend:
        """The same backend for one of `num_workers` threads, with a share of the cores."""
        ...

    def __call__(self, images: Tensor) -> StageOutput:
        """Map (B, H, W, 3) uint8 BGR images on the model's device to the raw outputs of the last stage."""
        ...


class TorchBackend:
    """Runs the model in PyTorch, which uses all cores for one call.

    On a GPU, a second thread prepares and post-processes images while the first one's are computed.
    """

    def __init__(self, model: Callable[[Tensor], list[StageOutput]], name: str = "torch", num_workers: int = 1) -> None:
        self.model = model
        self.name = name
        self.num_workers = num_workers

    def for_worker(self) -> Backend:
        return self

    def __call__(self, images: Tensor) -> StageOutput:
        # The permuted view is in channels_last already; nothing is copied. Outputs of a model in 16 bits are converted.
        return self.model(images.permute(0, 3, 1, 2))[-1].float()


class OnnxBackend:
    """Runs a graph of `raw_graph` in ONNX Runtime on the CPU."""

    name = "onnx"

    def __init__(self, graph: Path | bytes, priors: Callable[[Tensor], Tensor], threads: int | None = None) -> None:
        """Open a graph.

        Args:
            graph: a file or its content.
            priors: `RetinaFace.priors`, for graphs whose outputs do not contain them.
            threads: number of threads of a call; None means as many as PyTorch uses.
        """
        import onnxruntime  # an optional package

        self._graph = graph
        self._priors = priors
        self._threads = threads or torch.get_num_threads()
        self.num_workers = min(self._threads, _MAX_WORKERS)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        # Threads that spin while they wait slow down the post-processing that runs next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # A memory pattern would be kept for each of the many image sizes of photographs.
        options.enable_mem_pattern = False
        content = graph if isinstance(graph, bytes) else str(graph)
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self._session.get_outputs()]

    def __reduce__(self) -> tuple[type[OnnxBackend], tuple[Any, ...]]:
        """Pickle the graph instead of the session, which cannot be pickled; a spawned worker opens its own."""
        return OnnxBackend, (self._graph, self._priors, self._threads)

    def for_worker(self) -> Backend:
        return self._worker

    @cached_property
    def _worker(self) -> Backend:
        # Two calls with one thread each take less time than two calls with two threads one after the other. Rounded up,
        # because an idle core costs more than one thread too many.
        return OnnxBackend(self._graph, self._priors, math.ceil(self._threads / self.num_workers))

    def __call__(self, images: Tensor) -> StageOutput:
        try:
            values = self._session.run(self._names, {"images": images.numpy()})
        except Exception as error:  # its errors have no common base class; callers expect those of PyTorch
            raise RuntimeError(f"ONNX Runtime: {error}") from error
        tensors = {name: torch.from_numpy(value) for name, value in zip(self._names, values, strict=True)}
        if "priors" not in tensors:
            tensors["priors"] = self._priors(images.permute(0, 3, 1, 2))
        return StageOutput(
            class_logits=tensors["class_logits"],
            box_deltas=tensors["box_deltas"],
            landmark_deltas=tensors.get("landmark_deltas"),
            iou_logits=tensors.get("iou_logits"),
            priors=tensors["priors"],
        )


def build_backend(model: RetinaFace, options: ComputeOptions) -> Backend:
    """Build the backend that `options` select, for a model in evaluation mode.

    Raises:
        ConfigError: the backend is not installed, or does not compute on the device of the model.
    """
    if options.amp and model.device.type != "cuda":
        raise ConfigError("--amp needs a CUDA device; drop it")
    fused = fuse_batch_norm(model)
    if options.amp:
        # Converted once, while autocast would convert the weights in every pass.
        fused = fused.half()
    name = _choose(options.backend, model)
    if name == "onnx":
        return OnnxBackend(raw_graph(fused), fused.priors)
    if name == "compile":
        return _compile(fused)
    return TorchBackend(fused, num_workers=2 if model.device.type == "cuda" else 1)


def _choose(asked: str, model: RetinaFace) -> str:
    """`torch`, `compile` or `onnx`; see `ComputeOptions.backend`."""
    missing, device, config = missing_onnx_packages(), model.device, model.model_config
    if asked == "auto":
        has_graph = device.type == "cpu" and not missing and config.has_onnx_graph
        return "onnx" if has_graph else "torch"
    if asked == "onnx" and not config.has_onnx_graph:
        raise ConfigError("--backend=onnx: ONNX has no deformable convolutions, which this model has; use torch")
    if asked == "onnx" and missing:
        raise ConfigError(f"--backend=onnx needs {', '.join(missing)}; pip install them, or choose --backend=torch")
    if asked == "onnx" and device.type != "cpu":
        raise ConfigError(f"--backend=onnx computes on the CPU, not on {device}; add --gpu_num=-1, or use torch")
    return asked


@torch.inference_mode()
def _compile(model: RetinaFace) -> TorchBackend:
    """Compile `model` for any image size, or return it uncompiled, with a warning, where there is no compiler."""
    backend = TorchBackend(torch.compile(model, dynamic=True), "compile")
    try:
        with quiet_exporter():
            backend(torch.zeros((2, 96, 128, 3), dtype=torch.uint8, device=model.device))
    except Exception as error:  # compilers, and their absence, raise many types of exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"warning: --backend=compile: cannot compile here ({reason}); using torch", file=sys.stderr)
        return TorchBackend(model)
    return backend


def fuse_batch_norm(model: RetinaFace) -> RetinaFace:
    """A frozen copy for inference in which batch normalisation is folded into the convolution before it.

    Its outputs equal those of `model` in evaluation mode up to rounding. It is on the same device, in channels_last.
    """
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(fused.modules()):
        for (name, convolution), (norm_name, norm) in _conv_bn_pairs(module):
            setattr(module, name, fuse_conv_bn_eval(convolution, norm))
            setattr(module, norm_name, nn.Identity())
    return fused.to(memory_format=torch.channels_last)


def _conv_bn_pairs(module: nn.Module) -> Iterator[tuple[tuple[str, nn.Conv2d], tuple[str, nn.BatchNorm2d]]]:
    """The convolutions among a module's children that are followed by batch normalisation, and their names.

    Children are in the order of their use in `nn.Sequential`, and in torchvision's ResNet (conv1, bn1, conv2, ...).
    """
    for (name, child), (next_name, following) in pairwise(list(module.named_children())):
        if isinstance(child, nn.Conv2d) and isinstance(following, nn.BatchNorm2d):
            yield (name, child), (next_name, following)
