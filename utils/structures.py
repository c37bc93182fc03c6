"""The values that flow between network, loss, post-processing and writers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.landmarks import LANDMARKS_PER_FACE


@dataclass(frozen=True)
class StageOutput:
    """Raw predictions of one cascade stage, for B images and P priors.

    Attributes:
        class_logits: (B, P, 2) background, face.
        box_deltas: (B, P, 4) relative to the priors, with the deltas of earlier stages added in.
        landmark_deltas: (B, P, 10) x, y of five points relative to the priors, or None for a model without landmarks.
        iou_logits: (B, P) of the IoU-aware branch, or None where the model has none.
    """

    class_logits: Tensor
    box_deltas: Tensor
    landmark_deltas: Tensor | None
    iou_logits: Tensor | None


@dataclass(frozen=True)
class Detections:
    """The faces of one image, best first. N = 0 is an ordinary value.

    Attributes:
        boxes: (N, 4) float xyxy in pixels of the original image.
        scores: (N,) float in [0, 1].
        landmarks: (N, 5, 2) float x, y in pixels of the original image, or None for a model without landmarks.
    """

    boxes: Tensor
    scores: Tensor
    landmarks: Tensor | None

    def __post_init__(self) -> None:
        count = len(self.scores)
        expected = {"boxes": (count, 4), "scores": (count,), "landmarks": (count, LANDMARKS_PER_FACE, 2)}
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"expected {name} of shape {shape}, got {tuple(value.shape)}")

    def __len__(self) -> int:
        return len(self.scores)

    def cpu(self) -> Detections:
        landmarks = None if self.landmarks is None else self.landmarks.cpu()
        return Detections(self.boxes.cpu(), self.scores.cpu(), landmarks)


@dataclass(frozen=True)
class FaceTargets:
    """The labelled faces of one training image.

    Attributes:
        boxes: (N, 4) float xyxy, normalised to the image, of positive area.
        landmarks: (N, 5, 2) float x, y, normalised to the image; zeros for faces without.
        has_landmarks: (N,) bool.
    """

    boxes: Tensor
    landmarks: Tensor
    has_landmarks: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    def to(self, device: torch.device) -> FaceTargets:
        return FaceTargets(self.boxes.to(device), self.landmarks.to(device), self.has_landmarks.to(device))
