"""Find checkpoint files, recognise what wrote them, and translate their tensors to this project's names.

Four kinds load: this project's own, the original's (SNU_FaceDetection) `{"epoch_idx", "network"}`, biubug6's plain
state dicts of MobileNet0.25 and ResNet-50, and, for a backbone alone, biubug6's and torchvision's ImageNet files.
Files are read with `weights_only=True`: loading a checkpoint never runs code from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import ExperimentConfig, ModelConfig, ModelOverrides
from models.architecture import apply_overrides
from models.foreign_checkpoint import (
    CheckpointError,
    State,
    check_tensors,
    describe_anchors,
    plain_state,
    read_file,
    read_foreign,
    recognise_backbone,
)
from models.image_pyramid import add_upsampled_stages
from utils.options import from_dict, to_dict
from utils.runtime.experiment import load_config
from utils.runtime.files import atomic_write, is_file, is_folder, user_path

FORMAT = "retinaface-2"
_FORMATS = ("retinaface-1", FORMAT)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a detector under this project's names, and its architecture.

    Attributes:
        path: the file.
        model_config: architecture that the weights belong to.
        state: tensors by name.
        kind: `own`, `original` or `biubug6`.
        experiment: configuration of the experiment; only in this project's own checkpoints.
        training: state to resume training from; only in this project's own checkpoints.
        note: assumptions made about the file, for the user.
    """

    path: Path
    model_config: ModelConfig
    state: State
    kind: str
    experiment: ExperimentConfig | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    note: str | None = None

    def experiment_name(self, experiments: Path) -> str:
        """The name for result files: the experiment whose folder contains the file, or else the name of the file."""
        folder = self.path.parent.parent
        return folder.name if folder.parent == experiments else self.path.stem

    @property
    def suffix(self) -> str:
        """What follows the name of the detector in messages: " (biubug6)" or " (original)", nothing for our own."""
        return "" if self.kind == "own" else f" ({self.kind})"

    @property
    def configuration(self) -> ExperimentConfig:
        """The configuration that was saved with the weights, or the usual one of this architecture."""
        return self.experiment or ExperimentConfig(model=self.model_config)


# ------------------------------------------------------------------------------------------------- locating


def locate_checkpoint(experiments: Path, experiment_name: str, model_weight: str) -> Path:
    """Find the file that `--model_weight` names: a path, or a name in the experiment's `ckpt/` or else here.

    In `ckpt/` the name may be prefixed by the backbone, as in the original's `resnet50_ckpt-best.pth`.

    Raises:
        CheckpointError: there is no such file, or more than one.
    """
    direct, folder = user_path(model_weight), experiments / experiment_name / "ckpt"
    is_name = Path(model_weight).name == model_weight  # ./ckpt-best.pth is a path
    found = sorted(path for path in folder.glob("*.pth") if is_name and path.name.endswith(f"_{model_weight}"))
    if is_name and is_file(folder / model_weight):
        return folder / model_weight
    if len(found) == 1:
        return found[0]
    if is_file(direct) and not found:
        return direct
    if not is_name:
        raise CheckpointError(f"--model_weight {model_weight}: no such file")
    if not is_folder(folder):
        known = sorted(path.parent.name for path in experiments.glob("*/ckpt"))
        raise CheckpointError(
            f"{folder}: no such experiment; "
            + (f"choose --experiment_name from {', '.join(known)}" if known else "train one with train.py")
        )
    present = ", ".join(path.name for path in sorted(folder.glob("*.pth"))) or "nothing"
    problem = "more than one checkpoint ends in" if found else "no checkpoint named"
    raise CheckpointError(f"{folder}: {problem} {model_weight}; it holds {present}; choose with --model_weight")


# -------------------------------------------------------------------------------------------------- loading


