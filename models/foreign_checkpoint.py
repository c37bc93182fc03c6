"""Checkpoints of other projects: SNU_FaceDetection (the original) and biubug6/Pytorch_Retinaface."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import USUAL_LEVELS, LevelConfig, ModelConfig, ModelOverrides
from models.architecture import apply_overrides, usual_config
from utils.errors import ConfigError, UserError, lfs_pointer

State = dict[str, Tensor]

# The activation slope and anchors of biubug6's two MobileNet0.25 families, which the tensors do not determine, by the
# MD5 of the published files.
_PUBLISHED_FILES: dict[str, tuple[float, tuple[LevelConfig, ...]]] = {
    # biubug6/Pytorch_Retinaface, mobilenet0.25_Final.pth
    "d308262876f997c63f79c7805b2cdab0": (0.1, USUAL_LEVELS[2]),
    # biubug6/Face-Detector-1MB-with-landmark, mobilenet0.25_Final.pth
    "20234fc223b10b0308ba99eecea00c4f": (
        0.0,
        (LevelConfig(8, (10, 20)), LevelConfig(16, (32, 64)), LevelConfig(32, (128, 256))),
    ),
}
_RESNET_DEPTHS = {(2, False): 18, (6, False): 34, (6, True): 50, (23, True): 101, (36, True): 152}
# The original builds five pyramid levels and uses three; these tensors never reach an output.
_UNUSED_BY_THE_ORIGINAL = re.compile(r"fpn\.(output0|output4|merge0|merge3)\.")


_WRAPPERS = tuple(
    "network state_dict model_state_dict model net weights params module ema model_ema ema_state_dict "
    "state_dict_ema".split()
)
# Of DataParallel, torch.compile, Lightning, and modules that hold the detector.
_PREFIXES = re.compile(r"((module|_orig_mod|model|net|network|ema)\.)+")


class CheckpointError(UserError):
    """A checkpoint is missing, unreadable, of an unknown kind, or contradicts the requested architecture."""


def check_tensors(path: Path, state: Mapping[str, Any]) -> None:
    """Check that all weights are tensors of finite values that can be copied into a model.

    Raises:
        CheckpointError: one is something else; the message names it.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: has weights that are not tensors; it is damaged")
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_complex():
            raise CheckpointError(f"{path}: {name} is sparse, quantised, complex or without data; save dense weights")
        if not value.isfinite().all():
            raise CheckpointError(f"{path}: {name} is not finite; training diverged or the file is damaged")


