"""Image and video files among the results."""

from __future__ import annotations

import errno
from collections.abc import Set
from pathlib import Path, PurePosixPath

import cv2
import numpy as np

from utils.runtime.files import shortened
from utils.runtime.images import WRITABLE_SUFFIXES, write_image


def write_file(folder: Path, relative: str, pixels: np.ndarray) -> str:
    """Write an image below a folder; its name is shortened if it is too long.

    Returns:
        The path of the file relative to `folder`.

    Raises:
        OSError: the file cannot be written.
    """
    relative = shortened(relative)
    write_image(folder / relative, pixels)
    return relative


class OutputImages:
    """Writes one image for each input image, or one video with a frame for each frame of the input."""

    def __init__(
        self, folder: Path, kind: str, frames_per_second: float | None, names: Set[str], video: Path | None = None
    ) -> None:
        """Prepare to write; nothing is created yet.

        Args:
            folder: folder of the results.
            kind: name of the folder in it for these images.
            frames_per_second: frame rate of a video; None for images.
            names: names of all input images in lower case, so that no two of them share a file.
            video: video file of the input; the videos written for `a.mp4` and `a.avi` have different names.
        """
        self._folder = folder
        self._kind = kind
        self._frames_per_second = frames_per_second
        self._names = names
        self._suffix = video.suffix if video and video.suffix.lower() != ".mp4" else ""
        self._video: VideoFile | None = None

    def write(self, name: str, pixels: np.ndarray) -> tuple[str, bool]:
        """Write the image made for the input image `name`.

        Returns:
            The path of the file relative to the folder of the results, and whether the file is new: a video is created
            with its first frame.

        Raises:
            OSError: the file cannot be written.
        """
        if self._frames_per_second is None:
            return write_file(self._folder, f"{self._kind}/{self._file_name(name)}", pixels), True
        relative = shortened(f"{self._kind}/{name.rsplit('_', 1)[0]}{self._suffix}.mp4")
        is_new = self._video is None
        if self._video is None:
            self._video = VideoFile(self._folder / relative, self._frames_per_second)
        self._video.write(pixels)
        return relative, is_new

    def _file_name(self, name: str) -> str:
        """The name itself, or with `.png` behind it if its format cannot be written."""
        if PurePosixPath(name).suffix.lower() not in WRITABLE_SUFFIXES:
            name += ".png"
            while name.lower() in self._names:  # another image already has this name
                name += ".png"
        return name

    def close(self) -> Path | None:
        """Complete the video and return its path, or return None if there is no video."""
        video, self._video = self._video, None
        if video is None:
            return None
        video.close()
        return video.path


class VideoFile:
    """An .mp4 file that gets its name when it is complete."""

    def __init__(self, path: Path, frames_per_second: float) -> None:
        self.path = path
        self._frames_per_second = frames_per_second
        self._temporary = path.with_name(shortened(f"{path.stem}.tmp.mp4"))
        self._writer: cv2.VideoWriter | None = None

    def write(self, frame: np.ndarray) -> None:
        """Append a frame; all have the size of the first.

        Raises:
            OSError: the video cannot be encoded.
        """
        # Codecs need frames of even size: the last row and column are repeated.
        odd_rows, odd_columns = frame.shape[0] % 2, frame.shape[1] % 2
        frame = cv2.copyMakeBorder(frame, 0, odd_rows, 0, odd_columns, cv2.BORDER_REPLICATE)
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            codec, size = cv2.VideoWriter.fourcc(*"mp4v"), (frame.shape[1], frame.shape[0])
            writer = cv2.VideoWriter(str(self._temporary), codec, self._frames_per_second, size)
            if not writer.isOpened():
                reason = f"OpenCV cannot encode it at {self._frames_per_second} frames/s"
                raise OSError(errno.EIO, reason, str(self.path))
            self._writer = writer
        self._writer.write(frame)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.release()
            self._temporary.replace(self.path)
