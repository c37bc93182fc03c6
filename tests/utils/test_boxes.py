"""Tests of encoding, decoding and IoU of boxes."""

from __future__ import annotations

import pytest
import torch

from utils.boxes import decode_boxes, decode_landmarks, encode_boxes, encode_landmarks, paired_iou

VARIANCES = (0.1, 0.2)
PRIORS = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.1, 0.3, 0.1, 0.1]])


def test_decoding_inverts_encoding() -> None:
    boxes = torch.tensor([[0.4, 0.2, 0.7, 0.9], [-0.1, 0.0, 0.1, 0.5]])
    deltas = encode_boxes(boxes, PRIORS, VARIANCES)
    torch.testing.assert_close(decode_boxes(deltas, PRIORS, VARIANCES), boxes)
    points = torch.rand(2, 5, 2)
    torch.testing.assert_close(decode_landmarks(encode_landmarks(points, PRIORS, VARIANCES), PRIORS, VARIANCES), points)


def test_deltas_by_hand() -> None:
    """One prior width to the right is 1 / 0.1; e times as high is 1 / 0.2."""
    box = torch.tensor([[0.6, 0.5 - 0.2 * torch.e, 0.8, 0.5 + 0.2 * torch.e]])
    torch.testing.assert_close(encode_boxes(box, PRIORS[:1], VARIANCES), torch.tensor([[10.0, 0, 0, 5]]))


def test_no_boxes() -> None:
    none = torch.zeros(0, 4)
    assert decode_boxes(none, none, VARIANCES).shape == (0, 4)
    assert decode_landmarks(torch.zeros(0, 10), none, VARIANCES).shape == (0, 5, 2)
    assert paired_iou(none, none).shape == (0,)


def test_iou_of_pairs_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 1, 1], [3, 3, 3, 3]])
    others = torch.tensor([[1.0, 0, 3, 2], [0, 0, 1, 1], [5, 5, 6, 6], [3, 3, 3, 3]])
    assert paired_iou(boxes, others).tolist() == pytest.approx([1 / 3, 1, 0, 0])
