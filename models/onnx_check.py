"""Comparison of ONNX graphs with the PyTorch model from which they were exported."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import torch
from torchvision.ops import box_iou

from config import DATA, ComputeOptions, PostprocessConfig
from models.backend import OnnxBackend, TorchBackend
from models.detector import FaceDetector
from models.onnx_graph import detector_output_names, output_names
from models.retinaface import RetinaFace
from utils.runtime.images import read_image

_CHECKED_IMAGE = DATA / "sample_widerface/images/astronaut.jpg"
_CHECKED_SHAPES = ((1, 160, 160, 3), (2, 97, 210, 3))
_MIN_IOU = 0.9  # for reduced images, because the two resizing filters differ slightly


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
