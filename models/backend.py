"""How a network's raw outputs are computed where it no longer learns: PyTorch, `torch.compile` or ONNX Runtime."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from config import ConfigError, DetectionConfig, ModelConfig, SpeedOptions, to_dict
from layers.postprocess import find_candidates, suppress
from models.fuse import fuse_batch_norm
from models.retinaface import RetinaFace
from utils.structures import StageOutput

_ONNX_PACKAGES = ("onnx", "onnxruntime")
_OPSET = 17
_TIMES_BEFORE_TUNING = 20
_MOST_LANES = 4  # each needs the memory of an image's activations
_EXAMPLE_SIZE = (96, 128)  # of the image that is traced


class Backend(Protocol):
    """Computes what the last stage says of images.

    Attributes:
        lanes: threads that should call it at once, each its own from `for_lane`, for the machine to be used best.
    """

    name: str
    lanes: int

    def for_lane(self) -> Backend:
        """The same for such threads, with a share of the cores."""
        ...

    def __call__(self, images: Tensor) -> StageOutput:
        """(B, H, W, 3) uint8 BGR on the network's device to the raw outputs of the last stage, there."""
        ...


class TorchBackend:
    """The network as it is, run by PyTorch, which uses all cores for one call."""

    lanes = 1

    def __init__(self, network: Callable[[Tensor], list[StageOutput]], name: str = "torch") -> None:
        self.network = network
        self.name = name

    def for_lane(self) -> Backend:
        return self

    def __call__(self, images: Tensor) -> StageOutput:
        # Seen so, images lie in channels_last already; nothing is copied.
        return self.network(images.permute(0, 3, 1, 2))[-1]


class CudaBackend(TorchBackend):
    """PyTorch on a GPU, with what is to be had only there."""

    def __init__(self, network: Callable[[Tensor], list[StageOutput]], name: str, options: SpeedOptions) -> None:
        super().__init__(network, name)
        self._options = options
        self._seen: Counter[torch.Size] = Counter()

    def __call__(self, images: Tensor) -> StageOutput:
        with self._tuned(images.shape), torch.autocast("cuda", torch.float16, enabled=self._options.amp):
            output = super().__call__(images)
        return output.float()

    @contextmanager
    def _tuned(self, shape: torch.Size) -> Iterator[None]:
        """Have cuDNN try its algorithms, which takes it some hundred passes' time, once a size has come often."""
        self._seen[shape] += 1
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = before or (
            self._options.cudnn_benchmark and self._seen[shape] > _TIMES_BEFORE_TUNING
        )
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before


class OnnxBackend:
    """A graph that `network_graph` made, or a file of it, run by ONNX Runtime on the CPU."""

    name = "onnx"

    def __init__(self, graph: Path | bytes, threads: int | None = None) -> None:
        """Open a graph.

        Args:
            threads: that a call uses; None is as many as PyTorch does.
        """
        import onnxruntime  # an optional package

        self._graph = graph
        self._threads = threads or torch.get_num_threads()
        self.lanes = min(self._threads, _MOST_LANES)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        # Threads that wait by spinning slow the post-processing that runs next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # A pattern is kept for every size of image, and photographs come in many.
        options.enable_mem_pattern = False
        content = graph if isinstance(graph, bytes) else str(graph)
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self._session.get_outputs()]

    def for_lane(self) -> Backend:
        return self._lane

    @cached_property
    def _lane(self) -> Backend:
        # Two calls with one thread each take less time than one after the other with two: no thread waits for another.
        # Rounded up, for a core without work is worse than a thread too many.
        return OnnxBackend(self._graph, math.ceil(self._threads / self.lanes))

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
    is_cuda = network.pixel_mean.device.type == "cuda"
    for name in ("amp", "cudnn_benchmark"):
        if getattr(options, name) and not is_cuda:
            raise ConfigError(f"--{name} needs a CUDA device; drop it")
    name = _choose(options.backend, ready)
    if name == "onnx":
        return OnnxBackend(network_graph(ready))
    backend = _compiled(ready) if name == "compile" else TorchBackend(ready)
    return CudaBackend(backend.network, backend.name, options) if is_cuda else backend


