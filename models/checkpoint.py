"""Find checkpoint files, recognise what wrote them, and translate their tensors to this project's names.

Four kinds load: this project's own, the original's (SNU_FaceDetection) `{"epoch_idx", "network"}`, biubug6's plain
state dicts of MobileNet0.25 and ResNet-50, and, for a backbone alone, biubug6's and torchvision's ImageNet files.
Files are read with `weights_only=True`: a checkpoint cannot run code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import (
    ConfigError,
    ExperimentConfig,
    Flags,
    ModelConfig,
    UserError,
    anchor_sizes_for,
    from_dict,
    model_config_from_flags,
    stages_for,
    to_dict,
)
from models.levels import adapt_levels
from utils.runtime.experiment import user_path
from utils.runtime.files import replacing

State = dict[str, Tensor]

FORMAT = "retinaface-1"
# Facts that the tensors of biubug6's two MobileNet0.25 families cannot tell, by the MD5 of the published files.
_PUBLISHED_FILES: dict[str, dict[str, Any]] = {
    # biubug6/Pytorch_Retinaface, mobilenet0.25_Final.pth
    "d308262876f997c63f79c7805b2cdab0": {
        "activation_slope": 0.1,
        "anchor_sizes": ((16, 32), (64, 128), (256, 512)),
    },
    # biubug6/Face-Detector-1MB-with-landmark, mobilenet0.25_Final.pth
    "20234fc223b10b0308ba99eecea00c4f": {
        "activation_slope": 0.0,
        "anchor_sizes": ((10, 20), (32, 64), (128, 256)),
    },
}
_RESNET_DEPTHS = {(2, False): 18, (6, False): 34, (6, True): 50, (23, True): 101, (36, True): 152}
# The original builds five pyramid levels and uses three; these tensors never reach an output.
_UNUSED_BY_THE_ORIGINAL = re.compile(r"fpn\.(output0|output4|merge0|merge3)\.")


class CheckpointError(UserError):
    """A checkpoint is missing, unreadable, of an unknown kind, or contradicts what was asked for."""


@dataclass(frozen=True)
class Checkpoint:
    """A detector's weights under this project's names, and the architecture that they belong to."""

    path: Path
    model: ModelConfig
    state: State
    kind: str
    experiment: ExperimentConfig | None = None  # of our own checkpoints
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # state to resume from
    note: str | None = None  # what had to be assumed


# ------------------------------------------------------------------------------------------------- locating


def locate_checkpoint(experiments: Path, experiment_name: str, model_weight: str) -> Path:
    """The file that `--model_weight` means: a path, or a name in the experiment's `ckpt/`.

    In `ckpt/` a backbone's name may stand before it, as in the original's `resnet50_ckpt-best.pth`.

    Raises:
        CheckpointError: there is no such file, or more than one.
    """
    direct = user_path(model_weight)
    if direct.is_file():
        return direct
    folder = experiments / experiment_name / "ckpt"
    if direct.parent != Path():
        raise CheckpointError(f"--model_weight {model_weight}: no such file")
    if not folder.is_dir():
        known = sorted(path.parent.name for path in experiments.glob("*/ckpt"))
        raise CheckpointError(
            f"{folder}: no such experiment; "
            + (f"choose --experiment_name from {', '.join(known)}" if known else "train one with train.py")
        )
    if (folder / model_weight).is_file():
        return folder / model_weight
    found = sorted(path for path in folder.glob("*.pth") if path.name.endswith(f"_{model_weight}"))
    if len(found) == 1:
        return found[0]
    present = ", ".join(path.name for path in sorted(folder.glob("*.pth"))) or "nothing"
    problem = "more than one checkpoint ends in" if found else "no checkpoint named"
    raise CheckpointError(f"{folder}: {problem} {model_weight}; it holds {present}; choose with --model_weight")


# -------------------------------------------------------------------------------------------------- loading


def load_checkpoint(path: Path, flags: Flags | None = None) -> Checkpoint:
    """Read a detector's checkpoint of any supported kind.

    Args:
        path: the file.
        flags: model flags that the user gave. They must agree with what the file holds; where the tensors cannot
            tell (activation slope, anchor sizes of a foreign file) they decide. `--cascade False` takes the first
            stage of a two-stage checkpoint, `--landmark_loss False` leaves the landmarks out, and `--fine_levels`
            shows one without them the enlarged picture too.

    Raises:
        CheckpointError: see the class.
    """
    flags = flags or Flags({})
    content = _read(path)
    if content.get("format") == FORMAT:
        checkpoint = _own(path, content)
    else:
        checkpoint = _foreign(path, _plain_state(content), flags)
    return _agree(checkpoint, flags)


def load_backbone(path: Path, backbone: str) -> State:
    """Read the weights of a backbone alone, without its classifier.

    Takes an ImageNet file (with or without `module.` and a `state_dict` around it) or any detector's checkpoint.

    Raises:
        CheckpointError: see the class.
    """
    content = _read(path)
    state = _own(path, content).state if content.get("format") == FORMAT else _plain_state(content)
    for prefix in ("backbone.", "body."):
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    found = _backbone_of(state, "", path)
    if found != backbone:
        raise CheckpointError(f"{path}: weights of {found}, but the model's backbone is {backbone}")
    return state


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError):
        raise CheckpointError(f"{path}: not a PyTorch checkpoint of plain tensors, or damaged") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    return dict(content)


def _plain_state(content: Mapping[str, Any]) -> State:
    """The tensors of a foreign file, without wrappers and without DataParallel's `module.`."""
    for wrapper in ("network", "state_dict"):
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    return {name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}


