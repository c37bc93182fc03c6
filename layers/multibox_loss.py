"""The multi-stage multibox loss, as named terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, sigmoid_focal_loss

from config import LossConfig, ModelConfig, StageConfig
from layers.matcher import BACKGROUND, match_priors
from utils.boxes import clamp_deltas, decode_boxes, encode_boxes, encode_landmarks, paired_iou
from utils.runtime.distributed import share_of_count
from utils.structures import FaceTargets, StageOutput, TeacherOutput

# Width w and bend e of the Wing loss, in landmark deltas. A delta of 1 is a tenth of the prior's side (the first
# variance). The bend keeps the paper's proportion of 10 to 2 pixels.
WING_WIDTH = 1.0
WING_BEND = 0.2

# Weights of a teacher's boxes and landmarks relative to its scores.
TEACHER_BOX_WEIGHT = 0.5
TEACHER_LANDMARK_WEIGHT = 0.1


class MultiBoxLoss:
    """Losses of classes, boxes, landmarks and, for `tina`, of the IoU of the decoded boxes.

    By default the terms follow RetinaFace (arXiv:1905.00641, eq. 1) in the form of biubug6/Pytorch_Retinaface. The IoU
    term is TinaFace's (arXiv:2011.13183, section 3.3), as are the focal and the DIoU loss. Over all
    processes, the class, box and IoU terms are divided by the number of positive priors, landmarks by that of positive
    priors with landmarks, and distillation by the sum of the teacher's scores. All are computed in float32, and are
    finite for images without faces.
    """

    def __init__(self, loss_config: LossConfig, model_config: ModelConfig) -> None:
        self.loss_config = loss_config
        self.model_config = model_config

    def __call__(
        self,
        outputs: Sequence[StageOutput],
        targets: FaceTargets,
        image_size_hw: tuple[int, int],
        teacher: TeacherOutput | None = None,
    ) -> dict[str, Tensor]:
        """Compute the weighted terms, `stage1/class` and so on. Their sum is the loss to minimise.

        On CUDA, gathering the positive priors takes one host-device synchronisation for all stages with the same
        priors and thresholds and one for each other stage. torchvision's IoU losses synchronise as well.

        Args:
            outputs: the raw outputs of each stage for B images.
            targets: faces of the B images, on the device of the outputs.
            image_size_hw: height and width of the model's input in pixels.
            teacher: predictions of a teacher for the priors of the first stage.
        """
        terms = {}
        matched, matched_by = None, None
        for number, (stage, output) in enumerate(zip(self.model_config.stages, outputs, strict=True), start=1):
            matching = (id(output.priors), replace(stage, loss_weight=1.0))
            if matched is None or matching != matched_by:
                matched, matched_by = match_batch(targets, output.priors, stage), matching
            output_32 = output.float()
            values = self._stage_terms(output_32, matched, image_size_hw)
            if teacher is not None:
                values["distil"] = self._distillation_loss(output_32, teacher)
            for name, value in values.items():
                terms[f"stage{number}/{name}"] = stage.loss_weight * getattr(self.loss_config, f"{name}_weight") * value
        return terms

    def _stage_terms(self, output: StageOutput, matched: Matched, image_size_hw: tuple[int, int]) -> dict[str, Tensor]:
        """Unweighted terms of one stage."""
        variances = self.model_config.variances
        box_deltas = matched.of_positives(output.box_deltas)
        terms = {
            "class": self._class_loss(output.class_logits, matched),
            "box": self._box_losses(box_deltas, matched, image_size_hw).sum() / matched.count,
        }
        if output.landmark_deltas is not None:
            losses = self._landmark_losses(matched.of_positives(output.landmark_deltas), matched)
            count = share_of_count(matched.has_landmarks.sum())
            terms["landmark"] = torch.where(matched.has_landmarks, losses, 0.0).sum() / count
        if output.iou_logits is not None:
            decoded = decode_boxes(clamp_deltas(box_deltas.detach(), variances), matched.priors, variances)
            iou_targets = paired_iou(decoded, matched.boxes)
            iou_logits = matched.of_positives(output.iou_logits)
            losses = F.binary_cross_entropy_with_logits(iou_logits, iou_targets, reduction="none")
            terms["iou"] = losses.sum() / matched.count
        return terms

    def _distillation_loss(self, output: StageOutput, teacher: TeacherOutput) -> Tensor:
        """The loss towards a teacher's scores, and towards its boxes and landmarks in proportion to these scores.

        It is divided by the sum of the scores, the number of positive priors that the teacher expects.
        """
        variances = self.model_config.variances
        loss = distillation_loss(output.class_logits, teacher.scores)
        box_targets = encode_boxes(teacher.boxes, output.priors, variances)
        box_losses = F.smooth_l1_loss(output.box_deltas, box_targets, reduction="none").sum(dim=2)
        loss = loss + TEACHER_BOX_WEIGHT * (teacher.scores * box_losses).sum()
        if output.landmark_deltas is not None and teacher.landmarks is not None:
            targets = encode_landmarks(teacher.landmarks, output.priors, variances)
            landmark_losses = F.smooth_l1_loss(output.landmark_deltas, targets, reduction="none").sum(dim=2)
            loss = loss + TEACHER_LANDMARK_WEIGHT * (teacher.scores * landmark_losses).sum()
        return loss / share_of_count(teacher.scores.sum())

    def _class_loss(self, class_logits: Tensor, matched: Matched) -> Tensor:
        if self.loss_config.classification == "focal":
            return focal_loss(class_logits, matched.positive, matched.background) / matched.count
        ratio = self.loss_config.negative_ratio
        return ohem_cross_entropy(class_logits, matched.positive, matched.background, ratio) / matched.count

    def _box_losses(self, box_deltas: Tensor, matched: Matched, image_size_hw: tuple[int, int]) -> Tensor:
        """(M,) losses of the (M, 4) deltas of the positive priors."""
        variances = self.model_config.variances
        if self.loss_config.box_regression == "smooth_l1":
            box_targets = encode_boxes(matched.boxes, matched.priors, variances)
            return F.smooth_l1_loss(box_deltas, box_targets, reduction="none").sum(dim=1)
        decoded = decode_boxes(clamp_deltas(box_deltas, variances), matched.priors, variances)
        iou_loss = {"diou": distance_box_iou_loss, "ciou": complete_box_iou_loss}[self.loss_config.box_regression]
        # In pixels, because normalising to an image that is not square changes distances and proportions.
        losses: Tensor = iou_loss(
            _to_pixels(decoded, image_size_hw), _to_pixels(matched.boxes, image_size_hw), reduction="none"
        )
        return losses

    def _landmark_losses(self, landmark_deltas: Tensor, matched: Matched) -> Tensor:
        """(M,) losses of the (M, 10) deltas of the positive priors."""
        landmark_targets = encode_landmarks(matched.landmarks, matched.priors, self.model_config.variances)
        if self.loss_config.landmark_regression == "wing":
            return wing_loss(landmark_deltas - landmark_targets).sum(dim=1)
        return F.smooth_l1_loss(landmark_deltas, landmark_targets, reduction="none").sum(dim=1)


@dataclass(frozen=True)
class Matched:
    """The matched priors of B images, M of which are positive.

    Attributes:
        positive: (B, P) bool, priors matched with a face.
        background: (B, P) bool, negative priors; those that are neither are ignored.
        count: number of positive priors, at least 1; with several processes, this process's share of the total.
        images, indices: (M,) int64, positions of the positive priors in (B, P).
        priors: (M, 4) cxcywh, the positive priors.
        boxes, landmarks, has_landmarks: (M, ...), of the face of each positive prior; see `FaceTargets`.
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

    def of_positives(self, prediction: Tensor) -> Tensor:
        """Gather the (M, ...) predictions of the positive priors from (B, P, ...)."""
        return prediction[self.images, self.indices]


