"""Tests of models with a second backbone of half the strides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from config import ExperimentConfig, LevelConfig, ModelConfig, ModelOverrides
from models.architecture import usual_config
from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.foreign_checkpoint import CheckpointError
from models.image_pyramid import build_model
from models.initialise import initialise_from_detector
from models.retinaface import RetinaFace
from utils.errors import ConfigError

PLAIN = usual_config("mobilenet0.25", num_anchor=2, cascade=False, model_version="retina", fpn_channels=32)
FINEST = LevelConfig(4, (8, 16), channels=16)
TWO_RESOLUTIONS = replace(PLAIN, two_resolutions=True, levels=(FINEST, *PLAIN.levels))


def trained_model(config: ModelConfig) -> RetinaFace:
    """Return a model whose batch normalisation has running statistics."""
    torch.manual_seed(0)
    model = build_model(config)
    for _ in range(3):
        model(torch.rand(2, 3, 96, 128) * 255)
    return model.eval()


@torch.no_grad()
def test_initialised_model_keeps_the_outputs_of_the_detector() -> None:
    old, new = trained_model(PLAIN), build_model(TWO_RESOLUTIONS)
    untrained = initialise_from_detector(new, Checkpoint(Path("old.pth"), PLAIN, old.state_dict(), "own"))
    assert not [name for name in untrained if name.startswith("backbone.")]
    images = torch.rand(1, 3, 101, 90) * 255
    before, after = old(images)[0], new.eval()(images)[0]
    count = before.class_logits.shape[1]
    assert after.class_logits.shape[1] == count + 2 * 26 * 23
    torch.testing.assert_close(after.class_logits[:, -count:], before.class_logits)
    torch.testing.assert_close(after.box_deltas[:, -count:], before.box_deltas)


@torch.no_grad()
def test_second_backbone_starts_with_the_features_of_the_upsampled_image() -> None:
    old, new = trained_model(PLAIN), build_model(TWO_RESOLUTIONS)
    initialise_from_detector(new, Checkpoint(Path("old.pth"), PLAIN, old.state_dict(), "own"))
    images = torch.rand(1, 3, 128, 160) * 255 - 110
    upsampled = F.interpolate(images, scale_factor=2.0, mode="bilinear")
    expected, found = old.backbone(upsampled)[8], new.eval().backbone(images)[4]
    inner = (..., slice(6, -6), slice(6, -6))  # images are padded with another colour at the border
    torch.testing.assert_close(found[inner], expected[inner], atol=1e-4, rtol=1e-4)


def test_two_resolutions_need_a_mobilenet_and_a_level_of_stride_4() -> None:
    with pytest.raises(ConfigError, match="stride 4"):
        replace(PLAIN, two_resolutions=True)
    with pytest.raises(ConfigError, match="mobilenet"):
        replace(usual_config("resnet18", num_anchor=2), two_resolutions=True)


def test_flag_that_contradicts_a_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "new.pth"
    save_checkpoint(path, ExperimentConfig(model=TWO_RESOLUTIONS), build_model(TWO_RESOLUTIONS).state_dict())
    with pytest.raises(CheckpointError, match="trained with two_resolutions True, but --two_resolutions=False"):
        load_checkpoint(path, ModelOverrides(two_resolutions=False))
