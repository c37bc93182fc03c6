"""The network in every configuration: shapes, gradients, and nothing unused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from config import BACKBONES, FINE_LEVELS, LossConfig, ModelConfig, PostprocessConfig
from layers.multibox_loss import MultiBoxLoss
from layers.postprocess import postprocess
from layers.prior_box import prior_boxes
from models.checkpoint import Checkpoint
from models.initialise import initialise_for_focal_loss, initialise_from_detector
from models.retinaface import RetinaFace
from utils.boxes import decode_boxes, decode_landmarks
from utils.structures import FaceTargets, StageOutput

CASCADES = {"single": (False, "sum"), "sum": (True, "sum"), "rematch": (True, "rematch")}
CONFIGURATIONS = [
    usual_config(
        backbone,
        num_anchor=anchors,
        cascade=cascade,
        refinement=refinement,
        model_version=version,
        landmarks=landmarks,
        fpn_channels=32,
    )
    for backbone, anchors, landmarks in [("mobilenet0.25", 2, True), ("resnet18", 3, True), ("mobilenet0.25", 3, False)]
    for version in ("retina", "tina")
    for cascade, refinement in CASCADES.values()
]
CONFIGURATIONS += [
    usual_config("mobilenet0.25", num_anchor=2, cascade=False, fine_levels=fine_levels, fpn_channels=32)
    for fine_levels in FINE_LEVELS[1:]
]
LOSSES = {
    "default": LossConfig(),
    "tinaface": LossConfig(classification="focal", box_regression="diou", landmark_regression="wing"),
}


def two_images_with_faces() -> FaceTargets:
    """Of 64 x 96 pixels. Among their faces every level of the pyramid finds one of its size."""
    boxes = torch.tensor([[0.1, 0.1, 0.3, 0.4], [0.3, 0.1, 0.9, 0.9], [-1.0, -1.0, 2.0, 2.5]])
    faces = FaceTargets(boxes, torch.rand(3, 5, 2), torch.ones(3, dtype=torch.bool))
    return FaceTargets.join([faces, faces])


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("config", CONFIGURATIONS, ids=lambda config: f"{config.name}-{config.landmarks}")
def test_every_parameter_gets_a_gradient(config: ModelConfig, loss: LossConfig, device: torch.device) -> None:
    torch.manual_seed(0)
    network = RetinaFace(config).to(device)
    images = torch.rand(2, 3, 64, 96, device=device) * 255
    terms = MultiBoxLoss(loss, config)(network(images), two_images_with_faces().to(device), (64, 96))
    torch.stack(list(terms.values())).sum().backward()
    without = [
        name for name, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert not without


@pytest.mark.parametrize("fine_levels", FINE_LEVELS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_outputs_pair_with_the_priors(backbone: str, fine_levels: int) -> None:
    """An odd size: every level rounds up as `feature_sizes` does."""
    config = usual_config(backbone, fpn_channels=16, fine_levels=fine_levels)
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
    retina = usual_config("mobilenet0.25", model_version="retina", landmarks=False)
    names = RetinaFace(retina).state_dict().keys()
    assert not [name for name in names if "iou_logits" in name or "landmark_deltas" in name]
    tina = dataclasses.replace(retina, model_version="tina", landmarks=True)
    added = RetinaFace(tina).state_dict().keys() - names
    assert {name.split(".")[4] for name in added} == {"iou_logits", "landmark_deltas"}


def test_second_stage_corrects_the_boxes_of_the_first() -> None:
    network = RetinaFace(usual_config("mobilenet0.25")).eval()
    for name, parameter in network.stages[1].named_parameters():
        if ".box_deltas." in name:
            torch.nn.init.constant_(parameter, 0.5 if name.endswith("bias") else 0.0)
    with torch.inference_mode():
        first, second = network(torch.rand(1, 3, 40, 56) * 255)
    torch.testing.assert_close(second.box_deltas, first.box_deltas + 0.5)


def cascade_of(refinement: str, *, context_share: float = 0.0, **changes: Any) -> RetinaFace:
    config = usual_config("mobilenet0.25", refinement=refinement, context_share=context_share, **changes)
    return RetinaFace(config).eval()


def fixed_priors(network: RetinaFace) -> Tensor:
    return prior_boxes((40, 56), network.config.anchor_sizes, network.config.strides)


def noise() -> Tensor:
    return torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(3)) * 255


@torch.inference_mode()
def test_rematched_stage_without_corrections_keeps_the_boxes_of_the_first() -> None:
    network = cascade_of("rematch")
    set_parameters(network, lambda name: name.startswith("stages.1.") and ".box_deltas." in name, torch.zeros_like)
    first, second = network(noise())
    assert first.priors is None
    assert second.priors is not None
    assert not second.box_deltas.any()
    variances = network.config.variances
    kept = decode_boxes(first.box_deltas, fixed_priors(network), variances)
    assert torch.equal(decode_boxes(second.box_deltas, second.priors, variances), kept)
    everything = PostprocessConfig(confidence_threshold=0, nms_threshold=1, clip_boxes=False)
    (found,) = postprocess(second, (40, 56), network.config, everything)
    order = found.boxes[:, 0].argsort()
    boxes = kept[0] * torch.tensor([56, 40, 56, 40])
    torch.testing.assert_close(found.boxes[order][:, 0], boxes[:, 0].sort().values, atol=1e-3, rtol=0)


def test_rematched_stage_does_not_teach_the_first_its_anchors() -> None:
    network = cascade_of("rematch")
    terms = MultiBoxLoss(LossConfig(), network.config)(
        network(torch.rand(2, 3, 64, 96) * 255), two_images_with_faces(), (64, 96)
    )
    torch.stack([term for name, term in terms.items() if name.startswith("stage2/")]).sum().backward()
    assert all(parameter.grad is None for parameter in network.stages[0].parameters())
    assert all(parameter.grad is not None for parameter in network.fpn.parameters())


def test_anchors_of_a_network_gone_astray_are_finite_and_have_area() -> None:
    network = cascade_of("rematch")
    for size_delta in (1e4, -1e4):
        value = torch.tensor(size_delta)
        set_parameters(network, lambda name: "0.heads." in name and ".box_deltas.bias" in name, value.expand_as)
        _, second = network(noise())
        assert second.priors is not None
        assert second.priors.isfinite().all()
        assert (second.priors[..., 2:] > 1e-4).all()


def test_anchors_are_decoded_in_32_bits() -> None:
    network = cascade_of("rematch")
    with torch.autocast("cpu", torch.bfloat16):
        first, second = network(noise())
    assert first.box_deltas.dtype == torch.bfloat16
    assert second.priors is not None
    assert second.priors.dtype == torch.float32


def set_parameters(network: RetinaFace, chosen: Callable[[str], bool], change: Callable[[Tensor], Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if chosen(name):
                parameter.copy_(change(parameter))


@torch.inference_mode()
@pytest.mark.parametrize("refinement", ["sum", "rematch"])
def test_a_cascade_starts_by_finding_what_one_stage_found(refinement: str) -> None:
    single = cascade_of("sum", cascade=False)
    set_parameters(single, lambda name: "box_deltas" in name, lambda values: values * 0.1)
    network = cascade_of(refinement)
    checkpoint = Checkpoint(Path("single.pth"), single.config, single.state_dict(), "own")
    assert initialise_from_detector(network, checkpoint) == []
    assert_starts_from(single(noise())[0], network)


@torch.inference_mode()
def test_a_cascade_that_refines_in_another_way_starts_from_the_first_stage() -> None:
    old, network = cascade_of("sum"), cascade_of("rematch")
    checkpoint = Checkpoint(Path("sum.pth"), old.config, old.state_dict(), "own")
    assert initialise_from_detector(network, checkpoint) == []
    assert_starts_from(old(noise())[0], network)
    again = cascade_of("sum")
    initialise_from_detector(again, checkpoint)
    torch.testing.assert_close(again(noise())[1].box_deltas, old(noise())[1].box_deltas)


@torch.inference_mode()
@pytest.mark.parametrize("fine_levels", FINE_LEVELS[1:])
def test_fine_levels_start_by_finding_what_the_detector_found_in_the_enlarged_picture(fine_levels: int) -> None:
    usual = cascade_of("sum", cascade=False)
    fine = cascade_of("sum", cascade=False, fine_levels=fine_levels)
    assert initialise_from_detector(fine, Checkpoint(Path("usual.pth"), usual.config, usual.state_dict(), "own")) == []
    found = fine(noise())[0]
    enlarged = usual(F.interpolate(noise(), scale_factor=2, mode="bilinear"))[0]
    plain = usual(noise())[0]
    # 40 x 56 pixels, three anchors a cell: the enlarged picture's levels have 10 x 14 cells and so on.
    finest = sum(rows * columns * 3 for rows, columns in [(10, 14), (5, 7), (3, 4)][:fine_levels])
    coarsest = sum(rows * columns * 3 for rows, columns in [(5, 7), (3, 4), (2, 2)][fine_levels - 1 :])
    for name in ("class_logits", "box_deltas", "landmark_deltas", "iou_logits"):
        value = getattr(found, name)
        torch.testing.assert_close(value[:, :finest], getattr(enlarged, name)[:, :finest])
        torch.testing.assert_close(value[:, finest:], getattr(plain, name)[:, -coarsest:])


@torch.inference_mode()
def test_fine_scores_take_their_share_from_the_picture_at_its_own_size() -> None:
    """Fine levels have anchors of 4, 8, 16 pixels (stride 4) and 16, 32, 64 (stride 8)."""
    single = cascade_of("sum", cascade=False)
    alone, fused = (cascade_of("sum", cascade=False, fine_levels=2, context_share=share) for share in (0.0, 0.25))
    for network in (alone, fused):
        initialise_from_detector(network, Checkpoint(Path("usual.pth"), single.config, single.state_dict(), "own"))
    plain, before, after = single(noise())[0], alone(noise())[0], fused(noise())[0]
    assert torch.equal(before.box_deltas, after.box_deltas)
    fine_cells, coarse_cells = (10 * 14, 5 * 7)
    fine = before.class_logits.split([fine_cells * 3, coarse_cells * 3, 12 * 3 + 4 * 3], dim=1)
    mixed = after.class_logits.split([fine_cells * 3, coarse_cells * 3, 12 * 3 + 4 * 3], dim=1)
    assert torch.equal(fine[2], mixed[2])
    # The level of stride 8 has the same cells there, and the anchors of 16 and 32 are the second and third of them.
    there = plain.class_logits[:, : coarse_cells * 3].unflatten(1, (-1, 3))[:, :, 1:]
    expected = 0.75 * fine[1].unflatten(1, (-1, 3))[:, :, :2] + 0.25 * there
    torch.testing.assert_close(mixed[1].unflatten(1, (-1, 3))[:, :, :2], expected)
    # Of stride 4, the anchor of 8 takes it from that of 8 there, interpolated between the cells.
    of_8 = plain.class_logits[:, : coarse_cells * 3].unflatten(1, (5, 7, 3))[:, :, :, 0].permute(0, 3, 1, 2)
    around = F.interpolate(of_8, size=(10, 14), mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2)
    expected = 0.75 * fine[0].unflatten(1, (-1, 3))[:, :, 1] + 0.25 * around
    assert alone.config.anchor_sizes[0] == (4, 8, 16)
    torch.testing.assert_close(mixed[0].unflatten(1, (-1, 3))[:, :, 1], expected)


@torch.inference_mode()
def test_scores_take_their_share_from_the_picture_at_half_its_size() -> None:
    """There the levels have anchors of 16, 32, 64 pixels of the picture (stride 16), of 64, 128, 256, and so on."""
    plain, fused = (cascade_of("sum", coarse_share=share) for share in (0.0, 0.25))
    fused.load_state_dict(plain.state_dict())
    halved = F.interpolate(noise(), size=(20, 28), mode="bilinear")
    for before, after, coarse in zip(plain(noise()), fused(noise()), plain(halved), strict=True):
        assert torch.equal(before.box_deltas, after.box_deltas)
        cells = [5 * 7 * 3, 3 * 4 * 3, 2 * 2 * 3]
        own, mixed = (output.class_logits.split(cells, dim=1) for output in (before, after))
        first, second, _ = coarse.class_logits.split([3 * 4 * 3, 2 * 2 * 3, 3], dim=1)
        # The anchor of 32 is the third of stride 8 and the second of stride 16 in the picture at half its size.
        of_32 = first.unflatten(1, (3, 4, 3))[:, :, :, 1].permute(0, 3, 1, 2)
        around = F.interpolate(of_32, size=(5, 7), mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2)
        expected = 0.75 * own[0].unflatten(1, (-1, 3))[:, :, 2] + 0.25 * around
        torch.testing.assert_close(mixed[0].unflatten(1, (-1, 3))[:, :, 2], expected)
        # That of 256 is the second of stride 32, and there the third of the second level, of as many cells.
        of_256 = second.unflatten(1, (-1, 3))[:, :, 2]
        expected = 0.75 * own[2].unflatten(1, (-1, 3))[:, :, 1] + 0.25 * of_256
        torch.testing.assert_close(mixed[2].unflatten(1, (-1, 3))[:, :, 1], expected)


@torch.inference_mode()
def test_other_anchors_start_by_finding_the_same_boxes() -> None:
    two, three = (
        RetinaFace(usual_config("mobilenet0.25", num_anchor=anchors, cascade=False)).eval() for anchors in (2, 3)
    )
    set_parameters(two, lambda name: "box_deltas" in name, lambda values: values * 0.1)
    assert initialise_from_detector(three, Checkpoint(Path("two.pth"), two.config, two.state_dict(), "own")) == []
    variances = two.config.variances
    old, new = two(noise())[0], three(noise())[0]
    old_boxes = decode_boxes(old.box_deltas, fixed_priors(two), variances).unflatten(1, (-1, 2))
    new_boxes = decode_boxes(new.box_deltas, fixed_priors(three), variances).unflatten(1, (-1, 3))
    assert old.landmark_deltas is not None
    assert new.landmark_deltas is not None
    old_points = decode_landmarks(old.landmark_deltas, fixed_priors(two), variances).unflatten(1, (-1, 2))
    new_points = decode_landmarks(new.landmark_deltas, fixed_priors(three), variances).unflatten(1, (-1, 3))
    old_scores, new_scores = old.class_logits.unflatten(1, (-1, 2)), new.class_logits.unflatten(1, (-1, 3))
    for anchor, source in enumerate((0, 0, 1)):  # of 8, 16 and 32 pixels; the first two say what that of 16 said
        torch.testing.assert_close(new_boxes[:, :, anchor], old_boxes[:, :, source])
        torch.testing.assert_close(new_points[:, :, anchor], old_points[:, :, source])
        torch.testing.assert_close(new_scores[:, :, anchor], old_scores[:, :, source])


def assert_starts_from(single: StageOutput, network: RetinaFace) -> None:
    """The last stage's scores and boxes are those of `single`, and its landmarks but for the size of its boxes."""
    variances, priors = network.config.variances, fixed_priors(network)
    last = network(noise())[-1]
    torch.testing.assert_close(last.class_logits, single.class_logits)
    own = priors if last.priors is None else last.priors
    boxes = decode_boxes(single.box_deltas, priors, variances)
    torch.testing.assert_close(decode_boxes(last.box_deltas, own, variances), boxes)
    assert last.landmark_deltas is not None
    assert single.landmark_deltas is not None
    expected = decode_landmarks(single.landmark_deltas, priors, variances)
    found = decode_landmarks(last.landmark_deltas, own, variances)
    if last.priors is None:
        torch.testing.assert_close(found, expected)
    else:  # offsets from the box's centre, stretched as the box is
        stretch = (last.priors[..., 2:] / priors[:, 2:]).unsqueeze(-2)
        centres = last.priors[..., :2].unsqueeze(-2)
        torch.testing.assert_close(found, centres + (expected - centres) * stretch, atol=1e-5, rtol=1e-4)


def test_mean_is_subtracted_by_the_network() -> None:
    config = usual_config("mobilenet0.25")
    network = RetinaFace(config).eval()
    centred = RetinaFace(dataclasses.replace(config, pixel_mean=(0.0, 0.0, 0.0))).eval()
    centred.load_state_dict(network.state_dict())
    images = torch.rand(1, 3, 32, 32) * 255
    with torch.inference_mode():
        mean = torch.tensor(config.pixel_mean).view(1, 3, 1, 1)
        torch.testing.assert_close(network(images)[0].class_logits, centred(images - mean)[0].class_logits)


def test_untrained_network_expects_few_faces() -> None:
    torch.manual_seed(0)
    network = RetinaFace(usual_config("mobilenet0.25"))
    for name, parameter in network.named_parameters():
        if name.endswith("class_logits.weight"):
            torch.nn.init.zeros_(parameter)
    initialise_for_focal_loss(network, probability=0.02)
    with torch.inference_mode():
        output = network.eval()(torch.zeros(1, 3, 32, 32))[-1]
    scores = output.class_logits.softmax(dim=-1)[..., 1]
    assert scores.min() == pytest.approx(0.02)
    assert scores.max() == pytest.approx(0.02)
