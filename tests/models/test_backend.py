"""Every way to compute the network finds the same faces."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models.backend
from config import ROOT, ConfigError, ModelConfig, SpeedOptions
from models.backend import OnnxBackend, TorchBackend, build_backend, export_onnx, output_names
from models.detector import FaceDetector
from models.retinaface import RetinaFace
from utils.images import read_image
from utils.structures import Detections

PICTURES = sorted((ROOT / "data/sample_widerface/images").iterdir())
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("onnx", "onnxruntime", "onnxscript")),
    reason="onnx, onnxruntime or onnxscript is not installed",
)


@pytest.fixture(scope="module")
def plain() -> FaceDetector:
    return FaceDetector(FaceDetector.from_experiment().network, FaceDetector.from_experiment().detection)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "retinaface_onnx"


def assert_same_faces(found: Detections, expected: Detections) -> None:
    assert len(found) == len(expected)
    torch.testing.assert_close(found.boxes, expected.boxes, atol=0.05, rtol=0)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-3, rtol=0)
    assert found.landmarks is not None
    assert expected.landmarks is not None
    torch.testing.assert_close(found.landmarks, expected.landmarks, atol=0.05, rtol=0)


def with_speed(plain: FaceDetector, **options: Any) -> FaceDetector:
    return FaceDetector(plain.network, plain.detection, SpeedOptions(**options))


def test_fused_network_finds_the_same_faces_in_the_samples(plain: FaceDetector) -> None:
    fused = with_speed(plain, backend="torch")
    assert fused.backend.name == "torch"
    for path in PICTURES:
        image = read_image(path)
        assert_same_faces(fused.detect(image), plain.detect(image))


@needs_onnx
def test_onnx_runtime_finds_the_same_faces_in_the_samples(plain: FaceDetector, cache: Path) -> None:
    detector = with_speed(plain, backend="onnx")
    assert detector.backend.name == "onnx"
    for path in PICTURES:
        image = read_image(path)
        assert_same_faces(detector.detect(image), plain.detect(image))


@needs_onnx
def test_graph_is_made_once_for_the_same_weights(
    plain: FaceDetector, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    written: list[Path] = []

    def write(network: RetinaFace, path: Path) -> None:
        written.append(path)
        path.write_bytes(b"graph")

    monkeypatch.setattr(models.backend, "export_onnx", write)
    monkeypatch.setattr(models.backend, "OnnxBackend", lambda path: path)
    first, again = (str(with_speed(plain, backend="onnx").backend) for _ in range(2))
    assert first == again
    assert capfd.readouterr().err.count("preparing the network for ONNX Runtime") == 1
    unfused = str(with_speed(plain, backend="onnx", fuse=False).backend)
    assert [Path(first), Path(unfused)] == written
    assert first != unfused


@needs_onnx
@torch.inference_mode()
@pytest.mark.parametrize(
    "model",
    [
        ModelConfig.for_backbone("mobilenet0.25", refinement="rematch", fpn_channels=16),
        ModelConfig.for_backbone(
            "resnet18", cascade=False, model_version="retina", landmarks=False, num_anchor=2, fpn_channels=16
        ),
    ],
    ids=["rematch", "single without branches"],
)
def test_graph_takes_any_number_and_size_of_images(model: ModelConfig, tmp_path: Path) -> None:
    """Also one so small that the coarsest level is a single cell, and sizes that no stride divides."""
    torch.manual_seed(0)
    network = RetinaFace(model).eval()
    export_onnx(network, tmp_path / "graph.onnx")
    backend, plain = OnnxBackend(tmp_path / "graph.onnx"), TorchBackend(network)
    for shape in ((1, 64, 64, 3), (3, 45, 133, 3), (1, 20, 17, 3)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        found, expected = backend(images), plain(images)
        for name in output_names(model):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-4, rtol=1e-3)
        assert (found.priors is None) == (expected.priors is None)
        assert (found.landmark_deltas is None) == (expected.landmark_deltas is None)


def test_no_faces_in_a_blank_image_that_is_not_square(plain: FaceDetector) -> None:
    blank = np.zeros((70, 120, 3), np.uint8)
    for fuse in (True, False):
        assert len(with_speed(plain, backend="torch", fuse=fuse).detect(blank)) == 0


@needs_onnx
def test_automatic_choice_is_onnx_once_there_is_a_graph(
    plain: FaceDetector, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.backend, "export_onnx", lambda network, path: path.write_bytes(b"graph"))
    monkeypatch.setattr(models.backend, "OnnxBackend", lambda path: "onnx runtime")
    assert with_speed(plain).backend.name == "torch"
    with_speed(plain, backend="onnx")
    assert str(with_speed(plain).backend) == "onnx runtime"
    assert with_speed(plain, fuse=False).backend.name == "torch"  # another graph
    monkeypatch.setattr(models.backend, "_ONNX_PACKAGES", ("no_such_package",))
    assert with_speed(plain).backend.name == "torch"


def test_backend_that_cannot_be_had_is_refused(plain: FaceDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.backend, "_ONNX_PACKAGES", ("no_such_package",))
    with pytest.raises(ConfigError, match=r"--backend=onnx needs no_such_package; pip install"):
        with_speed(plain, backend="onnx")
    monkeypatch.setattr(models.backend, "_ONNX_PACKAGES", ())
    elsewhere = RetinaFace(plain.network.config).to("meta")
    with pytest.raises(ConfigError, match=r"--backend=onnx computes on the CPU, not on meta; add --gpu_num=-1"):
        build_backend(elsewhere, SpeedOptions(backend="onnx", fuse=False))
    with pytest.raises(ConfigError, match="--backend is one of auto, torch, compile, onnx, got 'tensorrt'"):
        SpeedOptions(backend="tensorrt")


@needs_onnx
def test_cache_that_cannot_be_written_is_named(plain: FaceDetector, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match=r"retinaface_onnx: cannot be written \(.+\); set XDG_CACHE_HOME"):
        with_speed(plain, backend="onnx")


def test_without_a_compiler_one_line_says_so(
    plain: FaceDetector, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(_images: torch.Tensor) -> None:
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", lambda network, dynamic: fail)
    backend = build_backend(plain.network, SpeedOptions(backend="compile"))
    assert backend.name == "torch"
    assert capfd.readouterr().err == (
        "warning: --backend=compile: cannot compile here (no C++ compiler); using torch\n"
    )


def test_validation_computes_the_network_that_is_being_trained() -> None:
    network = RetinaFace(ModelConfig.for_backbone("mobilenet0.25"))
    backend = FaceDetector(network, FaceDetector.from_experiment().detection).backend
    assert isinstance(backend, TorchBackend)
    assert backend.network is network
