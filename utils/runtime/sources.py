"""Where pictures come from: a folder, one file, a list or a pattern of files, a video or a camera."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from config import UserError
from utils.results.files import OUTPUT_FOLDERS
from utils.runtime.experiment import user_path
from utils.runtime.images import IMAGE_SUFFIXES, UnreadableImageError, read_image
from utils.runtime.threads import map_in_order

LIST_SUFFIXES = frozenset([".txt", ".lst"])
VIDEO_SUFFIXES = frozenset(".mp4 .avi .mov .mkv .webm .m4v .mpg .mpeg .wmv .flv .ts .3gp".split())
_READERS = 2  # threads; what they hold ready is all that memory is needed for


class SourceError(UserError):
    """There is nothing to read where the user pointed."""


@dataclass(frozen=True)
class Picture:
    """One picture of a source, read or not.

    Attributes:
        name: path relative to the folder that is read, with forward slashes; of a frame, a name made from its number.
        image: (H, W, 3) uint8 BGR, or None if it could not be read.
        problem: why it could not be read.
        position: its place among all pictures of its source, from 0.
    """

    name: str
    image: np.ndarray | None
    problem: str | None = None
    position: int = 0


class Source(Protocol):
    """Pictures in a fixed order.

    Attributes:
        description: for messages.
        total: how many there are, or None where that is not known in advance.
        names: of all pictures, where they are known in advance.
        ignored: files that are not pictures by their names.
        frames_per_second: of a video or camera, None of files.
    """

    description: str
    total: int | None
    names: list[str]
    ignored: int
    frames_per_second: float | None

    def __iter__(self) -> Iterator[Picture]: ...


def open_source(name: str, data_root: Path, exclude: Path, max_frames: int) -> Source:
    """What `--inference_dir` means.

    Args:
        name: a folder or file below `data_root`, any other path, or a camera's index.
        data_root: looked in first.
        exclude: the folder of the results. It is not read, and where it is the one to be read, what runs write there.
        max_frames: of a video or camera; 0 is no limit.

    Raises:
        SourceError: it does not exist, holds no picture, or cannot be opened.
    """
    candidates = [data_root / name, user_path(name)]
    found = next((path for path in candidates if path.exists()), None)
    if found is None and any(mark in name for mark in "*?["):
        return _match_pattern(name, candidates)
    if found is None and name.isdecimal():
        return Video(int(name), f"camera{name}", max_frames)
    if found is None:
        raise SourceError(f"--inference_dir {name}: neither {candidates[0]} nor {candidates[1]} exists")
    if found.is_dir():
        return ImageFolder(found, exclude)
    if found.suffix.lower() in LIST_SUFFIXES:
        return _read_list(found)
    if found.suffix.lower() in VIDEO_SUFFIXES:
        return Video(found, found.stem, max_frames)
    return ImageFile(found)


def _match_pattern(pattern: str, candidates: Sequence[Path]) -> Source:
    for candidate in candidates:
        # Path.glob takes no absolute pattern.
        matched = map(Path, sorted(glob.glob(str(candidate), recursive=True)))  # noqa: PTH207
        paths = [path for path in matched if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES]
        if paths:
            return ImageList(paths, pattern)
    raise SourceError(f"--inference_dir {pattern}: no image matches it, here or in {candidates[0].parent}")


def _read_list(file: Path) -> Source:
    """The paths in a text file, one a line, from where the command runs or, if nothing is there, from the file."""
    try:
        lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise SourceError(f"{file}: cannot be read ({error.strerror})") from None
    paths = [Path(line.strip()) for line in lines if line.strip()]
    if not paths:
        raise SourceError(f"{file}: names no image; expected a path a line")
    return ImageList(list(dict.fromkeys(path if path.exists() else file.parent / path for path in paths)), str(file))


class ImageFiles:
    """Image files in a fixed order, of which any can be read.

    Attributes:
        names: paths relative to `folder`, with forward slashes.
    """

    frames_per_second: float | None = None

    def __init__(self, description: str, folder: Path, names: list[str], ignored: int = 0) -> None:
        self.description = description
        self.folder = folder
        self.names = names
        self.total: int | None = len(names)
        self.ignored = ignored

    def __iter__(self) -> Iterator[Picture]:
        return self.read(range(len(self.names)))

    def read(self, positions: Sequence[int]) -> Iterator[Picture]:
        """The pictures at these positions of `names`, in the order given."""
        pictures = read_pictures((self.names[position], self.folder / self.names[position]) for position in positions)
        for position, picture in zip(positions, pictures, strict=True):
            yield replace(picture, position=position)

    def digest(self) -> str:
        """SHA-256 of the paths in their order, in hexadecimal."""
        digest = hashlib.sha256(os.fsencode(self.folder.absolute()))
        for name in self.names:
            digest.update(b"\0" + os.fsencode(name))
        return digest.hexdigest()


class ImageFile(ImageFiles):
    """A single image file, whatever its suffix."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), path.parent, [path.name])


