"""Test protocols and test-time augmentation: detection in resized, padded, mirrored and rescaled images."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch

from config import PostprocessConfig, ProtocolConfig
from models.detector import FaceDetector
from utils.nms import vote_boxes
from utils.structures import Detections

_VGA_SIDE = 640
# Short side and maximum long side of the protocols that resize.
_SIDES = {"1600x2150": (1600, 2150), "1100x1650": (1100, 1650), "800x1200": (800, 1200)}
# RetinaFace's image pyramid: short sides of 500 to 1700 pixels, relative to its usual 800 (insightface,
# detection/retinaface/test_widerface.py). With --protocol=800x1200 it is exactly that.
_SCALES = (500 / 800, 1.0, 1100 / 800, 1400 / 800, 1700 / 800)


class TestTimeAugmentation:
    """Runs a detector as a test protocol prescribes.

    Detections of several passes are merged by box voting at the NMS threshold. Landmarks and score are those of the
    best box.
    """

    __test__ = False  # pytest would collect the class because of its name

    def __init__(self, detector: FaceDetector, protocol: ProtocolConfig) -> None:
        self.detector = detector
        self.protocol = protocol

    @property
    def config(self) -> PostprocessConfig:
        return self.detector.config

    @property
    def max_pixels(self) -> int:
        """Largest number of pixels of images that are processed at their own size; 0 means no limit."""
        return self.detector.max_pixels if self.protocol.protocol == "original" else 0

    @property
    def num_workers(self) -> int:
        return self.detector.num_workers

    def size_seen(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """Height and width in which the model sees an image of this height and width in its largest pass."""
        factor = max(_SCALES) if self.protocol.multi_scale else 1.0
        height, width = resized_size(size_hw, self.protocol.protocol, factor)
        if self.protocol.protocol == "vga":
            height = width = max(height, width)
        return self.detector.size_seen((height, width))

    def for_worker(self) -> TestTimeAugmentation:
        return TestTimeAugmentation(self.detector.for_worker(), self.protocol)

    def detect_batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Detect the faces of (H, W, 3) uint8 BGR images of the same `size_seen`, in pixels of each, on the CPU."""
        passes = [
            self._detect(images, factor, mirrored)
            for factor in (_SCALES if self.protocol.multi_scale else (1.0,))
            for mirrored in ((False, True) if self.protocol.flip else (False,))
        ]
        merged = passes[0] if len(passes) == 1 else [self._merge(found) for found in zip(*passes, strict=True)]
        smallest = self.protocol.min_face_height
        return (
            [found.select(found.boxes[:, 3] - found.boxes[:, 1] >= smallest) for found in merged]
            if smallest
            else merged
        )

    def _detect(self, images: Sequence[np.ndarray], factor: float, mirrored: bool) -> list[Detections]:
        shown = [self._shown(image[:, ::-1] if mirrored else image, factor) for image in images]
        if len({image.shape for image in shown}) == 1:
            found = self.detector.detect_batch(shown)
        else:  # sizes of several images may round to the same one at one scale and not at another
            found = [self.detector.detect_batch([image])[0] for image in shown]
        return [self._in_image(each, image, factor, mirrored) for each, image in zip(found, images, strict=True)]

    def _shown(self, image: np.ndarray, factor: float) -> np.ndarray:
        """The image as the detector sees it in one pass."""
        size_hw = (image.shape[0], image.shape[1])
        new_hw = resized_size(size_hw, self.protocol.protocol, factor)
        if new_hw != size_hw:
            image = cv2.resize(image, new_hw[::-1], interpolation=cv2.INTER_LINEAR)
        return self._pad(image, round(_VGA_SIDE * factor)) if self.protocol.protocol == "vga" else image

    def _in_image(self, found: Detections, image: np.ndarray, factor: float, mirrored: bool) -> Detections:
        """Detections in pixels of the image, from those of one pass."""
        height, width = image.shape[:2]
        new_height, new_width = resized_size((height, width), self.protocol.protocol, factor)
        found = found.scaled(width / new_width, height / new_height)
        found = found.mirrored(width) if mirrored else found
        return found.clipped((height, width)) if self.config.clip_boxes else found

    def _pad(self, image: np.ndarray, side: int) -> np.ndarray:
        """Pad an image at the right and bottom to a square with the mean colour, which becomes zero in the model."""
        mean = self.detector.model.model_config.pixel_mean
        canvas = np.broadcast_to(np.round(mean).astype(np.uint8), (side, side, 3)).copy()
        canvas[: image.shape[0], : image.shape[1]] = image
        return canvas

    def _merge(self, passes: Sequence[Detections]) -> Detections:
        boxes = torch.cat([detections.boxes for detections in passes])
        scores = torch.cat([detections.scores for detections in passes])
        kept, voted = vote_boxes(boxes, scores, self.config.nms_threshold)
        if self.config.keep_top_k:
            kept, voted = kept[: self.config.keep_top_k], voted[: self.config.keep_top_k]
        landmarks = [detections.landmarks for detections in passes if detections.landmarks is not None]
        return Detections(voted, scores[kept], torch.cat(landmarks)[kept] if landmarks else None)


def resized_size(size_hw: tuple[int, int], protocol: str, factor: float) -> tuple[int, int]:
    """Height and width to which a protocol resizes an image.

    Args:
        size_hw: height and width of the image in pixels.
        protocol: a value of `ProtocolConfig.protocol`.
        factor: scale relative to the size of the protocol, for multi-scale tests.
    """
    short, long = sorted(size_hw)
    if protocol == "vga":
        scale = _VGA_SIDE / long
    elif protocol in _SIDES:
        short_side, long_side = _SIDES[protocol]
        scale = min(short_side / short, long_side / long)
    else:
        scale = 1.0
    height, width = (max(1, round(side * scale * factor)) for side in size_hw)
    return height, width
