"""Making faces unrecognisable in images and videos."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from utils.results.masks import HeadMask
from utils.runtime.files import shortened

# The hidden region relative to the box of the face, which ends at the chin and below the hair.
_REGION_SCALE = 1.3
# Number of cells that remain along the shorter side of a hidden region, whatever its size.
_CELLS = 6
# A mask is used only if it covers this fraction of the face, because segmentation fails for some faces.
_MIN_COVERED_FRACTION = 0.9


def anonymise(image: np.ndarray, boxes: np.ndarray, method: str, heads: Sequence[HeadMask] | None = None) -> np.ndarray:
    """Copy an image and make its faces unrecognisable.

    An ellipse around each face is hidden, or the pixels of the person if a mask covers the face.

    Args:
        image: (H, W, 3) uint8 BGR.
        boxes: (N, 4) xyxy in pixels of the image.
        method: `blur` and `pixelate` leave 6 cells across a face, smoothly joined or not; `solid` is black.
        heads: head mask of each face, or None.
    """
    canvas = image.copy()
    for index, box in enumerate(boxes):
        left, top, right, bottom = _region(box, image.shape[:2])
        if right <= left or bottom <= top:
            continue
        shape = _ellipse(box, (left, top, right, bottom), _REGION_SCALE)
        if heads is not None:
            shape = _mask_shape(heads[index], box, (left, top, right, bottom), shape)
        hidden = _hide(image[top:bottom, left:right], method)
        np.copyto(canvas[top:bottom, left:right], hidden, where=shape[..., None] > 0)
    return canvas


def _region(box: np.ndarray, size_hw: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The rectangle in the image that contains the hidden ellipse."""
    centre, half = (box[:2] + box[2:]) / 2, np.maximum(box[2:] - box[:2], 1) / 2 * _REGION_SCALE
    left, top = np.maximum(np.floor(centre - half), 0).astype(int)
    right, bottom = np.minimum(np.ceil(centre + half), size_hw[1::-1]).astype(int)
    return int(left), int(top), int(right), int(bottom)


def _ellipse(box: np.ndarray, region: tuple[int, int, int, int], scale: float) -> np.ndarray:
    """(H, W) bool mask of the region: the ellipse that touches the sides of the box scaled by `scale`."""
    left, top, right, bottom = region
    centre, half = (box[:2] + box[2:]) / 2, np.maximum(box[2:] - box[:2], 1) / 2 * scale
    x = (np.arange(left, right) + 0.5 - centre[0]) / half[0]
    y = (np.arange(top, bottom) + 0.5 - centre[1]) / half[1]
    return (x[None] ** 2 + y[:, None] ** 2) <= 1


def _mask_shape(head: HeadMask, box: np.ndarray, region: tuple[int, int, int, int], ellipse: np.ndarray) -> np.ndarray:
    """The person's pixels in the region, or the ellipse where they leave a part of the face visible."""
    left, top, right, bottom = region
    mask = np.zeros(ellipse.shape, bool)
    x1, y1 = max(left, head.head_box[0]), max(top, head.head_box[1])
    x2, y2 = min(right, head.head_box[2]), min(bottom, head.head_box[3])
    if x2 > x1 and y2 > y1:
        part = head.head_mask[
            y1 - head.head_box[1] : y2 - head.head_box[1], x1 - head.head_box[0] : x2 - head.head_box[0]
        ]
        mask[y1 - top : y2 - top, x1 - left : x2 - left] = part > 0
    face = _ellipse(box, region, 1.0)
    is_covered = mask[face].mean() >= _MIN_COVERED_FRACTION if face.any() else False
    return mask | face if is_covered else ellipse


def _hide(region: np.ndarray, method: str) -> np.ndarray:
    height, width = region.shape[:2]
    if method == "solid":
        return np.zeros_like(region)
    cell = max(2.0, min(height, width) / _CELLS)
    cells = cv2.resize(
        region, (max(1, round(width / cell)), max(1, round(height / cell))), interpolation=cv2.INTER_AREA
    )
    how = cv2.INTER_NEAREST if method == "pixelate" else cv2.INTER_CUBIC
    return cv2.resize(cells, (width, height), interpolation=how)


def add_audio(video: Path, source: Path) -> str | None:
    """Copy the audio of the source into a video, if the source has audio and ffmpeg is installed.

    Args:
        video: video without audio, which is replaced.
        source: video file with the audio.

    Returns:
        Why the video has no audio, or None.
    """
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        return "without sound, because ffmpeg is not installed"
    joined = video.with_name(shortened(f"{video.stem}.tmp.mp4"))
    command = [ffmpeg, *"-v error -nostdin -y".split(), "-i", str(video), "-i", str(source)]
    command += [*"-map 0:v:0 -map 1:a? -c:v copy -c:a aac -shortest".split(), str(joined)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode:
        joined.unlink(missing_ok=True)
        return f"without sound, because ffmpeg failed ({(result.stderr.strip() or 'no reason given').splitlines()[-1]})"
    joined.replace(video)
    return None