def read_file(path: Path) -> dict[str, Any]:
    """Read the dictionary that a checkpoint is; raises a CheckpointError if the file is anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # problems of the file are reported below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged file makes the unpickler raise almost anything
        global_name = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if global_name or "TorchScript" in str(error):
            held = f"a pickled {global_name[1]}" if global_name else "a TorchScript program"
            raise CheckpointError(
                f"{path}: holds {held}, which would run code to load; where it can be trusted, convert it: "
                f"torch.save(torch.load(FILE, weights_only=False).state_dict(), NEW_FILE)"
            ) from None
        reason = lfs_pointer(path.read_bytes()) or "not a PyTorch checkpoint of plain tensors, or damaged"
        raise CheckpointError(f"{path}: {reason}") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    return dict(content)


def plain_state(path: Path, content: Mapping[str, Any]) -> State:
    """The tensors of a foreign file, without wrappers and the prefixes that they add, such as DataParallel's."""
    while wrapper := next((name for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None):
        content = content[wrapper]
    state = {_PREFIXES.sub("", str(name)): value for name, value in content.items() if isinstance(value, Tensor)}
    state.pop("n_averaged", None)  # of AveragedModel
    check_tensors(path, state)
    return state


def read_foreign(path: Path, state: State, overrides: ModelOverrides) -> tuple[str, ModelConfig, State, str | None]:
    """Recognise a detector of another project by its tensors, and rename them.

    Args:
        path: the file, for its hash and for messages.
        state: tensors under the names of the other project.
        overrides: architecture that the tensors do not determine.

    Returns:
        The kind (`original` or `biubug6`), the architecture, the renamed tensors, and a note on assumptions.

    Raises:
        CheckpointError: the tensors belong to no known detector, or contradict the overrides.
    """
    if "ClassHead_1.0.conv1x1.weight" in state:
        kind, stages, class_head = "original", 2, "ClassHead_1.0.conv1x1.weight"
    elif "ClassHead.0.conv1x1.weight" in state:
        kind, stages, class_head = "biubug6", 1, "ClassHead.0.conv1x1.weight"
    else:
        names = ", ".join(list(state)[:3]) or "no tensors"
        raise CheckpointError(
            f"{path}: not a detector's checkpoint that is supported (this project's, SNU_FaceDetection's, biubug6's); "
            f"it holds {names} ..."
        )
    backbone = recognise_backbone(state, "body.", path)
    try:
        usual = usual_config(
            backbone,
            num_anchor=state[class_head].shape[0] // 2,
            cascade=stages == 2,
            fpn_channels=state["fpn.output1.0.weight"].shape[0],
            model_version="tina" if any(name.startswith("IoUHead") for name in state) else "retina",
            # Neither project uses the IoU branch in the score.
            score_exponent=1.0,
        )
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{path}: looks like a checkpoint of {kind}, but lacks or contradicts {error}") from None
    model_config, note = _infer_missing(path, usual, overrides)
    renamed = {_translate_name(name): value for name, value in state.items() if not _UNUSED_BY_THE_ORIGINAL.match(name)}
    return kind, model_config, renamed, note


def _infer_missing(path: Path, model_config: ModelConfig, overrides: ModelOverrides) -> tuple[ModelConfig, str | None]:
    """Set what tensors do not determine by the overrides, by the hash of a published file, or to the defaults."""
    asked = apply_overrides(
        ModelOverrides(
            activation_slope=overrides.activation_slope,
            anchor_sizes=overrides.anchor_sizes,
            variances=overrides.variances,
        ),
        model_config,
    )
    published = _PUBLISHED_FILES.get(hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest())
    if published:
        slope, levels = published
        if overrides.activation_slope not in (None, slope):
            raise CheckpointError(f"{path}: was trained with --activation_slope={slope}, not {asked.activation_slope}")
        if overrides.anchor_sizes is not None and asked.levels != levels:
            raise CheckpointError(f"{path}: was trained with --anchor_sizes={describe_anchors(levels)}")
        return dataclasses.replace(model_config, activation_slope=slope, levels=levels), None
    assumed = {
        "activation_slope": model_config.activation_slope,
        "anchor_sizes": describe_anchors(model_config.levels),
    }
    unknown = [f"--{name}={value}" for name, value in assumed.items() if getattr(overrides, name) is None]
    if model_config.backbone != "mobilenet0.25" or not unknown:
        return asked, None
    return asked, f"{path.name}: not a published file; assuming {' and '.join(unknown)}"


def describe_anchors(levels: tuple[LevelConfig, ...]) -> str:
    """The anchor sizes as `--anchor_sizes` takes them."""
    return "/".join(",".join(f"{size:g}" for size in level.anchor_sizes) for level in levels)


def recognise_backbone(state: State, prefix: str, path: Path) -> str:
    if f"{prefix}stage1.0.0.weight" in state:
        return "mobilenet0.25"
    blocks = {match[1] for name in state if (match := re.match(rf"{re.escape(prefix)}layer3\.(\d+)\.", name))}
    depth = _RESNET_DEPTHS.get((len(blocks), f"{prefix}layer3.0.conv3.weight" in state))
    if depth is None:
        raise CheckpointError(f"{path}: neither the tensors of MobileNetV1-0.25 nor those of a ResNet")
    return f"resnet{depth}"


_HEADS = {"Class": "class_logits", "Bbox": "box_deltas", "Landmark": "landmark_deltas", "IoU": "iou_logits"}
# Patterns of the original's and biubug6's names. Their levels and stages count from 1, the only stage of biubug6 has no
# number, and the first lateral and merge convolutions in use are called output1 and merge1.
_RENAMINGS: list[tuple[re.Pattern[str], Callable[[re.Match[str]], str]]] = [
    (re.compile(r"body\.(.+)"), lambda m: f"backbone.{m[1]}"),
    (re.compile(r"fpn\.output(\d)\.(.+)"), lambda m: f"fpn.lateral.{int(m[1]) - 1}.{m[2]}"),
    (re.compile(r"fpn\.merge(\d)\.(.+)"), lambda m: f"fpn.merge.{int(m[1]) - 1}.{m[2]}"),
    (
        re.compile(r"ssh(?:(\d)_)?(\d)\.(.+)"),
        lambda m: f"stages.{int(m[1] or 1) - 1}.context.{int(m[2]) - 1}.{m[3].replace('X', 'x')}",
    ),
    (
        re.compile(r"(Class|Bbox|Landmark|IoU)Head(?:_(\d))?\.(\d)\.conv1x1\.(.+)"),
        lambda m: f"stages.{int(m[2] or 1) - 1}.heads.{m[3]}.{_HEADS[m[1]]}.{m[4]}",
    ),
]


def _translate_name(name: str) -> str:
    for pattern, rename in _RENAMINGS:
        if match := pattern.fullmatch(name):
            return rename(match)
    return name  # strict loading will report it
