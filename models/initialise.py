"""Starting a network from published weights."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from config import UserError
from models.checkpoint import Checkpoint, CheckpointError, State, load_backbone
from models.detector import load_strictly
from models.levels import adapt_levels
from models.retinaface import RetinaFace
from utils.landmarks import LANDMARKS_PER_FACE
from utils.runtime.experiment import user_path


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

    A stage that the checkpoint lacks, or that corrects something else there (`ModelConfig.refinement`), starts as a
    copy of the first one with box corrections of zero, so that the new cascade begins by finding what the old detector
    found. Branches that it lacks keep their random start.

    Levels correspond by their strides in the picture that they see, so a network with fine levels begins as the
    detector that is shown the picture at both sizes; and anchors by their sizes, so a network with more of them begins
    by finding the same faces.

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
    sources = adapt_levels(checkpoint.state, checkpoint.model, network.config)
    if checkpoint.model.refinement != network.config.refinement:
        sources = {name: tensor for name, tensor in sources.items() if re.match(r"stages\.[1-9]", name) is None}
    state = network.state_dict()
    left: list[str] = []
    for name, tensor in state.items():
        source = sources.get(name)
        if source is None and name.startswith("stages."):
            source = _start_of_later_stage(sources, name.split(".", 2)[2], network.config.refinement)
        if source is None or source.shape != tensor.shape:
            left.append(name)
        else:
            state[name] = source
    network.load_state_dict(state)
    return left


def expect_few_faces(network: RetinaFace, probability: float = 0.01) -> None:
    """Let an untrained network give every prior this score, as the focal loss wants it (arXiv:1708.02002, section 4.1).

    Else its many background priors, each at one half, drown the faces in the first steps.
    """
    logit = math.log(probability / (1 - probability))
    for name, parameter in network.named_parameters():
        if name.endswith("class_logits.bias"):
            with torch.no_grad():
                parameter.view(-1, 2).copy_(torch.tensor([-logit / 2, logit / 2]))


def _start_of_later_stage(sources: State, name: str, refinement: str) -> Tensor | None:
    """A tensor of a stage that corrects the first one of `sources` and as yet changes nothing; `name` is within it."""
    source = sources.get(f"stages.0.{name}")
    if source is None:
        return None
    if ".box_deltas." in name:
        return torch.zeros_like(source)
    if refinement == "rematch" and ".landmark_deltas." in name:
        # Landmarks are now offsets from the centre of the first stage's box: the offsets from the prior's centre less
        # that of the box. Both are linear in the same features. What this leaves out is that they are measured in
        # sides of the box and no longer of the prior.
        centres = _per_anchor(sources[f"stages.0.{name.replace('landmark', 'box')}"], 4)[:, :2]
        offsets = _per_anchor(source, 2 * LANDMARKS_PER_FACE).unflatten(1, (LANDMARKS_PER_FACE, 2))
        return (offsets - centres.unsqueeze(1)).reshape(source.shape)
    return source


def _per_anchor(head: Tensor, values: int) -> Tensor:
    """Weights or biases of a prediction head, (anchors * values, ...), as (anchors, values, ...)."""
    return head.unflatten(0, (-1, values))
