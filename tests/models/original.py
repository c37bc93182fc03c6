"""Reference forward pass of the original model (SNU_FaceDetection) over a plain dictionary of its tensors.

It uses none of this project's modules, so that it can serve as an independent reference for them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def _conv_bn(state: State, name: str, x: Tensor, bn: str, stride: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
    mean, var = state[f"{bn}.running_mean"], state[f"{bn}.running_var"]
    return F.batch_norm(x, mean, var, state[f"{bn}.weight"], state[f"{bn}.bias"], eps=1e-5)


def _bottleneck(state: State, name: str, x: Tensor, stride: int) -> Tensor:
    y = F.relu(_conv_bn(state, f"{name}.conv1", x, f"{name}.bn1"))
    y = F.relu(_conv_bn(state, f"{name}.conv2", y, f"{name}.bn2", stride))
    y = _conv_bn(state, f"{name}.conv3", y, f"{name}.bn3")
    if f"{name}.downsample.0.weight" in state:
        x = _conv_bn(state, f"{name}.downsample.0", x, f"{name}.downsample.1", stride)
    return F.relu(x + y)


def _resnet50(state: State, x: Tensor) -> list[Tensor]:
    x = F.relu(_conv_bn(state, "body.conv1", x, "body.bn1", stride=2))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    features = []
    for layer, blocks in ((1, 3), (2, 4), (3, 6), (4, 3)):
        for block in range(blocks):
            x = _bottleneck(state, f"body.layer{layer}.{block}", x, stride=2 if layer > 1 and block == 0 else 1)
        features.append(x)
    return features[1:]


def _unit(state: State, name: str, x: Tensor) -> Tensor:
    return _conv_bn(state, f"{name}.0", x, f"{name}.1")


def _fpn(state: State, features: list[Tensor]) -> list[Tensor]:
    output1, output2, output3 = (F.relu(_unit(state, f"fpn.output{i}", x)) for i, x in enumerate(features, start=1))
    up3 = F.interpolate(output3, size=output2.shape[-2:], mode="nearest")
    output2 = F.relu(_unit(state, "fpn.merge2", output2 + up3))
    up2 = F.interpolate(output2, size=output1.shape[-2:], mode="nearest")
    output1 = F.relu(_unit(state, "fpn.merge1", output1 + up2))
    return [output1, output2, output3]


def _ssh(state: State, name: str, x: Tensor) -> Tensor:
    conv3 = _unit(state, f"{name}.conv3X3", x)
    conv5_1 = F.relu(_unit(state, f"{name}.conv5X5_1", x))
    conv5 = _unit(state, f"{name}.conv5X5_2", conv5_1)
    conv7_2 = F.relu(_unit(state, f"{name}.conv7X7_2", conv5_1))
    conv7 = _unit(state, f"{name}.conv7x7_3", conv7_2)
    return F.relu(torch.cat([conv3, conv5, conv7], dim=1))


def _head(state: State, name: str, features: list[Tensor], values: int) -> Tensor:
    outputs = []
    for level, x in enumerate(features):
        y = F.conv2d(x, state[f"{name}.{level}.conv1x1.weight"], state[f"{name}.{level}.conv1x1.bias"])
        outputs.append(y.permute(0, 2, 3, 1).contiguous().view(y.shape[0], -1, values))
    return torch.cat(outputs, dim=1)


def original_forward(state: State, images: Tensor, cascade: bool) -> dict[str, Tensor]:
    """Compute the outputs that the original detects with: of its second stage if `cascade`, else of its first.

    Args:
        state: its `checkpoint["network"]`.
        images: (B, 3, H, W) BGR with the mean subtracted.

    Returns:
        `boxes` (B, P, 4) deltas, `scores` (B, P, 2) after softmax, `landmarks` (B, P, 10) deltas.
    """
    pyramid = _fpn(state, _resnet50(state, images))
    outputs = {}
    for stage in (1, 2):
        features = [_ssh(state, f"ssh{stage}_{level}", x) for level, x in enumerate(pyramid, start=1)]
        outputs[stage] = {
            "boxes": _head(state, f"BboxHead_{stage}", features, 4),
            "scores": F.softmax(_head(state, f"ClassHead_{stage}", features, 2), dim=-1),
            "landmarks": _head(state, f"LandmarkHead_{stage}", features, 10),
        }
    outputs[2]["boxes"] = outputs[1]["boxes"] + outputs[2]["boxes"]
    return outputs[2] if cascade else outputs[1]


def noise_state(shapes: dict[str, list[int]], seed: int = 0) -> State:
    """Return random weights with the original names, scaled so that activations neither vanish nor explode."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(1)
        elif name.endswith("running_var"):
            state[name] = torch.rand(shape, generator=generator) + 0.5
        elif name.endswith(("running_mean", "bias")):
            state[name] = torch.randn(shape, generator=generator) * 0.1
        elif len(shape) == 1:  # BatchNorm's scale
            state[name] = torch.rand(shape, generator=generator) * 0.4 + 0.3
        else:
            fan_in = shape[1] * shape[2] * shape[3]
            state[name] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
    return state
