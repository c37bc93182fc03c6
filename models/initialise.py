"""Initial weights from published backbones and trained detectors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from config import LevelConfig, ModelConfig
from models.checkpoint import Checkpoint, load_backbone
from models.foreign_checkpoint import CheckpointError, State
from models.image_pyramid import add_upsampled_stages, build_model, nearest_anchor
from models.retinaface import RetinaFace
from utils.errors import UserError
from utils.runtime.files import user_path


def load_model(checkpoint: Checkpoint) -> RetinaFace:
    """Build the model of a checkpoint and load its weights; names and shapes of the tensors must be the same.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape; the message names the first.
    """
    model = build_model(checkpoint.model_config)
    load_strictly(model, checkpoint.state, checkpoint.path)
    return model


def load_strictly(module: nn.Module, state: State, path: Path) -> None:
    """Copy `state` into `module`; see `load_model`."""
    expected = module.state_dict()
    # PyTorch before 0.4.1 did not save this counter, which only batch normalisation without momentum uses.
    optional = {name for name in expected if name.endswith(".num_batches_tracked")}
    problems = [f"lacks {name}" for name in expected if name not in state and name not in optional]
    problems += [f"has {name}, which the architecture does not" for name in state if name not in expected]
    problems += [
        f"has {name} of shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise CheckpointError(f"{path}: {problems[0]}{more}; the file is damaged or of another architecture")
    module.load_state_dict({**{name: expected[name] for name in optional}, **state})


# Mean and standard deviation of the RGB images, 0 to 255, that ImageNet weights were trained on.
_IMAGENET_MEAN = (123.675, 116.28, 103.53)
_IMAGENET_STD = (58.395, 57.12, 57.375)


def initialise_backbone(model: RetinaFace, source: str) -> None:
    """Load the weights of every backbone from `source`: a file, `imagenet` (torchvision's own), or `none`.

    ImageNet weights are adapted to the channel order and range of the model's input, so that the backbone computes the
    features that it was trained to compute.

    Raises:
        CheckpointError: the file does not fit the backbone.
        UserError: torchvision has no weights for the backbone, or they cannot be downloaded.
    """
    if source == "none":
        return
    name = model.model_config.backbone
    if source == "imagenet":
        state, origin = _torchvision_weights(name), Path(f"torchvision-{name}")
        is_imagenet = True
    else:
        origin = user_path(source)
        if not origin.is_file():
            raise CheckpointError(f"--pretrained_backbone {source}: no such file")
        state, is_imagenet = load_backbone(origin, name)
    if is_imagenet:
        state = _adapt_input(state, model.model_config)
    for backbone in model.backbones:
        _load_backbone(backbone, state, origin, model.model_config)


def _adapt_input(state: State, config: ModelConfig) -> State:
    """Rescale the first convolution for the input of the model, and shift the statistics that follow it.

    Features at the border of the image differ slightly, because zero padding then means another colour.
    """
    conv_name = "stage1.0.0" if config.backbone == "mobilenet0.25" else "conv1"
    norm_name = "stage1.0.1" if config.backbone == "mobilenet0.25" else "bn1"
    order = [2, 1, 0] if config.channel_order == "bgr" else [0, 1, 2]
    mean, std = torch.tensor(_IMAGENET_MEAN)[order], torch.tensor(_IMAGENET_STD)[order]
    own_mean, own_std = torch.tensor(config.pixel_mean), torch.tensor(config.pixel_std)
    weight = state[f"{conv_name}.weight"][:, order]
    # (x - mean) / std = own * own_std / std + (own_mean - mean) / std, for own = (x - own_mean) / own_std.
    shift = (weight * ((own_mean - mean) / std).view(1, 3, 1, 1)).sum(dim=(1, 2, 3))
    adapted = dict(state)
    adapted[f"{conv_name}.weight"] = weight * (own_std / std).view(1, 3, 1, 1)
    adapted[f"{norm_name}.running_mean"] = state[f"{norm_name}.running_mean"] - shift
    return adapted


def _load_backbone(backbone: nn.Module, state: State, origin: Path, config: ModelConfig) -> None:
    """Load the weights of a standard backbone, as far as the layers of the model's backbone correspond to them.

    Deformable convolutions take the weights of the convolutions that they replace. Group normalisation keeps its
    initial scale and shift, and a second backbone its initial weights.
    """
    if config.deformable_backbone:
        pattern = re.compile(r"(layer[34]\.\d+\.conv2)\.weight")
        state = {pattern.sub(r"\1.conv.weight", name): tensor for name, tensor in state.items()}
    own = backbone.state_dict()
    if config.norm == "group":
        norms = {name for name, module in backbone.named_modules() if isinstance(module, nn.GroupNorm)}
        state = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in norms}
        state |= {name: tensor for name, tensor in own.items() if name.rpartition(".")[0] in norms}
    added = re.compile(r"fine\.|layer[34]\.\d+\.conv2\.offsets\.")
    load_strictly(backbone, {name: tensor for name, tensor in own.items() if added.match(name)} | state, origin)


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
            f"--pretrained_backbone imagenet: cannot download {file_name} ({error}); put that file anywhere and give "
            "its path, or use none"
        ) from None
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def initialise_from_detector(model: RetinaFace, checkpoint: Checkpoint) -> list[str]:
    """Copy the weights of a trained detector as far as the architectures correspond.

    Levels are matched by stride and anchors by size; upsampled levels that the checkpoint lacks, and their backbone,
    start as copies of those of the native scale. A stage that the checkpoint lacks, or that corrects something else
    there (`ModelConfig.refinement`), starts as a copy of the first one with box corrections of zero, so that the new
    cascade begins by detecting what the old detector detected. Branches that the checkpoint lacks keep their random
    initialisation.

    Returns:
        Names of the tensors that keep their random initialisation.

    Raises:
        CheckpointError: the backbones differ.
    """
    source, target = checkpoint.model_config, model.model_config
    if source.backbone != target.backbone:
        raise CheckpointError(
            f"{checkpoint.path}: a detector with {source.backbone}, but the model's backbone is {target.backbone}; "
            f"give --backbone={source.backbone}"
        )
    before, after = source.image_pyramid.upsampled_levels, target.image_pyramid.upsampled_levels
    sources = _adapt_levels(_restore_native_levels(checkpoint.state, before, after), source.levels, target)
    if target.two_resolutions and not source.two_resolutions:
        sources = _add_fine_backbone(sources, model)
    if source.refinement != target.refinement:
        sources = {n: tensor for n, tensor in sources.items() if not re.match(r"(upsampled_)?stages\.[1-9]", n)}
    for number in range(1, len(target.stages)):
        sources = _copies_of_first_stage(sources, number) | sources
    sources = add_upsampled_stages(sources, after) | sources
    sources = {
        f"upsampled_{name}": sources[name] for name in sources if name.startswith(("backbone.", "fpn."))
    } | sources
    state = model.state_dict()
    matching = {name: tensor for name, tensor in sources.items() if name in state and tensor.shape == state[name].shape}
    model.load_state_dict(state | matching)
    return [name for name in state if name not in matching]


# A 3x3 convolution of stride 2 on the image at twice its size, bilinearly interpolated, is one of stride 1 on the image
# itself. Rows are the pixels of the former, columns those of the latter.
_INTERPOLATION = ((0.75, 0.25, 0.0), (0.25, 0.75, 0.0), (0.0, 0.75, 0.25))


def _add_fine_backbone(state: Mapping[str, Tensor], model: RetinaFace) -> State:
    """Convert the tensors of a model with one backbone to a model with two; see `ModelConfig.two_resolutions`.

    The second backbone starts with the features that the first one has in the image at twice its size. The levels do
    not use them yet, so that the new model begins by detecting what the old detector detected.
    """
    extended = dict(state)
    for name, tensor in state.items():
        if name.startswith("backbone."):
            extended[name.replace("backbone.", "backbone.fine.", 1)] = tensor
    stem, interpolation = "stage1.0.0.weight", torch.tensor(_INTERPOLATION)
    rescaled = torch.einsum("ocij,ia,jb->ocab", state[f"backbone.{stem}"], interpolation, interpolation)
    extended[f"backbone.fine.{stem}"] = rescaled
    for name, tensor in model.state_dict().items():
        if re.fullmatch(r"fpn\.lateral\.[1-9]\d*\.0\.weight", name) and name in state:
            extended[name] = F.pad(state[name], (0, 0, 0, 0, 0, tensor.shape[1] - state[name].shape[1]))
    return extended


def _copies_of_first_stage(sources: Mapping[str, Tensor], number: int) -> State:
    """The tensors of stage `number` as a copy of the first one that corrects nothing yet."""
    copies = {}
    for name, tensor in sources.items():
        part = re.fullmatch(r"((?:upsampled_)?stages)\.0\.(.+)", name)
        if part:
            copies[f"{part[1]}.{number}.{part[2]}"] = torch.zeros_like(tensor) if ".box_deltas." in name else tensor
    return copies


def _restore_native_levels(state: State, before: int, after: int) -> State:
    """Copy upsampled levels to the native levels that they replaced, where fewer levels are upsampled than before.

    The native levels were themselves trained for face scores at most; see `ImagePyramid`.
    """
    restored = dict(state)
    for name, tensor in state.items():
        part = re.fullmatch(r"upsampled_(stages\.\d+\.\w+\.(\d+)\..+)", name)
        if part and after - 1 <= int(part[2]) < before - 1:
            restored[part[1]] = tensor
    return restored


def _adapt_levels(state: State, levels: tuple[LevelConfig, ...], target: ModelConfig) -> State:
    """Convert the tensors of a detector to the levels and anchors of another one.

    Args:
        state: tensors of a model with the given levels.
        levels: levels of the source.
        target: architecture of the new model.
    """
    if levels == target.levels:
        return dict(state)
    index_of_stride = {level.stride: index for index, level in enumerate(target.levels)}
    adapted = {}
    for name, tensor in state.items():
        part = re.fullmatch(r"(fpn\.\w+|(?:upsampled_)?stages\.\d+\.(?:context|heads))\.(\d+)\.(.+)", name)
        if part is None:
            adapted[name] = tensor
            continue
        level = levels[int(part[2])]
        index = index_of_stride.get(level.stride)
        if index is not None:
            value = tensor
            if part[1].endswith("heads"):
                value = _adapt_anchors(tensor, part[3], level, target.levels[index], target.variances)
            adapted[f"{part[1]}.{index}.{part[3]}"] = value
    return adapted


def _adapt_anchors(
    head: Tensor, name: str, source: LevelConfig, target: LevelConfig, variances: tuple[float, float]
) -> Tensor:
    """Convert the weights or biases of a prediction head to other anchors, each from the anchor nearest in size.

    Predictions are rescaled, because deltas are measured in sides of the anchor.
    """
    per_anchor = head.unflatten(0, (len(source.anchor_sizes), -1))
    adapted = []
    for size in target.anchor_sizes:
        _, nearest = nearest_anchor(size, [source])
        values, ratio = per_anchor[nearest].clone(), source.anchor_sizes[nearest] / size
        branch, _, kind = name.partition(".")
        if branch == "landmark_deltas":
            values *= ratio
        elif branch == "box_deltas":
            values[:2] *= ratio
            if kind == "bias":
                values[2:] += math.log(ratio) / variances[1]
        adapted.append(values)
    return torch.stack(adapted).flatten(0, 1)


def initialise_for_focal_loss(model: RetinaFace, probability: float = 0.01) -> None:
    """Initialise the class biases so that every prior has this score (arXiv:1708.02002, section 4.1).

    Otherwise the many negative priors, each with a score of one half, dominate the first steps of the focal loss.
    """
    logit = math.log(probability / (1 - probability))
    for name, parameter in model.named_parameters():
        if name.endswith("class_logits.bias"):
            with torch.no_grad():
                parameter.view(-1, 2).copy_(torch.tensor([-logit / 2, logit / 2]))
