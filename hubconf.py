"""Entry point of torch.hub: `torch.hub.load("<path or repository>", "face_detector", source=...)`."""

from __future__ import annotations

from typing import Any

dependencies = ["torch", "torchvision", "cv2", "numpy"]


def face_detector(**settings: Any) -> Any:
    """Load the shipped detector; `settings` are the arguments of `FaceDetector.from_experiment`."""
    from models.detector import FaceDetector

    return FaceDetector.from_experiment(**settings)
