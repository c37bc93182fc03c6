"""The types that flow between data, model, loss, post-processing and results.

PyTorch, which takes a second to import, is imported where it is used: labels are read without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Left eye, right eye, nose, left mouth corner, right mouth corner, as seen in the image.
LANDMARKS_PER_FACE = 5
# Left and right landmarks are swapped in a mirrored face.
MIRRORED_LANDMARKS = [1, 0, 2, 4, 3]


@dataclass(frozen=True)
class StageOutput:
    """Raw predictions of one cascade stage for B images and P priors.

    Attributes:
        class_logits: (B, P, 2) background, face.
        box_deltas: (B, P, 4) relative to the priors; if stages are summed, they include the deltas of earlier stages.
        landmark_deltas: (B, P, 10) x, y of five points relative to the priors, or None for a model without landmarks.
        iou_logits: (B, P) of the IoU-aware branch, or None for a model without it.
        priors: (P, 4) or (B, P, 4) cxcywh, normalised to the image.
    """

    class_logits: Tensor
    box_deltas: Tensor
    landmark_deltas: Tensor | None
    iou_logits: Tensor | None
    priors: Tensor

    def float(self) -> StageOutput:
        """A copy in 32 bits."""
        return _map_tensors(self, lambda tensor: tensor.float())


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher predicts for each of P priors of B images.

    Attributes:
        scores: (B, P) face scores in [0, 1].
        boxes: (B, P, 4) xyxy, normalised to the image.
        landmarks: (B, P, 5, 2) x, y, normalised to the image, or None for a model without landmarks.
    """

    scores: Tensor
    boxes: Tensor
    landmarks: Tensor | None


