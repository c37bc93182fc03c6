"""From a stage's raw outputs to detections in pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from config import DetectionConfig, ModelConfig
from layers.prior_box import prior_boxes
from utils.boxes import decode_boxes, decode_landmarks
from utils.nms import pixel_nms
from utils.structures import Detections, StageOutput


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
    """Score, filter, decode and suppress, image by image.

    Args:
        output: of the stage whose boxes are wanted, B images of one size.
        image_size_hw: height and width of the network's input in pixels.

    Returns:
        B `Detections`, on the device of `output`.
    """
    fixed = prior_boxes(image_size_hw, model.anchor_sizes, model.strides, output.box_deltas.device)
    scores = fuse_scores(output.class_logits, output.iou_logits, model.score_exponent)
    landmark_deltas = output.landmark_deltas
    return [
        _detections_of_image(
            scores[i],
            output.box_deltas[i],
            None if landmark_deltas is None else landmark_deltas[i],
            fixed if output.priors is None else output.priors[i],
            image_size_hw,
            model,
            detection,
        )
        for i in range(len(scores))
    ]


def _detections_of_image(
    scores: Tensor,
    box_deltas: Tensor,
    landmark_deltas: Tensor | None,
    priors: Tensor,
    image_size_hw: tuple[int, int],
    model: ModelConfig,
    detection: DetectionConfig,
) -> Detections:
    # Filtering first leaves a few hundred of tens of thousands of priors to decode.
    candidates = torch.nonzero(scores > detection.confidence_threshold).squeeze(1)
    if detection.top_k and len(candidates) > detection.top_k:
        candidates = candidates[scores[candidates].topk(detection.top_k).indices]

    height, width = image_size_hw
    pixels = scores.new_tensor([width, height])
    boxes = decode_boxes(box_deltas[candidates], priors[candidates], model.variances) * pixels.repeat(2)
    finite = boxes.isfinite().all(dim=1)  # exp() overflows for the deltas of an untrained or damaged network
    candidates, boxes = candidates[finite], boxes[finite]
    kept = pixel_nms(boxes, scores[candidates], detection.nms_threshold)
    if detection.keep_top_k:
        kept = kept[: detection.keep_top_k]

    chosen = candidates[kept]
    landmarks = None
    if landmark_deltas is not None:
        landmarks = decode_landmarks(landmark_deltas[chosen], priors[chosen], model.variances) * pixels
    found = Detections(boxes[kept], scores[chosen], landmarks)
    return found.clipped(image_size_hw) if detection.clip_boxes else found