def _own(path: Path, content: Mapping[str, Any]) -> Checkpoint:
    if not {"config", "model"} <= content.keys():
        raise CheckpointError(f"{path}: a checkpoint of ours without its configuration or weights; it is damaged")
    experiment = from_dict(ExperimentConfig, content["config"], where=str(path))
    beside = path.parent.parent / "config.json"
    if beside.is_file() and ExperimentConfig.load(beside).model != experiment.model:
        raise CheckpointError(f"{path}: the architecture saved in it is not that of {beside}; restore one of the two")
    training = {name: value for name, value in content.items() if name not in ("format", "config", "model")}
    return Checkpoint(path, experiment.model, content["model"], "own", experiment, training)


def _foreign(path: Path, state: State, flags: Flags) -> Checkpoint:
    if "ClassHead_1.0.conv1x1.weight" in state:
        kind, stages, class_head = "original", 2, "ClassHead_1.0.conv1x1.weight"
    elif "ClassHead.0.conv1x1.weight" in state:
        kind, stages, class_head = "biubug6", 1, "ClassHead.0.conv1x1.weight"
    else:
        names = ", ".join(list(state)[:3]) or "no tensors"
        raise CheckpointError(
            f"{path}: not a detector's checkpoint that is known here (ours, SNU_FaceDetection's or biubug6's); "
            f"it holds {names} ..."
        )
    backbone = _backbone_of(state, "body.", path)
    try:
        usual = ModelConfig.for_backbone(
            backbone,
            num_anchor=state[class_head].shape[0] // 2,
            fpn_channels=state["fpn.output1.0.weight"].shape[0],
            model_version="tina" if any(name.startswith("IoUHead") for name in state) else "retina",
            # Neither project lets the IoU branch take part in the score.
            score_exponent=1.0,
            stages=stages_for(cascade=stages == 2),
        )
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{path}: looks like a checkpoint of {kind}, but lacks or contradicts {error}") from None
    model, note = _settle_untold_facts(path, usual, flags)
    renamed = {_own_name(name): value for name, value in state.items() if not _UNUSED_BY_THE_ORIGINAL.match(name)}
    return Checkpoint(path, model, renamed, kind, note=note)


def _settle_untold_facts(path: Path, model: ModelConfig, flags: Flags) -> tuple[ModelConfig, str | None]:
    """Activation slope and anchor sizes: from the flags, else from the published file's hash, else the usual ones."""
    untold = ("activation_slope", "anchor_sizes")
    given = {name: flags.given[name] for name in untold if name in flags.given}
    published = _PUBLISHED_FILES.get(hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest(), {})
    for name in given.keys() & published.keys():
        if given[name] != published[name]:
            raise CheckpointError(f"{path}: was trained with {name} {published[name]}, but --{name}={given[name]}")
    model = dataclasses.replace(model, **(published | given))
    if published or model.backbone != "mobilenet0.25" or len(given) == len(untold):
        return model, None
    assumed = " and ".join(f"--{name} {getattr(model, name)}" for name in untold if name not in given)
    return model, f"{path.name}: not a published file; assuming {assumed}"