class ImageFolder(ImageFiles):
    """All image files below a folder, sorted by their paths; hidden files and folders are left alone."""

    def __init__(self, folder: Path, exclude: Path) -> None:
        names, files = [], 0
        for path in _walk(folder, {(exclude / name).resolve() for name in ("", *OUTPUT_FOLDERS)}):
            files += 1
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_fifo():
                names.append(path.relative_to(folder).as_posix())
        if not names:
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            raise SourceError(f"{folder}: holds no image (looked for {suffixes}, in any case)")
        super().__init__(str(folder), folder, sorted(names), ignored=files - len(names))


class ImageList(ImageFiles):
    """Image files that a pattern or a list names, in its order, each under its path from the folder that holds all.

    A file that does not exist comes out with its problem, like one that cannot be read.
    """

    def __init__(self, paths: Sequence[Path], description: str) -> None:
        """`paths` holds one or more, none of them twice."""
        absolute = [path.absolute() for path in paths]
        folder = Path(os.path.commonpath([path.parent for path in absolute]))
        super().__init__(description, folder, [path.relative_to(folder).as_posix() for path in absolute])


class Video:
    """The frames of a video file or a camera."""

    ignored = 0

    def __init__(self, source: Path | int, stem: str, max_frames: int) -> None:
        self.names: list[str] = []  # not known in advance
        self.description = stem if isinstance(source, int) else str(source)
        self.stem = stem
        self.max_frames = max_frames
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        if not self._capture.isOpened():
            remedy = "no such camera, or it is in use" if isinstance(source, int) else "not a video that OpenCV reads"
            raise SourceError(f"{self.description}: cannot be opened; {remedy}")
        self.frames_per_second: float | None = self._capture.get(cv2.CAP_PROP_FPS) or 25.0
        frames = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        known = max(frames, 0) if isinstance(source, Path) else 0
        self.total: int | None = (min(known, max_frames) if known and max_frames else known or max_frames) or None

    def __iter__(self) -> Iterator[Picture]:
        positions = range(self.max_frames) if self.max_frames else count()
        # One thread, for frames are decoded one after another; it is ahead of what is done with them.
        with closing(map_in_order(lambda _: self._capture.read()[1], positions, threads=1)) as frames:
            number = -1
            for number, frame in enumerate(takewhile(lambda frame: frame is not None, frames)):
                yield Picture(f"{self.stem}_{number + 1:06d}.jpg", frame, position=number)
        self._capture.release()
        if number < 0:
            raise SourceError(f"{self.description}: holds no frame that OpenCV reads")


def read_pictures(files: Iterable[tuple[str, Path]]) -> Iterator[Picture]:
    """Read image files, each under a name, in their order.

    Threads read and decode the next few while the one that came out is worked on; no more are held in memory.
    """
    return map_in_order(lambda file: read_picture(file[1], file[0]), files, _READERS)


def read_picture(path: Path, name: str) -> Picture:
    """The picture in a file, under a name; with its `problem` if it cannot be read."""
    try:
        return Picture(name, read_image(path))
    except UnreadableImageError as reason:
        return Picture(name, None, str(reason))


def _walk(folder: Path, exclude: Set[Path]) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise SourceError(f"{error.filename}: cannot be read ({error.strerror})")

    for parent, folders, files in os.walk(folder, onerror=refuse):
        visible = [name for name in folders if not name.startswith(".")]
        folders[:] = [name for name in visible if (Path(parent) / name).resolve() not in exclude]
        yield from (Path(parent) / name for name in files if not name.startswith("."))
