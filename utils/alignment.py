"""Crops of faces: plain ones with a margin, and aligned ones as face recognition expects them."""

from __future__ import annotations

import cv2
import numpy as np

ALIGNED_SIDE = 112
# Landmarks of an aligned face of 112 x 112 pixels in ArcFace (arXiv:1801.07698).
_TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


def plain_crop(image: np.ndarray, box: np.ndarray, margin: float) -> np.ndarray:
    """Crop a face and its surroundings.

    Args:
        image: (H, W, 3).
        box: (4,) xyxy in pixels of the image.
        margin: margin on each side, relative to the longer side of the box.

    Returns:
        (h, w, 3), clipped to the image, and empty for a face outside it.
    """
    x1, y1, x2, y2 = box
    added = margin * max(x2 - x1, y2 - y1)
    left, top = max(0, int(np.floor(x1 - added))), max(0, int(np.floor(y1 - added)))
    return image[top : max(top, int(np.ceil(y2 + added))), left : max(left, int(np.ceil(x2 + added)))]


def aligned_crop(image: np.ndarray, landmarks: np.ndarray, side: int = ALIGNED_SIDE) -> np.ndarray:
    """Rotate and scale a face so that its landmarks match ArcFace's template (arXiv:1801.07698).

    Args:
        image: (H, W, 3).
        landmarks: (5, 2) in pixels of the image.
        side: side of the crop in pixels, to which the template is scaled.

    Returns:
        (side, side, 3); black outside the image.
    """
    template = _TEMPLATE * (side / ALIGNED_SIDE)
    return cv2.warpAffine(image, similarity_transform(landmarks, template), (side, side))


def similarity_transform(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The rotation, scaling and translation that takes points closest to targets, by least squares (Umeyama, 1991).

    Args:
        points: (N, 2), not all the same.
        targets: (N, 2).

    Returns:
        (2, 3) matrix for `cv2.warpAffine`.
    """
    # In the complex plane a rotation with scaling is a product, so this is linear regression of one variable.
    source, target = (np.asarray(values, np.float64) @ [1, 1j] for values in (points, targets))
    centred = source - source.mean()
    factor = np.vdot(centred, target - target.mean()) / max(np.vdot(centred, centred).real, 1e-12)
    shift = target.mean() - factor * source.mean()
    return np.array([[factor.real, -factor.imag, shift.real], [factor.imag, factor.real, shift.imag]])