def _backbone_of(state: State, prefix: str, path: Path) -> str:
    if f"{prefix}stage1.0.0.weight" in state:
        return "mobilenet0.25"
    blocks = {match[1] for name in state if (match := re.match(rf"{re.escape(prefix)}layer3\.(\d+)\.", name))}
    depth = _RESNET_DEPTHS.get((len(blocks), f"{prefix}layer3.0.conv3.weight" in state))
    if depth is None:
        raise CheckpointError(f"{path}: neither the tensors of MobileNetV1-0.25 nor those of a ResNet")
    return f"resnet{depth}"


_HEADS = {"Class": "class_logits", "Bbox": "box_deltas", "Landmark": "landmark_deltas", "IoU": "iou_logits"}
# Patterns of the original's and biubug6's names. Their levels and stages count from 1, where no stage is named the
# only one is meant, and their first lateral and merge convolutions in use are called output1 and merge1.
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


def _own_name(name: str) -> str:
    for pattern, rename in _RENAMINGS:
        if match := pattern.fullmatch(name):
            return rename(match)
    return name  # strict loading will report it


def _agree(checkpoint: Checkpoint, flags: Flags) -> Checkpoint:
    """Refuse flags that contradict the checkpoint; leave out the parts of it that they do without."""
    asked = model_config_from_flags(flags, base=checkpoint.model)
    if asked.fine_levels and not checkpoint.model.fine_levels:
        checkpoint = _with_fine_levels(checkpoint, asked.fine_levels)
    saved = checkpoint.model
    anchors = ("fine_levels", "num_anchor", "anchor_sizes")
    for name in ("backbone", "model_version", *anchors, "activation_slope", "fpn_channels"):
        if getattr(asked, name) != getattr(saved, name):
            raise CheckpointError(
                f"{checkpoint.path}: trained with {name} {getattr(saved, name)}, but --{name}={getattr(asked, name)}; "
                "drop the flag or choose another checkpoint"
            )
    if asked.cascade and not saved.cascade:
        raise CheckpointError(f"{checkpoint.path}: trained with one stage, but --cascade=True; drop the flag")
    if asked.cascade and asked.refinement != saved.refinement:
        raise CheckpointError(
            f"{checkpoint.path}: trained with refinement {saved.refinement}, but --refinement={asked.refinement}; "
            "drop the flag or choose another checkpoint"
        )
    if asked.landmarks and not saved.landmarks:
        raise CheckpointError(f"{checkpoint.path}: trained without landmarks, but --landmark_loss=True; drop the flag")
    stages = saved.stages if asked.cascade else saved.stages[:1]
    without = [rf"stages\.{number}\." for number in range(len(stages), len(saved.stages))]
    without += [] if asked.landmarks else [r".*\.landmark_deltas\."]
    state = {
        name: tensor for name, tensor in checkpoint.state.items() if not any(re.match(part, name) for part in without)
    }
    return dataclasses.replace(checkpoint, model=dataclasses.replace(asked, stages=stages), state=state)


def _with_fine_levels(checkpoint: Checkpoint, fine_levels: int) -> Checkpoint:
    """The same detector, shown the picture at twice its size as well: its weights serve both."""
    usual = checkpoint.model
    if usual.anchor_sizes != anchor_sizes_for(usual.num_anchor):
        raise CheckpointError(f"{checkpoint.path}: --fine_levels is for the usual anchors, not {usual.anchor_sizes}")
    model = model_config_from_flags(Flags({"fine_levels": fine_levels}), base=usual)
    return dataclasses.replace(checkpoint, model=model, state=adapt_levels(checkpoint.state, usual, model))


# --------------------------------------------------------------------------------------------------- saving


def save_checkpoint(path: Path, config: ExperimentConfig, state: Mapping[str, Tensor], **training: Any) -> None:
    """Write a checkpoint of our own, whole or not at all.

    Args:
        path: where; its folder is made.
        config: saved with the weights and verified when they are loaded.
        state: `RetinaFace.state_dict()`.
        training: what else to keep: tensors, numbers, strings and containers of them.

    Raises:
        CheckpointError: the file cannot be written; what stood there before is intact.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            torch.save({"format": FORMAT, "config": to_dict(config), "model": tensors, **training}, temporary)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error}); the previous checkpoint is intact") from None
