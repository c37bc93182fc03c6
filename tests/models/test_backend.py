"""Every way to compute the network finds the same faces."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch

import models.backend
from config import ROOT, ComputeOptions, ConfigError, ModelConfig, PostprocessConfig
from models.backend import (
    CudaBackend,
    OnnxBackend,
    TorchBackend,
    build_backend,
    detector_graph,
    detector_output_names,
    output_names,
    raw_graph,
)
from models.detector import FaceDetector
from models.retinaface import RetinaFace
from utils.runtime.images import read_image
from utils.structures import Detections, StageOutput

PICTURES = sorted((ROOT / "data/sample_widerface/images").iterdir())
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("onnx", "onnxruntime")),
    reason="onnx or onnxruntime is not installed",
)


@pytest.fixture(scope="module")
def plain() -> FaceDetector:
    return FaceDetector(FaceDetector.from_experiment().network, FaceDetector.from_experiment().detection)


def assert_same_faces(found: Detections, expected: Detections) -> None:
    assert len(found) == len(expected)
    torch.testing.assert_close(found.boxes, expected.boxes, atol=0.05, rtol=0)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)
    assert found.landmarks is not None
    assert expected.landmarks is not None
    torch.testing.assert_close(found.landmarks, expected.landmarks, atol=0.05, rtol=0)


def with_speed(plain: FaceDetector, **options: Any) -> FaceDetector:
    return FaceDetector(plain.network, plain.detection, ComputeOptions(**options))


@pytest.mark.parametrize("backend", ["torch", pytest.param("onnx", marks=needs_onnx)])
def test_fused_network_finds_the_same_faces_in_the_samples(plain: FaceDetector, backend: str) -> None:
    fused = with_speed(plain, backend=backend)
    assert fused.backend.name == backend
    for path in PICTURES:
        image = read_image(path)
        assert_same_faces(fused.detect(image), plain.detect(image))


MODELS = {
    "rematch": usual_config("mobilenet0.25", refinement="rematch", fpn_channels=16),
    "rematch with four levels": usual_config(
        "mobilenet0.25", refinement="rematch", fine_levels=2, coarse_share=0.3, fpn_channels=16
    ),
    "single without branches": usual_config(
        "resnet18", cascade=False, model_version="retina", landmarks=False, num_anchor=2, fpn_channels=16
    ),
    "sum with four levels": usual_config("resnet18", fine_levels=1, fpn_channels=16),
}


@needs_onnx
@torch.inference_mode()
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_graph_takes_any_number_and_size_of_images(model: ModelConfig) -> None:
    """Also one so small that the coarsest level is a single cell, and sizes that no stride divides."""
    torch.manual_seed(0)
    network = RetinaFace(model).eval()
    backend, plain = OnnxBackend(raw_graph(network)), TorchBackend(network)
    for shape in ((1, 64, 64, 3), (3, 45, 133, 3), (1, 20, 17, 3)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        found, expected = backend(images), plain(images)
        for name in output_names(model):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-4, rtol=1e-3)
        assert (found.priors is None) == (expected.priors is None)
        assert (found.landmark_deltas is None) == (expected.landmark_deltas is None)


@needs_onnx
@pytest.mark.parametrize(
    "detection", [PostprocessConfig(0.02, 0.4), PostprocessConfig(0.1, 0.3, top_k=20, keep_top_k=5)]
)
@pytest.mark.parametrize("name", [None, "rematch with four levels", "single without branches"])
def test_graph_with_suppression_finds_what_the_detector_finds(
    name: str | None, detection: PostprocessConfig, plain: FaceDetector
) -> None:
    """Also nothing, in a picture of a single pixel's height, and with a network that finds faces everywhere."""
    import onnxruntime

    torch.manual_seed(0)
    network = RetinaFace(MODELS[name]).eval() if name else plain.network
    session = onnxruntime.InferenceSession(detector_graph(network, detection), providers=["CPUExecutionProvider"])
    image = read_image(ROOT / "data/sample_widerface/images/astronaut.jpg")
    for shown in (image[:300], image[::3, 100:200], np.zeros((1, 40, 3), np.uint8)):
        expected = FaceDetector(network, detection).detect(shown)
        values = session.run(None, {"images": np.ascontiguousarray(shown)[None]})
        found = dict(zip(detector_output_names(network.config), map(torch.from_numpy, values), strict=True))
        if name is None:
            assert_same_faces(Detections(found["boxes"], found["scores"], found["landmarks"]), expected)
        else:  # an untrained network's scores lie so close together that rounding changes their order
            torch.testing.assert_close(found["scores"][:1], expected.scores[:1], atol=1e-4, rtol=0)
            assert found["boxes"].shape[1:] == (4,)


