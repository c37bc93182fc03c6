"""Tests of the multibox loss: its terms by hand, mining, distillation, gradients and host-device synchronisation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_convert

from config import LossConfig, ModelConfig, StageConfig
from layers.matcher import IGNORED, match_priors
from layers.multibox_loss import (
    TEACHER_BOX_WEIGHT,
    TEACHER_LANDMARK_WEIGHT,
    MultiBoxLoss,
    distillation_loss,
    focal_loss,
    ohem_cross_entropy,
    wing_loss,
)
from layers.prior_box import _cached_prior_boxes, prior_boxes
from models.architecture import usual_config
from utils.boxes import encode_boxes, encode_landmarks
from utils.structures import FaceTargets, StageOutput, TeacherOutput

SIZE = (32, 64)
MODEL = usual_config("mobilenet0.25", num_anchor=2)
PRIORS = prior_boxes(SIZE, MODEL.levels)


def no_faces() -> FaceTargets:
    return FaceTargets(
        torch.zeros(0, 4),
        torch.zeros(0, 5, 2),
        torch.zeros(0, dtype=torch.bool),
        torch.zeros(0, dtype=torch.bool),
        (0,),
    )


def one_face(has_landmarks: bool = True) -> FaceTargets:
    """A face of 16 x 16 pixels."""
    box = torch.tensor([[0.25, 0.25, 0.5, 0.75]])
    return FaceTargets(box, torch.full((1, 5, 2), 0.4), torch.tensor([has_landmarks]), torch.tensor([False]), (1,))


def zero_output(images: int) -> StageOutput:
    count = len(PRIORS)
    shapes = ((images, count, 2), (images, count, 4), (images, count, 10), (images, count))
    return output_of(torch.zeros(shape, requires_grad=True) for shape in shapes)


def output_of(tensors: Iterable[torch.Tensor], priors: torch.Tensor = PRIORS) -> StageOutput:
    class_logits, box_deltas, landmark_deltas, iou_logits = tensors
    return StageOutput(class_logits, box_deltas, landmark_deltas, iou_logits, priors)


def predictions(output: StageOutput) -> list[torch.Tensor]:
    """Return the predicted tensors in the order of `StageOutput`."""
    return [value for name, value in vars(output).items() if value is not None and name != "priors"]


def loss_values(
    outputs: list[StageOutput],
    targets: list[FaceTargets],
    loss: LossConfig | None = None,
    model: ModelConfig = MODEL,
) -> dict[str, float]:
    """Return the loss terms as numbers."""
    terms = MultiBoxLoss(loss or LossConfig(), model)(outputs, FaceTargets.join(targets), SIZE)
    return {name: term.item() for name, term in terms.items()}


def test_teacher_adds_a_term_to_every_stage() -> None:
    outputs = [zero_output(1)] * 2
    scores = torch.full((1, len(PRIORS)), 0.5)
    teacher = TeacherOutput(scores, box_convert(PRIORS, "cxcywh", "xyxy")[None], None)
    loss = MultiBoxLoss(LossConfig(distil_weight=3.0), MODEL)
    agreed = loss(outputs, FaceTargets.join([one_face()]), SIZE, teacher)
    assert {name for name, value in agreed.items() if name.endswith("distil") and value.abs() < 1e-4} == {
        "stage1/distil",
        "stage2/distil",
    }
    scores[0, 0] = 1.0  # where the model predicts one half
    differ = loss(outputs, FaceTargets.join([no_faces()]), SIZE, teacher)
    assert differ["stage1/distil"].item() == pytest.approx(3 * math.log(2) / scores.sum().item(), rel=1e-4)


def test_distilled_boxes_and_landmarks_are_weighted_by_the_teacher_score() -> None:
    """The loss of moving the teacher's box or landmark of a prior is weighted by its share of the scores."""
    priors_xyxy = box_convert(PRIORS, "cxcywh", "xyxy")[None]
    centres = PRIORS[None, :, None, :2].expand(1, len(PRIORS), 5, 2)
    logits = torch.zeros(1, len(PRIORS), 2)
    logits[0, :2, 1] = torch.tensor([9.0, -9.0])
    scores = logits.softmax(2)[..., 1]
    output = dataclasses.replace(zero_output(1), class_logits=logits)

    def distilled(boxes: Tensor, landmarks: Tensor) -> float:
        teacher = TeacherOutput(scores, boxes, landmarks)
        terms = MultiBoxLoss(LossConfig(), MODEL)([output] * 2, FaceTargets.join([no_faces()]), SIZE, teacher)
        return terms["stage1/distil"].item()

    assert distilled(priors_xyxy, centres) == pytest.approx(0, abs=1e-4)
    for prior in (0, 1):
        share = (scores[0, prior] / scores.sum()).item()
        boxes, landmarks = priors_xyxy.clone(), centres.clone()
        boxes[0, prior, [0, 2]] += 0.1 * PRIORS[prior, 2]
        assert distilled(boxes, centres) == pytest.approx(0.5 * TEACHER_BOX_WEIGHT * share, rel=1e-2, abs=1e-6)
        landmarks[0, prior, 0] += 0.1 * PRIORS[prior, 2:]
        expected = 2 * 0.5 * TEACHER_LANDMARK_WEIGHT * share
        assert distilled(priors_xyxy, landmarks) == pytest.approx(expected, rel=1e-2, abs=1e-6)


