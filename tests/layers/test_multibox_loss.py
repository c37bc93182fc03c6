from __future__ import annotations

import math

import pytest
import torch

from config import LossConfig, ModelConfig
from layers.matcher import BACKGROUND, match_priors
from layers.multibox_loss import MultiBoxLoss, mined_cross_entropy
from layers.prior_box import prior_boxes
from utils.boxes import encode_boxes, encode_landmarks
from utils.structures import FaceTargets, StageOutput

SIZE = (32, 64)
MODEL = ModelConfig.for_backbone("mobilenet0.25", num_anchor=2)
PRIORS = prior_boxes(SIZE, MODEL.anchor_sizes, MODEL.strides)


def no_faces() -> FaceTargets:
    return FaceTargets(torch.zeros(0, 4), torch.zeros(0, 5, 2), torch.zeros(0, dtype=torch.bool))


def one_face(has_landmarks: bool = True) -> FaceTargets:
    """16 pixels wide and high."""
    box = torch.tensor([[0.25, 0.25, 0.5, 0.75]])
    return FaceTargets(box, torch.full((1, 5, 2), 0.4), torch.tensor([has_landmarks]))


def zero_output(images: int) -> StageOutput:
    count = len(PRIORS)
    shapes = ((images, count, 2), (images, count, 4), (images, count, 10), (images, count))
    return StageOutput(*(torch.zeros(shape, requires_grad=True) for shape in shapes))


def values(outputs: list[StageOutput], targets: list[FaceTargets], loss: LossConfig | None = None) -> dict[str, float]:
    """The terms as plain numbers."""
    terms = MultiBoxLoss(loss or LossConfig(), MODEL)(outputs, targets, SIZE)
    return {name: term.item() for name, term in terms.items()}


def test_terms_are_named_by_stage() -> None:
    terms = values([zero_output(1)] * 2, [one_face()])
    assert list(terms) == [f"stage{stage}/{name}" for stage in (1, 2) for name in ("class", "box", "landmark", "iou")]


def test_perfect_regression_costs_nothing() -> None:
    face = one_face()
    boxes = face.boxes.expand(len(PRIORS), 4)
    output = StageOutput(
        class_logits=torch.zeros(1, len(PRIORS), 2),
        box_deltas=encode_boxes(boxes, PRIORS, MODEL.variances)[None],
        landmark_deltas=encode_landmarks(face.landmarks.expand(len(PRIORS), 5, 2), PRIORS, MODEL.variances)[None],
        iou_logits=torch.full((1, len(PRIORS)), 20.0),
    )
    terms = values([output, output], [face])
    for name in ("box", "landmark", "iou"):
        assert terms[f"stage1/{name}"] == pytest.approx(0, abs=1e-5)


def test_weights_multiply_their_terms() -> None:
    single = values([zero_output(1)] * 2, [one_face()], LossConfig(box_weight=1.0))
    triple = values([zero_output(1)] * 2, [one_face()], LossConfig(box_weight=3.0))
    assert triple["stage2/box"] == pytest.approx(3 * single["stage2/box"])
    assert triple["stage2/class"] == pytest.approx(single["stage2/class"])


def test_untrained_classification_costs_the_logarithm_of_two_per_mined_prior() -> None:
    """Two positives bring fourteen negatives: 16 priors at log 2, divided by 2 positives."""
    positive = torch.zeros(1, 40, dtype=torch.bool)
    positive[0, :2] = True
    loss = mined_cross_entropy(torch.zeros(1, 40, 2), positive, negative_ratio=7)
    assert float(loss) == pytest.approx(16 * math.log(2) / 2)


def test_the_hardest_negatives_are_mined() -> None:
    """Prior 0 is the face; of the rest, 1 and 2 look most like one."""
    logits = torch.zeros(1, 6, 2)
    logits[0, :, 1] = torch.tensor([9.0, 5.0, 4.0, -9.0, -9.0, -9.0])
    logits.requires_grad_()
    positive = torch.tensor([[True, False, False, False, False, False]])
    mined_cross_entropy(logits, positive, negative_ratio=2).backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum(dim=2).gt(0).tolist() == [[True, True, True, False, False, False]]


@pytest.mark.parametrize(
    "targets",
    [[no_faces(), no_faces()], [one_face(), no_faces()], [one_face(has_landmarks=False), one_face()]],
    ids=["no faces", "one image without", "no landmarks"],
)
def test_losses_and_gradients_are_finite(targets: list[FaceTargets], device: torch.device) -> None:
    outputs = []
    for _ in range(2):
        cpu = zero_output(2)
        outputs.append(StageOutput(*(t.detach().to(device).requires_grad_() for t in vars(cpu).values())))
    terms = MultiBoxLoss(LossConfig(), MODEL)(outputs, [faces.to(device) for faces in targets], SIZE)
    torch.stack(list(terms.values())).sum().backward()
    assert all(torch.isfinite(term) for term in terms.values())
    for output in outputs:
        for tensor in vars(output).values():
            assert tensor.grad is not None
            assert torch.isfinite(tensor.grad).all()


def test_faces_without_landmarks_teach_no_landmarks() -> None:
    terms = values([zero_output(1)] * 2, [one_face(has_landmarks=False)])
    assert terms["stage1/landmark"] == 0
    assert terms["stage1/box"] > 0


def test_iou_branch_does_not_teach_the_boxes() -> None:
    output = zero_output(1)
    terms = MultiBoxLoss(LossConfig(), MODEL)([output, output], [one_face()], SIZE)
    terms["stage1/iou"].backward()
    assert output.iou_logits is not None
    assert output.iou_logits.grad is not None
    assert output.box_deltas.grad is None


def test_faces_of_several_images_are_not_mixed_up() -> None:
    """The same faces in one batch or in two cost the same, weighted by their positives."""
    left = FaceTargets(torch.tensor([[0.0, 0.0, 0.25, 0.5]]), torch.zeros(1, 5, 2), torch.tensor([False]))
    targets = [no_faces(), left, one_face(has_landmarks=False)]
    together = values([zero_output(3)] * 2, targets)
    alone = [values([zero_output(1)] * 2, [faces]) for faces in targets[1:]]
    counts = [int((match_priors(faces.boxes, PRIORS, 0.35) != BACKGROUND).sum()) for faces in targets[1:]]
    expected = sum(n * terms["stage1/box"] for n, terms in zip(counts, alone, strict=True)) / sum(counts)
    assert together["stage1/box"] == pytest.approx(expected, rel=1e-5)
