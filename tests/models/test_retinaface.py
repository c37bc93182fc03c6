"""Tests of the model in all configurations: output shapes, gradients, cascades and initialisation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from config import BACKBONES, USUAL_LEVELS, ImagePyramidConfig, LevelConfig, LossConfig, ModelConfig, PostprocessConfig
from layers.multibox_loss import MultiBoxLoss
from layers.postprocess import postprocess
from layers.prior_box import prior_boxes
from models.architecture import usual_config
from models.checkpoint import Checkpoint
from models.heads import LevelOutput, join_levels
from models.image_pyramid import ImagePyramid, add_upsampled_stages, build_model, pyramid_levels
from models.initialise import initialise_for_focal_loss, initialise_from_detector
from models.net import MergedFPN
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
    usual_config("mobilenet0.25", num_anchor=2, cascade=False, fpn_channels=32, image_pyramid=pyramid)
    for pyramid in (
        ImagePyramidConfig(1, 0.3),
        ImagePyramidConfig(2, 0.3),
        ImagePyramidConfig(3, 0.3),
        ImagePyramidConfig(2, 0.3, 0.3),
        ImagePyramidConfig(3),
        ImagePyramidConfig(2, half_scale_weight=0.3),
        ImagePyramidConfig(half_scale_weight=0.3),
        ImagePyramidConfig(2, 0.3, upsampled_channels=(16, 24)),
        ImagePyramidConfig(2, half_scale_weight=0.3, upsampled_channels=(16, 24)),
        ImagePyramidConfig(3, upsampled_channels=(16, 24, 32)),
    )
]
CONFIGURATIONS += [
    usual_config(
        "mobilenet0.25",
        num_anchor=2,
        fpn_channels=32,
        two_resolutions=True,
        levels=(LevelConfig(4, (8, 16), channels=16), *USUAL_LEVELS[2]),
    )
]
LOSSES = {
    "default": LossConfig(),
    "tinaface": LossConfig(classification="focal", box_regression="diou", landmark_regression="wing"),
}


def two_images_with_faces() -> FaceTargets:
    """Return two images of 64 x 96 pixels with faces of the size of every level."""
    boxes = torch.tensor([[0.1, 0.1, 0.3, 0.4], [0.3, 0.1, 0.9, 0.9], [-1.0, -1.0, 2.0, 2.5]])
    faces = FaceTargets(
        boxes, torch.rand(3, 5, 2), torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool), (3,)
    )
    return FaceTargets.join([faces, faces])


def describe(config: ModelConfig) -> str:
    pyramid = config.image_pyramid
    scales = tuple(vars(pyramid).values())
    return f"{config.name}-{config.landmarks}-{scales}"


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("config", CONFIGURATIONS, ids=describe)
def test_every_parameter_gets_a_gradient(config: ModelConfig, loss: LossConfig, device: torch.device) -> None:
    """A trainable parameter without a gradient stops distributed training."""
    torch.manual_seed(0)
    model = build_model(config).to(device)
    images = torch.rand(2, 3, 64, 96, device=device) * 255
    terms = MultiBoxLoss(loss, config)(model(images), two_images_with_faces().to(device), (64, 96))
    torch.stack(list(terms.values())).sum().backward()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not [name for name, parameter in trainable.items() if parameter.grad is None or not parameter.grad.any()]
    if config.image_pyramid.upsampled_levels < 2:
        assert len(trainable) == len(list(model.parameters()))


def test_replaced_native_levels_train_at_most_their_scores() -> None:
    """Two of three native levels are replaced; without a weight of the native scale nothing of them is trained."""
    for weight, expected in ((0.3, {"context", "class_logits"}), (0.0, set())):
        config = usual_config("mobilenet0.25", cascade=False, image_pyramid=ImagePyramidConfig(3, weight))
        parts = [
            name.split(".") for name, value in build_model(config).stages.named_parameters() if value.requires_grad
        ]
        trainable = {part[1] if part[1] == "context" else part[3] for part in parts if part[2] in ("0", "1")}
        assert trainable == expected
        assert "box_deltas" in {part[3] for part in parts if part[2] == "2"}


@pytest.mark.parametrize(
    "pyramid",
    [
        *(ImagePyramidConfig(count, 0.3) for count in range(4)),
        ImagePyramidConfig(3),
        ImagePyramidConfig(2, half_scale_weight=0.3, upsampled_channels=(8, 12)),
    ],
)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_outputs_have_one_prediction_per_prior(backbone: str, pyramid: ImagePyramidConfig) -> None:
    """The image size is odd: every level rounds up, as `feature_sizes` does."""
    config = usual_config(backbone, fpn_channels=16, image_pyramid=pyramid)
    model = build_model(config).eval()
    with torch.inference_mode():
        outputs = model(torch.zeros(1, 3, 33, 70, dtype=torch.uint8))
    priors = prior_boxes((33, 70), pyramid_levels(config))
    count = len(priors)
    assert len(outputs) == 2
    for output in outputs:
        assert output.class_logits.shape == (1, count, 2)
        assert output.box_deltas.shape == (1, count, 4)
        assert output.landmark_deltas is not None
        assert output.landmark_deltas.shape == (1, count, 10)
        assert output.iou_logits is not None
        assert output.iou_logits.shape == (1, count)
        assert torch.equal(output.priors, priors)


def test_levels_are_joined_in_the_order_of_the_priors() -> None:
    """The four box deltas of a prediction encode its level, row, column and anchor."""
    config = usual_config("mobilenet0.25", num_anchor=2)
    priors = prior_boxes((40, 56), config.levels)
    levels = []
    for number, (rows, columns) in enumerate([(5, 7), (3, 4), (2, 2)]):
        row = torch.arange(rows).view(1, rows, 1).expand(2, rows, columns)
        column = torch.arange(columns).view(1, 1, columns).expand(2, rows, columns)
        anchor = torch.arange(2).view(2, 1, 1).expand(2, rows, columns)
        place = torch.stack([torch.full_like(row, number), row, column, anchor], dim=1).flatten(0, 1)[None].float()
        levels.append(LevelOutput(place[:, :4], place, None, place[:, :2]))
    joined = join_levels(levels, priors)
    assert joined.class_logits.shape == (1, len(priors), 2)
    assert joined.iou_logits is not None
    assert joined.iou_logits.shape == (1, len(priors))
    level, row, column, anchor = joined.box_deltas[0].long().unbind(1)
    stride = torch.tensor([8, 16, 32])[level]
    centres = torch.stack([(column + 0.5) * stride / 56, (row + 0.5) * stride / 40], dim=1)
    torch.testing.assert_close(priors[:, :2], centres)
    sizes = torch.tensor([[16.0, 32], [64, 128], [256, 512]])[level, anchor]
    torch.testing.assert_close(priors[:, 2:], sizes[:, None] / torch.tensor([56, 40]))


def test_disabled_branches_have_no_parameters() -> None:
    retina = usual_config("mobilenet0.25", model_version="retina", landmarks=False)
    names = RetinaFace(retina).state_dict().keys()
    assert not [name for name in names if "iou_logits" in name or "landmark_deltas" in name]
    tina = dataclasses.replace(retina, model_version="tina", landmarks=True)
    added = RetinaFace(tina).state_dict().keys() - names
    assert {name.split(".")[4] for name in added} == {"iou_logits", "landmark_deltas"}


def test_second_stage_adds_to_the_box_deltas_of_the_first() -> None:
    model = RetinaFace(usual_config("mobilenet0.25")).eval()
    for name, parameter in model.stages[1].named_parameters():
        if ".box_deltas." in name:
            torch.nn.init.constant_(parameter, 0.5 if name.endswith("bias") else 0.0)
    with torch.inference_mode():
        first, second = model(torch.rand(1, 3, 40, 56) * 255)
    torch.testing.assert_close(second.box_deltas, first.box_deltas + 0.5)


def model_of(refinement: str = "sum", pyramid: ImagePyramidConfig | None = None, **changes: Any) -> RetinaFace:
    """Return a cascade or, with cascade=False, a single stage."""
    pyramid = pyramid or ImagePyramidConfig()
    return build_model(usual_config("mobilenet0.25", refinement=refinement, image_pyramid=pyramid, **changes)).eval()


def checkpoint_of(model: RetinaFace) -> Checkpoint:
    return Checkpoint(Path("detector.pth"), model.model_config, model.state_dict(), "own")


def noise() -> Tensor:
    return torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(3)) * 255


@torch.inference_mode()
def test_rematched_stage_with_zero_deltas_keeps_the_boxes_of_the_first() -> None:
    model = model_of("rematch")
    set_parameters(model, lambda name: name.startswith("stages.1.") and ".box_deltas." in name, torch.zeros_like)
    first, second = model(noise())
    assert torch.equal(first.priors, prior_boxes((40, 56), model.levels))
    assert second.priors.shape == (1, *first.priors.shape)
    assert not second.box_deltas.any()
    variances = model.model_config.variances
    kept = decode_boxes(first.box_deltas, first.priors, variances)
    assert torch.equal(decode_boxes(second.box_deltas, second.priors, variances), kept)
    everything = PostprocessConfig(confidence_threshold=0, nms_threshold=1, clip_boxes=False)
    (found,) = postprocess(second, (40, 56), model.model_config, everything)
    order = found.boxes[:, 0].argsort()
    boxes = kept[0] * torch.tensor([56, 40, 56, 40])
    torch.testing.assert_close(found.boxes[order][:, 0], boxes[:, 0].sort().values, atol=1e-3, rtol=0)


def test_rematched_stage_has_no_gradient_through_its_anchors() -> None:
    model = model_of("rematch")
    terms = MultiBoxLoss(LossConfig(), model.model_config)(
        model(torch.rand(2, 3, 64, 96) * 255), two_images_with_faces(), (64, 96)
    )
    torch.stack([term for name, term in terms.items() if name.startswith("stage2/")]).sum().backward()
    assert all(parameter.grad is None for parameter in model.stages[0].parameters())
    assert all(parameter.grad is not None for parameter in model.fpn.parameters())


def test_anchors_of_a_diverged_model_are_finite_and_have_area() -> None:
    model = model_of("rematch")
    for size_delta in (1e4, -1e4):
        value = torch.tensor(size_delta)
        set_parameters(model, lambda name: "0.heads." in name and ".box_deltas.bias" in name, value.expand_as)
        _, second = model(noise())
        assert second.priors.isfinite().all()
        assert (second.priors[..., 2:] > 1e-4).all()


def test_anchors_are_decoded_in_float32() -> None:
    model = model_of("rematch")
    with torch.autocast("cpu", torch.bfloat16):
        first, second = model(noise())
    assert first.box_deltas.dtype == torch.bfloat16
    assert second.priors.dtype == torch.float32


def set_parameters(model: RetinaFace, chosen: Callable[[str], bool], change: Callable[[Tensor], Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if chosen(name):
                parameter.copy_(change(parameter))


@torch.inference_mode()
def test_landmarks_of_every_stage_are_predicted_relative_to_the_first_priors() -> None:
    """The boxes of the first stage move by half a prior and become twice as large; the landmarks stay."""
    model = model_of("rematch")
    set_parameters(model, lambda name: ".box_deltas.weight" in name, torch.zeros_like)
    variances = model.model_config.variances
    change = torch.tensor([0.5 / variances[0], 0.5 / variances[0], *[math.log(2) / variances[1]] * 2])
    set_parameters(model, lambda name: "stages.0." in name and ".box_deltas.bias" in name, lambda _: change.repeat(3))
    set_parameters(model, lambda name: ".landmark_deltas.weight" in name, torch.zeros_like)
    set_parameters(model, lambda name: ".landmark_deltas.bias" in name, torch.ones_like)
    first, second = model(noise())
    centres, sizes = first.priors[None].split(2, dim=2)
    torch.testing.assert_close(second.priors, torch.cat([centres + sizes / 2, sizes * 2], dim=2))
    assert second.landmark_deltas is not None
    points = decode_landmarks(second.landmark_deltas, second.priors, variances)
    # A delta of 1 is a tenth of the first prior's side, from the first prior's centre.
    torch.testing.assert_close(points, (centres + 0.1 * sizes).unsqueeze(2).expand_as(points))


PYRAMIDS = [ImagePyramidConfig(), ImagePyramidConfig(2, 0.3), ImagePyramidConfig(1, half_scale_weight=0.2)]


@torch.inference_mode()
@pytest.mark.parametrize("pyramid", PYRAMIDS)
@pytest.mark.parametrize("refinement", ["sum", "rematch"])
def test_cascade_initialised_from_one_stage_gives_its_detections(refinement: str, pyramid: ImagePyramidConfig) -> None:
    single = model_of("sum", pyramid, cascade=False)
    set_parameters(single, lambda name: "box_deltas" in name, lambda values: values * 0.1)
    model = model_of(refinement, pyramid)
    assert initialise_from_detector(model, checkpoint_of(single)) == []
    assert_starts_from(single(noise())[0], model)


@torch.inference_mode()
@pytest.mark.parametrize("pyramid", PYRAMIDS)
@pytest.mark.parametrize("refinement", ["sum", "rematch"])
def test_cascade_with_another_refinement_is_initialised_from_the_first_stage(
    refinement: str, pyramid: ImagePyramidConfig
) -> None:
    old, model = model_of("rematch" if refinement == "sum" else "sum", pyramid), model_of(refinement, pyramid)
    assert initialise_from_detector(model, checkpoint_of(old)) == []
    assert_starts_from(old(noise())[0], model)


@torch.inference_mode()
@pytest.mark.parametrize("refinement", ["sum", "rematch"])
def test_cascade_with_the_same_refinement_is_copied(refinement: str) -> None:
    old, again = model_of(refinement), model_of(refinement)
    initialise_from_detector(again, checkpoint_of(old))
    for name, value in vars(old(noise())[1]).items():
        torch.testing.assert_close(getattr(again(noise())[1], name), value)


# 40 x 56 pixels, three anchors per cell: the levels of the upsampled image have 10 x 14 cells, and so on.
UPSAMPLED_PRIORS = [rows * columns * 3 for rows, columns in [(10, 14), (5, 7), (3, 4)]]
NATIVE_PRIORS = [rows * columns * 3 for rows, columns in [(5, 7), (3, 4), (2, 2)]]


@torch.inference_mode()
@pytest.mark.parametrize("has_own_fpn", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_fine_levels_are_initialised_from_the_detector(count: int, has_own_fpn: bool) -> None:
    usual = model_of(cascade=False)
    pyramid = ImagePyramidConfig(count, upsampled_channels=(64,) * count if has_own_fpn else ())
    fine = model_of("sum", pyramid, cascade=False)
    assert initialise_from_detector(fine, checkpoint_of(usual)) == []
    assert_equals_both_scales(fine(noise())[0], usual, count)


def assert_equals_both_scales(found: StageOutput, usual: RetinaFace, count: int) -> None:
    """Assert that the finest levels equal those of the upsampled image, and the others those of the image."""
    upsampled = usual(F.interpolate(noise(), scale_factor=2, mode="bilinear"))[0]
    plain = usual(noise())[0]
    finest, coarsest = sum(UPSAMPLED_PRIORS[:count]), sum(NATIVE_PRIORS[count - 1 :])
    for name in ("class_logits", "box_deltas", "landmark_deltas", "iou_logits"):
        value = getattr(found, name)
        torch.testing.assert_close(value[:, :finest], getattr(upsampled, name)[:, :finest])
        torch.testing.assert_close(value[:, finest:], getattr(plain, name)[:, -coarsest:])


@torch.inference_mode()
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_another_number_of_fine_levels_is_initialised_from_trained_levels(after: int) -> None:
    """Of two fine levels, the first replaces the native level of the same weights, whose boxes are not trained."""
    usual = model_of(cascade=False)
    source = model_of("sum", ImagePyramidConfig(2), cascade=False)
    initialise_from_detector(source, checkpoint_of(usual))
    set_parameters(source, lambda name: name.startswith("stages.0.heads.0."), torch.zeros_like)
    target = model_of("sum", ImagePyramidConfig(after), cascade=False)
    assert initialise_from_detector(target, checkpoint_of(source)) == []
    if after:
        assert_equals_both_scales(target(noise())[0], usual, after)
    else:
        torch.testing.assert_close(target(noise())[0].box_deltas, usual(noise())[0].box_deltas)


def test_upsampled_stages_are_copies_of_the_finest_native_levels() -> None:
    """With two upsampled levels, of levels 0, 1 and 2 the first two are copied, in both stages."""
    state = model_of().state_dict()
    extended = add_upsampled_stages(state, 2)
    assert all(torch.equal(extended.pop(name), value) for name, value in state.items())
    assert {tuple(name.split(".")[:4:3]) for name in extended} == {("upsampled_stages", "0"), ("upsampled_stages", "1")}
    assert {name.split(".")[1] for name in extended} == {"0", "1"}
    assert all(torch.equal(value, state[name.removeprefix("upsampled_")]) for name, value in extended.items())
    pyramid = ImagePyramid(usual_config("mobilenet0.25", image_pyramid=ImagePyramidConfig(2)))
    assert pyramid.state_dict().keys() == state.keys() | extended.keys()
    assert add_upsampled_stages(state, 0) == state


@pytest.mark.parametrize(("count", "strides"), [(0, [8, 16, 32]), (1, [4, 8, 16, 32]), (3, [4, 8, 16, 32])])
def test_levels_of_the_pyramid(count: int, strides: list[int]) -> None:
    """Upsampled levels have half the stride and anchors; the last of them is beside the native level of its stride."""
    levels = pyramid_levels(usual_config("mobilenet0.25", num_anchor=2, image_pyramid=ImagePyramidConfig(count)))
    assert [level.stride for level in levels] == strides
    anchors = {
        0: [(16, 32), (64, 128), (256, 512)],
        1: [(8, 16), (16, 32), (64, 128), (256, 512)],
        3: [(8, 16), (32, 64), (128, 256), (256, 512)],
    }
    assert [level.anchor_sizes for level in levels] == anchors[count]


@torch.inference_mode()
def test_fine_scores_are_fused_with_the_native_scale() -> None:
    """Fine levels have anchors of 4, 8, 16 pixels (stride 4) and 16, 32, 64 (stride 8)."""
    single = model_of(cascade=False)
    alone, fused = (model_of("sum", ImagePyramidConfig(2, weight), cascade=False) for weight in (0.0, 0.25))
    for model in (alone, fused):
        initialise_from_detector(model, checkpoint_of(single))
    plain, before, after = single(noise())[0], alone(noise())[0], fused(noise())[0]
    assert torch.equal(before.box_deltas, after.box_deltas)
    fine_cells, coarse_cells = (10 * 14, 5 * 7)
    fine = before.class_logits.split([fine_cells * 3, coarse_cells * 3, 12 * 3 + 4 * 3], dim=1)
    mixed = after.class_logits.split([fine_cells * 3, coarse_cells * 3, 12 * 3 + 4 * 3], dim=1)
    assert torch.equal(fine[2], mixed[2])
    # The native level of stride 8 has the same cells, and the anchors of 16 and 32 are its second and third.
    native = plain.class_logits[:, : coarse_cells * 3].unflatten(1, (-1, 3))[:, :, 1:]
    expected = 0.75 * fine[1].unflatten(1, (-1, 3))[:, :, :2] + 0.25 * native
    torch.testing.assert_close(mixed[1].unflatten(1, (-1, 3))[:, :, :2], expected)
    # The anchor of 8 at stride 4 is fused with the native anchor of 8, interpolated between the cells.
    of_8 = plain.class_logits[:, : coarse_cells * 3].unflatten(1, (5, 7, 3))[:, :, :, 0].permute(0, 3, 1, 2)
    around = F.interpolate(of_8, size=(10, 14), mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2)
    expected = 0.75 * fine[0].unflatten(1, (-1, 3))[:, :, 1] + 0.25 * around
    assert alone.levels[0].anchor_sizes == (4, 8, 16)
    torch.testing.assert_close(mixed[0].unflatten(1, (-1, 3))[:, :, 1], expected)


@torch.inference_mode()
def test_scores_are_fused_with_the_half_scale() -> None:
    """Levels of the half scale have anchors of 16, 32, 64 pixels of the image (stride 16), 64, 128, 256, etc."""
    plain, fused = (model_of("sum", ImagePyramidConfig(half_scale_weight=weight)) for weight in (0.0, 0.25))
    fused.load_state_dict(plain.state_dict())
    halved = F.interpolate(noise(), size=(20, 28), mode="bilinear")
    for before, after, coarse in zip(plain(noise()), fused(noise()), plain(halved), strict=True):
        assert torch.equal(before.box_deltas, after.box_deltas)
        cells = [5 * 7 * 3, 3 * 4 * 3, 2 * 2 * 3]
        own, mixed = (output.class_logits.split(cells, dim=1) for output in (before, after))
        first, second, _ = coarse.class_logits.split([3 * 4 * 3, 2 * 2 * 3, 3], dim=1)
        # The anchor of 32 is the third of stride 8 and, at half scale, the second of stride 16.
        of_32 = first.unflatten(1, (3, 4, 3))[:, :, :, 1].permute(0, 3, 1, 2)
        around = F.interpolate(of_32, size=(5, 7), mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2)
        expected = 0.75 * own[0].unflatten(1, (-1, 3))[:, :, 2] + 0.25 * around
        torch.testing.assert_close(mixed[0].unflatten(1, (-1, 3))[:, :, 2], expected)
        # The anchor of 256 is the second of stride 32 and, at half scale, the third of the second level (same cells).
        of_256 = second.unflatten(1, (-1, 3))[:, :, 2]
        expected = 0.75 * own[2].unflatten(1, (-1, 3))[:, :, 1] + 0.25 * of_256
        torch.testing.assert_close(mixed[2].unflatten(1, (-1, 3))[:, :, 1], expected)


@torch.inference_mode()
@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_another_number_of_anchors_starts_with_the_same_boxes(pyramid: ImagePyramidConfig) -> None:
    two, three = (model_of("sum", pyramid, num_anchor=anchors, cascade=False) for anchors in (2, 3))
    set_parameters(two, lambda name: "box_deltas" in name, lambda values: values * 0.1)
    assert initialise_from_detector(three, checkpoint_of(two)) == []
    variances = two.model_config.variances
    old, new = two(noise())[0], three(noise())[0]
    old_boxes = decode_boxes(old.box_deltas, old.priors, variances).unflatten(1, (-1, 2))
    new_boxes = decode_boxes(new.box_deltas, new.priors, variances).unflatten(1, (-1, 3))
    assert old.landmark_deltas is not None
    assert new.landmark_deltas is not None
    old_points = decode_landmarks(old.landmark_deltas, old.priors, variances).unflatten(1, (-1, 2))
    new_points = decode_landmarks(new.landmark_deltas, new.priors, variances).unflatten(1, (-1, 3))
    old_scores, new_scores = old.class_logits.unflatten(1, (-1, 2)), new.class_logits.unflatten(1, (-1, 3))
    for anchor, source in enumerate((0, 0, 1)):  # 8, 16 and 32 pixels; the first two start from 16
        torch.testing.assert_close(new_boxes[:, :, anchor], old_boxes[:, :, source])
        torch.testing.assert_close(new_points[:, :, anchor], old_points[:, :, source])
        if pyramid == ImagePyramidConfig():  # other scales average scores of different anchors
            torch.testing.assert_close(new_scores[:, :, anchor], old_scores[:, :, source])


def assert_starts_from(single: StageOutput, model: RetinaFace) -> None:
    """Assert that the scores, boxes and landmarks of the last stage equal those of `single`."""
    variances = model.model_config.variances
    last = model(noise())[-1]
    torch.testing.assert_close(last.class_logits, single.class_logits)
    boxes = decode_boxes(single.box_deltas, single.priors, variances)
    torch.testing.assert_close(decode_boxes(last.box_deltas, last.priors, variances), boxes, atol=1e-6, rtol=1e-5)
    assert last.landmark_deltas is not None
    assert single.landmark_deltas is not None
    points = decode_landmarks(single.landmark_deltas, single.priors, variances)
    found = decode_landmarks(last.landmark_deltas, last.priors, variances)
    torch.testing.assert_close(found, points, atol=1e-6, rtol=1e-5)


def test_mean_is_subtracted_by_the_model() -> None:
    config = usual_config("mobilenet0.25")
    model = RetinaFace(config).eval()
    centred = RetinaFace(dataclasses.replace(config, pixel_mean=(0.0, 0.0, 0.0))).eval()
    centred.load_state_dict(model.state_dict())
    images = torch.rand(1, 3, 32, 32) * 255
    with torch.inference_mode():
        mean = torch.tensor(config.pixel_mean).view(1, 3, 1, 1)
        torch.testing.assert_close(model(images)[0].class_logits, centred(images - mean)[0].class_logits)


def test_focal_initialisation_predicts_few_faces() -> None:
    torch.manual_seed(0)
    model = RetinaFace(usual_config("mobilenet0.25"))
    for name, parameter in model.named_parameters():
        if name.endswith("class_logits.weight"):
            torch.nn.init.zeros_(parameter)
    initialise_for_focal_loss(model, probability=0.02)
    with torch.inference_mode():
        output = model.eval()(torch.zeros(1, 3, 32, 32))[-1]
    scores = output.class_logits.softmax(dim=-1)[..., 1]
    assert scores.min() == pytest.approx(0.02)
    assert scores.max() == pytest.approx(0.02)


@pytest.mark.parametrize(("fpn", "depends"), [("merged", True), ("lateral", False)])
def test_finest_level_depends_on_merged_features_of_coarser_ones(fpn: str, depends: bool) -> None:
    torch.manual_seed(0)
    model = RetinaFace(usual_config("mobilenet0.25", fpn_channels=16, fpn=fpn)).eval()
    assert isinstance(model.fpn, MergedFPN)
    images = torch.rand(1, 3, 64, 64) * 255
    with torch.inference_mode():
        before = model.features(images)
        for parameter in model.fpn.merge[1].parameters():
            parameter.mul_(2)
        after = model.features(images)
    assert not torch.equal(before[1], after[1])
    assert torch.equal(before[2], after[2])
    assert torch.equal(before[0], after[0]) != depends