def test_distillation_loss_is_the_kl_divergence_of_the_scores() -> None:
    logits = torch.tensor([[[0.3, 1.0], [2.0, -1.0]]])
    scores = torch.tensor([[0.2, 0.9]])
    expected = torch.distributions.kl_divergence(
        torch.distributions.Bernoulli(probs=scores),
        torch.distributions.Bernoulli(logits=logits[..., 1] - logits[..., 0]),
    ).sum()
    torch.testing.assert_close(distillation_loss(logits, scores), expected)


def test_terms_are_named_by_stage() -> None:
    terms = loss_values([zero_output(1)] * 2, [one_face()])
    assert list(terms) == [f"stage{stage}/{name}" for stage in (1, 2) for name in ("class", "box", "landmark", "iou")]


def test_perfect_regression_has_zero_loss() -> None:
    face = one_face()
    boxes = face.boxes.expand(len(PRIORS), 4)
    output = StageOutput(
        class_logits=torch.zeros(1, len(PRIORS), 2),
        box_deltas=encode_boxes(boxes, PRIORS, MODEL.variances)[None],
        landmark_deltas=encode_landmarks(face.landmarks.expand(len(PRIORS), 5, 2), PRIORS, MODEL.variances)[None],
        iou_logits=torch.full((1, len(PRIORS)), 20.0),
        priors=PRIORS,
    )
    terms = loss_values([output, output], [face])
    for name in ("box", "landmark", "iou"):
        assert terms[f"stage1/{name}"] == pytest.approx(0, abs=1e-5)


def test_weights_multiply_their_terms() -> None:
    single = loss_values([zero_output(1)] * 2, [one_face()], LossConfig(box_weight=1.0))
    triple = loss_values([zero_output(1)] * 2, [one_face()], LossConfig(box_weight=3.0))
    assert triple["stage2/box"] == pytest.approx(3 * single["stage2/box"])
    assert triple["stage2/class"] == pytest.approx(single["stage2/class"])


def test_untrained_classification_loss_is_log_two_per_mined_prior() -> None:
    """Two positives and fourteen mined negatives: 16 priors at log 2."""
    positive = torch.zeros(1, 40, dtype=torch.bool)
    positive[0, :2] = True
    loss = ohem_cross_entropy(torch.zeros(1, 40, 2), positive, ~positive, negative_ratio=7)
    assert float(loss) == pytest.approx(16 * math.log(2))


