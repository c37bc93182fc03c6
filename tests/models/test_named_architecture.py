"""Tests of architectures that are derived from the name of an experiment and from flags."""

from __future__ import annotations

import dataclasses

import pytest

from config import USUAL_LEVELS, MatchingOverrides, ModelOverrides, StageConfig
from models.architecture import (
    apply_matching,
    apply_overrides,
    check_name,
    combine_overrides,
    describe_architecture,
    usual_config,
)
from utils.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "backbone", "version", "anchors", "cascade"),
    [
        ("resnet_anc2_casT_fpn3", "resnet50", "retina", 2, True),
        ("tina_iou_anc3_casT_fpn3", "resnet50", "tina", 3, True),
        ("resnet18_anc3_casF_fpn3", "resnet18", "retina", 3, False),
        ("mobilenet0.25_tina_iou_anc3_casT_fpn3", "mobilenet0.25", "tina", 3, True),
        ("anc2_casF_fpn3", "resnet50", "retina", 2, False),
    ],
)
def test_name_in_the_original_format_sets_the_architecture(
    name: str, backbone: str, version: str, anchors: int, cascade: bool
) -> None:
    config = apply_overrides(combine_overrides(ModelOverrides(), name))
    assert config == usual_config(backbone, num_anchor=anchors, cascade=cascade, model_version=version)


@pytest.mark.parametrize("name", ["", "mine", "resnet_anc2", "resnet_anc4_casT_fpn3", "resnet_anc2_casT_fpn3-again"])
def test_other_names_have_no_effect(name: str) -> None:
    overrides = ModelOverrides(num_anchor=2, model_version="tina")
    assert combine_overrides(overrides, name) == overrides


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (ModelOverrides(num_anchor=3), r"resnet_anc2_casT_fpn3 says num_anchor 2, but --num_anchor=3"),
        (ModelOverrides(cascade=False), r"says cascade True, but --cascade=False"),
        (ModelOverrides(model_version="tina"), r"says model_version retina, but --model_version=tina"),
        (ModelOverrides(backbone="resnet18"), r"says backbone resnet50, but --backbone=resnet18"),
    ],
)
def test_flag_that_contradicts_the_name_is_refused(overrides: ModelOverrides, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        combine_overrides(overrides, "resnet_anc2_casT_fpn3")


def test_levels_that_contradict_the_name_are_refused() -> None:
    """`fpn3` means three levels, each with the number of anchors in the name."""
    four = ModelOverrides(strides=(4, 8, 16, 32), anchor_sizes=((8, 16), (16, 32), (64, 128), (256, 512)))
    with pytest.raises(ConfigError, match="says 3 levels, but --strides has 4"):
        combine_overrides(four, "resnet_anc2_casT_fpn3")
    more = ModelOverrides(anchor_sizes=((8, 16, 32), (32, 64, 128), (128, 256, 512)))
    with pytest.raises(ConfigError, match="--num_anchor=2 contradicts --anchor_sizes with 3"):
        apply_overrides(combine_overrides(more, "resnet_anc2_casT_fpn3"))


def test_flags_that_agree_with_the_name_are_applied() -> None:
    overrides = ModelOverrides(num_anchor=2, cascade=True, landmark_loss=False, variances=(0.2, 0.3))
    config = apply_overrides(combine_overrides(overrides, "resnet_anc2_casT_fpn3"))
    assert (config.levels, config.landmarks, config.variances) == (USUAL_LEVELS[2], False, (0.2, 0.3))


def test_architecture_is_described_in_one_line() -> None:
    config = apply_overrides(combine_overrides(ModelOverrides(), "tina_iou_anc3_casT_fpn3"))
    assert describe_architecture(config) == (
        "resnet50, 2 stages (sum), IoU branch, 3 anchors per cell, strides 8, 16, 32"
    )


def test_recipe_that_contradicts_the_name_is_refused() -> None:
    config = usual_config("resnet50", num_anchor=2, model_version="retina")
    check_name("resnet_anc2_casT_fpn3", config)
    check_name("anything", config)
    with pytest.raises(ConfigError, match="says num_anchor 3, but the recipe has 2"):
        check_name("resnet_anc3_casT_fpn3", config)
    with pytest.raises(ConfigError, match="says levels 3, but the recipe has 1"):
        check_name("resnet_anc2_casT_fpn3", dataclasses.replace(config, levels=config.levels[:1]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (ModelOverrides(context_share=0.3), "--context_share needs --fine_levels"),
        (ModelOverrides(fine_channels=(40, 48)), "--fine_channels has 2"),
        (ModelOverrides(model_version="retina", score_exponent=0.9), "--score_exponent needs"),
    ],
)
def test_flag_without_effect_is_refused(overrides: ModelOverrides, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides(overrides)


def test_every_stage_has_its_own_matching_thresholds() -> None:
    overrides = MatchingOverrides(match_iou=(0.7, 0.5), negative_iou=(0.3, 0.4), force_match=False)
    assert apply_matching(overrides, usual_config()).stages == (
        StageConfig(0.7, negative_iou=0.3, force_match=False),
        StageConfig(0.5, negative_iou=0.4, force_match=False),
    )
    single = apply_matching(MatchingOverrides(match_iou=(0.4,)), usual_config("mobilenet0.25", cascade=False))
    assert single.stages == (StageConfig(0.4),)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (MatchingOverrides(match_iou=(0.7,)), r"--match_iou has 1 number\(s\) for 2 stage"),
        (MatchingOverrides(negative_iou=(0.3, 0.3, 0.3)), r"--negative_iou has 3 number\(s\) for 2 stage"),
        (MatchingOverrides(match_iou=(0.3, 0.5), negative_iou=(0.4, 0.4)), "negative_iou must be positive and at most"),
        (MatchingOverrides(match_iou=(0.7, 1.5)), "match_iou must lie between 0 and 1, got 1.5"),
    ],
)
def test_invalid_matching_thresholds_are_refused(overrides: MatchingOverrides, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_matching(overrides, usual_config())


@pytest.mark.parametrize(
    ("variances", "message"),
    [((0.1,), "--variances takes two numbers"), ((0.1, 0.0), "variances must be positive")],
)
def test_invalid_variances_are_refused(variances: tuple[float, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides(ModelOverrides(variances=variances))


def test_both_thresholds_can_be_raised_or_lowered_together() -> None:
    """Each flag alone would contradict the saved value of the other."""
    base = usual_config("mobilenet0.25", stages=(StageConfig(0.35, negative_iou=0.3), StageConfig(0.5)))
    raised = apply_matching(MatchingOverrides(match_iou=(0.7, 0.7), negative_iou=(0.6, 0.6)), base)
    assert [(stage.match_iou, stage.negative_iou) for stage in raised.stages] == [(0.7, 0.6), (0.7, 0.6)]
    lowered = apply_matching(MatchingOverrides(match_iou=(0.2, 0.2), negative_iou=(0.1, 0.1)), base)
    assert [(stage.match_iou, stage.negative_iou) for stage in lowered.stages] == [(0.2, 0.1), (0.2, 0.1)]
