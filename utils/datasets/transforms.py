"""Training-time changes of an image together with its faces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from config import DataConfig
from utils.landmarks import MIRRORED_LANDMARKS

Generator = np.random.Generator
_INTERPOLATIONS = (cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA, cv2.INTER_NEAREST, cv2.INTER_LANCZOS4)
# A face thinner than this in the crop has no pixels to learn from.
_MIN_FACE_SIDE = 1.0
_MAX_BLUR_RADIUS = 4
_JPEG_QUALITIES = (30, 90)


@dataclass(frozen=True)
class Sample:
    """An image and its faces, all in pixels of that image.

    Attributes:
        image: (H, W, 3) uint8 BGR.
        boxes: (N, 4) float32 xyxy.
        landmarks: (N, 5, 2) float32; meaningless where `has_landmarks` is False.
        has_landmarks: (N,) bool.
    """

    image: np.ndarray
    boxes: np.ndarray
    landmarks: np.ndarray
    has_landmarks: np.ndarray

    def select(self, faces: np.ndarray) -> Sample:
        return Sample(self.image, self.boxes[faces], self.landmarks[faces], self.has_landmarks[faces])


def augment(sample: Sample, side: int, config: DataConfig, fill: Sequence[float], rng: Generator) -> Sample:
    """A square training crop of `side` pixels: turned, mirrored, coloured, blurred and compressed at random.

    `fill` is the BGR colour of what lies outside the image.
    """
    region = _random_square(sample, (config.min_crop_scale, config.max_crop_scale), rng)
    if config.rotation_degrees > 0:
        sample = crop_turned(sample, region, rng.uniform(-config.rotation_degrees, config.rotation_degrees), fill)
    else:
        sample = crop(sample, region, fill)
    sample = resize_square(sample, side, int(rng.choice(_INTERPOLATIONS)))
    if rng.random() < config.flip_probability:
        sample = mirror(sample)
    return replace(sample, image=_change_pixels(sample.image, config, rng))


def _change_pixels(image: np.ndarray, config: DataConfig, rng: Generator) -> np.ndarray:
    """What happens to a picture on its way, in that order: light, optics, compression."""
    image = change_colours(image, config.colour_probability, rng)
    if rng.random() < config.grey_probability:
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    if rng.random() < config.blur_probability:
        image = blur(image, rng)
    if rng.random() < config.jpeg_probability:
        image = compress(image, int(rng.integers(*_JPEG_QUALITIES, endpoint=True)))
    return image


def mosaic(quarters: Sequence[Sample]) -> Sample:
    """Four square samples of one size as the quarters of one: top left, top right, bottom left, bottom right.

    Faces get smaller without the flat padding that a zoomed-out picture would bring, which shifts the statistics of
    batch normalisation away from those of real pictures.
    """
    side = quarters[0].image.shape[0]
    rows = [np.concatenate([left.image, right.image], axis=1) for left, right in (quarters[:2], quarters[2:])]
    moved = [
        (quarter, np.array([column * side, row * side], np.float32))
        for quarter, (row, column) in zip(quarters, np.ndindex(2, 2), strict=True)
    ]
    return Sample(
        image=np.concatenate(rows, axis=0),
        boxes=np.concatenate([quarter.boxes + np.tile(offset, 2) for quarter, offset in moved]),
        landmarks=np.concatenate([quarter.landmarks + offset for quarter, offset in moved]),
        has_landmarks=np.concatenate([quarter.has_landmarks for quarter, _ in moved]),
    )


def crop(sample: Sample, region_xywh: tuple[int, int, int, int], fill: Sequence[float] = (0, 0, 0)) -> Sample:
    """Cut a region out; it may reach outside the image, where it has the colour `fill`.

    Faces whose centre lies outside are dropped; the boxes of the others are clipped to the region. The pixels may be
    a view of those of `sample`.
    """
    offset = np.array(region_xywh[:2], np.float32)
    return _drop_and_clip(
        replace(
            sample,
            image=_cut(sample.image, region_xywh, fill),
            boxes=sample.boxes - np.tile(offset, 2),
            landmarks=sample.landmarks - offset,
        )
    )


def crop_turned(
    sample: Sample, region_xywh: tuple[int, int, int, int], degrees: float, fill: Sequence[float] = (0, 0, 0)
) -> Sample:
    """What `crop` cuts out once the image is turned counter-clockwise about the centre of the region.

    A box becomes the bounds of its inscribed ellipse, turned: a head is round, and the bounds of a box's corners would
    be up to 1.4 times as wide as the face.
    """
    x, y, width, height = region_xywh
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rotation = np.array([[cosine, sine], [-sine, cosine]])  # y points downwards
    old_centre, new_centre = np.array([x + width / 2, y + height / 2]), np.array([width / 2, height / 2])

    # Only what can turn into the region, for OpenCV warps no image that is longer than 32,767 pixels.
    reach = math.ceil(math.hypot(width, height) / 2) + 1
    corner = np.floor(old_centre).astype(int) - reach
    around = _cut(sample.image, (int(corner[0]), int(corner[1]), 2 * reach + 1, 2 * reach + 1), fill)
    # OpenCV counts from the centre of the first pixel, boxes from its corner.
    shift = new_centre - 0.5 - rotation @ (old_centre - corner - 0.5)
    image = cv2.warpAffine(around, np.column_stack([rotation, shift]), (width, height), borderMode=cv2.BORDER_REPLICATE)

    centres = ((sample.boxes[:, :2] + sample.boxes[:, 2:]) / 2 - old_centre) @ rotation.T + new_centre
    radii = np.sqrt(((sample.boxes[:, 2:] - sample.boxes[:, :2]) / 2) ** 2 @ rotation**2)
    return _drop_and_clip(
        replace(
            sample,
            image=image,
            boxes=np.concatenate([centres - radii, centres + radii], axis=1).astype(np.float32),
            landmarks=((sample.landmarks - old_centre) @ rotation.T + new_centre).astype(np.float32),
        )
    )


def _cut(image: np.ndarray, region_xywh: tuple[int, int, int, int], fill: Sequence[float]) -> np.ndarray:
    """(H, W, 3) pixels of a region, a view where it lies within the image, else filled."""
    x, y, width, height = region_xywh
    image_height, image_width = image.shape[:2]
    left, top = max(0, x), max(0, y)
    right, bottom = max(left, min(image_width, x + width)), max(top, min(image_height, y + height))
    if (right - left, bottom - top) == (width, height):
        return image[top:bottom, left:right]
    region = np.empty((height, width, 3), np.uint8)
    region[:] = np.rint(fill).astype(np.uint8)
    region[top - y : bottom - y, left - x : right - x] = image[top:bottom, left:right]
    return region


def _drop_and_clip(sample: Sample) -> Sample:
    """Without the faces whose centre lies outside the image; the boxes of the others end at its borders."""
    height, width = sample.image.shape[:2]
    centres = (sample.boxes[:, :2] + sample.boxes[:, 2:]) / 2
    kept = sample.select(((centres >= 0) & (centres < (width, height))).all(axis=1))
    boxes: np.ndarray = np.clip(kept.boxes, 0, np.array([width, height] * 2, np.float32))
    return replace(kept, boxes=boxes)


def resize_square(sample: Sample, side: int, interpolation: int = cv2.INTER_LINEAR) -> Sample:
    """Scale a square sample to `side`; faces that become thinner than a pixel are dropped."""
    scale = side / sample.image.shape[0]
    image = cv2.resize(sample.image, (side, side), interpolation=interpolation)
    scaled = replace(
        sample,
        image=image,
        boxes=(sample.boxes * scale).astype(np.float32),
        landmarks=(sample.landmarks * scale).astype(np.float32),
    )
    return scaled.select((scaled.boxes[:, 2:] - scaled.boxes[:, :2] >= _MIN_FACE_SIDE).all(axis=1))


def mirror(sample: Sample) -> Sample:
    """Flip left and right, and swap the landmarks that this exchanges. Inverts itself."""
    width = sample.image.shape[1]
    boxes = sample.boxes.copy()
    boxes[:, [0, 2]] = width - sample.boxes[:, [2, 0]]
    landmarks = sample.landmarks[:, MIRRORED_LANDMARKS].copy()
    landmarks[:, :, 0] = width - landmarks[:, :, 0]
    return replace(sample, image=cv2.flip(sample.image, 1), boxes=boxes, landmarks=landmarks)


def change_colours(image: np.ndarray, probability: float, rng: Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue, each with `probability`, in the ranges of SSD (arXiv:1512.02325).

    On look-up tables: ten times as fast as torchvision's ColorJitter at 640 x 640.
    """
    levels = np.arange(256, dtype=np.float32)
    brightness = rng.uniform(-32, 32) if rng.random() < probability else 0.0
    contrast = rng.uniform(0.5, 1.5) if rng.random() < probability else 1.0
    if brightness != 0 or contrast != 1:
        image = cv2.LUT(image, _as_pixels(levels * contrast + brightness))
    saturation = rng.uniform(0.5, 1.5) if rng.random() < probability else 1.0
    hue = int(rng.integers(-18, 19)) if rng.random() < probability else 0
    if saturation == 1 and hue == 0:
        return image
    tables = np.stack([(levels + hue) % 180, _as_pixels(levels * saturation), levels], axis=-1).astype(np.uint8)
    return cv2.cvtColor(cv2.LUT(cv2.cvtColor(image, cv2.COLOR_BGR2HSV), tables[None]), cv2.COLOR_HSV2BGR)