def test_no_faces_in_a_blank_image_that_is_not_square(plain: FaceDetector) -> None:
    blank = np.zeros((70, 120, 3), np.uint8)
    for fuse in (True, False):
        assert len(with_speed(plain, backend="torch", fuse=fuse).detect(blank)) == 0


@needs_onnx
def test_automatic_choice_is_the_fastest_that_is_installed(
    plain: FaceDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert with_speed(plain).backend.name == "onnx"
    monkeypatch.setattr(models.backend, "_ONNX_PACKAGES", ("no_such_package",))
    assert with_speed(plain).backend.name == "torch"


def test_backend_that_cannot_be_had_is_refused(plain: FaceDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.backend, "_ONNX_PACKAGES", ("no_such_package",))
    with pytest.raises(ConfigError, match=r"--backend=onnx needs no_such_package; pip install"):
        with_speed(plain, backend="onnx")
    monkeypatch.setattr(models.backend, "_ONNX_PACKAGES", ())
    elsewhere = RetinaFace(plain.network.config).to("meta")
    with pytest.raises(ConfigError, match=r"--backend=onnx computes on the CPU, not on meta; add --gpu_num=-1"):
        build_backend(elsewhere, ComputeOptions(backend="onnx", fuse=False))
    with pytest.raises(ConfigError, match="--backend is one of auto, torch, compile, onnx, got 'tensorrt'"):
        ComputeOptions(backend="tensorrt")


@pytest.mark.parametrize("options", [{"amp": True}, {"cudnn_benchmark": True}])
def test_what_only_cuda_has_is_refused_elsewhere(plain: FaceDetector, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"--(amp|cudnn_benchmark) needs a CUDA device; drop it"):
        with_speed(plain, **options)


@pytest.mark.parametrize("asked", [False, True])
def test_algorithms_are_tried_for_sizes_that_repeat_and_the_users_setting_stays(asked: bool) -> None:
    tried: list[bool] = []
    output = StageOutput(torch.zeros(1, 1, 2), torch.zeros(1, 1, 4), None, None)

    def network(_images: torch.Tensor) -> list[StageOutput]:
        tried.append(torch.backends.cudnn.benchmark)
        return [output]

    backend = CudaBackend(network, "torch", ComputeOptions(cudnn_benchmark=asked))
    for width in [*[9] * 22, 8, 9]:
        backend(torch.zeros(1, 4, width, 3))
    assert tried == [False] * 20 + [asked] * 2 + [False] + [asked]
    assert not torch.backends.cudnn.benchmark


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_half_precision_finds_the_same_faces_on_cuda(plain: FaceDetector) -> None:
    network = copy.deepcopy(plain.network).to("cuda")
    image = read_image(ROOT / "data/sample_widerface/images/astronaut.jpg")
    expected, found = (
        FaceDetector(network, plain.detection, ComputeOptions(amp=amp)).detect(image) for amp in (False, True)
    )
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found.boxes, expected.boxes, atol=0.5, rtol=0)
    torch.testing.assert_close(found.scores, expected.scores, atol=5e-3, rtol=0)


def test_without_a_compiler_one_line_says_so(
    plain: FaceDetector, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(_images: torch.Tensor) -> None:
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", lambda network, dynamic: fail)
    backend = build_backend(plain.network, ComputeOptions(backend="compile"))
    assert backend.name == "torch"
    assert capfd.readouterr().err == (
        "warning: --backend=compile: cannot compile here (no C++ compiler); using torch\n"
    )


def test_validation_computes_the_network_that_is_being_trained() -> None:
    network = RetinaFace(usual_config("mobilenet0.25"))
    backend = FaceDetector(network, FaceDetector.from_experiment().detection).backend
    assert isinstance(backend, TorchBackend)
    assert backend.network is network