@dataclass(frozen=True)
class Detections:
    """The detected faces of one image, best first. N = 0 is an ordinary value.

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
        """The detections chosen by a (N,) bool mask, or by indices from 0.

        Raises:
            ValueError: the mask has another length.
            IndexError: there is no detection of an index.
        """
        import torch

        if chosen.dtype == torch.bool:
            if len(chosen) != len(self):
                raise ValueError(f"expected a mask of length {len(self)}, got {len(chosen)}")
            chosen = chosen.nonzero().squeeze(1)
        # index_select takes a third of the time of indexing.
        return _map_tensors(self, lambda tensor: tensor.index_select(0, chosen))

    def split(self, counts: Sequence[int]) -> list[Detections]:
        """Consecutive parts of the given lengths."""
        landmarks: Sequence[Tensor | None] = [None] * len(counts)
        if self.landmarks is not None:
            landmarks = self.landmarks.split(list(counts))
        parts = zip(self.boxes.split(list(counts)), self.scores.split(list(counts)), landmarks, strict=True)
        return [Detections(*part) for part in parts]

    def cpu(self) -> Detections:
        return _map_tensors(self, lambda tensor: tensor.cpu())

    def clone(self) -> Detections:
        """A copy; outside of inference mode it may be written to and differentiated."""
        return _map_tensors(self, lambda tensor: tensor.clone())

    def clipped(self, size_hw: tuple[int, int]) -> Detections:
        """Clip boxes and landmarks to an image of this height and width."""
        largest = image_size_xy(size_hw, self.boxes)
        landmarks = None if self.landmarks is None else self.landmarks.clamp(min=0).minimum(largest)
        return replace(self, boxes=self.boxes.clamp(min=0).minimum(largest.repeat(2)), landmarks=landmarks)

    def scaled(self, x_factor: float, y_factor: float) -> Detections:
        """The same faces in an image resized by these factors."""
        factors = self.boxes.new_tensor([x_factor, y_factor])
        landmarks = None if self.landmarks is None else self.landmarks * factors
        return Detections(self.boxes * factors.repeat(2), self.scores, landmarks)

    def mirrored(self, width: float) -> Detections:
        """The same faces in the horizontally mirrored image, which is `width` pixels wide."""
        import torch

        x1, y1, x2, y2 = self.boxes.unbind(dim=1)
        landmarks = None
        if self.landmarks is not None:
            x, y = self.landmarks[:, MIRRORED_LANDMARKS].unbind(dim=2)
            landmarks = torch.stack([width - x, y], dim=2)
        return Detections(torch.stack([width - x2, y1, width - x1, y2], dim=1), self.scores, landmarks)

    def to_dict(self) -> dict[str, Any]:
        """`{"faces": [{"box": [x1, y1, x2, y2], "score": ..., "landmarks": [[x, y], ...] or None}]}`, for JSON."""
        landmarks = [None] * len(self) if self.landmarks is None else self.landmarks.tolist()
        faces = zip(self.boxes.tolist(), self.scores.tolist(), landmarks, strict=True)
        return {"faces": [{"box": box, "score": score, "landmarks": points} for box, score, points in faces]}

    def crop(self, image: np.ndarray, margin: float = 0.25) -> list[np.ndarray]:
        """The pixels of each face in the image, with a margin relative to its longer side; see `plain_crop`."""
        from utils.alignment import plain_crop

        return [plain_crop(image, box, margin) for box in self.boxes.numpy(force=True)]

    def aligned(self, image: np.ndarray, side: int = 112) -> list[np.ndarray]:
        """Each face, upright and in the same size, as face recognition models expect it; see `aligned_crop`.

        Raises:
            ValueError: the model predicts no landmarks.
        """
        from utils.alignment import aligned_crop

        if self.landmarks is None:
            raise ValueError("faces are aligned by their landmarks, which this model does not predict")
        return [aligned_crop(image, landmarks, side) for landmarks in self.landmarks.numpy(force=True)]

    def draw(self, image: np.ndarray) -> np.ndarray:
        """A copy of the image with boxes, landmarks and scores drawn."""
        from utils.drawing import draw_detections

        return draw_detections(image, self.cpu())


def image_size_xy(size_hw: tuple[int, int], like: Tensor) -> Tensor:
    """(2,) width and height with the device and type of `like`, made without a copy from the host.

    Tracing passes tensors as sizes.
    """
    import torch

    height, width = size_hw
    if isinstance(height, torch.Tensor):
        return torch.stack([torch.as_tensor(width), height]).to(like)
    return torch.stack([like.new_full((), width), like.new_full((), height)])


@dataclass(frozen=True)
class Faces:
    """The labelled faces of one image, in pixels. N = 0 is an ordinary value.

    Attributes:
        boxes: (N, 4) float32 xyxy, of positive area.
        landmarks: (N, 5, 2) float32 x, y; zeros for faces without landmarks.
        has_landmarks: (N,) bool.
        ignored: (N,) bool, faces that count neither as positives nor as background.
    """

    boxes: np.ndarray
    landmarks: np.ndarray
    has_landmarks: np.ndarray
    ignored: np.ndarray

    def __len__(self) -> int:
        return len(self.boxes)

    def select(self, chosen: np.ndarray) -> Faces:
        """The faces chosen by a mask or by indices."""
        return Faces(self.boxes[chosen], self.landmarks[chosen], self.has_landmarks[chosen], self.ignored[chosen])

    def moved(self, offset_xy: Sequence[float] | np.ndarray) -> Faces:
        """The same faces in an image whose origin lies `offset_xy` pixels to the top left."""
        offset = np.asarray(offset_xy, np.float32)
        return replace(self, boxes=self.boxes + np.tile(offset, 2), landmarks=self.landmarks + offset)

    def scaled(self, factor: float) -> Faces:
        """The same faces in an image resized by this factor."""
        boxes, landmarks = (self.boxes * factor).astype(np.float32), (self.landmarks * factor).astype(np.float32)
        return replace(self, boxes=boxes, landmarks=landmarks)

    def mirrored(self, width: float) -> Faces:
        """The same faces in the horizontally mirrored image, which is `width` pixels wide."""
        boxes, landmarks = self.boxes.copy(), self.landmarks[:, MIRRORED_LANDMARKS].copy()
        boxes[:, [0, 2]] = width - self.boxes[:, [2, 0]]
        landmarks[:, :, 0] = width - landmarks[:, :, 0]
        return replace(self, boxes=boxes, landmarks=landmarks)


def join_faces(parts: Sequence[Faces]) -> Faces:
    """The faces of all parts, one part after the other."""
    return Faces(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])})


@dataclass(frozen=True)
class FaceTargets:
    """The labelled faces of B training images, one image after the other.

    Attributes:
        boxes: (N, 4) float xyxy, normalised to the image, of positive area.
        landmarks: (N, 5, 2) float x, y, normalised to the image; zeros for faces without landmarks.
        has_landmarks: (N,) bool.
        ignored: (N,) bool, faces that count neither as positives nor as background.
        counts: number of faces of each of the B images.
    """

    boxes: Tensor
    landmarks: Tensor
    has_landmarks: Tensor
    ignored: Tensor
    counts: tuple[int, ...]

    @classmethod
    def from_faces(cls, faces: Faces, image_size_hw: tuple[int, int]) -> FaceTargets:
        """The targets of one image of this height and width."""
        import torch

        size_xy = np.array(image_size_hw[::-1], np.float32)
        landmarks = np.where(faces.has_landmarks[:, None, None], faces.landmarks / size_xy, 0)
        return cls(
            boxes=torch.from_numpy(faces.boxes / np.tile(size_xy, 2)).float(),
            landmarks=torch.from_numpy(landmarks).float(),
            has_landmarks=torch.from_numpy(faces.has_landmarks),
            ignored=torch.from_numpy(faces.ignored),
            counts=(len(faces),),
        )

    @classmethod
    def join(cls, parts: Sequence[FaceTargets]) -> FaceTargets:
        """The targets of all images of all parts."""
        import torch

        return cls(
            boxes=torch.cat([part.boxes for part in parts]),
            landmarks=torch.cat([part.landmarks for part in parts]),
            has_landmarks=torch.cat([part.has_landmarks for part in parts]),
            ignored=torch.cat([part.ignored for part in parts]),
            counts=tuple(count for part in parts for count in part.counts),
        )

    def __len__(self) -> int:
        return len(self.boxes)

    def to(self, device: torch.device) -> FaceTargets:
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> FaceTargets:
        """A copy in page-locked memory, as the data loader asks for."""
        return _map_tensors(self, lambda tensor: tensor.pin_memory())


Holder = TypeVar("Holder", StageOutput, Detections, FaceTargets)


def _map_tensors(holder: Holder, change: Callable[[Tensor], Tensor]) -> Holder:
    """A copy in which `change` has been applied to every tensor."""
    import torch

    tensors = {name: value for name, value in vars(holder).items() if isinstance(value, torch.Tensor)}
    changed: dict[str, Any] = {name: change(tensor) for name, tensor in tensors.items()}
    return replace(holder, **changed)