def test_hardest_negatives_are_mined() -> None:
    """Prior 0 is positive; priors 1 and 2 are the negatives with the highest face scores."""
    logits = torch.zeros(1, 6, 2)
    logits[0, :, 1] = torch.tensor([9.0, 5.0, 4.0, -9.0, -9.0, -9.0])
    logits.requires_grad_()
    positive = torch.tensor([[True, False, False, False, False, False]])
    ohem_cross_entropy(logits, positive, ~positive, negative_ratio=2).backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum(dim=2).gt(0).tolist() == [[True, True, True, False, False, False]]


def test_no_more_negatives_are_mined_than_exist() -> None:
    """One of four priors is positive and one ignored, so only two of seven negatives can be mined."""
    positive = torch.tensor([[True, False, False, False]])
    background = torch.tensor([[False, True, True, False]])
    loss = ohem_cross_entropy(torch.zeros(1, 4, 2), positive, background, negative_ratio=7)
    assert float(loss) == pytest.approx(3 * math.log(2))


LOSSES = [
    LossConfig(),
    LossConfig(classification="focal", box_regression="diou", landmark_regression="wing"),
    LossConfig(box_regression="ciou"),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.classification}-{loss.box_regression}")
@pytest.mark.parametrize("refinement", ["sum", "rematch"])
@pytest.mark.parametrize(
    "targets",
    [
        [no_faces(), no_faces()],
        [one_face(), no_faces()],
        [one_face(has_landmarks=False), one_face()],
        [
            FaceTargets(
                torch.tensor([[0.3, 0.4, 0.3, 0.9]]),
                torch.zeros(1, 5, 2),
                torch.tensor([True]),
                torch.tensor([False]),
                (1,),
            ),
            no_faces(),
        ],
    ],
    ids=["no faces", "one image without faces", "no landmarks", "a face without width"],
)
def test_losses_and_gradients_are_finite(
    targets: list[FaceTargets], refinement: str, loss: LossConfig, device: torch.device
) -> None:
    model = usual_config("mobilenet0.25", num_anchor=2, refinement=refinement)
    outputs = []
    for priors in (PRIORS, PRIORS.repeat(2, 1, 1) if refinement == "rematch" else PRIORS):
        tensors = (tensor.detach().to(device).requires_grad_() for tensor in predictions(zero_output(2)))
        outputs.append(output_of(tensors, priors.to(device)))
    terms = MultiBoxLoss(loss, model)(outputs, FaceTargets.join(targets).to(device), SIZE)
    torch.stack(list(terms.values())).sum().backward()
    assert all(torch.isfinite(term) for term in terms.values())
    for output in outputs:
        for tensor in predictions(output):
            assert tensor.grad is not None
            assert torch.isfinite(tensor.grad).all()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.classification}-{loss.box_regression}")
def test_losses_of_a_diverged_model_are_finite(loss: LossConfig) -> None:
    """exp(0.2 * 1000) is more than float32 holds."""
    output = zero_output(1)
    deltas = torch.full_like(output.box_deltas, 1000.0, requires_grad=True)
    diverged = dataclasses.replace(output, box_deltas=deltas)
    terms = MultiBoxLoss(loss, MODEL)([diverged, diverged], FaceTargets.join([one_face()]), SIZE)
    torch.stack(list(terms.values())).sum().backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert deltas.grad is not None
    assert torch.isfinite(deltas.grad).all()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.classification}-{loss.box_regression}")
def test_losses_of_float16_predictions_equal_those_of_float32(loss: LossConfig) -> None:
    random = torch.Generator().manual_seed(0)
    halves = [torch.randn(tensor.shape, generator=random).half() for tensor in predictions(zero_output(2))]
    low, high = output_of(halves), output_of(tensor.float() for tensor in halves)
    targets = [one_face(), no_faces()]
    assert loss_values([low, low], targets, loss) == loss_values([high, high], targets, loss)


