"""Tests of the Python API: input types of FaceDetector, batches, pickling and exported files."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from benchmarks.speed import yunet_run
from config import ROOT, ComputeOptions, PostprocessConfig
from models import onnx_check
from models.backend import OnnxBackend, fuse_batch_norm
from models.detector import FaceDetector
from models.onnx_graph import detector_graph, missing_onnx_packages
from utils.errors import UserError
from utils.runtime.images import as_bgr_uint8, read_image
from utils.structures import Detections

ASTRONAUT = ROOT / "data/sample_widerface/images/astronaut.jpg"
EXPERIMENT = "mobilenet0.25_anc2_casT_fpn3"
needs_onnx = pytest.mark.skipif(bool(missing_onnx_packages()), reason="onnx or onnxruntime is not installed")


@pytest.fixture(scope="module")
def detector() -> FaceDetector:
    return FaceDetector.from_experiment(EXPERIMENT)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return read_image(ASTRONAUT)


INPUTS: dict[str, Callable[[np.ndarray], Any]] = {
    "float 0..1": lambda image: image / np.float32(255),
    "float 0..255": lambda image: image.astype(np.float64),
    "uint16": lambda image: image.astype(np.uint16) * 257,
    "int64": lambda image: image.astype(np.int64),
    "BGRA": lambda image: cv2.cvtColor(image, cv2.COLOR_BGR2BGRA),
    "PIL": lambda image: Image.fromarray(image[:, :, ::-1]),
    "PIL RGBA": lambda image: Image.fromarray(image[:, :, ::-1]).convert("RGBA"),
    "path": lambda image: ASTRONAUT,
    "text": lambda image: str(ASTRONAUT),
    "read-only": lambda image: np.frombuffer(image.tobytes(), np.uint8).reshape(image.shape),
    "mirrored twice": lambda image: np.ascontiguousarray(image[:, ::-1])[:, ::-1],
}
GREY_INPUTS: dict[str, Callable[[np.ndarray], Any]] = {
    "grey": lambda image: cv2.cvtColor(image, cv2.COLOR_BGR2GRAY),
    "grey with a channel": lambda image: cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)[..., None],
    "PIL grey": lambda image: Image.fromarray(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)),
    "PIL 16 bits": lambda image: Image.fromarray(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).astype(np.uint16) * 257),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("input_type", INPUTS)
def test_all_input_types_give_the_same_image(image: np.ndarray, input_type: str) -> None:
    assert np.array_equal(as_bgr_uint8(INPUTS[input_type](image)), image)


@pytest.mark.parametrize("input_type", GREY_INPUTS)
def test_grey_has_three_equal_channels(image: np.ndarray, input_type: str) -> None:
    found = as_bgr_uint8(GREY_INPUTS[input_type](image))
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    assert np.array_equal(found, np.stack([grey] * 3, axis=2))


def test_faces_do_not_depend_on_the_input_type(detector: FaceDetector, image: np.ndarray) -> None:
    expected = detector.detect(image)
    assert len(expected) == 1
    for value in (INPUTS["float 0..1"](image), INPUTS["PIL"](image), ASTRONAUT):
        assert torch.equal(detector.detect(value).boxes, expected.boxes)


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        [[1, 2], [3, 4]],
        torch.zeros(8, 8, 3),
        np.zeros((0, 0, 3), np.uint8),
        Image.new("RGB", (0, 0)),
        Image.new("L", (0, 5)),
        np.zeros((3, 40, 40), np.uint8),
        np.zeros((1, 40, 40, 3), np.uint8),
        np.zeros((40, 40, 2), np.uint8),
        np.zeros(5, np.uint8),
        np.array([["a"]]),
        np.zeros((4, 4), complex),
        "nowhere.jpg",
        Path(__file__),
    ],
)
def test_invalid_input_is_refused_in_one_line(detector: FaceDetector, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as exc_info:
        detector.detect(value)
    assert "\n" not in str(exc_info.value)
    assert (
        "expected an image" in str(exc_info.value)
        or "nowhere.jpg: " in str(exc_info.value)
        or ".py: " in str(exc_info.value)
    )


def test_truncated_pil_image_is_refused(detector: FaceDetector) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (64, 48)).save(stream, "PNG")
    image = Image.open(io.BytesIO(stream.getvalue()[:-40]))
    with pytest.raises(ValueError, match="truncated"):
        detector.detect(image)


def test_detect_batch(detector: FaceDetector, image: np.ndarray) -> None:
    assert detector.detect_batch([]) == []
    with pytest.raises(
        ValueError, match="expected images of the same size, got 512x512, 512x100; call detect for each"
    ):
        detector.detect_batch([image, image[:100]])
    assert [len(found) for found in detector.detect_batch([image, INPUTS["PIL"](image)])] == [1, 1]


def test_detections_can_be_modified(detector: FaceDetector, image: np.ndarray) -> None:
    found = detector.detect(image)
    assert not found.boxes.is_inference()
    found.boxes[0, 0] = 5
    found.scores.mul_(2)
    assert found.landmarks is not None
    found.landmarks.requires_grad_().sum().backward()


def test_max_pixels_is_an_option() -> None:
    assert FaceDetector.from_experiment(EXPERIMENT, max_pixels=1000).max_pixels == 1000
    assert FaceDetector.from_experiment(EXPERIMENT, max_pixels=0, keep_top_k=3).config.keep_top_k == 3
    assert FaceDetector.from_experiment(EXPERIMENT).max_pixels == ComputeOptions.max_pixels


def test_landmarks_are_clipped_where_boxes_are() -> None:
    points = torch.tensor([[[-5.0, 3], [8, 99], [4, 4], [50, -1], [2, 2]]])
    found = Detections(torch.tensor([[-1.0, -1, 50, 50]]), torch.ones(1), points).clipped((20, 10))
    assert found.landmarks is not None
    assert found.landmarks.tolist() == [[[0, 3], [8, 20], [4, 4], [10, 0], [2, 2]]]
    assert Detections(found.boxes, found.scores, None).clipped((20, 10)).landmarks is None


@needs_onnx
def test_onnx_detector_can_be_sent_to_a_spawned_worker(image: np.ndarray) -> None:
    detector = FaceDetector.from_experiment(EXPERIMENT, compute=ComputeOptions("onnx"))
    copied = pickle.loads(pickle.dumps(detector))
    assert isinstance(copied.backend, OnnxBackend)
    assert torch.equal(copied.detect(image).boxes, detector.detect(image).boxes)


@needs_onnx
@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_exported_file_reduces_large_images(image: np.ndarray, factor: float) -> None:
    """The largest image has more than 30 times as many pixels as the limit, and the smallest is not reduced."""
    import onnxruntime

    detector = FaceDetector.from_experiment(EXPERIMENT, max_pixels=60_000)
    graph = detector_graph(fuse_batch_norm(detector.model), detector.config, 60_000)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["max_pixels"]) == 60_000
    shown = cv2.resize(image, None, fx=factor, fy=0.9 * factor)
    expected, (boxes, scores, landmarks) = detector.detect(shown), session.run(None, {"images": shown[None]})
    assert len(boxes) == len(expected) == 1
    assert box_iou(torch.from_numpy(boxes), expected.boxes).item() > (0.999 if factor < 1 else 0.95)
    assert abs(scores[0] - float(expected.scores[0])) < 0.01
    assert expected.landmarks is not None
    assert np.abs(landmarks - expected.landmarks.numpy()).max() < 0.03 * (boxes[0, 2] - boxes[0, 0])


@needs_onnx
def test_export_needs_no_sample_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_check, "_CHECKED_IMAGE", tmp_path / "absent.jpg")
    detector = FaceDetector.from_experiment(EXPERIMENT)
    model, config = fuse_batch_norm(detector.model), PostprocessConfig(confidence_threshold=0.02)
    (tmp_path / "a.onnx").write_bytes(detector_graph(model, config, 100_000))
    compute = ComputeOptions("torch", max_pixels=100_000)
    assert onnx_check.largest_detection_difference(model, tmp_path / "a.onnx", config, compute) < 0.05
    # A file without the reduction is detected.
    (tmp_path / "b.onnx").write_bytes(detector_graph(model, config))
    monkeypatch.setattr(onnx_check, "_CHECKED_IMAGE", ASTRONAUT)
    compute = ComputeOptions("torch", max_pixels=2_000)
    assert onnx_check.largest_detection_difference(model, tmp_path / "b.onnx", config, compute) > 1


def test_unreadable_yunet_model_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "yunet.onnx").write_text("not a model")
    with pytest.raises(UserError, match=r"--yunet .*yunet\.onnx: OpenCV cannot read it"):
        yunet_run(tmp_path / "yunet.onnx", [], tmp_path)
