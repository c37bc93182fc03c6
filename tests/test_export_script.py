"""Tests of export.py, run as a user runs it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

import export as script
from config import ROOT, ModelConfig
from models.backend import fuse_batch_norm
from models.image_pyramid import build_model
from models.onnx_check import largest_difference
from tests.scripts import run_script
from utils.options import from_dict, to_dict
from utils.runtime.images import read_image

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("onnx", "onnxruntime")),
    reason="onnx or onnxruntime is not installed",
)


def export(*flags: str) -> CompletedProcess[str]:
    return run_script(script, *flags)


def test_exported_file_describes_its_experiment(tmp_path: Path) -> None:
    import onnxruntime

    file = tmp_path / "faces.onnx"
    name = "--experiment_name=mobilenet0.25_pretrained"
    result = export(name, f"--output={file}", "--cascade=False", "--max_pixels=640000")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{file}: mobilenet0.25_ckpt-best.pth, ")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    assert (images.name, images.type, images.shape[3]) == ("images", "tensor(uint8)", 3)
    assert not [size for size in images.shape[:3] if isinstance(size, int)]
    names = [output.name for output in session.get_outputs()]
    assert names == ["class_logits", "box_deltas", "landmark_deltas", "iou_logits"]
    config = from_dict(ModelConfig, json.loads(session.get_modelmeta().custom_metadata_map["model"]), "metadata")
    assert (config.backbone, config.cascade) == ("mobilenet0.25", False)
    assert json.loads(session.get_modelmeta().custom_metadata_map["max_pixels"]) == 640_000
    other = fuse_batch_norm(build_model(from_dict(ModelConfig, to_dict(config), "")))
    assert largest_difference(other, file) > 0.01  # a model with other weights differs
    assert torch.is_grad_enabled()


def test_file_exported_with_nms_detects_faces(tmp_path: Path) -> None:
    import onnxruntime

    file = tmp_path / "faces.onnx"
    result = export(f"--output={file}", "--with_nms", "--confidence_threshold=0.6")
    assert (result.returncode, result.stderr) == (0, "")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["boxes", "scores", "landmarks"]
    thresholds = json.loads(session.get_modelmeta().custom_metadata_map["detection"])
    assert thresholds["confidence_threshold"] == 0.6
    image = read_image(ROOT / "data/sample_widerface/images/astronaut.jpg")
    boxes, scores, landmarks = session.run(None, {"images": image[None]})
    assert (boxes.shape, scores.shape, landmarks.shape) == ((1, 4), (1,), (1, 5, 2))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--output=/no/such/folder/faces.onnx",), "there is no folder /no/such/folder"),
        (("--experiment_name=nowhere",), "no such experiment"),
        ((f"--output={'x' * 300}",), "cannot be used (File name too long)"),
        (
            ("--experiment_name=mobilenet0.25_pretrained", "--cascade=True", "--refinement=sum"),
            "trained with refinement rematch",
        ),
    ],
)
def test_errors_are_one_line(flags: tuple[str, ...], message: str) -> None:
    result = export(*flags)
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_flag_without_effect_exits_with_status_2() -> None:
    result = export("--top_k=5")
    assert result.returncode == 2
    assert result.stderr == "error: --top_k has no effect without --with_nms; add it, or drop --top_k\n"
