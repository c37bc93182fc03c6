"""The network in every configuration: shapes, gradients, and nothing unused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from config import BACKBONES, LossConfig, ModelConfig
from layers.multibox_loss import MultiBoxLoss
from layers.prior_box import prior_boxes
from models.retinaface import RetinaFace
from utils.structures import FaceTargets

CONFIGURATIONS = [
    ModelConfig.for_backbone(
        backbone, num_anchor=anchors, cascade=cascade, model_version=version, landmarks=landmarks, fpn_channels=32
    )
    for backbone, anchors, cascade, version, landmarks in [
        ("mobilenet0.25", 2, False, "retina", True),
        ("mobilenet0.25", 3, True, "tina", True),
        ("mobilenet0.25", 2, True, "retina", False),
        ("resnet18", 3, False, "tina", True),
        ("resnet18", 2, True, "retina", True),
    ]
]


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=lambda config: f"{config.name}-{config.landmarks}")
def test_every_parameter_gets_a_gradient(config: ModelConfig, device: torch.device) -> None:
    torch.manual_seed(0)
    network = RetinaFace(config).to(device)
    images = torch.rand(2, 3, 64, 96, device=device) * 255
    faces = FaceTargets(
        torch.tensor([[0.1, 0.1, 0.3, 0.4], [0.3, 0.2, 0.9, 0.9]]), torch.rand(2, 5, 2), torch.tensor([True, True])
    ).to(device)
    terms = MultiBoxLoss(LossConfig(), config)(network(images), [faces, faces], (64, 96))
    torch.stack(list(terms.values())).sum().backward()
    without = [
        name for name, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    # A level whose anchors match no face has no box to learn from in this one step.
    assert not [name for name in without if ".heads." not in name]
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_outputs_pair_with_the_priors(backbone: str) -> None:
    """An odd size: every level rounds up as `feature_sizes` does."""
    config = ModelConfig.for_backbone(backbone, fpn_channels=16)
    network = RetinaFace(config).eval()
    with torch.inference_mode():
        outputs = network(torch.zeros(1, 3, 33, 70, dtype=torch.uint8))
    count = len(prior_boxes((33, 70), config.anchor_sizes, config.strides))
    assert len(outputs) == 2
    for output in outputs:
        assert output.class_logits.shape == (1, count, 2)
        assert output.box_deltas.shape == (1, count, 4)
        assert output.landmark_deltas is not None
        assert output.landmark_deltas.shape == (1, count, 10)
        assert output.iou_logits is not None
        assert output.iou_logits.shape == (1, count)


def test_a_branch_and_its_parameters_come_and_go_together() -> None:
    retina = ModelConfig.for_backbone("mobilenet0.25", model_version="retina", landmarks=False)
    names = RetinaFace(retina).state_dict().keys()
    assert not [name for name in names if "iou_logits" in name or "landmark_deltas" in name]
    tina = dataclasses.replace(retina, model_version="tina", landmarks=True)
    added = RetinaFace(tina).state_dict().keys() - names
    assert {name.split(".")[4] for name in added} == {"iou_logits", "landmark_deltas"}


def test_second_stage_corrects_the_boxes_of_the_first() -> None:
    network = RetinaFace(ModelConfig.for_backbone("mobilenet0.25")).eval()
    for name, parameter in network.stages[1].named_parameters():
        if ".box_deltas." in name:
            torch.nn.init.constant_(parameter, 0.5 if name.endswith("bias") else 0.0)
    with torch.inference_mode():
        first, second = network(torch.rand(1, 3, 40, 56) * 255)
    torch.testing.assert_close(second.box_deltas, first.box_deltas + 0.5)


def test_mean_is_subtracted_by_the_network() -> None:
    config = ModelConfig.for_backbone("mobilenet0.25")
    network = RetinaFace(config).eval()
    centred = RetinaFace(dataclasses.replace(config, pixel_mean=(0.0, 0.0, 0.0))).eval()
    centred.load_state_dict(network.state_dict())
    images = torch.rand(1, 3, 32, 32) * 255
    with torch.inference_mode():
        mean = torch.tensor(config.pixel_mean).view(1, 3, 1, 1)
        torch.testing.assert_close(network(images)[0].class_logits, centred(images - mean)[0].class_logits)
