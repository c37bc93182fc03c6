"""The multi-stage multibox loss, as named terms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, sigmoid_focal_loss

from config import LossConfig, ModelConfig, StageConfig
from layers.matcher import BACKGROUND, match_priors
from layers.prior_box import prior_boxes
from utils.boxes import bounded_deltas, decode_boxes, encode_boxes, encode_landmarks, paired_iou
from utils.runtime.distributed import share_of_count
from utils.structures import BatchTargets, StageOutput

# Of the wing loss, in landmark deltas: a delta of 1 is a tenth of the prior's side (the first variance), and errors up
# to there are magnified. The bend keeps the paper's proportion of 10 to 2 pixels.
WING_WIDTH = 1.0
WING_BEND = 0.2


class MultiBoxLoss:
    """Classification, boxes, landmarks and, for `tina`, the IoU of the decoded box.

    By default the terms follow RetinaFace (arXiv:1905.00641, eq. 1) in the form of biubug6/Pytorch_Retinaface; the
    IoU term is TinaFace's (arXiv:2011.13183, section 3.3), as are focal classification and DIoU boxes where they are
    chosen. They are means over the priors that have a face, in all processes together; computed in float32, and finite
    for images without faces or landmarks.
    """

    def __init__(self, loss: LossConfig, model: ModelConfig) -> None:
        self.loss = loss
        self.model = model

    def __call__(
        self,
        outputs: Sequence[StageOutput],
        targets: BatchTargets,
        image_size_hw: tuple[int, int],
        teacher_scores: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Weighted terms, `stage1/class` and so on; their sum is what to minimise.

        On CUDA the device is waited for once for all stages that match the fixed priors alike, and once for each
        other stage: to gather the few priors that have a face. torchvision's IoU losses wait as well.

        Args:
            outputs: one a stage, B images each.
            targets: of B images, on the device of the outputs.
            image_size_hw: height and width of the network's input in pixels.
            teacher_scores: (B, P) in [0, 1], what a teacher says of every prior.
        """
        device = outputs[0].class_logits.device
        fixed = prior_boxes(image_size_hw, self.model.anchor_sizes, self.model.strides, device)
        match_fixed = cache(lambda *thresholds: Matched.of(targets, fixed, *thresholds))
        terms = {}
        for number, (stage, output) in enumerate(zip(self.model.stages, outputs, strict=True), start=1):
            thresholds = (stage.match_iou, stage.background_iou)
            priors = output.priors
            matched = match_fixed(*thresholds) if priors is None else Matched.of(targets, priors, *thresholds)
            found = _in_float32(output)
            values = self._stage_terms(found, matched, image_size_hw)
            if teacher_scores is not None:
                values["distil"] = distillation_loss(found.class_logits, teacher_scores) / matched.count
            for name, value in values.items():
                terms[f"stage{number}/{name}"] = self._weight(stage, name) * value
        return terms

    def _weight(self, stage: StageConfig, name: str) -> float:
        weight: float = getattr(self.loss, f"{name}_weight")
        return stage.loss_weight * weight

    def _stage_terms(self, output: StageOutput, matched: Matched, image_size_hw: tuple[int, int]) -> dict[str, Tensor]:
        """Unweighted terms."""
        box_deltas = matched.of_positives(output.box_deltas)
        terms = {
            "class": self._class_loss(output.class_logits, matched),
            "box": self._box_losses(box_deltas, matched, image_size_hw).sum() / matched.count,
        }
        if output.landmark_deltas is not None:
            losses = self._landmark_losses(matched.of_positives(output.landmark_deltas), matched)
            known = matched.has_landmarks
            terms["landmark"] = torch.where(known, losses, 0.0).sum() / share_of_count(known.sum())
        if output.iou_logits is not None:
            decoded = _decode_bounded(box_deltas.detach(), matched.priors, self.model.variances)
            iou_targets = paired_iou(decoded, matched.boxes)
            iou_logits = matched.of_positives(output.iou_logits)
            losses = F.binary_cross_entropy_with_logits(iou_logits, iou_targets, reduction="none")
            terms["iou"] = losses.sum() / matched.count
        return terms

    def _class_loss(self, class_logits: Tensor, matched: Matched) -> Tensor:
        if self.loss.classification == "focal":
            return focal_loss(class_logits, matched.positive, matched.background) / matched.count
        mined = mined_cross_entropy(class_logits, matched.positive, matched.background, self.loss.negative_ratio)
        return mined / matched.count

    def _box_losses(self, box_deltas: Tensor, matched: Matched, image_size_hw: tuple[int, int]) -> Tensor:
        """(M, 4) deltas of the positives to (M,)."""
        if self.loss.box_regression == "smooth_l1":
            box_targets = encode_boxes(matched.boxes, matched.priors, self.model.variances)
            return F.smooth_l1_loss(box_deltas, box_targets, reduction="none").sum(dim=1)
        decoded = _decode_bounded(box_deltas, matched.priors, self.model.variances)
        iou_loss = {"diou": distance_box_iou_loss, "ciou": complete_box_iou_loss}[self.loss.box_regression]
        # Distances and proportions in an image that is not square are others when normalised to it.
        found, faces = _in_pixels(decoded, image_size_hw), _in_pixels(matched.boxes, image_size_hw)
        losses: Tensor = iou_loss(found, faces, reduction="none")
        return losses

    def _landmark_losses(self, landmark_deltas: Tensor, matched: Matched) -> Tensor:
        """(M, 10) deltas of the positives to (M,)."""
        landmark_targets = encode_landmarks(matched.landmarks, matched.priors, self.model.variances)
        if self.loss.landmark_regression == "wing":
            return wing_loss(landmark_deltas - landmark_targets).sum(dim=1)
        return F.smooth_l1_loss(landmark_deltas, landmark_targets, reduction="none").sum(dim=1)


