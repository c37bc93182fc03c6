"""Post-processing of the raw outputs of a stage to detections in pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from config import ModelConfig, PostprocessConfig
from utils.boxes import decode_boxes, decode_landmarks
from utils.nms import pixel_nms
from utils.structures import Detections, StageOutput, image_size_xy

_LOGIT_MARGIN = 1e-3  # more than the rounding error of a logit


def fuse_scores(class_logits: Tensor, iou_logits: Tensor | None, exponent: float, power: float = 1.0) -> Tensor:
    """Scores p^a * iou^(1-a) of the IoU-aware head (arXiv:2011.13183, section 3.3), or p without the branch.

    Args:
        class_logits: (..., 2) background, face.
        iou_logits: (...,) or None.
        exponent: a in [0, 1]; 1 gives p.
        power: exponent of the whole score.

    Returns:
        (...,) in [0, 1].
    """
    probabilities = class_logits.softmax(dim=-1)[..., 1]
    scores = probabilities
    if iou_logits is not None and exponent != 1:
        scores = probabilities.pow(exponent) * iou_logits.sigmoid().pow(1 - exponent)
    return scores if power == 1 else scores.pow(power)


def postprocess(
    output: StageOutput, image_size_hw: tuple[int, int], model_config: ModelConfig, config: PostprocessConfig
) -> list[Detections]:
    """Compute scores, filter and decode boxes, and apply non-maximum suppression.

    Filtering and decoding run on the device of the output, the suppression on the CPU. The host waits for the device
    twice per batch: for the number of candidates, and for their values, which are copied at once.

    Args:
        output: raw outputs of the last stage for B images of the same size.
        image_size_hw: height and width of the model's input in pixels.

    Returns:
        B `Detections`, on the CPU.
    """
    candidates, image_indices, is_above = copy_to_cpu(*filter_and_decode(output, image_size_hw, model_config, config))
    counts = image_indices[is_above].bincount(minlength=len(output.box_deltas)).tolist()
    return [apply_nms(found, image_size_hw, config) for found in candidates.select(is_above).split(counts)]


def copy_to_cpu(candidates: Detections, image_indices: Tensor, is_above: Tensor) -> tuple[Detections, Tensor, Tensor]:
    """Copy the result of `filter_and_decode` to the CPU in one piece."""
    if candidates.boxes.device.type == "cpu":
        return candidates, image_indices, is_above
    return _from_table(_to_table(candidates, image_indices, is_above).cpu())


def _to_table(candidates: Detections, image_indices: Tensor, is_above: Tensor) -> Tensor:
    """The N candidates as the rows of one tensor of doubles, which hold all of these values exactly."""
    columns = [image_indices.unsqueeze(1), is_above.unsqueeze(1), candidates.scores.unsqueeze(1), candidates.boxes]
    if candidates.landmarks is not None:
        columns.append(candidates.landmarks.flatten(1))
    return torch.cat([column.double() for column in columns], dim=1)


def _from_table(table: Tensor) -> tuple[Detections, Tensor, Tensor]:
    """Invert `_to_table`."""
    indices, above, scores, boxes, points = table.tensor_split((1, 2, 3, 7), dim=1)
    landmarks = points.float().unflatten(1, (-1, 2)) if points.shape[1] else None
    candidates = Detections(boxes.float(), scores.squeeze(1).float(), landmarks)
    return candidates, indices.squeeze(1).long(), above.squeeze(1).bool()


def filter_and_decode(
    output: StageOutput, image_size_hw: tuple[int, int], model_config: ModelConfig, config: PostprocessConfig
) -> tuple[Detections, Tensor, Tensor]:
    """Decode the boxes whose score may exceed the threshold.

    Scores and boxes are computed only for those priors that the class logits do not rule out.

    Args:
        output: raw outputs of B images.
        image_size_hw: height and width of the model's input in pixels.

    Returns:
        The decoded boxes of all images, one image after the other, as N unclipped detections in pixels of the input;
        (N,) int64 index of the image of each; (N,) bool whether its score exceeds the threshold and its box is finite.
    """
    logits = output.class_logits.flatten(0, 1)
    class_exponent = 1.0 if output.iou_logits is None else model_config.score_exponent
    min_difference = _min_logit_difference(config.confidence_threshold, class_exponent * model_config.score_power)
    chosen = torch.nonzero(logits[:, 1] - logits[:, 0] > min_difference).squeeze(1)

    def select(predictions: Tensor) -> Tensor:
        # index_select takes a third of the time of indexing.
        return predictions.flatten(0, 1).index_select(0, chosen)

    iou_logits = None if output.iou_logits is None else select(output.iou_logits)
    scores = fuse_scores(select(output.class_logits), iou_logits, model_config.score_exponent, model_config.score_power)
    count = output.box_deltas.shape[1]
    has_shared_priors = output.priors.dim() == 2
    priors = output.priors.index_select(0, chosen % count) if has_shared_priors else select(output.priors)
    size_xy = image_size_xy(image_size_hw, scores)
    boxes = decode_boxes(select(output.box_deltas), priors, model_config.variances) * size_xy.repeat(2)
    landmarks = None
    if output.landmark_deltas is not None:
        landmarks = decode_landmarks(select(output.landmark_deltas), priors, model_config.variances) * size_xy
    is_finite = boxes.isfinite().all(dim=1)  # exp() overflows for the deltas of an untrained or damaged model
    is_above = (scores > config.confidence_threshold) & is_finite
    return Detections(boxes, scores, landmarks), chosen // count, is_above


def _min_logit_difference(score_threshold: float, exponent: float) -> float:
    """The smallest difference of class logits for which a score may exceed the threshold, whatever the IoU is.

    (p^a * iou^(1-a))^b > t requires p^(a b) > t, because the other factor is at most 1.
    """
    if score_threshold <= 0 or exponent == 0:
        return -math.inf
    if score_threshold >= 1:
        return math.inf
    probability = score_threshold ** (1 / exponent)
    return math.log(probability) - math.log1p(-probability) - _LOGIT_MARGIN if probability > 0 else -math.inf


def apply_nms(candidates: Detections, image_size_hw: tuple[int, int], config: PostprocessConfig) -> Detections:
    """Apply non-maximum suppression to the boxes of one image, best first, and clip them if configured."""
    if config.top_k:
        candidates = candidates.select(candidates.scores.argsort(descending=True)[: config.top_k])
    kept = pixel_nms(candidates.boxes, candidates.scores, config.nms_threshold)
    if config.keep_top_k:
        kept = kept[: config.keep_top_k]
    found = candidates.select(kept)
    return found.clipped(image_size_hw) if config.clip_boxes else found
