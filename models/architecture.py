"""The default architectures, and the overrides that change them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from config import (
    USUAL_LEVELS,
    ImagePyramidConfig,
    LevelConfig,
    MatchingOverrides,
    ModelConfig,
    ModelOverrides,
    StageConfig,
)
from utils.errors import ConfigError

# The weight of the native scale if --fine_levels is given without --context_share.
_NATIVE_SCALE_WEIGHT = 0.3


def usual_config(
    backbone: str = "resnet50",
    *,
    num_anchor: int = 3,
    cascade: bool = True,
    refinement: str = "sum",
    **changes: Any,
) -> ModelConfig:
    """The usual configuration of a backbone; `changes` are further fields of `ModelConfig`."""
    defaults = {
        **_backbone_defaults(backbone),
        "levels": _usual_levels(num_anchor),
        "refinement": refinement,
        "stages": usual_stages(cascade, refinement),
    }
    return ModelConfig(**(defaults | changes))


def usual_stages(cascade: bool, refinement: str = "sum") -> tuple[StageConfig, ...]:
    """The stages that `--cascade` and `--refinement` select."""
    if not cascade:
        return (StageConfig(),)
    # RetinaFace's official cascade: decoded boxes fit better than priors, so the thresholds are higher.
    second = StageConfig(match_iou=0.5, negative_iou=0.4) if refinement == "rematch" else StageConfig()
    return (StageConfig(), second)


_LEVELS_OF_THE_ORIGINAL = 3
_ORIGINAL_NAME = re.compile(
    r"(?:(?P<backbone>resnet\d*|mobilenet0\.25)_)?(?P<tina>tina_iou_)?anc(?P<anchors>[23])_cas(?P<cascade>[TF])_fpn3"
)


def overrides_from_name(experiment_name: str) -> ModelOverrides | None:
    """Parse an experiment's name in the original's form, such as `resnet_anc2_casT_fpn3`; None for other names."""
    name = _ORIGINAL_NAME.fullmatch(experiment_name)
    if name is None:
        return None
    backbone = name["backbone"] or "resnet50"
    return ModelOverrides(
        backbone="resnet50" if backbone == "resnet" else backbone,
        model_version="tina" if name["tina"] else "retina",
        num_anchor=int(name["anchors"]),
        cascade=name["cascade"] == "T",
    )


def combine_overrides(overrides: ModelOverrides, experiment_name: str) -> ModelOverrides:
    """Combine the overrides with those that the name of the experiment implies.

    Raises:
        ConfigError: a flag contradicts the name.
    """
    implied = overrides_from_name(experiment_name)
    if implied is None:
        return overrides
    for name, value in vars(implied).items():
        given = getattr(overrides, name)
        if value is not None and given not in (None, value):
            raise ConfigError(
                f"--experiment_name={experiment_name} says {name} {value}, but --{name}={given}; drop the flag, or "
                "choose another name"
            )
    if overrides.strides is not None and len(overrides.strides) != _LEVELS_OF_THE_ORIGINAL:
        raise ConfigError(
            f"--experiment_name={experiment_name} says {_LEVELS_OF_THE_ORIGINAL} levels, but --strides has "
            f"{len(overrides.strides)}; drop the flag, or choose another name"
        )
    return replace(overrides, **{name: value for name, value in vars(implied).items() if value is not None})


def check_name(experiment_name: str, config: ModelConfig) -> None:
    """Ensure that an experiment's name in the original's form says the architecture that the experiment has.

    Raises:
        ConfigError: the name says another architecture.
    """
    implied = overrides_from_name(experiment_name)
    if implied is None:
        return
    for name, value in {**vars(implied), "levels": _LEVELS_OF_THE_ORIGINAL}.items():
        present = len(config.levels) if name == "levels" else getattr(config, name, None)
        if value not in (None, present):
            raise ConfigError(
                f"--experiment_name={experiment_name} says {name} {value}, but the recipe has {present}; choose "
                "another name"
            )


def describe_architecture(config: ModelConfig) -> str:
    """The architecture in one line, for the user."""
    stages = f"{len(config.stages)} stages ({config.refinement})" if config.cascade else "1 stage"
    branch = (", two resolutions" if config.two_resolutions else "") + (", IoU branch" if config.iou_aware else "")
    strides = ", ".join(str(level.stride) for level in config.levels)
    return f"{config.backbone}, {stages}{branch}, {config.num_anchor} anchors per cell, strides {strides}"


def apply_overrides(overrides: ModelOverrides, base: ModelConfig | None = None) -> ModelConfig:
    """Apply overrides to an architecture.

    Args:
        overrides: requested changes; None leaves a property as it is.
        base: the architecture to change; None means the usual one of the backbone.

    Raises:
        ConfigError: the overrides contradict each other or the base.
    """
    given = {name: value for name, value in vars(overrides).items() if value is not None}
    base = base or usual_config(given.get("backbone", "resnet50"))
    changes = {name: given[name] for name in ("model_version", "score_exponent", "refinement") if name in given}
    if given.get("backbone", base.backbone) != base.backbone:
        changes |= _backbone_defaults(given["backbone"])
    changes |= {name: given[name] for name in ("activation_slope", "fpn_channels", "two_resolutions") if name in given}
    if "score_exponent" in given and given.get("model_version", base.model_version) != "tina":
        raise ConfigError("--score_exponent needs the IoU branch of --model_version=tina; drop it")
    if "landmark_loss" in given:
        changes["landmarks"] = given["landmark_loss"]
    if not base.iou_aware and given.get("model_version") == "tina":
        changes.setdefault("score_exponent", ModelConfig.score_exponent)  # a new branch takes part in the score
    cascade = given.get("cascade", base.cascade)
    refinement = given.get("refinement", base.refinement if cascade else "sum")
    if (cascade, refinement) != (base.cascade, base.refinement):
        changes |= {"refinement": refinement, "stages": usual_stages(cascade, refinement)}
    if overrides.variances is not None:
        if len(overrides.variances) != 2:
            raise ConfigError(f"--variances takes two numbers, got {overrides.variances}")
        changes["variances"] = overrides.variances
    changes["levels"] = _override_levels(overrides, base.levels)
    changes["image_pyramid"] = _override_image_pyramid(overrides, base.image_pyramid)
    return replace(base, **changes)


def apply_matching(overrides: MatchingOverrides, base: ModelConfig) -> ModelConfig:
    """The architecture with other matching thresholds, one for each stage; None leaves them as they are.

    Raises:
        ConfigError: there are more or fewer numbers than stages, or they contradict each other.
    """
    changes: list[dict[str, Any]] = [{} for _ in base.stages]
    for name in ("match_iou", "negative_iou"):
        values = getattr(overrides, name)
        if values is None:
            continue
        if len(values) != len(changes):
            raise ConfigError(f"--{name} has {len(values)} number(s) for {len(changes)} stage(s)")
        for change, value in zip(changes, values, strict=True):
            change[name] = value
    if overrides.force_match is not None:
        changes = [change | {"force_match": overrides.force_match} for change in changes]
    stages = tuple(replace(stage, **change) for stage, change in zip(base.stages, changes, strict=True))
    return replace(base, stages=stages)


def _backbone_defaults(backbone: str) -> dict[str, Any]:
    """FPN channels and LeakyReLU slope of biubug6/Pytorch_Retinaface."""
    is_small = backbone == "mobilenet0.25"
    return {
        "backbone": backbone,
        "fpn_channels": 64 if is_small else 256,
        "activation_slope": 0.1 if is_small else 0.0,
    }


def _usual_levels(num_anchor: int) -> tuple[LevelConfig, ...]:
    if num_anchor not in USUAL_LEVELS:
        raise ConfigError(f"--num_anchor must be one of {sorted(USUAL_LEVELS)}, got {num_anchor}")
    return USUAL_LEVELS[num_anchor]


def _override_levels(overrides: ModelOverrides, levels: tuple[LevelConfig, ...]) -> tuple[LevelConfig, ...]:
    strides = overrides.strides or tuple(level.stride for level in levels)
    if overrides.anchor_sizes is not None:
        if len(overrides.anchor_sizes) != len(strides):
            raise ConfigError(f"--anchor_sizes has {len(overrides.anchor_sizes)} levels for strides {strides}")
        levels = tuple(map(LevelConfig, strides, overrides.anchor_sizes))
    elif overrides.strides is not None:
        raise ConfigError("--strides needs --anchor_sizes, one group of sizes for each stride")
    elif overrides.num_anchor not in (None, len(levels[0].anchor_sizes)):
        levels = _usual_levels(overrides.num_anchor or 0)
    if overrides.num_anchor not in (None, len(levels[0].anchor_sizes)):
        raise ConfigError(
            f"--num_anchor={overrides.num_anchor} contradicts --anchor_sizes with {len(levels[0].anchor_sizes)} a "
            "cell; drop one"
        )
    return levels


def _override_image_pyramid(overrides: ModelOverrides, base: ImagePyramidConfig) -> ImagePyramidConfig:
    count = base.upsampled_levels if overrides.fine_levels is None else overrides.fine_levels
    usual = base.native_scale_weight if base.upsampled_levels else _NATIVE_SCALE_WEIGHT
    native = usual if overrides.context_share is None else overrides.context_share
    if overrides.context_share and not count:
        raise ConfigError("--context_share needs --fine_levels; drop it")
    channels = base.upsampled_channels if count == base.upsampled_levels else ()
    return ImagePyramidConfig(
        upsampled_levels=count,
        native_scale_weight=native if count else 0.0,
        half_scale_weight=base.half_scale_weight if overrides.coarse_share is None else overrides.coarse_share,
        upsampled_channels=channels if overrides.fine_channels is None else overrides.fine_channels,
    )
