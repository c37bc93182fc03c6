"""How a network's raw outputs are computed where it no longer learns: PyTorch, `torch.compile` or ONNX Runtime."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from config import ConfigError, ModelConfig, SpeedOptions, to_dict
from models.fuse import fuse_batch_norm
from models.retinaface import RetinaFace
from utils.files import replacing
from utils.structures import StageOutput

_ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_OPSET = 18
# What the exporter sees of an image. Height, width and number must differ, lest it takes them for the same.
_EXAMPLE_SHAPE = (2, 96, 128, 3)


class Backend(Protocol):
    """Computes what the last stage says of images."""

    name: str

    def __call__(self, images: Tensor) -> StageOutput:
        """(B, H, W, 3) uint8 BGR on the network's device to the raw outputs of the last stage, there."""
        ...


class TorchBackend:
    """The network as it is, run by PyTorch."""

    def __init__(self, network: Callable[[Tensor], list[StageOutput]], name: str = "torch") -> None:
        self.network = network
        self.name = name

    def __call__(self, images: Tensor) -> StageOutput:
        # Seen so, images lie in channels_last already; nothing is copied.
        return self.network(images.permute(0, 3, 1, 2))[-1]


class OnnxBackend:
    """An ONNX graph that `export_onnx` wrote, run by ONNX Runtime on the CPU."""

    name = "onnx"

    def __init__(self, graph: Path | bytes) -> None:
        import onnxruntime  # an optional package

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that wait by spinning slow the post-processing that runs next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # A pattern is kept for every size of image, and photographs come in many.
        options.enable_mem_pattern = False
        content = graph if isinstance(graph, bytes) else str(graph)
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, images: Tensor) -> StageOutput:
        try:
            values = self._session.run(self._names, {"images": images.numpy()})
        except Exception as error:  # its errors share no other base; callers know PyTorch's, "out of memory" among them
            raise RuntimeError(f"ONNX Runtime: {error}") from error
        tensors = {name: torch.from_numpy(value) for name, value in zip(self._names, values, strict=True)}
        return StageOutput(
            class_logits=tensors["class_logits"],
            box_deltas=tensors["box_deltas"],
            landmark_deltas=tensors.get("landmark_deltas"),
            iou_logits=tensors.get("iou_logits"),
            priors=tensors.get("priors"),
        )


def build_backend(network: RetinaFace, options: SpeedOptions) -> Backend:
    """What computes the outputs of a network in evaluation mode, as `options` ask.

    Raises:
        ConfigError: the backend that was asked for is not installed, or does not compute on the network's device.
    """
    ready = fuse_batch_norm(network) if options.fuse else network
    name = _choose(options.backend, ready)
    if name == "onnx":
        return OnnxBackend(_cached_graph(ready))
    if name == "compile":
        return _compiled(ready)
    return TorchBackend(ready)


def _choose(asked: str, network: RetinaFace) -> str:
    """`torch`, `compile` or `onnx`; see `build_backend`.

    `auto` is ONNX Runtime, the fastest on a CPU, where the graph is there already. To make it takes longer than it
    saves the shipped network in a thousand images, so that is done only for those who ask.
    """
    device, missing = network.pixel_mean.device, missing_onnx_packages()
    can_run_onnx = device.type == "cpu" and not missing
    if asked == "auto":
        return "onnx" if can_run_onnx and _graph_path(network).is_file() else "torch"
    if asked == "onnx" and missing:
        raise ConfigError(f"--backend=onnx needs {', '.join(missing)}; pip install them, or choose --backend=torch")
    if asked == "onnx" and not can_run_onnx:
        raise ConfigError(f"--backend=onnx computes on the CPU, not on {device}; add --gpu_num=-1, or use torch")
    return asked


def missing_onnx_packages() -> list[str]:
    """What would have to be installed to write and run ONNX graphs."""
    return [package for package in _ONNX_PACKAGES if importlib.util.find_spec(package) is None]


