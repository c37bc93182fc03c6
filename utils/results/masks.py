"""Head and face masks: where the head is, and which of its pixels are the person."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import cv2
import numpy as np

from config import UserError
from utils.structures import Detections

Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in whole pixels; x2 and y2 lie behind the last pixel

# The head region's sides are the face's times this, as in the original.
_HEAD_SCALE = 4
# A pixel belongs to the person from this confidence on, as in the original.
_PERSON_CONFIDENCE = 0.1


@dataclass(frozen=True)
class Head:
    """A face's surroundings, segmented.

    Attributes:
        head_box: the head region in pixels of the image, clipped to it.
        face_box: the face in pixels of the head region.
        head_mask: (H, W) uint8 over the head region, 255 where the person is, else 0.
    """

    head_box: Box
    face_box: Box
    head_mask: np.ndarray

    @property
    def face_mask(self) -> np.ndarray:
        """The part of `head_mask` inside the face box."""
        return cut(self.head_mask, self.face_box)


def cut(image: np.ndarray, box: Box) -> np.ndarray:
    """The pixels of a box that lies within the image."""
    x1, y1, x2, y2 = box
    return image[y1:y2, x1:x2]


def head_region(face: np.ndarray, image_size_hw: tuple[int, int]) -> tuple[Box, Box]:
    """The head region around a face, and the face within it.

    The region is centred on the face and `_HEAD_SCALE` times as wide and high, then clipped to the image. The face is
    given relative to the region as it is after clipping, so it is the same pixels at a border as elsewhere.

    Args:
        face: (4,) xyxy in pixels of the image; may reach outside it.
        image_size_hw: height and width in pixels.

    Returns:
        The head box in the image and the face box in the head box; both may be empty, for a face outside the image.
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
    """What was found: five lists with an entry for each image that could be read, in one order.

    Attributes:
        result_bboxes: (N, 4) int faces, xyxy in pixels of the image.
        face_bboxes: (N, 4) int faces, xyxy in pixels of their head regions.
        face_masks: N uint8 masks of the faces, 255 where the person is.
        head_bboxes: (N, 4) int head regions, xyxy in pixels of the image.
        head_masks: N uint8 masks of the head regions.

    Without `--mask` all but `result_bboxes` hold empty entries.
    """

    result_bboxes: list[np.ndarray]
    face_bboxes: list[np.ndarray]
    face_masks: list[list[np.ndarray]]
    head_bboxes: list[np.ndarray]
    head_masks: list[list[np.ndarray]]

    def add(self, detections: Detections, heads: Sequence[Head]) -> None:
        self.result_bboxes.append(detections.boxes.int().numpy())
        self.face_bboxes.append(np.array([head.face_box for head in heads], dtype=int).reshape(-1, 4))
        self.face_masks.append([head.face_mask for head in heads])
        self.head_bboxes.append(np.array([head.head_box for head in heads], dtype=int).reshape(-1, 4))
        self.head_masks.append([head.head_mask for head in heads])


class HeadSegmenter:
    """MediaPipe's selfie segmentation on head regions. Made once, used for every face; a context manager.

    Attributes:
        count: heads segmented so far.
        seconds: that they took.
    """

    def __init__(self, model: Path | None = None) -> None:
        """Load `model`, a TensorFlow Lite segmenter with one confidence output; None takes MediaPipe's own.

        Raises:
            UserError: MediaPipe or the model is missing or cannot be used.
        """
        try:  # imported only here: it takes a second, and only masks need it
            import mediapipe
            from mediapipe.tasks.python import BaseOptions, vision
        except ImportError as error:
            raise UserError(f"--mask needs MediaPipe ({error}); pip install -r requirements.txt") from None
        self.count, self.seconds = 0, 0.0
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
                self._confidence(np.zeros((8, 8, 3), np.uint8))  # the first call is the one that logs
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{model}: MediaPipe cannot use it as a segmenter ({reason})") from None

    def segment(self, image: np.ndarray, face: np.ndarray) -> Head:
        """Find the head around one face.

        Args:
            image: (H, W, 3) uint8 BGR.
            face: (4,) xyxy in pixels of the image.
        """
        start = time.perf_counter()
        head_box, face_box = head_region(face, (image.shape[0], image.shape[1]))
        region = cut(image, head_box)
        mask = np.zeros(region.shape[:2], np.uint8)
        if region.size:
            mask = (self._confidence(region) > _PERSON_CONFIDENCE).astype(np.uint8) * np.uint8(255)
        self.count += 1
        self.seconds += time.perf_counter() - start
        return Head(head_box, face_box, mask)

    def describe(self) -> str:
        """What it did and what that cost, in a line."""
        each = 1000 * self.seconds / max(self.count, 1)
        return f"{self.count} heads segmented, {each:.1f} ms each"

    def _confidence(self, region: np.ndarray) -> np.ndarray:
        """(H, W) float in [0, 1]: how surely each pixel is the person's."""
        rgb = cv2.cvtColor(region, cv2.COLOR_BGR2RGB)
        frame = self._mediapipe.Image(image_format=self._mediapipe.ImageFormat.SRGB, data=rgb)
        # The last of the masks is the person's: selfie models have one, others put the background first.
        confidence: np.ndarray = self._segmenter.segment(frame).confidence_masks[-1].numpy_view()
        return confidence.reshape(region.shape[:2])

    def __enter__(self) -> HeadSegmenter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._segmenter.close()


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Silence what MediaPipe's native code tells standard error while it starts, and its Python warnings."""
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
