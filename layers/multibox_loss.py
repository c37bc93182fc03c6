"""The multi-stage multibox loss, as named terms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from config import LossConfig, ModelConfig
from layers.matcher import BACKGROUND, match_priors
from layers.prior_box import prior_boxes
from utils.boxes import decode_boxes, encode_boxes, encode_landmarks, paired_iou
from utils.structures import FaceTargets, StageOutput


class MultiBoxLoss:
    """Classification with hard-negative mining, boxes, landmarks and, for `tina`, the IoU of the decoded box.

    The terms follow RetinaFace (arXiv:1905.00641, eq. 1) in the form of biubug6/Pytorch_Retinaface; the IoU term is
    TinaFace's (arXiv:2011.13183, section 3.3). All are finite for images without faces or landmarks.
    """

    def __init__(self, loss: LossConfig, model: ModelConfig) -> None:
        self.loss = loss
        self.model = model

    def __call__(
        self, outputs: Sequence[StageOutput], targets: Sequence[FaceTargets], image_size_hw: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Weighted terms, `stage1/class` and so on; their sum is what to minimise.

        Args:
            outputs: one a stage, B images each.
            targets: B, on the device of the outputs.
            image_size_hw: height and width of the network's input in pixels.
        """
        device = outputs[0].class_logits.device
        priors = prior_boxes(image_size_hw, self.model.anchor_sizes, self.model.strides, device)
        terms = {}
        for number, (stage, output) in enumerate(zip(self.model.stages, outputs, strict=True), start=1):
            matches = torch.stack([match_priors(faces.boxes, priors, stage.match_iou) for faces in targets])
            for name, value in self._stage_terms(output, targets, matches, priors).items():
                weight = stage.loss_weight * getattr(self.loss, f"{name}_weight")
                terms[f"stage{number}/{name}"] = weight * value
        return terms

    def _stage_terms(
        self, output: StageOutput, targets: Sequence[FaceTargets], matches: Tensor, priors: Tensor
    ) -> dict[str, Tensor]:
        """Unweighted terms; `matches` is (B, P) as `match_priors` gives it for each image."""
        positive = matches != BACKGROUND
        images, prior_indices = positive.nonzero(as_tuple=True)
        faces = _gather_faces(targets, images, matches[positive])
        their_priors = priors[prior_indices]
        variances = self.model.variances

        box_deltas = output.box_deltas[positive]
        box_targets = encode_boxes(faces.boxes, their_priors, variances)
        terms = {
            "class": mined_cross_entropy(output.class_logits, positive, self.loss.negative_ratio),
            "box": _mean_over_faces(F.smooth_l1_loss(box_deltas, box_targets, reduction="none")),
        }
        if output.landmark_deltas is not None:
            known = faces.has_landmarks
            landmark_deltas = output.landmark_deltas[positive][known]
            landmark_targets = encode_landmarks(faces.landmarks[known], their_priors[known], variances)
            terms["landmark"] = _mean_over_faces(F.smooth_l1_loss(landmark_deltas, landmark_targets, reduction="none"))
        if output.iou_logits is not None:
            decoded = decode_boxes(box_deltas.detach(), their_priors, variances)
            iou_targets = paired_iou(decoded, faces.boxes)
            losses = F.binary_cross_entropy_with_logits(output.iou_logits[positive], iou_targets, reduction="none")
            terms["iou"] = _mean_over_faces(losses.unsqueeze(1))
        return terms


def mined_cross_entropy(class_logits: Tensor, positive: Tensor, negative_ratio: int) -> Tensor:
    """Cross-entropy over the positives and the hardest negatives of each image (SSD, arXiv:1512.02325, section 2.2).

    An image without positives contributes its `negative_ratio` hardest negatives.

    Args:
        class_logits: (B, P, 2).
        positive: (B, P) bool, priors that have a face; all others have none.

    Returns:
        The sum divided by the number of positives in the batch, at least 1.
    """
    losses = F.cross_entropy(class_logits.flatten(0, 1), positive.flatten().long(), reduction="none").view_as(positive)
    negative_losses = losses.detach().masked_fill(positive, -1)
    ranks = negative_losses.argsort(dim=1, descending=True).argsort(dim=1)
    positives_per_image = positive.sum(dim=1, keepdim=True)
    mined = (ranks < negative_ratio * positives_per_image.clamp(min=1)) & ~positive
    return losses[positive | mined].sum() / positive.sum().clamp(min=1)


def _gather_faces(targets: Sequence[FaceTargets], images: Tensor, faces: Tensor) -> FaceTargets:
    """Row i is face `faces[i]` of image `images[i]`."""
    counts = [len(target) for target in targets]
    first_face = torch.tensor([0, *counts[:-1]], device=images.device).cumsum(0)
    rows = first_face[images] + faces
    return FaceTargets(
        boxes=torch.cat([target.boxes for target in targets])[rows],
        landmarks=torch.cat([target.landmarks for target in targets])[rows],
        has_landmarks=torch.cat([target.has_landmarks for target in targets])[rows],
    )


def _mean_over_faces(losses: Tensor) -> Tensor:
    """(N, K) to the mean over N of the sums over K; 0, with a gradient, for N = 0."""
    return losses.sum() / max(len(losses), 1)