@dataclasses.dataclass(frozen=True)
class Matched:
    """Which priors have a face, and those M of all B images that do.

    Attributes:
        positive: (B, P) bool, priors that have a face.
        background: (B, P) bool, priors that have none; what is neither is ignored.
        count: of the positives, at least 1; of several processes, the share of each.
        images, indices: (M,) int64, where the positives lie in (B, P).
        priors: (M, 4) cxcywh, the positives themselves.
        boxes, landmarks, has_landmarks: (M, ...), of the face of each positive; see `BatchTargets`.
    """

    positive: Tensor
    background: Tensor
    count: Tensor
    images: Tensor
    indices: Tensor
    priors: Tensor
    boxes: Tensor
    landmarks: Tensor
    has_landmarks: Tensor

    @classmethod
    def of(cls, targets: BatchTargets, priors: Tensor, match_iou: float, background_iou: float) -> Matched:
        """Match the faces with (P, 4) or (B, P, 4) priors, as `match_priors` does."""
        matches = match_priors(targets, priors, match_iou, background_iou)
        positive = matches >= 0
        images, indices = positive.nonzero(as_tuple=True)
        faces = matches[images, indices]
        return cls(
            positive=positive,
            background=matches == BACKGROUND,
            count=share_of_count(positive.sum()),
            images=images,
            indices=indices,
            priors=priors[indices] if priors.dim() == 2 else priors[images, indices],
            boxes=targets.boxes[faces],
            landmarks=targets.landmarks[faces],
            has_landmarks=targets.has_landmarks[faces],
        )

    def of_positives(self, prediction: Tensor) -> Tensor:
        """(B, P, ...) to the (M, ...) of the positives."""
        return prediction[self.images, self.indices]


