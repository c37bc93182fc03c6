"""Folding batch normalisation into the convolutions before it, for networks that no longer learn."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.retinaface import RetinaFace


def fuse_batch_norm(network: RetinaFace) -> RetinaFace:
    """A copy for inference in which a convolution does what it and its batch normalisation did.

    Its outputs equal those of `network` in evaluation mode up to rounding. It lies on the same device, in
    channels_last, is frozen, and holds no batch normalisation.

    Args:
        network: left as it is.
    """
    fused = copy.deepcopy(network).eval().requires_grad_(False)
    for module in list(fused.modules()):
        for (name, convolution), (norm_name, norm) in _pairs(module):
            setattr(module, name, fuse_conv_bn_eval(convolution, norm))
            setattr(module, norm_name, nn.Identity())
    return fused.to(memory_format=torch.channels_last)


def _pairs(module: nn.Module) -> Iterator[tuple[tuple[str, nn.Conv2d], tuple[str, nn.BatchNorm2d]]]:
    """The convolutions among a module's children, each with the batch normalisation behind it, and their names.

    Children stand in the order of their use in `nn.Sequential`, and in torchvision's ResNet: conv1, bn1, conv2, bn2 ...
    """
    children = list(module.named_children())
    for (name, child), (next_name, following) in pairwise(children):
        if isinstance(child, nn.Conv2d) and isinstance(following, nn.BatchNorm2d):
            yield (name, child), (next_name, following)
