"""Tests that checkpoints of the original project are loaded completely and give its outputs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from config import USUAL_LEVELS, ModelOverrides
from layers.prior_box import prior_boxes
from models.architecture import apply_overrides, combine_overrides
from models.checkpoint import load_checkpoint
from models.detector import FaceDetector
from models.image_pyramid import build_model
from models.initialise import load_model
from utils.nms import pixel_nms


def _load_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("original", Path(__file__).with_name("original.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = _load_reference()
UNUSED = re.compile(r"fpn\.(output[04]|merge[03])\.")


@pytest.fixture(scope="module", params=["resnet_anc2_casT_fpn3", "tina_iou_anc3_casT_fpn3"])
def checkpoint(
    request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint in the original format with random weights, and its tensors."""
    shapes = json.loads((shared / "reference/upstream_state_shapes.json").read_text())[request.param]
    state = reference.noise_state(shapes)
    path = tmp_path_factory.mktemp(request.param) / "resnet50_ckpt-best.pth"
    torch.save({"epoch_idx": 7, "network": state}, path)
    return path, state


def test_experiment_name_builds_the_tensors_of_the_original(
    checkpoint: tuple[Path, dict[str, Tensor]],
) -> None:
    """`train.py --experiment_name=<name>` trains the model of that name, without its unused tensors."""
    path, _ = checkpoint
    original = load_checkpoint(path)
    overrides = combine_overrides(ModelOverrides(), path.parent.name.removesuffix("0"))
    config = apply_overrides(overrides)
    assert dataclasses.replace(config, score_exponent=original.model_config.score_exponent) == original.model_config
    shapes = {name: tuple(tensor.shape) for name, tensor in build_model(config).state_dict().items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in original.state.items()}


def test_architecture_is_recognised_from_the_tensors(checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    path, _ = checkpoint
    model = load_checkpoint(path).model_config
    tina = "tina" in path.parent.name
    assert (model.backbone, model.num_anchor, model.model_version) == (
        "resnet50",
        3 if tina else 2,
        "tina" if tina else "retina",
    )
    assert len(model.stages) == 2
    assert model.score_exponent == 1  # its IoU branch takes no part in the score


def test_every_tensor_except_those_of_unused_levels_is_loaded_once(checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    path, state = checkpoint
    model = load_model(load_checkpoint(path))
    used = {name: tensor for name, tensor in state.items() if not UNUSED.match(name)}
    assert len(model.state_dict()) == len(used)
    assert fingerprints(model.state_dict()) == fingerprints(used)


def fingerprints(state: dict[str, Tensor]) -> list[tuple[tuple[int, ...], float]]:
    return sorted((tuple(tensor.shape), float(tensor.double().sum())) for tensor in state.values())


@pytest.mark.parametrize("cascade", [True, False])
def test_outputs_equal_the_reference(
    checkpoint: tuple[Path, dict[str, Tensor]], cascade: bool, device: torch.device
) -> None:
    path, state = checkpoint
    model = load_model(load_checkpoint(path, ModelOverrides(cascade=cascade))).eval().to(device)
    images = torch.rand(2, 3, 96, 129, generator=torch.Generator().manual_seed(1)) * 255
    mean = torch.tensor([104.0, 117.0, 123.0]).view(1, 3, 1, 1)
    with torch.inference_mode():
        expected = reference.original_forward(state, images - mean, cascade)
        output = model(images.to(device))[-1]
    torch.testing.assert_close(output.box_deltas.cpu(), expected["boxes"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.class_logits.softmax(-1).cpu(), expected["scores"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.landmark_deltas.cpu(), expected["landmarks"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cascade", [True, False])
def test_detections_equal_the_reference(checkpoint: tuple[Path, dict[str, Tensor]], cascade: bool) -> None:
    """End to end: mean, model, priors, decoding with variances 0.1 and 0.2, score threshold 0.5, NMS at 0.3."""
    path, state = checkpoint
    image = cv2.resize(np.random.default_rng(3).integers(0, 255, (13, 17, 3), np.uint8), (170, 130))
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() - torch.tensor([104.0, 117, 123]).view(1, 3, 1, 1)
    with torch.inference_mode():
        raw = reference.original_forward(state, pixels, cascade)
    scores, deltas = raw["scores"][0, :, 1], raw["boxes"][0]
    priors = prior_boxes((130, 170), USUAL_LEVELS[3 if "tina" in path.parent.name else 2])
    centres = priors[:, :2] + deltas[:, :2] * 0.1 * priors[:, 2:]
    halves = priors[:, 2:] * torch.exp(deltas[:, 2:] * 0.2) / 2
    boxes = torch.cat([centres - halves, centres + halves], dim=1) * torch.tensor([170, 130, 170, 130])
    chosen = torch.nonzero(scores > 0.5)[:, 0]
    chosen = chosen[pixel_nms(boxes[chosen], scores[chosen], 0.3)]
    assert len(chosen) > 3

    checkpointed = load_checkpoint(path, ModelOverrides(cascade=cascade))
    settings = FaceDetector.from_checkpoint(path, clip_boxes=False).config
    found = FaceDetector(load_model(checkpointed), settings).detect(image)
    assert len(found) == len(chosen)
    torch.testing.assert_close(found.boxes, boxes[chosen], atol=0.05, rtol=1e-4)


def test_biubug6_resnet50_is_the_originals_first_stage_under_other_names(
    checkpoint: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    """Its checkpoint is a plain state dictionary, here with the prefix of DataParallel."""
    original_path, state = checkpoint
    if "tina" in original_path.parent.name:
        pytest.skip("biubug6 has no IoU branch")
    first = {name: tensor for name, tensor in state.items() if not re.match(r"ssh2_|\w+Head_2|" + UNUSED.pattern, name)}
    renamed = {name.replace("ssh1_", "ssh").replace("Head_1", "Head"): tensor for name, tensor in first.items()}
    path = tmp_path / "Resnet50_Final.pth"
    torch.save({f"module.{name}": tensor for name, tensor in renamed.items()}, path)
    loaded = load_checkpoint(path)
    assert (loaded.kind, loaded.note, loaded.model_config.cascade) == ("biubug6", None, False)
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(2)) * 255
    with torch.inference_mode():
        (output,) = load_model(loaded).eval()(images)
        expected = reference.original_forward(state, images - torch.tensor([104.0, 117, 123]).view(1, 3, 1, 1), False)
    torch.testing.assert_close(output.box_deltas, expected["boxes"], atol=1e-4, rtol=1e-4)
