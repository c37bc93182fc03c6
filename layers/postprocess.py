"""From a stage's raw outputs to detections in pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from config import DetectionConfig, ModelConfig
from layers.prior_box import prior_boxes
from utils.boxes import decode_boxes, decode_landmarks
from utils.nms import pixel_nms
from utils.structures import Detections, StageOutput, corner_of

_LOGIT_MARGIN = 1e-3  # more than rounding makes of a logit


def fuse_scores(class_logits: Tensor, iou_logits: Tensor | None, exponent: float) -> Tensor:
    """Scores p^a * iou^(1-a) of the IoU-aware head (arXiv:2011.13183, section 3.3); p alone without the branch.

    Args:
        class_logits: (..., 2) background, face.
        iou_logits: (...,) or None.
        exponent: a in [0, 1]; 1 gives p.

    Returns:
        (...,) in [0, 1].
    """
    probabilities = class_logits.softmax(dim=-1)[..., 1]
    if iou_logits is None or exponent == 1:
        return probabilities
    return probabilities.pow(exponent) * iou_logits.sigmoid().pow(1 - exponent)


def postprocess(
    output: StageOutput, image_size_hw: tuple[int, int], model: ModelConfig, detection: DetectionConfig
) -> list[Detections]:
    """Score, filter, decode and suppress.

    Args:
        output: of the stage whose boxes are wanted, B images of one size.
        image_size_hw: height and width of the network's input in pixels.

    Returns:
        B `Detections`, on the CPU.
    """
    # All images at once, and the suppression where the results are wanted: a GPU is waited for twice a batch.
    candidates = find_candidates(output, image_size_hw, model, detection).cpu().above_threshold()
    counts = candidates.image_indices.bincount(minlength=output.box_deltas.shape[0]).tolist()
    images = candidates.detections.split(counts)
    return [suppress(found, image_size_hw, detection) for found in images]


@dataclass(frozen=True)
class Candidates:
    """Decoded boxes, among them all that enter the suppression.

    Attributes:
        detections: of all images, one after the other, in the order of the priors.
        image_indices: (N,) int64 in ascending order: the image of each.
        is_above: (N,) bool: whether its score is above the threshold, and its box finite.
    """

    detections: Detections
    image_indices: Tensor
    is_above: Tensor

    def cpu(self) -> Candidates:
        return Candidates(self.detections.cpu(), self.image_indices.cpu(), self.is_above.cpu())

    def above_threshold(self) -> Candidates:
        chosen = torch.nonzero(self.is_above).squeeze(1)
        return Candidates(self.detections.select(chosen), self.image_indices[chosen], self.is_above[chosen])


def find_candidates(
    output: StageOutput, image_size_hw: tuple[int, int], model: ModelConfig, detection: DetectionConfig
) -> Candidates:
    """The boxes that may be above the score threshold, decoded; see `postprocess`.

    Scores, exponentials and boxes are computed for those priors only whose logits do not rule it out.
    """
    fixed = prior_boxes(image_size_hw, model.anchor_sizes, model.strides, output.box_deltas.device)
    logits = output.class_logits.flatten(0, 1)
    bound = _least_logit(detection.confidence_threshold, 1.0 if output.iou_logits is None else model.score_exponent)
    likely = torch.nonzero(logits[:, 1] - logits[:, 0] > bound).squeeze(1)

    iou_logits = None if output.iou_logits is None else output.iou_logits.flatten()[likely]
    scores = fuse_scores(logits[likely], iou_logits, model.score_exponent)
    count = output.box_deltas.shape[1]
    priors = fixed[likely % count] if output.priors is None else output.priors.flatten(0, 1)[likely]
    corner = corner_of(image_size_hw, scores)
    boxes = decode_boxes(output.box_deltas.flatten(0, 1)[likely], priors, model.variances) * corner.repeat(2)
    landmarks = None
    if output.landmark_deltas is not None:
        deltas = output.landmark_deltas.flatten(0, 1)[likely]
        landmarks = decode_landmarks(deltas, priors, model.variances) * corner
    finite = boxes.isfinite().all(dim=1)  # exp() overflows for the deltas of an untrained or damaged network
    is_above = (scores > detection.confidence_threshold) & finite
    return Candidates(Detections(boxes, scores, landmarks), likely // count, is_above)


def _least_logit(score_threshold: float, exponent: float) -> float:
    """A difference of the class logits that a score above the threshold exceeds, whatever the IoU branch says.

    p^a * iou^(1-a) > t asks for p^a > t, for the other factor is at most 1.
    """
    if score_threshold <= 0 or exponent == 0:
        return -math.inf
    if score_threshold >= 1:
        return math.inf
    probability = score_threshold ** (1 / exponent)
    return math.log(probability) - math.log1p(-probability) - _LOGIT_MARGIN if probability > 0 else -math.inf


def suppress(candidates: Detections, image_size_hw: tuple[int, int], detection: DetectionConfig) -> Detections:
    """The detections of one image that remain of its candidates, best first."""
    if detection.top_k:
        candidates = candidates.select(candidates.scores.argsort(descending=True)[: detection.top_k])
    kept = pixel_nms(candidates.boxes, candidates.scores, detection.nms_threshold)
    if detection.keep_top_k:
        kept = kept[: detection.keep_top_k]
    found = candidates.select(kept)
    return found.clipped(image_size_hw) if detection.clip_boxes else found