def load_checkpoint(path: Path, overrides: ModelOverrides | None = None) -> Checkpoint:
    """Read a detector's checkpoint of any supported kind.

    Args:
        path: the file.
        overrides: architecture that the user requested. It must agree with the file, and sets what the tensors do not
            determine (activation slope, anchor sizes and variances of a foreign file). `--cascade False` takes the
            first stage of a two-stage checkpoint, `--landmark_loss False` leaves the landmarks out, and `--fine_levels`
            and `--coarse_share` add other scales of the image.

    Raises:
        CheckpointError: the file is missing, unreadable, of an unknown kind, or contradicts the arguments.
    """
    overrides = overrides or ModelOverrides()
    content = read_file(path)
    try:
        if content.get("format") in _FORMATS:
            checkpoint = _read_own(path, content)
        else:
            kind, model_config, state, note = read_foreign(path, plain_state(path, content), overrides)
            checkpoint = Checkpoint(path, model_config, state, kind, note=note)
        return _adapt_to_overrides(checkpoint, overrides)
    except (LookupError, TypeError, AttributeError, ValueError) as error:  # an entry has the wrong type
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from None


def load_backbone(path: Path, backbone: str) -> tuple[State, bool]:
    """Read the weights of a backbone alone, without its classifier.

    Accepts an ImageNet file (with or without `module.` and a `state_dict` around it) or any detector's checkpoint.

    Returns:
        The tensors, and whether they are from ImageNet rather than from a detector.

    Raises:
        CheckpointError: the file is missing, unreadable, of an unknown kind, or contradicts the arguments.
    """
    content = read_file(path)
    state = _read_own(path, content).state if content.get("format") in _FORMATS else plain_state(path, content)
    is_imagenet = True
    for prefix in ("backbone.", "body."):
        if any(name.startswith(prefix) for name in state):
            is_imagenet = False
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    found = recognise_backbone(state, "", path)
    if found != backbone:
        raise CheckpointError(f"{path}: weights of {found}, but the model's backbone is {backbone}")
    return state, is_imagenet


def _read_own(path: Path, content: Mapping[str, Any]) -> Checkpoint:
    if not {"config", "model"} <= content.keys():
        raise CheckpointError(f"{path}: lacks the configuration or the weights of a checkpoint; it is damaged")
    check_tensors(path, content["model"])
    _check_integrity(path, content)
    experiment = from_dict(ExperimentConfig, content["config"], where=str(path))
    beside = path.parent.parent / "config.json"
    if beside.is_file() and load_config(beside).model != experiment.model:
        raise CheckpointError(f"{path}: the architecture saved in it is not that of {beside}; restore one of the two")
    state = content["model"]
    if content["format"] != FORMAT:
        state = _upgrade_levels(state, experiment.model.image_pyramid.upsampled_levels)
        state = _upgrade_landmarks(state, experiment.model)
    state = _upgrade_backbone(state, experiment.model)
    training = {name: value for name, value in content.items() if name not in ("format", "config", "model", "digest")}
    return Checkpoint(path, experiment.model, state, "own", experiment, training)


