"""Tests of post-processing: decoding, score fusion, thresholds, suppression and limits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from config import PostprocessConfig
from layers.postprocess import _from_table, _to_table, fuse_scores, postprocess
from layers.prior_box import prior_boxes
from models.architecture import usual_config
from utils.boxes import encode_boxes
from utils.nms import pixel_nms
from utils.structures import Detections, StageOutput

SIZE = (40, 64)
MODEL = usual_config("mobilenet0.25", num_anchor=2, model_version="retina")
PRIORS = prior_boxes(SIZE, MODEL.levels)
CONFIG = PostprocessConfig(confidence_threshold=0.1, nms_threshold=0.3)


def output_of(faces: dict[int, tuple[float, list[float]]], device: torch.device | None = None) -> StageOutput:
    """Return an output with faces given as prior index: (score, xyxy in pixels); other priors are background."""
    logits = torch.zeros(1, len(PRIORS), 2)
    logits[..., 0] = 20.0
    deltas = torch.zeros(1, len(PRIORS), 4)
    for index, (score, box) in faces.items():
        logits[0, index] = torch.tensor([1 - score, score]).log()
        normalised = torch.tensor(box) / torch.tensor([SIZE[1], SIZE[0]] * 2)
        deltas[0, index] = encode_boxes(normalised, PRIORS[index], MODEL.variances)
    points = torch.zeros(1, len(PRIORS), 10, device=device)
    return StageOutput(logits.to(device), deltas.to(device), points, None, PRIORS.to(device))


def test_no_detections_above_the_threshold(device: torch.device) -> None:
    (found,) = postprocess(output_of({}, device), SIZE, MODEL, CONFIG)
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)
    assert found.landmarks is not None
    assert found.landmarks.shape == (0, 5, 2)


def test_boxes_are_in_pixels_and_sorted_by_score(device: torch.device) -> None:
    output = output_of({3: (0.6, [1, 2, 11, 12]), 20: (0.9, [30, 10, 50, 34])}, device)
    (found,) = postprocess(output, SIZE, MODEL, CONFIG)
    assert found.boxes.device.type == "cpu"
    torch.testing.assert_close(found.boxes.cpu(), torch.tensor([[30.0, 10, 50, 34], [1, 2, 11, 12]]))
    torch.testing.assert_close(found.scores.cpu(), torch.tensor([0.9, 0.6]))


def test_landmarks_of_zero_deltas_lie_at_the_priors_centre() -> None:
    (found,) = postprocess(output_of({0: (0.9, [0, 0, 16, 16])}), SIZE, MODEL, CONFIG)
    assert found.landmarks is not None
    assert found.landmarks.tolist() == [[[4.0, 4.0]] * 5]  # first cell of stride 8


def test_overlapping_box_of_lower_score_is_suppressed() -> None:
    output = output_of({2: (0.8, [0, 0, 20, 20]), 3: (0.7, [1, 1, 21, 21]), 40: (0.6, [40, 10, 60, 30])})
    (found,) = postprocess(output, SIZE, MODEL, CONFIG)
    torch.testing.assert_close(found.scores, torch.tensor([0.8, 0.6]))


@pytest.mark.parametrize("has_landmarks", [True, False])
@pytest.mark.parametrize("count", [0, 3])
def test_packing_candidates_into_one_tensor_is_lossless(count: int, has_landmarks: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    landmarks = torch.randn(count, 5, 2, generator=generator) if has_landmarks else None
    candidates = Detections(torch.randn(count, 4, generator=generator), torch.rand(count), landmarks)
    indices, is_above = torch.arange(count) * 10_000_019, torch.arange(count) % 2 == 1
    copied, copied_indices, copied_above = _from_table(_to_table(candidates, indices, is_above))
    assert copied.boxes.equal(candidates.boxes)
    assert copied.scores.equal(candidates.scores)
    torch.testing.assert_close(copied.landmarks, landmarks, rtol=0, atol=0)
    assert copied_indices.equal(indices)
    assert copied_above.equal(is_above)


def test_clipping_can_be_disabled() -> None:
    output = output_of({0: (0.9, [-5, -3, 70, 45])})
    (clipped,) = postprocess(output, SIZE, MODEL, CONFIG)
    assert clipped.boxes.tolist() == [[0, 0, 64, 40]]
    (raw,) = postprocess(output, SIZE, MODEL, dataclasses.replace(CONFIG, clip_boxes=False))
    torch.testing.assert_close(raw.boxes, torch.tensor([[-5.0, -3, 70, 45]]))


def test_top_k_limits_keep_the_highest_scores() -> None:
    faces = {index: (0.5 + index / 100, [8.0 * index, 0, 8 * index + 7, 8]) for index in range(6)}
    (before,) = postprocess(output_of(faces), SIZE, MODEL, dataclasses.replace(CONFIG, top_k=2))
    (after,) = postprocess(output_of(faces), SIZE, MODEL, dataclasses.replace(CONFIG, keep_top_k=3))
    torch.testing.assert_close(before.scores, torch.tensor([0.55, 0.54]))
    torch.testing.assert_close(after.scores, torch.tensor([0.55, 0.54, 0.53]))


def test_infinite_box_is_dropped() -> None:
    output = output_of({0: (0.9, [0, 0, 16, 16]), 1: (0.8, [30, 0, 46, 16])})
    output.box_deltas[0, 0, 2:] = 1e4
    (found,) = postprocess(output, SIZE, MODEL, CONFIG)
    torch.testing.assert_close(found.boxes, torch.tensor([[30.0, 0, 46, 16]]))


def test_images_of_a_batch_are_independent() -> None:
    one, none = output_of({3: (0.6, [1, 2, 11, 12])}), output_of({})
    batch = StageOutput(
        torch.cat([none.class_logits, one.class_logits]),
        torch.cat([none.box_deltas, one.box_deltas]),
        None,
        None,
        PRIORS,
    )
    found = postprocess(batch, SIZE, MODEL, CONFIG)
    assert [len(image) for image in found] == [0, 1]
    assert found[1].landmarks is None


def test_decoding_uses_the_priors_of_the_stage(device: torch.device) -> None:
    """Equal to decoding all priors first and filtering last."""
    random = torch.Generator().manual_seed(0)
    count = len(PRIORS)
    logits, deltas = torch.randn(2, count, 2, generator=random), torch.randn(2, count, 4, generator=random)
    points = torch.randn(2, count, 10, generator=random)
    priors = torch.rand(2, count, 4, generator=random) * 0.4 + 0.1
    output = StageOutput(logits.to(device), deltas.to(device), points.to(device), None, priors.to(device))
    settings = dataclasses.replace(CONFIG, confidence_threshold=0.6, clip_boxes=False)
    scale = torch.tensor([SIZE[1], SIZE[0]])
    for image, found in enumerate(postprocess(output, SIZE, MODEL, settings)):
        centres, sides = priors[image, :, :2], priors[image, :, 2:]
        middle = centres + 0.1 * deltas[image, :, :2] * sides
        half = sides * (0.2 * deltas[image, :, 2:]).exp() / 2
        boxes = torch.cat([middle - half, middle + half], dim=1) * scale.repeat(2)
        landmarks = (centres[:, None] + 0.1 * points[image].view(-1, 5, 2) * sides[:, None]) * scale
        scores = logits[image].softmax(dim=1)[:, 1]
        above = torch.nonzero(scores > 0.6)[:, 0]
        chosen = above[pixel_nms(boxes[above], scores[above], 0.3)]
        assert len(chosen) > 3
        torch.testing.assert_close(found.boxes.cpu(), boxes[chosen], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(found.scores.cpu(), scores[chosen])
        assert found.landmarks is not None
        torch.testing.assert_close(found.landmarks.cpu(), landmarks[chosen], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("exponent", "expected"), [(1.0, 0.64), (0.5, 0.4), (0.0, 0.25)])
def test_fused_score_by_hand(exponent: float, expected: float) -> None:
    """p = 0.64 and an IoU of 0.25: their geometric mean is 0.4."""
    logits = torch.tensor([[0.36, 0.64]]).log()
    iou_logits = torch.tensor([0.25]).logit()
    assert float(fuse_scores(logits, iou_logits, exponent)) == pytest.approx(expected)


def test_score_without_iou_branch_is_the_probability() -> None:
    assert float(fuse_scores(torch.tensor([[0.36, 0.64]]).log(), None, 0.5)) == pytest.approx(0.64)


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.0])
def test_filtering_logits_equals_filtering_scores(threshold: float, exponent: float) -> None:
    """The first of the two images has no face."""
    generator = torch.Generator().manual_seed(0)
    model = dataclasses.replace(MODEL, model_version="tina", score_exponent=exponent)
    logits = torch.randn(2, len(PRIORS), 2, generator=generator) * 4
    logits[0, :, 0] = 50
    iou_logits = torch.randn(2, len(PRIORS), generator=generator) * 3
    output = StageOutput(logits, torch.zeros(2, len(PRIORS), 4), None, iou_logits, PRIORS)
    detection = PostprocessConfig(confidence_threshold=threshold, nms_threshold=1, clip_boxes=False)
    for image, found in enumerate(postprocess(output, SIZE, model, detection)):
        scores = fuse_scores(logits[image], iou_logits[image], exponent)
        expected = scores[scores > threshold].sort(descending=True).values
        torch.testing.assert_close(found.scores, expected)
