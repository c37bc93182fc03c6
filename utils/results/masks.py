"""Head and face masks: the head region around a face, and the pixels of the person in it."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from utils.errors import UserError
from utils.structures import Detections

Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in whole pixels; x2 and y2 are exclusive

# Sides of the head region relative to those of the face, as in the original.
_HEAD_SCALE = 4
# Confidence above which a pixel belongs to the person, as in the original.
_PERSON_CONFIDENCE = 0.1


@dataclass(frozen=True)
class HeadMask:
    """The segmented head region around a face.

    Attributes:
        head_box: the head region in pixels of the image, clipped to it.
        face_box: the face in pixels of the head region.
        head_mask: (H, W) uint8 mask of the head region, 255 for pixels of the person, else 0.
    """

    head_box: Box
    face_box: Box
    head_mask: np.ndarray

    @property
    def face_mask(self) -> np.ndarray:
        """The part of `head_mask` inside the face box."""
        return crop(self.head_mask, self.face_box)


def crop(image: np.ndarray, box: Box) -> np.ndarray:
    """Crop a box that lies within the image."""
    x1, y1, x2, y2 = box
    return image[y1:y2, x1:x2]


def head_region(face: np.ndarray, image_size_hw: tuple[int, int]) -> tuple[Box, Box]:
    """Compute the head region around a face, and the box of the face within the region.

    The region is centred on the face, `_HEAD_SCALE` times as wide and high, and clipped to the image. The face box is
    relative to the clipped region, so that it also covers the pixels of a face at the border of the image.

    Args:
        face: (4,) xyxy in pixels of the image; may reach outside it.
        image_size_hw: height and width in pixels.

    Returns:
        The head box in the image and the face box in the head box. Both are empty for a face outside the image.
    """
    height, width = image_size_hw
    x1, y1, x2, y2 = (int(value) for value in face)
    centre_x, centre_y = (x1 + x2) // 2, (y1 + y2) // 2
    reach_x, reach_y = _HEAD_SCALE * (x2 - x1) // 2, _HEAD_SCALE * (y2 - y1) // 2
    head = _clip((centre_x - reach_x, centre_y - reach_y, centre_x + reach_x, centre_y + reach_y), width, height)
    left, top, right, bottom = head
    return head, _clip((x1 - left, y1 - top, x2 - left, y2 - top), right - left, bottom - top)


def _clip(box: Box, width: int, height: int) -> Box:
    x1, y1, x2, y2 = (min(max(value, 0), limit) for value, limit in zip(box, (width, height) * 2, strict=True))
    return x1, y1, max(x1, x2), max(y1, y2)


class InferenceResults(NamedTuple):
    """Five lists with an entry for every image that could be read, in the same order.

    Attributes:
        result_bboxes: (N, 4) int faces, xyxy in pixels of the image.
        face_bboxes: (N, 4) int faces, xyxy in pixels of their head regions.
        face_masks: N uint8 masks of the faces, 255 for pixels of the person.
        head_bboxes: (N, 4) int head regions, xyxy in pixels of the image.
        head_masks: N uint8 masks of the head regions.

    Without `--mask` the entries of all lists but `result_bboxes` are empty.
    """

    result_bboxes: list[np.ndarray]
    face_bboxes: list[np.ndarray]
    face_masks: list[list[np.ndarray]]
    head_bboxes: list[np.ndarray]
    head_masks: list[list[np.ndarray]]

    def add(self, detections: Detections, heads: Sequence[HeadMask]) -> None:
        self.result_bboxes.append(detections.boxes.int().numpy())
        self.face_bboxes.append(np.array([head.face_box for head in heads], dtype=int).reshape(-1, 4))
        self.face_masks.append([head.face_mask for head in heads])
        self.head_bboxes.append(np.array([head.head_box for head in heads], dtype=int).reshape(-1, 4))
        self.head_masks.append([head.head_mask for head in heads])


class HeadSegmenter(AbstractContextManager["HeadSegmenter"]):
    """Context manager that segments head regions with MediaPipe's selfie segmentation.

    Attributes:
        count: number of heads segmented so far.
        empty: number of those in which no person was found around the face.
        seconds: total time of the segmentation.
    """

    def __init__(self, model: Path | None = None) -> None:
        """Load a segmenter.

        Args:
            model: a TensorFlow Lite segmenter with one confidence output; None means the one that MediaPipe contains.

        Raises:
            UserError: MediaPipe or the model is missing or cannot be used.
        """
        try:  # takes a second to import, and only masks need it
            import mediapipe
            from mediapipe.tasks.python import BaseOptions, vision
        except ImportError as error:
            raise UserError(f"--mask needs MediaPipe ({error}); pip install -r requirements.txt") from None
        self.count, self.empty, self.seconds = 0, 0, 0.0
        self._mediapipe = mediapipe
        model = model or Path(mediapipe.__file__).parent / "modules/selfie_segmentation/selfie_segmentation.tflite"
        if not model.is_file():
            raise UserError(f"{model}: no such segmenter model; give a .tflite with --segmenter_model")
        options = vision.ImageSegmenterOptions(
            base_options=BaseOptions(model_asset_buffer=model.read_bytes()),
            output_confidence_masks=True,
            output_category_mask=False,
        )
        try:
            with _quiet_stderr():
                self._segmenter = vision.ImageSegmenter.create_from_options(options)
                self._confidence(np.zeros((8, 8, 3), np.uint8))  # only the first call logs
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{model}: MediaPipe cannot use it as a segmenter ({reason})") from None

    def segment(self, image: np.ndarray, face: np.ndarray) -> HeadMask:
        """Segment the head around one face.

        Args:
            image: (H, W, 3) uint8 BGR.
            face: (4,) xyxy in pixels of the image.
        """
        start = time.perf_counter()
        head_box, face_box = head_region(face, (image.shape[0], image.shape[1]))
        region = crop(image, head_box)
        mask = np.zeros(region.shape[:2], np.uint8)
        if region.size:
            mask = (self._confidence(region) > _PERSON_CONFIDENCE).astype(np.uint8) * np.uint8(255)
        found = HeadMask(head_box, face_box, mask)
        self.count += 1
        self.empty += not found.face_mask.any()
        self.seconds += time.perf_counter() - start
        return found

    def describe(self) -> str:
        """Describe the number of heads and the time for each in one line."""
        each = 1000 * self.seconds / max(self.count, 1)
        empty = f", {self.empty} of them without a person where the face is" if self.empty else ""
        return f"{self.count} heads segmented{empty}, {each:.1f} ms each"

    def _confidence(self, region: np.ndarray) -> np.ndarray:
        """(H, W) float confidence in [0, 1] that each pixel belongs to the person."""
        rgb = cv2.cvtColor(region, cv2.COLOR_BGR2RGB)
        frame = self._mediapipe.Image(image_format=self._mediapipe.ImageFormat.SRGB, data=rgb)
        # The last mask is the person: selfie models have a single mask, other models put the background first.
        confidence: np.ndarray = self._segmenter.segment(frame).confidence_masks[-1].numpy_view()
        return confidence.reshape(region.shape[:2])

    def __exit__(self, *error: object) -> None:
        self._segmenter.close()


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Suppress what MediaPipe's native code writes to standard error while it starts, and its Python warnings."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