def _check_integrity(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse a file of which a bit has changed since it was written, which `torch.load` would not notice.

    The format of the file has a checksum of each part; checkpoints from before the digest have nothing else.
    """
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                part = archive.testzip()
        except Exception as error:  # its directory is damaged
            part = type(error).__name__
        if part is not None:
            raise CheckpointError(f"{path}: damaged ({part} has changed since it was written)")
    if "digest" in content and content["digest"] != content_digest(content):
        raise CheckpointError(f"{path}: damaged (its content has changed since it was written)")


def content_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of everything in a checkpoint but the digest itself, in hexadecimal."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, (Mapping, list, tuple)):
            items = (
                sorted(value.items(), key=lambda item: repr(item[0]))
                if isinstance(value, Mapping)
                else enumerate(value)
            )
            digest.update(f"{len(value)}:".encode())
            for name, item in items:
                digest.update(f"{name!r}:".encode())
                add(item)
        else:
            digest.update(f"{value!r};".encode())

    add({name: value for name, value in content.items() if name != "digest"})
    return digest.hexdigest()


def _upgrade_levels(state: State, count: int) -> State:
    """Rename the levels of a model with `count` upsampled levels, which used to precede those of the native scale.

    The heads of the finest levels used to be shared by both scales; now each scale gets a copy.
    """
    if not count:
        return state
    upgraded = {}
    for name, tensor in state.items():
        part = re.fullmatch(r"stages\.(\d+)\.(context|heads)\.(\d+)\.(.+)", name)
        if part is None:
            upgraded[name] = tensor
            continue
        stage, kind, level, rest = part[1], part[2], int(part[3]), part[4]
        if level < count:
            upgraded[f"upsampled_stages.{stage}.{kind}.{level}.{rest}"] = tensor
        if level != count - 1:
            native = level if level < count else level - 1
            upgraded[f"stages.{stage}.{kind}.{native}.{rest}"] = tensor
    return upgraded


def _upgrade_backbone(state: State, model_config: ModelConfig) -> State:
    """Give upsampled levels with channels of their own the copy of the backbone that they used to share."""
    has_own = any(name.startswith("upsampled_backbone.") for name in state)
    if has_own or not model_config.image_pyramid.upsampled_channels:
        return state
    return dict(state) | {f"upsampled_{name}": state[name] for name in state if name.startswith("backbone.")}


def _upgrade_landmarks(state: State, model_config: ModelConfig) -> State:
    """Give later stages of `rematch` the landmark heads of the first stage.

    They used to predict landmarks relative to refined boxes, with weights that were trained relative to priors.
    """
    if model_config.refinement != "rematch":
        return state
    pattern = re.compile(r"((?:upsampled_)?stages)\.[1-9]\d*\.(heads\.\d+\.landmark_deltas\..+)")
    former = {name: pattern.fullmatch(name) for name in state}
    return {
        name: state[f"{part[1]}.0.{part[2]}"] if (part := former[name]) else tensor for name, tensor in state.items()
    }


def _adapt_to_overrides(checkpoint: Checkpoint, overrides: ModelOverrides) -> Checkpoint:
    """Reject overrides that contradict the checkpoint; drop or add its parts as they request."""
    saved, asked = checkpoint.model_config, apply_overrides(overrides, checkpoint.model_config)
    kept: dict[str, Callable[[Any], str]] = {
        "backbone": str,
        "model_version": str,
        "num_anchor": str,
        "levels": describe_anchors,
        "variances": lambda values: ",".join(f"{value:g}" for value in values),
        "activation_slope": str,
        "fpn_channels": str,
        "two_resolutions": str,
    }
    for name, of in kept.items():
        if getattr(asked, name) != getattr(saved, name):
            flag = "anchor_sizes" if name == "levels" else name
            wanted, present = of(getattr(asked, name)), of(getattr(saved, name))
            raise CheckpointError(
                f"{checkpoint.path}: trained with {flag} {present}, but --{flag}={wanted}; "
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
    before, after = saved.image_pyramid.upsampled_levels, asked.image_pyramid.upsampled_levels
    if before not in (0, after):
        raise CheckpointError(
            f"{checkpoint.path}: trained with fine_levels {before}, but --fine_levels={after}; drop the flag"
        )
    if asked.image_pyramid.upsampled_channels != saved.image_pyramid.upsampled_channels:
        raise CheckpointError(f"{checkpoint.path}: not trained with this --fine_channels; drop the flag")
    state = checkpoint.state if before == after else add_upsampled_stages(checkpoint.state, after)
    dropped = [] if asked.cascade else [r"(upsampled_)?stages\.[1-9]\d*\."]
    dropped += [] if asked.landmarks else [r".*\.landmark_deltas\."]
    state = {name: tensor for name, tensor in state.items() if not any(re.match(part, name) for part in dropped)}
    stages = saved.stages if asked.cascade else saved.stages[:1]
    return dataclasses.replace(checkpoint, model_config=dataclasses.replace(asked, stages=stages), state=state)


# --------------------------------------------------------------------------------------------------- saving


def save_checkpoint(path: Path, config: ExperimentConfig, state: Mapping[str, Tensor], **training: Any) -> None:
    """Write a checkpoint atomically.

    Args:
        path: file to write; its folder is created.
        config: saved with the weights and verified when they are loaded.
        state: `RetinaFace.state_dict()`.
        training: further entries to save: tensors, numbers, strings and containers of them.

    Raises:
        CheckpointError: the file cannot be written; an earlier file at this path is intact.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            content = {"format": FORMAT, "config": to_dict(config), "model": tensors, **training}
            torch.save({**content, "digest": content_digest(content)}, temporary)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error}); the previous checkpoint is intact") from None