@torch.inference_mode()
def _compiled(network: RetinaFace) -> Backend:
    """`network` compiled for any size; as it is, with a line on standard error, where there is no compiler."""
    backend = TorchBackend(torch.compile(network, dynamic=True), "compile")
    try:
        with _quiet_exporter():
            backend(torch.zeros(_EXAMPLE_SHAPE, dtype=torch.uint8, device=network.pixel_mean.device))
    except Exception as error:  # whatever compilers and their absence raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"warning: --backend=compile: cannot compile here ({reason}); using torch", file=sys.stderr)
        return TorchBackend(network)
    return backend


# ------------------------------------------------------------------------------------------------- the graph


class _LastStage(nn.Module):
    """The graph's form of a network: images as OpenCV reads them to the tensors of the last `StageOutput`."""

    def __init__(self, network: RetinaFace) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        output = self.network(images.permute(0, 3, 1, 2))[-1]
        return tuple(getattr(output, name) for name in output_names(self.network.config))


def output_names(model: ModelConfig) -> list[str]:
    """The fields of `StageOutput` that the last stage of a model fills: the outputs of its graph, in order."""
    present = {
        "class_logits": True,
        "box_deltas": True,
        "landmark_deltas": model.landmarks,
        "iou_logits": model.iou_aware,
        "priors": model.refinement == "rematch",
    }
    return [name for name, is_present in present.items() if is_present]


def export_onnx(network: RetinaFace, path: Path) -> None:
    """Write a network in evaluation mode on the CPU as an ONNX graph, whole or not at all.

    Its input is `images`, (B, H, W, 3) uint8 BGR of any number and size; its outputs are `output_names`, with the
    shapes of `StageOutput`. It subtracts the mean, and makes the priors of a rematching cascade for the size it sees.
    Its metadata `model` is the architecture as JSON.

    Raises:
        OSError: the file cannot be written.
    """
    # The tracer must be told that the coarsest level has more than one cell; the graph works for one cell too.
    batch, height, width = (
        torch.export.Dim(name, min=low) for name, low in (("batch", 1), ("height", 33), ("width", 33))
    )
    example = torch.zeros(_EXAMPLE_SHAPE, dtype=torch.uint8)
    with _quiet_exporter():
        # Strict: the other way to trace takes len(tensor) for a constant, and stops at the cache of `prior_boxes`.
        program = torch.export.export(
            _LastStage(network).eval(),
            (example,),
            dynamic_shapes={"images": {0: batch, 1: height, 2: width}},
            strict=True,
        )
        graph = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=_OPSET,
            input_names=["images"],
            output_names=output_names(network.config),
            verbose=False,
        )
    assert graph is not None
    graph.model.metadata_props["model"] = json.dumps(to_dict(network.config))
    with replacing(path) as temporary:
        graph.save(temporary)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Hold back what PyTorch's tracer says of its own workings."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _cached_graph(network: RetinaFace) -> Path:
    """The graph of these very weights, from the cache; the first time it is made, which takes some seconds.

    Raises:
        ConfigError: the cache cannot be written.
    """
    path = _graph_path(network)
    if not path.is_file():
        print(f"preparing the network for ONNX Runtime, once; it is kept in {path.parent}", file=sys.stderr)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            export_onnx(network, path)
        except OSError as error:
            raise ConfigError(
                f"{path.parent}: cannot be written ({error.strerror or error}); set XDG_CACHE_HOME, or use "
                "--backend=torch"
            ) from None
    return path


def _graph_path(network: RetinaFace) -> Path:
    return cache_folder() / f"{_fingerprint(network)}.onnx"


def cache_folder() -> Path:
    """Where graphs are kept: below $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retinaface_onnx"


def _fingerprint(network: RetinaFace) -> str:
    """Of all that the graph depends on: weights, architecture, and what writes it."""
    about = [to_dict(network.config), list(network.state_dict()), torch.__version__, _OPSET]
    digest = hashlib.sha256(json.dumps(about).encode())
    for tensor in network.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