def match_batch(targets: FaceTargets, priors: Tensor, stage: StageConfig) -> Matched:
    """Match the faces with (P, 4) or (B, P, 4) priors by the thresholds of a stage; see `match_priors`."""
    matches = match_priors(targets, priors, stage)
    positive = matches >= 0
    images, indices = positive.nonzero(as_tuple=True)
    faces = matches[images, indices]
    return Matched(
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


def ohem_cross_entropy(class_logits: Tensor, positive: Tensor, background: Tensor, negative_ratio: int) -> Tensor:
    """Cross-entropy with hard negative mining in each image (SSD, arXiv:1512.02325, section 2.2).

    An image without positive priors contributes its `negative_ratio` hardest negatives.

    Args:
        class_logits: (B, P, 2).
        positive: (B, P) bool, priors matched with a face.
        background: (B, P) bool, negative priors; those that are neither are ignored.

    Returns:
        The sum over the positive priors and the mined negatives.
    """
    losses = F.cross_entropy(class_logits.flatten(0, 1), positive.flatten().long(), reduction="none").view_as(positive)
    # Losses are not negative, so priors that are not background come last.
    hardest_first = losses.masked_fill(~background, -1).sort(dim=1, descending=True).values
    wanted = negative_ratio * positive.sum(dim=1, keepdim=True).clamp(min=1)
    mined = torch.minimum(wanted, background.sum(dim=1, keepdim=True))
    ranks = torch.arange(losses.shape[1], device=losses.device)
    negative_sum = torch.where(ranks < mined, hardest_first, 0.0).sum()
    return torch.where(positive, losses, 0.0).sum() + negative_sum


def focal_loss(class_logits: Tensor, positive: Tensor, background: Tensor) -> Tensor:
    """Focal loss (arXiv:1708.02002, eq. 5) with gamma 2 and alpha 0.25.

    The softmax of two logits is the sigmoid of their difference, on which the loss is computed.

    Args:
        class_logits: (B, P, 2).
        positive: (B, P) bool, priors matched with a face.
        background: (B, P) bool, negative priors; those that are neither are ignored.

    Returns:
        The sum over all priors that are not ignored.
    """
    face_logits = class_logits[..., 1] - class_logits[..., 0]
    losses = sigmoid_focal_loss(face_logits, positive.to(face_logits.dtype), alpha=0.25, gamma=2.0)
    return torch.where(positive | background, losses, 0.0).sum()


def distillation_loss(class_logits: Tensor, teacher_scores: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the face scores from those of a teacher (arXiv:1503.02531).

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
    """Wing loss (arXiv:1711.06753, eq. 5) of each error.

    It is w ln(1 + |x| / e) for |x| < w, which magnifies small errors, and |x| - C beyond, where C joins the two. w is
    `WING_WIDTH` and e is `WING_BEND`.
    """
    sizes = errors.abs()
    offset = WING_WIDTH - WING_WIDTH * math.log1p(WING_WIDTH / WING_BEND)
    return torch.where(sizes < WING_WIDTH, WING_WIDTH * torch.log1p(sizes / WING_BEND), sizes - offset)


def _to_pixels(boxes: Tensor, image_size_hw: tuple[int, int]) -> Tensor:
    """Scale normalised (M, 4) xyxy boxes to pixels, by Python numbers to avoid the copy of a tensor to the device."""
    height, width = image_size_hw
    return torch.stack([side * size for side, size in zip(boxes.unbind(1), (width, height) * 2, strict=True)], dim=1)
