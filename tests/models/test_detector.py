"""Tests of the detector: large images, input checks, and memory over many image sizes."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from config import ROOT, ComputeOptions
from models.backend import Backend
from models.detector import FaceDetector
from models.onnx_graph import missing_onnx_packages
from utils.errors import ConfigError
from utils.runtime.images import read_image
from utils.runtime.pixels import resize_to_limit
from utils.structures import StageOutput

_STATM = Path("/proc/self/statm")


class RecordingBackend:
    """A backend that records the shapes of its inputs."""

    name = "recording"
    num_workers = 1

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.shapes: list[tuple[int, ...]] = []

    def for_worker(self) -> Backend:
        return self

    def __call__(self, images: Tensor) -> StageOutput:
        self.shapes.append(tuple(images.shape))
        return self.backend(images)


def test_large_image_is_reduced_and_boxes_are_in_its_own_pixels() -> None:
    image = read_image(ROOT / "data/sample_widerface/images/astronaut.jpg")[:400]
    detector = FaceDetector.from_experiment()
    quarter = 400 * 512 // 4
    expected = detector.detect(resize_to_limit(image, quarter)).scaled(2, 2)
    limited = FaceDetector(detector.model, detector.config, ComputeOptions("torch", max_pixels=quarter))
    limited.backend = recording = RecordingBackend(limited.backend)
    found = limited.detect(image)
    assert recording.shapes == [(1, 200, 256, 3)]
    assert len(found) == len(expected) == 1
    torch.testing.assert_close(found.boxes, expected.boxes, atol=0.05, rtol=0)
    torch.testing.assert_close(found.landmarks, expected.landmarks, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    "image",
    [np.zeros((40, 64, 3), np.uint8), np.zeros((40, 64), np.uint8), Image.new("RGB", (64, 40)), "a.jpg", Path("a")],
)
def test_one_image_in_place_of_several_is_refused(image: Any) -> None:
    """The rows of a three-dimensional array would be taken for grey images."""
    detector = FaceDetector.from_experiment("mobilenet0.25_anc2_casT_fpn3")
    for function in (detector.detect_batch, detector.detect_many):
        with pytest.raises(TypeError, match=r"expected several images, .* got one; call detect for one image"):
            function(image)
    assert len(detector.detect_batch(np.zeros((2, 40, 64, 3), np.uint8))) == 2  # type: ignore[arg-type]


def test_negative_max_pixels_is_refused() -> None:
    with pytest.raises(ConfigError, match="--max_pixels must not be negative"):
        ComputeOptions(max_pixels=-1)


@pytest.mark.skipif(not _STATM.exists(), reason="memory is read from /proc")
@pytest.mark.skipif(bool(missing_onnx_packages()), reason="PyTorch keeps kernels for the newest thousand shapes")
def test_memory_stays_flat_over_images_of_many_sizes() -> None:
    """Keeping the images would take 30 MB, and their feature pyramids more."""
    detector = FaceDetector.from_experiment(compute=ComputeOptions(backend="onnx"))
    generator = np.random.default_rng(0)

    def detect(count: int) -> None:
        for _ in range(count):
            height, width = generator.integers(100, 400, 2)
            detector.detect(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))

    detect(40)
    before = resident_megabytes()
    detect(160)
    assert resident_megabytes() - before < 20


def resident_megabytes() -> float:
    gc.collect()
    return int(_STATM.read_text().split()[1]) * 4096 / 1e6
