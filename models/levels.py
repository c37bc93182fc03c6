"""A trained detector's tensors for a pyramid of other levels or anchors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from config import ModelConfig


def adapt_levels(state: Mapping[str, Tensor], own: ModelConfig, wanted: ModelConfig) -> dict[str, Tensor]:
    """A detector's tensors for other levels or anchors.

    Levels correspond by their strides in the picture that they see, so with fine levels a detector becomes one that is
    shown the picture at both sizes; and anchors by their sizes, so with more of them it finds the same faces.

    Args:
        state: under this project's names, of a model of the configuration `own`.
    """
    own_levels, wanted_levels = _seen_levels(own), _seen_levels(wanted)
    if own_levels == wanted_levels:
        return dict(state)
    adapted = {}
    for name, tensor in state.items():
        part = re.fullmatch(r"(stages\.\d+)\.(context|heads)\.(\d+)\.(.+)", name)
        if part is None:
            adapted[name] = tensor
            continue
        stage, kind, own_level, rest = part.groups()
        own_stride, own_sizes = own_levels[int(own_level)]
        for level, (stride, sizes) in enumerate(wanted_levels):
            if stride == own_stride:
                is_head = kind == "heads"
                value = _for_anchors(tensor, rest, own_sizes, sizes, wanted.variances) if is_head else tensor
                adapted[f"{stage}.{kind}.{level}.{rest}"] = value
    return adapted


def _seen_levels(model: ModelConfig) -> list[tuple[int, tuple[int, ...]]]:
    """Stride and anchor sizes of every level in the picture that it sees, which for fine levels is the enlarged one."""
    scales = [2 if level < model.fine_levels else 1 for level in range(len(model.strides))]
    levels = zip(model.strides, model.anchor_sizes, scales, strict=True)
    return [(stride * scale, tuple(size * scale for size in sizes)) for stride, sizes, scale in levels]


def nearest_anchor(size: int, levels: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Level and number of the anchor whose side is nearest in proportion, the finest of equals."""
    distances = {
        (level, anchor): abs(math.log(other / size))
        for level, sizes in enumerate(levels)
        for anchor, other in enumerate(sizes)
    }
    return min(distances, key=distances.__getitem__)


def _for_anchors(
    head: Tensor, name: str, own: Sequence[int], wanted: Sequence[int], variances: tuple[float, float]
) -> Tensor:
    """A head's weights or biases for other anchors: each says what the nearest in size of its `own` anchors said.

    What it says is then measured in another anchor's sides. For more than one anchor of the same nearest the network
    begins by finding a face more than once, which the suppression sees to.
    """
    per_anchor = head.unflatten(0, (len(own), -1))
    adapted = []
    for size in wanted:
        _, nearest = nearest_anchor(size, [own])
        values, ratio = per_anchor[nearest].clone(), own[nearest] / size
        branch, _, kind = name.partition(".")
        if branch == "landmark_deltas":
            values *= ratio
        elif branch == "box_deltas":
            values[:2] *= ratio
            if kind == "bias":
                values[2:] += math.log(ratio) / variances[1]
        adapted.append(values)
    return torch.stack(adapted).flatten(0, 1)