def mined_cross_entropy(class_logits: Tensor, positive: Tensor, background: Tensor, negative_ratio: int) -> Tensor:
    """Cross-entropy over the positives and the hardest negatives of each image (SSD, arXiv:1512.02325, section 2.2).

    An image without positives contributes its `negative_ratio` hardest negatives.

    Args:
        class_logits: (B, P, 2).
        positive: (B, P) bool, priors that have a face.
        background: (B, P) bool, priors that have none; what is neither is left out.

    Returns:
        The sum.
    """
    losses = F.cross_entropy(class_logits.flatten(0, 1), positive.flatten().long(), reduction="none").view_as(positive)
    # Losses are not negative, so what is no background comes last.
    hardest_first = losses.masked_fill(~background, -1).sort(dim=1, descending=True).values
    wanted = negative_ratio * positive.sum(dim=1, keepdim=True).clamp(min=1)
    mined = torch.minimum(wanted, background.sum(dim=1, keepdim=True))
    ranks = torch.arange(losses.shape[1], device=losses.device)
    negative_sum = torch.where(ranks < mined, hardest_first, 0.0).sum()
    return torch.where(positive, losses, 0.0).sum() + negative_sum


def focal_loss(class_logits: Tensor, positive: Tensor, background: Tensor) -> Tensor:
    """Focal loss of all priors (arXiv:1708.02002, eq. 5), with its gamma 2 and alpha 0.25.

    The softmax of two logits is the sigmoid of their difference, so that is what the sigmoid form is given.

    Args:
        class_logits: (B, P, 2).
        positive: (B, P) bool, priors that have a face.
        background: (B, P) bool, priors that have none; what is neither is left out.

    Returns:
        The sum.
    """
    face_logits = class_logits[..., 1] - class_logits[..., 0]
    losses = sigmoid_focal_loss(face_logits, positive.to(face_logits.dtype), alpha=0.25, gamma=2.0)
    return torch.where(positive | background, losses, 0.0).sum()


def distillation_loss(class_logits: Tensor, teacher_scores: Tensor) -> Tensor:
    """How far the face scores are from a teacher's, as the divergence of two Bernoullis (arXiv:1503.02531).

    Args:
        class_logits: (B, P, 2).
        teacher_scores: (B, P) in [0, 1].

    Returns:
        The sum over all priors; 0 where the scores are equal.
    """
    face_logits = class_logits[..., 1] - class_logits[..., 0]
    cross_entropy = F.binary_cross_entropy_with_logits(face_logits, teacher_scores, reduction="sum")
    return cross_entropy - F.binary_cross_entropy(teacher_scores, teacher_scores, reduction="sum")


def wing_loss(errors: Tensor) -> Tensor:
    """Wing loss (arXiv:1711.06753, eq. 5) of each error, with `WING_WIDTH` w and `WING_BEND` e.

    w ln(1 + |x| / e) below w, which magnifies small errors, and |x| - C from there, where C joins the two.
    """
    sizes = errors.abs()
    offset = WING_WIDTH - WING_WIDTH * math.log1p(WING_WIDTH / WING_BEND)
    return torch.where(sizes < WING_WIDTH, WING_WIDTH * torch.log1p(sizes / WING_BEND), sizes - offset)


def _decode_bounded(deltas: Tensor, priors: Tensor, variances: tuple[float, float]) -> Tensor:
    return decode_boxes(bounded_deltas(deltas, variances), priors, variances)


def _in_pixels(boxes: Tensor, image_size_hw: tuple[int, int]) -> Tensor:
    """Normalised (M, 4) xyxy in pixels; made of numbers, for a tensor from the host would wait for the device."""
    height, width = image_size_hw
    return torch.stack([side * size for side, size in zip(boxes.unbind(1), (width, height) * 2, strict=True)], dim=1)


def _in_float32(output: StageOutput) -> StageOutput:
    """16-bit predictions of mixed precision are too coarse for logarithms and sums over all priors."""
    tensors: dict[str, Any] = {name: None if value is None else value.float() for name, value in vars(output).items()}
    return StageOutput(**tensors)