def _choose(asked: str, network: RetinaFace) -> str:
    """`torch`, `compile` or `onnx`; see `build_backend`.

    `auto` is the fastest that is installed: ONNX Runtime on a CPU.
    """
    device, missing = network.pixel_mean.device, missing_onnx_packages()
    can_run_onnx = device.type == "cpu" and not missing
    if asked == "auto":
        return "onnx" if can_run_onnx else "torch"
    if asked == "onnx" and missing:
        raise ConfigError(f"--backend=onnx needs {', '.join(missing)}; pip install them, or choose --backend=torch")
    if asked == "onnx" and not can_run_onnx:
        raise ConfigError(f"--backend=onnx computes on the CPU, not on {device}; add --gpu_num=-1, or use torch")
    return asked


def missing_onnx_packages() -> list[str]:
    """What would have to be installed to write and run ONNX graphs."""
    return [package for package in _ONNX_PACKAGES if importlib.util.find_spec(package) is None]


@torch.inference_mode()
def _compiled(network: RetinaFace) -> TorchBackend:
    """`network` compiled for any size; as it is, with a line on standard error, where there is no compiler."""
    backend = TorchBackend(torch.compile(network, dynamic=True), "compile")
    try:
        with _quiet_exporter():
            backend(torch.zeros((2, *_EXAMPLE_SIZE, 3), dtype=torch.uint8, device=network.pixel_mean.device))
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


class _Detector(nn.Module):
    """The graph's form of a whole detector: one image to its boxes, scores and landmarks."""

    def __init__(self, network: RetinaFace, detection: DetectionConfig) -> None:
        super().__init__()
        self.network = network
        self.detection = detection

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        output = self.network(images.permute(0, 3, 1, 2))[-1]
        size_hw = (images.shape[1], images.shape[2])
        candidates = find_candidates(output, size_hw, self.network.config, self.detection).above_threshold()
        found = suppress(candidates.detections, size_hw, self.detection)
        return (found.boxes, found.scores, *(() if found.landmarks is None else (found.landmarks,)))


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


def detector_output_names(model: ModelConfig) -> list[str]:
    """The outputs of a graph that ends with detections, in order: fields of `Detections`."""
    return ["boxes", "scores", *(["landmarks"] if model.landmarks else [])]


def network_graph(network: RetinaFace) -> bytes:
    """A network in evaluation mode on the CPU as an ONNX graph.

    Its input is `images`, (B, H, W, 3) uint8 BGR of any number and size; its outputs are `output_names`, with the
    shapes of `StageOutput`. It subtracts the mean, and makes the priors of a rematching cascade for the size it sees.
    Its metadata `model` is the architecture as JSON.
    """
    axes = {"images": {0: "batch", 1: "height", 2: "width"}}
    axes |= {name: {0: "batch", 1: "priors"} for name in output_names(network.config)}
    return _export(_LastStage(network), (2, *_EXAMPLE_SIZE, 3), axes, {"model": to_dict(network.config)})


def detector_graph(network: RetinaFace, detection: DetectionConfig) -> bytes:
    """A network with decoding and suppression behind it as an ONNX graph; see `network_graph`.

    Its input is `images`, (1, H, W, 3) uint8 BGR; its outputs are `detector_output_names`, with the shapes of
    `Detections`, in pixels, best first. The thresholds are constants, and metadata `detection` too.
    """
    axes = {"images": {1: "height", 2: "width"}}
    axes |= {name: {0: "faces"} for name in detector_output_names(network.config)}
    about = {"model": to_dict(network.config), "detection": to_dict(detection)}
    return _export(_Detector(network, detection), (1, *_EXAMPLE_SIZE, 3), axes, about)


@torch.no_grad()
def _export(
    module: nn.Module,
    example_shape: tuple[int, ...],
    dynamic_axes: Mapping[str, Mapping[int, str]],
    metadata: Mapping[str, Any],
) -> bytes:
    import onnx  # an optional package

    content = io.BytesIO()
    with _quiet_exporter():
        # By tracing, in a fraction of a second: the newer exporter (dynamo=True) takes some ten for the same graph.
        torch.onnx.export(
            module.eval(),
            (torch.zeros(example_shape, dtype=torch.uint8),),
            content,  # type: ignore[arg-type]  # it takes files as well as paths
            dynamo=False,
            opset_version=_OPSET,
            input_names=["images"],
            output_names=[name for name in dynamic_axes if name != "images"],
            dynamic_axes=dynamic_axes,
        )
    graph = onnx.load_from_string(content.getvalue())
    onnx.helper.set_model_props(graph, {name: json.dumps(value) for name, value in metadata.items()})
    return bytes(graph.SerializeToString())


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Hold back what PyTorch's tracer says of its own workings."""
    loggers = [logging.getLogger(name) for name in ("torch",)]
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
