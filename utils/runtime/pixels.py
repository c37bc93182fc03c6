"""The type and the number of an image's pixels."""

from __future__ import annotations

import math

import cv2
import numpy as np

_MAX_UNIT_VALUE = 2.0  # values meant for 0 to 1 may overshoot after a filter or lossy compression
_ROWS_AT_ONCE = 256


def to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Convert pixels of any type to uint8 by the range that they use: 0 to 1, 8, 12 or 16 bits, or any other."""
    if pixels.dtype == np.uint8:
        return pixels
    if not pixels.size:
        return pixels.astype(np.uint8)
    parts = [pixels[row : row + _ROWS_AT_ONCE] for row in range(0, len(pixels), _ROWS_AT_ONCE)]
    ranges = [(float(values.min()), float(values.max())) for values in map(_finite, parts)]
    low, high = min(0.0, *(each[0] for each in ranges)), max(0.0, *(each[1] for each in ranges))
    offset, limit, largest = 0.0, next((float(limit) for limit in (255, 4095, 65535) if high <= limit), 0.0), math.inf
    if low < 0 or high > 65535:
        offset, limit = low, high - low
    elif pixels.dtype == bool or (pixels.dtype.kind == "f" and high <= _MAX_UNIT_VALUE):
        limit, largest = 1.0, 1.0
    factor = 255 / limit
    result = np.empty(pixels.shape, np.uint8)
    for row, part in zip(range(0, len(pixels), _ROWS_AT_ONCE), parts, strict=True):
        result[row : row + _ROWS_AT_ONCE] = ((_finite(part) - offset).clip(max=largest) * factor).round()
    return result


def _finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float32), posinf=0, neginf=0)


def limited_size(size_hw: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """Height and width of an image after `resize_to_limit`."""
    height, width = size_hw
    if not max_pixels or height * width <= max_pixels:
        return size_hw
    factor = math.sqrt(max_pixels / (height * width))
    return max(1, int(height * factor)), max(1, int(width * factor))


def resize_to_limit(image: np.ndarray, max_pixels: int) -> np.ndarray:
    """Resize an image of more than `max_pixels` pixels to that number, keeping its aspect ratio.

    Args:
        image: (H, W, 3).
        max_pixels: largest number of pixels; 0 means no limit.
    """
    size_hw = (image.shape[0], image.shape[1])
    limited_hw = limited_size(size_hw, max_pixels)
    return image if limited_hw == size_hw else cv2.resize(image, limited_hw[::-1], interpolation=cv2.INTER_AREA)
