"""Starting a network from published weights."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision

from config import UserError
from models.detector import load_strictly
from models.retinaface import RetinaFace
from utils.checkpoint import Checkpoint, CheckpointError, State, load_backbone
from utils.experiment import user_path


def initialise_backbone(network: RetinaFace, source: str) -> None:
    """Give the backbone the weights of `source`: a file, `imagenet` (torchvision's own), or `none`.

    Raises:
        CheckpointError: the file does not fit the backbone.
        UserError: torchvision has no weights for it, or they cannot be fetched.
    """
    if source == "none":
        return
    name = network.config.backbone
    if source == "imagenet":
        state, origin = _torchvision_weights(name), Path(f"torchvision-{name}")
    else:
        origin = user_path(source)
        if not origin.is_file():
            raise CheckpointError(f"--pretrained_backbone {source}: no such file")
        state = load_backbone(origin, name)
    load_strictly(network.backbone, state, origin)


def _torchvision_weights(name: str) -> State:
    if not name.startswith("resnet"):
        raise UserError(
            f"--pretrained_backbone imagenet: torchvision has no weights of {name}; give a file, such as "
            "mobilenetV1X0.25_pretrain.tar of biubug6/Pytorch_Retinaface"
        )
    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    try:
        state: State = weights.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        file_name = weights.url.rsplit("/", 1)[-1]
        raise UserError(
            f"--pretrained_backbone imagenet: cannot fetch {file_name} ({error}); put that file anywhere and give "
            "its path, or use none"
        ) from None
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def initialise_from_detector(network: RetinaFace, checkpoint: Checkpoint) -> list[str]:
    """Copy a trained detector as far as it goes.

    A stage that the checkpoint lacks starts as a copy of the first one with box corrections of zero, so that the new
    cascade begins by finding what the old detector found. Branches that it lacks keep their random start.

    Returns:
        Names of the tensors that kept their random start.

    Raises:
        CheckpointError: the backbones differ, or nothing fits.
    """
    if checkpoint.model.backbone != network.config.backbone:
        raise CheckpointError(
            f"{checkpoint.path}: a detector with {checkpoint.model.backbone}, but the model's backbone is "
            f"{network.config.backbone}; give --backbone={checkpoint.model.backbone}"
        )
    state = network.state_dict()
    left: list[str] = []
    for name, tensor in state.items():
        source = checkpoint.state.get(name)
        corrects_boxes = False
        if source is None and name.startswith("stages."):
            _, stage, rest = name.split(".", 2)
            source = checkpoint.state.get(f"stages.0.{rest}")
            corrects_boxes = stage != "0" and ".box_deltas." in name
        if source is None or source.shape != tensor.shape:
            left.append(name)
        else:
            state[name] = torch.zeros_like(source) if corrects_boxes else source
    network.load_state_dict(state)
    return left
