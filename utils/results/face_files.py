"""The image files of a run: drawings, anonymised images, thumbnails, masks and crops."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from config import InferenceOptions
from utils.alignment import aligned_crop, plain_crop
from utils.drawing import draw_detections
from utils.results.anonymise import add_audio, anonymise
from utils.results.image_files import OutputImages, write_file
from utils.results.masks import HeadMask, crop
from utils.structures import Detections

_THUMBNAIL_SIDE = 400
_FRAME_SIDE = 960  # larger, because the page has no original file of a video's frame to show


@dataclass
class WrittenFiles:
    """Files written for one image, relative to the folder of the results.

    Attributes:
        entry: files of the image by kind, for `results.json`.
        faces: files of each face by kind.
        files: all files.
    """

    entry: dict[str, Any] = field(default_factory=dict)
    faces: list[dict[str, str]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


class FaceFiles:
    """Writes the files that the options select. Methods raise `OSError` if a file cannot be written."""

    def __init__(
        self,
        folder: Path,
        options: InferenceOptions,
        frames_per_second: float | None,
        video: Path | None,
        names: Set[str],
    ) -> None:
        """Prepare to write; see `ResultWriter` for `video`, and `OutputImages` for `frames_per_second` and `names`."""
        self.folder = folder
        self.options = options
        self.frames_per_second = frames_per_second
        self.video = video
        self._drawings = OutputImages(folder, "result_images", frames_per_second, names, video)
        self._anonymised = OutputImages(folder, "anonymized", frames_per_second, names, video)

    def write(
        self,
        position: int,
        name: str,
        crop_stem: str,
        image: np.ndarray,
        detections: Detections,
        heads: Sequence[HeadMask] | None,
    ) -> WrittenFiles:
        """Write the files of one image.

        Args:
            position: index of the image among all images.
            name: name of the image.
            crop_stem: beginning of the names of its crops.
            image: (H, W, 3) uint8 BGR.
            detections: faces of the image.
            heads: head mask of each face, or None without `--mask`.
        """
        written = WrittenFiles()
        for index in range(len(detections)):
            crops = self._crops(image, detections, index)
            if self.options.save_mask and heads is not None:
                crops = _mask_crops(image, heads[index]) | crops
            files = {
                kind: write_file(self.folder, f"{kind}/{crop_stem}_{index}.png", pixels)
                for kind, pixels in crops.items()
                if pixels.size  # the crop of a face outside the image is empty
            }
            written.faces.append(files)
            written.files += files.values()
        shown = image
        if self.options.anonymize is not None:
            shown = anonymise(image, detections.boxes.numpy(), self.options.anonymize, heads)
        # Of a video, one frame a second is shown.
        if self.options.page and position % max(1, round(self.frames_per_second or 1)) == 0:
            thumbnail = self._thumbnail(shown)
            written.entry["thumbnail"] = write_file(self.folder, f"thumbnails/{position:06d}.jpg", thumbnail)
            written.files.append(written.entry["thumbnail"])
        if self.options.anonymize is not None:
            written.entry["anonymized"], is_new = self._anonymised.write(name, shown)
            written.files += [written.entry["anonymized"]] if is_new else []
        if self.options.save_img:
            drawing, is_new = self._drawings.write(name, draw_detections(shown, detections))
            written.files += [drawing] if is_new else []
        return written

    def close(self) -> str | None:
        """Complete the videos, if there are any; returns a note for the user if the anonymised one has no sound."""
        self._drawings.close()
        video = self._anonymised.close()
        if video is None:
            return None
        problem: str | None = "without sound, because a camera has none"
        if self.video is not None:
            problem = add_audio(video, self.video)
        return f"{video}: {problem}" if problem else None

    def _thumbnail(self, image: np.ndarray) -> np.ndarray:
        side = _THUMBNAIL_SIDE if self.frames_per_second is None else _FRAME_SIDE
        height, width = image.shape[:2]
        factor = side / max(height, width)
        if factor >= 1:
            return image
        size = max(1, round(width * factor)), max(1, round(height * factor))
        # INTER_AREA takes several times as long for factors other than one half.
        for _ in range(int(math.log2(1 / factor))):
            image = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)

    def _crops(self, image: np.ndarray, detections: Detections, index: int) -> dict[str, np.ndarray]:
        crops = {}
        if "plain" in self.options.save_crops:
            crops["crops"] = plain_crop(image, detections.boxes[index].numpy(), self.options.crop_margin)
        if "aligned" in self.options.save_crops and detections.landmarks is not None:
            crops["aligned"] = aligned_crop(image, detections.landmarks[index].numpy(), self.options.crop_size)
        return crops


def _mask_crops(image: np.ndarray, head: HeadMask) -> dict[str, np.ndarray]:
    pixels = crop(image, head.head_box)
    face = crop(pixels, head.face_box)
    return {"masks": head.face_mask, "faces": face, "heads": pixels, "head_masks": head.head_mask}