def test_priors_cached_in_inference_mode_can_be_used_in_training() -> None:
    """Priors are cached, and inference tensors cannot be saved for the backward pass."""
    _cached_prior_boxes.cache_clear()
    with torch.inference_mode():
        prior_boxes(SIZE, MODEL.levels, torch.device("cpu"))
    output = zero_output(1)
    loss = MultiBoxLoss(LossConfig(box_regression="diou"), MODEL)
    loss([output, output], FaceTargets.join([one_face()]), SIZE)["stage1/box"].backward()
    assert output.box_deltas.grad is not None
    assert output.box_deltas.grad.any()


class HostSynchronisations(TorchDispatchMode):
    """Records operators that synchronise with a CUDA device: reads of values, value-dependent shapes, and copies."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).split(".")[1]
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        synchronising = ("nonzero", "_local_scalar_dense", "masked_select", "lift_fresh", "repeat_interleave", "unique")
        if by_mask or name in synchronising:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", [LossConfig(), LossConfig(classification="focal", landmark_regression="wing")])
@pytest.mark.parametrize(("refinement", "expected"), [("sum", 1), ("rematch", 2)])
def test_loss_synchronises_once_per_matching(refinement: str, expected: int, loss: LossConfig) -> None:
    """The number of positives is read once for all stages that match the same priors with the same thresholds.

    torchvision's IoU losses synchronise as well, because they index by a mask.
    """
    model = usual_config("mobilenet0.25", num_anchor=2, refinement=refinement)
    first = zero_output(2)
    second = dataclasses.replace(first, priors=PRIORS.repeat(2, 1, 1) if refinement == "rematch" else PRIORS)
    targets = FaceTargets.join([one_face(), no_faces()])
    with HostSynchronisations() as synchronisations:
        MultiBoxLoss(loss, model)([first, second], targets, SIZE)
    assert synchronisations.names == ["nonzero"] * expected


def single_stage(face: FaceTargets, box: list[float], **options: Any) -> dict[str, float]:
    """Return the terms of one stage that predicts `box`, xyxy in pixels, for every prior, with weights of 1."""
    model = usual_config("mobilenet0.25", num_anchor=2, cascade=False)
    normalised = torch.tensor(box) / torch.tensor([SIZE[1], SIZE[0]] * 2)
    deltas = encode_boxes(normalised.expand(len(PRIORS), 4), PRIORS, MODEL.variances)[None]
    output = dataclasses.replace(zero_output(1), box_deltas=deltas)
    return loss_values([output], [face], LossConfig(box_weight=1.0, **options), model)


def test_iou_box_losses_by_hand() -> None:
    """The face lies at x 16 to 32 and y 8 to 24, in pixels of an image that is twice as wide as high.

    Moved right by half its width, the box shares 8 x 16 of a union of 24 x 16 pixels: IoU 1/3. The centres are 8 apart,
    the corners of the hull 24 and 16. The aspect ratios are equal, so CIoU adds nothing.
    """
    moved = [24.0, 8, 40, 24]
    distance = 1 - 1 / 3 + 8**2 / (24**2 + 16**2)
    assert single_stage(one_face(), moved, box_regression="diou")["stage1/box"] == pytest.approx(distance, rel=1e-4)
    assert single_stage(one_face(), moved, box_regression="ciou")["stage1/box"] == pytest.approx(distance, rel=1e-4)


def test_ciou_adds_the_aspect_ratio() -> None:
    """Twice as wide about the same centre: IoU 1/2, no distance, and the angles of the diagonals differ."""
    wide = [8.0, 8, 40, 24]
    difference = 4 / math.pi**2 * (math.atan(2) - math.atan(1)) ** 2
    complete = 1 - 1 / 2 + difference**2 / (1 - 1 / 2 + difference)
    assert single_stage(one_face(), wide, box_regression="diou")["stage1/box"] == pytest.approx(1 / 2, rel=1e-4)
    assert single_stage(one_face(), wide, box_regression="ciou")["stage1/box"] == pytest.approx(complete, rel=1e-4)


def test_focal_loss_by_hand() -> None:
    """A face at p = 0.8 costs 0.25 * 0.2^2 * -ln 0.8; a background at p = 0.1 costs 0.75 * 0.1^2 * -ln 0.9."""
    logits = torch.tensor([[[0.2, 0.8], [0.9, 0.1], [0.5, 0.5]]]).log()
    positive = torch.tensor([[True, False, False]])
    background = torch.tensor([[False, True, False]])  # the last is ignored
    expected = -0.25 * 0.04 * math.log(0.8) - 0.75 * 0.01 * math.log(0.9)
    assert float(focal_loss(logits, positive, background)) == pytest.approx(expected, rel=1e-5)
    both = focal_loss(logits.repeat(2, 1, 1), positive.repeat(2, 1), background.repeat(2, 1))
    assert float(both) == pytest.approx(2 * expected, rel=1e-5)


def test_wing_loss_by_hand() -> None:
    """ln(1 + 0.2 / 0.2) = ln 2; from 1 on the slope is 1, and at 1 both branches give ln 6."""
    losses = wing_loss(torch.tensor([0.0, 0.2, -0.2, 1.0, -3.0]))
    expected = [0, math.log(2), math.log(2), math.log(6), math.log(6) + 2]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_wing_loss_is_summed_over_coordinates_like_smooth_l1() -> None:
    """All five landmarks lie ten deltas to the right of the predicted ones, at the same height."""
    model = usual_config("mobilenet0.25", num_anchor=2, cascade=False)
    face = one_face()
    targets = encode_landmarks(face.landmarks.expand(len(PRIORS), 5, 2), PRIORS, MODEL.variances)
    deltas = targets - torch.tensor([10.0, 0.0]).repeat(5)
    output = dataclasses.replace(zero_output(1), landmark_deltas=deltas[None])
    loss = LossConfig(landmark_regression="wing", landmark_weight=1.0)
    wing = loss_values([output], [face], loss, model)["stage1/landmark"]
    assert wing == pytest.approx(5 * (math.log(6) + 9), rel=1e-4)
    smooth = loss_values([output], [face], LossConfig(landmark_weight=1.0), model)["stage1/landmark"]
    assert smooth == pytest.approx(5 * 9.5, rel=1e-4)


def test_ignored_priors_have_no_class_gradient() -> None:
    """With a negative threshold near zero, every prior that overlaps the face without matching it is ignored."""
    stage = StageConfig(match_iou=0.6, negative_iou=0.001)
    model = usual_config("mobilenet0.25", num_anchor=2, stages=(stage,))
    for classification in ("ohem_ce", "focal"):
        output = zero_output(1)
        loss = LossConfig(classification=classification, negative_ratio=len(PRIORS))
        targets = FaceTargets.join([one_face()])
        MultiBoxLoss(loss, model)([output], targets, SIZE)["stage1/class"].backward()
        assert output.class_logits.grad is not None
        has_gradient = output.class_logits.grad[0].abs().sum(dim=1) > 0
        assert torch.equal(has_gradient, match_priors(targets, PRIORS, stage)[0] != -2)
        assert not has_gradient.all()


@pytest.mark.parametrize("classification", ["ohem_ce", "focal"])
def test_priors_on_an_ignored_face_have_no_gradient_and_are_not_mined(classification: str) -> None:
    """The priors on it are by far the hardest negatives, but have no gradient; all others may be mined."""
    face = dataclasses.replace(one_face(), ignored=torch.tensor([True]))
    around = match_priors(face, PRIORS, StageConfig())[0] == IGNORED
    assert 0 < around.sum() < len(PRIORS)
    class_logits = torch.zeros(1, len(PRIORS), 2)
    class_logits[0, around, 1] = 10.0
    zeros = predictions(zero_output(1))[1:]
    output = output_of([class_logits.requires_grad_(), *zeros])
    model = dataclasses.replace(MODEL, stages=(StageConfig(),))
    loss = MultiBoxLoss(LossConfig(classification=classification, negative_ratio=10_000), model)
    terms = loss([output], face, SIZE)
    torch.stack(list(terms.values())).sum().backward()
    assert class_logits.grad is not None
    assert torch.equal(class_logits.grad[0].abs().sum(dim=1) == 0, around)
    for value in zeros:
        assert value.grad is None or not value.grad.any()


def test_stages_that_differ_in_any_threshold_are_matched_separately() -> None:
    """The face is unreachable without forced matches; priors around it are ignored or negative."""
    outputs = [zero_output(1)]
    kinds = (
        StageConfig(0.9),
        StageConfig(0.9, negative_iou=0.3),
        StageConfig(0.9, negative_iou=0.3, force_match=False),
        StageConfig(0.9, negative_iou=0.3, force_match=False, ignore_unreachable=False),
    )
    loss = LossConfig(negative_ratio=10_000)  # all negatives
    alone = [loss_values(outputs, [one_face()], loss, dataclasses.replace(MODEL, stages=(kind,))) for kind in kinds]
    assert len({terms["stage1/class"] for terms in alone}) == 4
    together = loss_values(outputs * 4, [one_face()], loss, dataclasses.replace(MODEL, stages=kinds))
    assert [together[f"stage{number}/class"] for number in range(1, 5)] == [terms["stage1/class"] for terms in alone]


def test_rematched_stage_is_matched_with_its_own_priors() -> None:
    """All priors of the second stage equal the face, so all are positive and zero deltas are correct."""
    model = usual_config("mobilenet0.25", num_anchor=2, refinement="rematch")
    face = torch.tensor([0.375, 0.5, 0.25, 0.5]).expand(1, len(PRIORS), 4)
    output = zero_output(1)
    terms = loss_values([output, dataclasses.replace(output, priors=face)], [one_face()], model=model)
    assert terms["stage1/box"] > 0.1
    assert terms["stage2/box"] == 0
    assert terms["stage2/class"] == pytest.approx(math.log(2))  # all positive, no negatives


def test_faces_without_landmarks_have_no_landmark_loss() -> None:
    terms = loss_values([zero_output(1)] * 2, [one_face(has_landmarks=False)])
    assert terms["stage1/landmark"] == 0
    assert terms["stage1/box"] > 0


def test_iou_loss_has_no_gradient_for_the_boxes() -> None:
    output = zero_output(1)
    terms = MultiBoxLoss(LossConfig(), MODEL)([output, output], FaceTargets.join([one_face()]), SIZE)
    terms["stage1/iou"].backward()
    assert output.iou_logits is not None
    assert output.iou_logits.grad is not None
    assert output.box_deltas.grad is None


def test_faces_of_several_images_are_not_mixed_up() -> None:
    """The loss of a batch is the mean of the losses of its images, weighted by their positives."""
    left = FaceTargets(
        torch.tensor([[0.0, 0.0, 0.25, 0.5]]), torch.zeros(1, 5, 2), torch.tensor([False]), torch.tensor([False]), (1,)
    )
    targets = [no_faces(), left, one_face(has_landmarks=False)]
    together = loss_values([zero_output(3)] * 2, targets)
    alone = [loss_values([zero_output(1)] * 2, [faces]) for faces in targets[1:]]
    counts = [int((match_priors(FaceTargets.join([faces]), PRIORS, StageConfig()) >= 0).sum()) for faces in targets[1:]]
    expected = sum(n * terms["stage1/box"] for n, terms in zip(counts, alone, strict=True)) / sum(counts)
    assert together["stage1/box"] == pytest.approx(expected, rel=1e-5)