def blur(image: np.ndarray, rng: Generator) -> np.ndarray:
    """Out of focus or shaken, as often the one as the other, by up to `_MAX_BLUR_RADIUS` pixels."""
    radius = int(rng.integers(1, _MAX_BLUR_RADIUS, endpoint=True))
    if rng.random() < 0.5:
        return cv2.GaussianBlur(image, (2 * radius + 1, 2 * radius + 1), 0)
    return blur_by_motion(image, radius, rng.uniform(0, 180))


def blur_by_motion(image: np.ndarray, radius: int, degrees: float) -> np.ndarray:
    """Each pixel is the mean of those on a line through it that reaches `radius` pixels to either side."""
    kernel = np.zeros((2 * radius + 1, 2 * radius + 1), np.float32)
    x, y = round(radius * math.cos(math.radians(degrees))), round(radius * math.sin(math.radians(degrees)))
    cv2.line(kernel, (radius - x, radius + y), (radius + x, radius - y), (1.0,))
    return cv2.filter2D(image, -1, kernel / kernel.sum())


def compress(image: np.ndarray, quality: int) -> np.ndarray:
    """The image as a JPEG of this quality, from 1 to 100, shows it."""
    _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR)


def _as_pixels(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _random_square(sample: Sample, scales: tuple[float, float], rng: Generator) -> tuple[int, int, int, int]:
    """A square (x, y, side, side) of `scales` times the short side that holds the centre of a random face, if any."""
    height, width = sample.image.shape[:2]
    side = max(1, round(rng.uniform(*scales) * min(height, width)))
    centre_x, centre_y = rng.uniform(0, width), rng.uniform(0, height)
    if len(sample.boxes) > 0:
        x1, y1, x2, y2 = sample.boxes[rng.integers(len(sample.boxes))]
        centre_x, centre_y = (x1 + x2) / 2, (y1 + y2) / 2
    return _start_around(centre_x, side, width, rng), _start_around(centre_y, side, height, rng), side, side


def _start_around(centre: float, side: int, length: int, rng: Generator) -> int:
    """Start of a stretch of `side` that covers `centre` and lies within [0, length), or covers that where longer."""
    first, last = min(0, length - side), max(0, length - side)
    lowest = int(np.clip(np.ceil(centre - side + 1), first, last))
    highest = int(np.clip(np.floor(centre), first, last))
    return int(rng.integers(lowest, max(lowest, highest) + 1))
