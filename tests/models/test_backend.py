"""Tests that all backends, and models with fused batch normalisation, give the same outputs."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import models.onnx_graph
from config import (
    RECIPES,
    ROOT,
    USUAL_LEVELS,
    ComputeOptions,
    ImagePyramidConfig,
    LevelConfig,
    ModelConfig,
    PostprocessConfig,
)
from models.architecture import usual_config
from models.backend import OnnxBackend, TorchBackend, build_backend, fuse_batch_norm
from models.detector import FaceDetector
from models.image_pyramid import build_model
from models.onnx_graph import detector_graph, detector_output_names, output_names, raw_graph
from models.retinaface import RetinaFace
from utils.errors import ConfigError
from utils.runtime.experiment import load_recipe
from utils.runtime.images import read_image
from utils.structures import Detections

SAMPLE_IMAGES = sorted((ROOT / "data/sample_widerface/images").iterdir())
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("onnx", "onnxruntime")),
    reason="onnx or onnxruntime is not installed",
)


@pytest.fixture(scope="module")
def plain() -> FaceDetector:
    """The shipped detector with the PyTorch backend, without fused batch normalisation."""
    detector = FaceDetector.from_experiment()
    detector.backend = TorchBackend(detector.model)
    return detector


def assert_same_faces(found: Detections, expected: Detections) -> None:
    assert len(found) == len(expected)
    torch.testing.assert_close(found.boxes, expected.boxes, atol=0.05, rtol=0)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)
    assert found.landmarks is not None
    assert expected.landmarks is not None
    torch.testing.assert_close(found.landmarks, expected.landmarks, atol=0.05, rtol=0)


def with_options(plain: FaceDetector, **options: Any) -> FaceDetector:
    return FaceDetector(plain.model, plain.config, ComputeOptions(**options))


@pytest.mark.parametrize("backend", ["torch", pytest.param("onnx", marks=needs_onnx)])
def test_every_backend_finds_the_same_faces_in_the_samples(plain: FaceDetector, backend: str) -> None:
    detector = with_options(plain, backend=backend)
    assert detector.backend.name == backend
    for path in SAMPLE_IMAGES:
        image = read_image(path)
        assert_same_faces(detector.detect(image), plain.detect(image))


def with_resnet18(recipe: str) -> ModelConfig:
    """The model of a recipe with a smaller backbone, and without deformable convolutions, which ONNX does not have."""
    model = load_recipe(recipe, RECIPES).experiment.model
    model = dataclasses.replace(model, backbone="resnet18", deformable_backbone=False, deformable_context=False)
    return model if model.norm == "group" else dataclasses.replace(model, fpn_channels=16)


CONFIGS = {
    "rematch": usual_config("mobilenet0.25", refinement="rematch", fpn_channels=16),
    "rematch with four levels": usual_config(
        "mobilenet0.25", refinement="rematch", fpn_channels=16, image_pyramid=ImagePyramidConfig(2, 0.3, 0.3)
    ),
    "single without branches": usual_config(
        "resnet18", cascade=False, model_version="retina", landmarks=False, num_anchor=2, fpn_channels=16
    ),
    "sum with four levels": usual_config("resnet18", fpn_channels=16, image_pyramid=ImagePyramidConfig(1, 0.3)),
    "separate feature pyramid of the upsampled image": usual_config(
        "mobilenet0.25", fpn_channels=16, image_pyramid=ImagePyramidConfig(2, 0.0, 0.3, upsampled_channels=(8, 12))
    ),
    "two resolutions": usual_config(
        "mobilenet0.25",
        num_anchor=2,
        fpn_channels=16,
        two_resolutions=True,
        levels=(LevelConfig(4, (8, 16), channels=8), *USUAL_LEVELS[2]),
    ),
    "sum with half scale": usual_config(
        "mobilenet0.25", fpn_channels=16, image_pyramid=ImagePyramidConfig(half_scale_weight=0.3)
    ),
    # Strides 4 to 128, fractional anchor sizes with a ratio of 1.3, group normalisation, towers, bilinear upsampling.
    "TinaFace": with_resnet18("tinaface_r50_gn_dcn"),
    # Strides 4 to 64, the second stage on the boxes of the first.
    "RetinaFace": with_resnet18("retinaface_r152"),
}


@needs_onnx
@torch.inference_mode()
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_onnx_graph_accepts_any_batch_and_image_size(config: ModelConfig) -> None:
    """Including an image so small that the coarsest level is one cell, and sizes that no stride divides."""
    torch.manual_seed(0)
    model = build_model(config).eval()
    backend, plain = OnnxBackend(raw_graph(model), model.priors), TorchBackend(model)
    for shape in ((1, 64, 64, 3), (3, 45, 133, 3), (1, 20, 17, 3)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        found, expected = backend(images), plain(images)
        for name in {*output_names(config), "priors"}:
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-4, rtol=1e-3)
        assert (found.landmark_deltas is None) == (expected.landmark_deltas is None)
        assert (found.iou_logits is None) == (expected.iou_logits is None)


@needs_onnx
@pytest.mark.parametrize("config", [PostprocessConfig(0.02, 0.4), PostprocessConfig(0.1, 0.3, top_k=20, keep_top_k=5)])
@pytest.mark.parametrize("name", [None, "rematch with four levels", "single without branches"])
def test_onnx_graph_with_nms_equals_the_detector(
    name: str | None, config: PostprocessConfig, plain: FaceDetector
) -> None:
    """Including an image one pixel high, which has no faces, and an untrained model, which finds them everywhere."""
    import onnxruntime

    torch.manual_seed(0)
    model = build_model(CONFIGS[name]).eval() if name else plain.model
    session = onnxruntime.InferenceSession(detector_graph(model, config), providers=["CPUExecutionProvider"])
    image = read_image(ROOT / "data/sample_widerface/images/astronaut.jpg")
    for shown in (image[:300], image[::3, 100:200], np.zeros((1, 40, 3), np.uint8)):
        expected = FaceDetector(model, config).detect(shown)
        values = session.run(None, {"images": np.ascontiguousarray(shown)[None]})
        found = dict(zip(detector_output_names(model.model_config), map(torch.from_numpy, values), strict=True))
        if name is None:
            assert_same_faces(Detections(found["boxes"], found["scores"], found["landmarks"]), expected)
        else:  # scores of an untrained model are so close that rounding changes their order
            torch.testing.assert_close(found["scores"][:1], expected.scores[:1], atol=1e-4, rtol=0)
            assert found["boxes"].shape[1:] == (4,)


def test_no_faces_in_a_blank_image_that_is_not_square(plain: FaceDetector) -> None:
    blank = np.zeros((70, 120, 3), np.uint8)
    for detector in (plain, with_options(plain, backend="torch")):
        assert len(detector.detect(blank)) == 0


@needs_onnx
def test_auto_backend_is_the_fastest_installed_one(plain: FaceDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    assert with_options(plain).backend.name == "onnx"
    monkeypatch.setattr(models.onnx_graph, "_ONNX_PACKAGES", ("no_such_package",))
    assert with_options(plain).backend.name == "torch"


def test_deformable_models_run_in_pytorch() -> None:
    model = build_model(usual_config("mobilenet0.25", num_anchor=2, fpn_channels=16, deformable_context=True)).eval()
    assert build_backend(model, ComputeOptions()).name == "torch"
    with pytest.raises(ConfigError, match="ONNX has no deformable convolutions"):
        build_backend(model, ComputeOptions(backend="onnx"))


def test_unavailable_backend_is_refused(plain: FaceDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.onnx_graph, "_ONNX_PACKAGES", ("no_such_package",))
    with pytest.raises(ConfigError, match=r"--backend=onnx needs no_such_package; pip install"):
        with_options(plain, backend="onnx")
    monkeypatch.setattr(models.onnx_graph, "_ONNX_PACKAGES", ())
    elsewhere = build_model(plain.model.model_config).to("meta")
    with pytest.raises(ConfigError, match=r"--backend=onnx computes on the CPU, not on meta; add --gpu_num=-1"):
        build_backend(elsewhere, ComputeOptions(backend="onnx"))
    with pytest.raises(ConfigError, match="--backend is one of auto, torch, compile, onnx, got 'tensorrt'"):
        ComputeOptions(backend="tensorrt")


def test_amp_without_cuda_is_refused(plain: FaceDetector) -> None:
    with pytest.raises(ConfigError, match="--amp needs a CUDA device; drop it"):
        with_options(plain, amp=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_half_precision_finds_the_same_faces_on_cuda(plain: FaceDetector) -> None:
    model = copy.deepcopy(plain.model).to("cuda")
    image = read_image(ROOT / "data/sample_widerface/images/astronaut.jpg")
    expected, found = (
        FaceDetector(model, plain.config, ComputeOptions(amp=amp)).detect(image) for amp in (False, True)
    )
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found.boxes, expected.boxes, atol=0.5, rtol=0)
    torch.testing.assert_close(found.scores, expected.scores, atol=5e-3, rtol=0)


def test_missing_compiler_is_reported_in_one_line(
    plain: FaceDetector, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(_images: torch.Tensor) -> None:
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", lambda model, dynamic: fail)
    backend = build_backend(plain.model, ComputeOptions(backend="compile"))
    assert backend.name == "torch"
    assert capfd.readouterr().err == (
        "warning: --backend=compile: cannot compile here (no C++ compiler); using torch\n"
    )


# ---------------------------------------------------------------------------------------- batch normalisation

CASCADES = {"single": (False, "sum"), "sum": (True, "sum"), "rematch": (True, "rematch")}
PYRAMIDS = {
    "mobilenet0.25": ImagePyramidConfig(2, 0.3),
    "resnet18": ImagePyramidConfig(),
    "resnet50": ImagePyramidConfig(),
}


def model_with_random_statistics(backbone: str, cascade: bool = True, refinement: str = "sum") -> RetinaFace:
    """Return a model with random batch normalisation, as after training."""
    generator = torch.Generator().manual_seed(5)
    config = usual_config(
        backbone, cascade=cascade, refinement=refinement, fpn_channels=32, image_pyramid=PYRAMIDS[backbone]
    )
    model = build_model(config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.0),
                (module.bias, -0.2, 0.2),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 1.5),
            ):
                assert tensor is not None
                tensor.data.uniform_(low, high, generator=generator)
    return model


def images() -> Tensor:
    """Return two images of odd height that are not square."""
    return torch.rand(2, 3, 67, 96, generator=torch.Generator().manual_seed(1)) * 255


@torch.inference_mode()
@pytest.mark.parametrize(("cascade", "refinement"), CASCADES.values(), ids=CASCADES.keys())
@pytest.mark.parametrize("backbone", ["mobilenet0.25", "resnet18", "resnet50"])
def test_fused_outputs_equal_those_of_the_model(
    backbone: str, cascade: bool, refinement: str, device: torch.device
) -> None:
    model = model_with_random_statistics(backbone, cascade, refinement).to(device)
    fused = fuse_batch_norm(model)
    assert not [name for name, module in fused.named_modules() if "BatchNorm" in type(module).__name__]
    for found, expected in zip(fused(images().to(device)), model(images().to(device)), strict=True):
        for name, value in vars(expected).items():
            torch.testing.assert_close(getattr(found, name), value, atol=1e-4, rtol=1e-4)


def test_fusing_does_not_change_the_model() -> None:
    model = model_with_random_statistics("mobilenet0.25").train()
    before = copy.deepcopy(model.state_dict())
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    fused = fuse_batch_norm(model)
    assert model.training
    assert not fused.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any(trainable)
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert not any(parameter.requires_grad for parameter in fused.parameters())


@torch.inference_mode()
@pytest.mark.parametrize("backbone", ["mobilenet0.25", "resnet18"])
def test_memory_format_stays_channels_last(backbone: str) -> None:
    """Every convolution reads and writes channels_last, so the heads' predictions are in the priors' order already."""
    fused = fuse_batch_norm(model_with_random_statistics(backbone))
    other_layouts: list[torch.Size] = []

    def check(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        other_layouts.extend(
            tensor.shape for tensor in (*inputs, output) if not tensor.is_contiguous(memory_format=torch.channels_last)
        )

    for module in fused.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(check)
    batch = torch.zeros(2, 67, 96, 3, dtype=torch.uint8)
    fused(batch.permute(0, 3, 1, 2))
    assert not other_layouts
