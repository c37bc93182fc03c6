"""The values that flow between network, loss, post-processing and writers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.landmarks import LANDMARKS_PER_FACE, MIRRORED_LANDMARKS


@dataclass(frozen=True)
class StageOutput:
    """Raw predictions of one cascade stage, for B images and P priors.

    Attributes:
        class_logits: (B, P, 2) background, face.
        box_deltas: (B, P, 4) relative to the priors; where stages sum, with the deltas of earlier ones added in.
        landmark_deltas: (B, P, 10) x, y of five points relative to the priors, or None for a model without landmarks.
        iou_logits: (B, P) of the IoU-aware branch, or None where the model has none.
        priors: (B, P, 4) cxcywh, normalised to the image: the boxes of the stage before, where this one starts from
            them; None for the fixed priors of the pyramid.
    """

    class_logits: Tensor
    box_deltas: Tensor
    landmark_deltas: Tensor | None
    iou_logits: Tensor | None
    priors: Tensor | None = None

    def float(self) -> StageOutput:
        """The same in 32 bits."""
        values: dict[str, Any] = {name: None if value is None else value.float() for name, value in vars(self).items()}
        return StageOutput(**values)


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

    def select(self, chosen: Tensor) -> Detections:
        """Those that a mask or indices choose."""
        landmarks = None if self.landmarks is None else self.landmarks[chosen]
        return Detections(self.boxes[chosen], self.scores[chosen], landmarks)

    def split(self, counts: Sequence[int]) -> list[Detections]:
        """Consecutive parts of so many each."""
        landmarks: Sequence[Tensor | None] = [None] * len(counts)
        if self.landmarks is not None:
            landmarks = self.landmarks.split(list(counts))
        parts = zip(self.boxes.split(list(counts)), self.scores.split(list(counts)), landmarks, strict=True)
        return [Detections(*part) for part in parts]

    def cpu(self) -> Detections:
        landmarks = None if self.landmarks is None else self.landmarks.cpu()
        return Detections(self.boxes.cpu(), self.scores.cpu(), landmarks)

    def clipped(self, size_hw: tuple[int, int]) -> Detections:
        """Boxes cut off at the borders of an image of this height and width; landmarks as they are."""
        largest = corner_of(size_hw, self.boxes).repeat(2)
        return Detections(self.boxes.clamp(min=0).minimum(largest), self.scores, self.landmarks)

    def scaled(self, x_factor: float, y_factor: float) -> Detections:
        """The same faces in an image resized by these factors."""
        factors = self.boxes.new_tensor([x_factor, y_factor])
        landmarks = None if self.landmarks is None else self.landmarks * factors
        return Detections(self.boxes * factors.repeat(2), self.scores, landmarks)

    def mirrored(self, width: float) -> Detections:
        """The same faces in the image mirrored left to right, which is `width` pixels wide."""
        x1, y1, x2, y2 = self.boxes.unbind(dim=1)
        landmarks = None
        if self.landmarks is not None:
            x, y = self.landmarks[:, MIRRORED_LANDMARKS].unbind(dim=2)
            landmarks = torch.stack([width - x, y], dim=2)
        return Detections(torch.stack([width - x2, y1, width - x1, y2], dim=1), self.scores, landmarks)


def corner_of(size_hw: tuple[int, int], like: Tensor) -> Tensor:
    """(2,) x, y of an image's bottom right corner, of the kind of `like`; a trace may make tensors of the sizes."""
    height, width = size_hw
    return torch.stack([torch.as_tensor(width), torch.as_tensor(height)]).to(like)


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


@dataclass(frozen=True)
class BatchTargets:
    """The labelled faces of B training images, one image after the other.

    Attributes:
        boxes: (N, 4) float xyxy, normalised to the image, of positive area.
        landmarks: (N, 5, 2) float x, y, normalised to the image; zeros for faces without.
        has_landmarks: (N,) bool.
        image_indices: (N,) int64 in ascending order: the image of each face in the batch.
        batch_size: B, for images at the end may have no faces.
    """

    boxes: Tensor
    landmarks: Tensor
    has_landmarks: Tensor
    image_indices: Tensor
    batch_size: int

    @classmethod
    def of(cls, images: Sequence[FaceTargets]) -> BatchTargets:
        """Join the faces of one image or more."""
        counts = torch.tensor([len(faces) for faces in images])
        return cls(
            boxes=torch.cat([faces.boxes for faces in images]),
            landmarks=torch.cat([faces.landmarks for faces in images]),
            has_landmarks=torch.cat([faces.has_landmarks for faces in images]),
            image_indices=torch.arange(len(images)).repeat_interleave(counts),
            batch_size=len(images),
        )

    def __len__(self) -> int:
        return len(self.boxes)

    def to(self, device: torch.device) -> BatchTargets:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> BatchTargets:
        """For the loader: copies in memory from which a CUDA device reads without waiting."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> BatchTargets:
        return BatchTargets(
            change(self.boxes),
            change(self.landmarks),
            change(self.has_landmarks),
            change(self.image_indices),
            self.batch_size,
        )
