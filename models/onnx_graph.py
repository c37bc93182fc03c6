"""ONNX graphs of a model, with or without post-processing, and their comparison with PyTorch."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig, PostprocessConfig
from layers.postprocess import apply_nms, filter_and_decode
from models.retinaface import RetinaFace
from utils.options import to_dict
from utils.structures import Detections, image_size_xy

_ONNX_PACKAGES = ("onnx", "onnxruntime")
_OPSET = 18  # the first opset whose Resize has antialiasing, which reduced images need
_EXAMPLE_SIZE = (96, 128)  # height and width of the image used for tracing


def missing_onnx_packages() -> list[str]:
    """Packages that must be installed to write and run ONNX graphs."""
    return [package for package in _ONNX_PACKAGES if importlib.util.find_spec(package) is None]


def output_names(model_config: ModelConfig) -> list[str]:
    """Outputs of `raw_graph`, in order: the fields of the last `StageOutput` that the model predicts.

    Priors are included if they depend on the image, as in a cascade with `rematch`.
    """
    present = {
        "class_logits": True,
        "box_deltas": True,
        "landmark_deltas": model_config.landmarks,
        "iou_logits": model_config.iou_aware,
        "priors": model_config.refinement == "rematch",
    }
    return [name for name, is_present in present.items() if is_present]


def detector_output_names(model_config: ModelConfig) -> list[str]:
    """Outputs of `detector_graph`, in order: fields of `Detections`."""
    return ["boxes", "scores", *(["landmarks"] if model_config.landmarks else [])]


class _RawOutputs(nn.Module):
    """Maps images as OpenCV reads them to the tensors of the last `StageOutput`."""

    def __init__(self, model: RetinaFace) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        output = self.model(images.permute(0, 3, 1, 2))[-1]
        return tuple(getattr(output, name) for name in output_names(self.model.model_config))


class _Detector(nn.Module):
    """Maps one image as OpenCV reads it, reduced if it is large, to its boxes, scores and landmarks."""

    def __init__(self, model: RetinaFace, config: PostprocessConfig, max_pixels: int) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.max_pixels = max_pixels

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        size_hw = (images.shape[1], images.shape[2])
        pixels = images.permute(0, 3, 1, 2)
        if self.max_pixels:
            # Traced for images of any size: a smaller one is "reduced" to its own size, which changes nothing.
            height, width = torch.as_tensor(size_hw[0]), torch.as_tensor(size_hw[1])
            factor = (self.max_pixels / (height * width).double()).sqrt().clamp(max=1)
            seen_hw = [(height * factor).long().clamp(min=1), (width * factor).long().clamp(min=1)]
            pixels = F.interpolate(pixels.float(), size=seen_hw, mode="bilinear")  # type: ignore[arg-type]
        output = self.model(pixels)[-1]
        seen_size_hw = (pixels.shape[2], pixels.shape[3])
        candidates, _, is_above = filter_and_decode(output, seen_size_hw, self.model.model_config, self.config)
        found = apply_nms(candidates.select(torch.nonzero(is_above).squeeze(1)), seen_size_hw, self.config)
        if self.max_pixels:
            enlarged = image_size_xy(size_hw, found.boxes) / image_size_xy(seen_size_hw, found.boxes)
            landmarks = None if found.landmarks is None else found.landmarks * enlarged
            found = Detections(found.boxes * enlarged.repeat(2), found.scores, landmarks)
            found = found.clipped(size_hw) if self.config.clip_boxes else found
        return (found.boxes, found.scores, *(() if found.landmarks is None else (found.landmarks,)))


def raw_graph(model: RetinaFace, max_pixels: int = 0) -> bytes:
    """Export a model in evaluation mode on the CPU to an ONNX graph.

    Its input is `images`, (B, H, W, 3) uint8 BGR of any number and size. Its outputs are `output_names`, with the
    shapes of `StageOutput`. Its metadata `model` is the architecture as JSON, and `max_pixels` the number of pixels to
    which the caller has to reduce larger images; 0 means no limit.
    """
    axes = {"images": {0: "batch", 1: "height", 2: "width"}}
    axes |= {name: {0: "batch", 1: "priors"} for name in output_names(model.model_config)}
    metadata = {"model": to_dict(model.model_config), "max_pixels": max_pixels}
    return _export(_RawOutputs(model), (2, *_EXAMPLE_SIZE, 3), axes, metadata)


def detector_graph(model: RetinaFace, config: PostprocessConfig, max_pixels: int = 0) -> bytes:
    """Export a model with decoding and suppression to an ONNX graph; see `raw_graph`.

    Its input is `images`, (1, H, W, 3) uint8 BGR, which is reduced to `max_pixels` pixels if it has more, as
    `FaceDetector` does; 0 means no limit. Its outputs are `detector_output_names`, with the shapes of `Detections`, in
    pixels of the input, best first. The thresholds are constants of the graph; its metadata `detection` lists them.
    """
    axes = {"images": {1: "height", 2: "width"}}
    axes |= {name: {0: "faces"} for name in detector_output_names(model.model_config)}
    metadata = {"model": to_dict(model.model_config), "detection": to_dict(config), "max_pixels": max_pixels}
    graph = _export(_Detector(model, config, max_pixels), (1, *_EXAMPLE_SIZE, 3), axes, metadata)
    return _with_filter(graph) if max_pixels else graph


def _with_filter(graph: bytes) -> bytes:
    """Add antialiasing to the first Resize of the graph, that of the image; PyTorch's exporter cannot set it."""
    import onnx  # an optional package

    model = onnx.load_from_string(graph)
    resize = next(node for node in model.graph.node if node.op_type == "Resize")
    resize.attribute.append(onnx.helper.make_attribute("antialias", 1))
    return bytes(model.SerializeToString())


@torch.no_grad()
def _export(
    module: nn.Module,
    example_shape: tuple[int, ...],
    dynamic_axes: Mapping[str, Mapping[int, str]],
    metadata: Mapping[str, Any],
) -> bytes:
    import onnx  # an optional package

    content = io.BytesIO()
    with quiet_exporter():
        # Tracing takes a fraction of a second; the newer exporter (dynamo=True) takes about ten seconds.
        torch.onnx.export(
            module.eval(),
            (torch.zeros(example_shape, dtype=torch.uint8),),
            content,  # type: ignore[arg-type]  # it accepts file objects as well as paths
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
def quiet_exporter() -> Iterator[None]:
    """Suppress the warnings that PyTorch's tracer and compiler log about their internals."""
    logger = logging.getLogger("torch")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
