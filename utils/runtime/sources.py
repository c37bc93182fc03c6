"""Sources of images: a folder, a file, a list or a pattern of files, a video or a camera."""

from __future__ import annotations

import glob
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np

from utils.errors import UserError
from utils.runtime.files import OUTPUT_FOLDERS, candidate_paths, is_utf8, missing, path_exists, read_lines
from utils.runtime.images import (
    IMAGE_SUFFIXES,
    LARGE_PIXELS,
    UNSUPPORTED_REASON,
    UNSUPPORTED_SUFFIXES,
    LargeImageError,
    UnreadableImageError,
    read_image_with_note,
)
from utils.runtime.threads import map_in_order

LIST_SUFFIXES = frozenset([".txt", ".lst"])
VIDEO_SUFFIXES = frozenset(
    ".mp4 .avi .mov .mkv .webm .m4v .mpg .mpeg .mpe .m1v .m2v .wmv .asf .flv .f4v .ts .mts .m2ts .3gp .3g2 .ogv .ogm "
    ".vob .mxf .divx .mjpeg .mjpg .rm .rmvb .mod .tod .dv .qt .lrv .m2t".split()
)
_MAX_READER_THREADS = 8  # each holds an image
_COMPLETE_SHARE = 0.9  # some files contain only an estimate of their number of frames
_RESULTS_REASON = "results of an earlier run; --inference_dir may name this folder itself"
_MAX_CAMERA_DIGITS = 3  # longer numbers, such as 20240102, are names of missing folders


class SourceError(UserError):
    """The source that the user named does not exist, contains no image or cannot be read."""


@dataclass(frozen=True)
class InputImage:
    """One image of a source, whether it could be read or not.

    Attributes:
        name: path relative to the source's folder, with forward slashes; for a frame, a name made from its number.
        pixels: (H, W, 3) uint8 BGR, or None if the image could not be read.
        problem: why it could not be read.
        position: index among all images of the source, from 0.
        note: remark about an image that was read, for example that the file has several pages.
        seconds: time stamp of a frame, from the beginning of the video.
    """

    name: str
    pixels: np.ndarray | None
    problem: str | None = None
    position: int = 0
    note: str | None = None
    seconds: float | None = None


def open_source(name: str, data_root: Path, exclude: Set[Path], max_frames: int) -> Source:
    """Open what `--inference_dir` names.

    Args:
        name: a path, a folder or file below `data_root`, or the index of a camera.
        data_root: folder in which other names are searched; see `candidate_paths`.
        exclude: folders that are not searched, because results are written there.
        max_frames: maximum number of frames of a video or camera; 0 means no limit.

    Raises:
        SourceError: the source does not exist, contains no image, or cannot be opened.
    """
    candidates = candidate_paths(name, data_root)
    found = next((path for path in candidates if path_exists(path)), None)
    if found is None and any(mark in name for mark in "*?["):
        return _match_pattern(name, candidates)
    if found is None and name.isdecimal() and len(name) <= _MAX_CAMERA_DIGITS:
        return VideoFrames(int(name), f"camera{name}", max_frames)
    if found is None:
        raise SourceError(f"--inference_dir {name}: {missing(candidates)}")
    if found.is_dir():
        return _search_folder(found, exclude)
    if found.suffix.lower() in LIST_SUFFIXES:
        return _read_list(found)
    if found.suffix.lower() in VIDEO_SUFFIXES:
        return VideoFrames(found, found.stem, max_frames)
    return ImageFiles(str(found), found.parent, [found.name])


def _match_pattern(pattern: str, candidates: Sequence[Path]) -> Source:
    for candidate in candidates:
        # Brackets in the name of an existing folder are no pattern. Path.glob would match hidden files.
        folder = next(parent for parent in candidate.parents if path_exists(parent))
        names = glob.glob(str(candidate.relative_to(folder)), root_dir=folder, recursive=True)  # noqa: PTH207
        matched = [folder / name for name in sorted(names)]
        images = [path for path in matched if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES]
        results = [path for path in images if _is_result(path.relative_to(folder), folder, candidate)]
        if len(results) < len(images):
            paths = [path for path in images if path not in set(results)]
            return replace(_listed_images(paths, str(candidate)), notes=_notes({_RESULTS_REASON: results}))
    raise SourceError(f"--inference_dir {pattern}: no image matches it, as {' or '.join(map(str, candidates))}")


def _is_result(path: Path, folder: Path, pattern: Path) -> bool:
    """Whether an earlier run wrote the image at this path below `folder`, and the pattern does not name its folder."""
    parents = [folder / parent for parent in path.parents]
    return any(parent.name not in pattern.parts and _is_of_a_run(parent) for parent in parents)


def _is_of_a_run(folder: Path) -> bool:
    """Whether an earlier run wrote images into this folder."""
    return folder.name in OUTPUT_FOLDERS and (folder.parent / ".records").is_dir()


def _read_list(file: Path) -> Source:
    """Open the images that a text file lists, one path per line, relative to the working directory or to the file."""
    try:
        lines = read_lines(file, errors="surrogateescape")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{file}: cannot be read ({error})") from None
    # A zero byte is escaped, because most functions refuse a path with one; reading the image will report it.
    paths = [Path(line.strip().replace("\0", "\\0")) for line in lines if line.strip()]
    if not paths:
        raise SourceError(f"{file}: names no image; expected one path per line")
    resolved = dict.fromkeys(path if path_exists(path) else file.parent / path for path in paths)
    return _listed_images(list(resolved), str(file))


def _listed_images(paths: Sequence[Path], description: str) -> ImageFiles:
    """Open image files in the order given, each named by its path relative to their common folder."""
    # Resolve `..`, so that no result of the same name is written outside the folder of the results.
    folders = {parent: Path(os.path.realpath(parent)) for parent in {path.parent for path in paths}}
    absolute = [folders[path.parent] / path.name for path in paths]
    folder = Path(os.path.commonpath(folders.values()))
    return ImageFiles(description, folder, [path.relative_to(folder).as_posix() for path in absolute])


def _search_folder(folder: Path, exclude: Set[Path]) -> Source:
    """Open all image files below a folder, sorted by path; hidden files and folders are skipped."""
    names, left_out = list[str](), defaultdict[str, list[Path]](list)
    for path in _walk(folder, {path.resolve() for path in exclude}, left_out):
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES and not _is_pipe(path):
            names.append(path.relative_to(folder).as_posix())
        elif suffix in UNSUPPORTED_SUFFIXES:
            left_out[UNSUPPORTED_REASON].append(path)
        elif suffix in VIDEO_SUFFIXES:
            left_out["a video is read where --inference_dir names it"].append(path)
        else:
            left_out["its suffix is not that of an image"].append(path)
    notes = _notes(left_out)
    if not names:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise SourceError("; ".join([f"{folder}: holds no image (looked for {suffixes}, in any case)", *notes]))
    return ImageFiles(str(folder), folder, sorted(names), notes)


def _notes(left_out: Mapping[str, Sequence[Path]]) -> list[str]:
    """A line for each reason for which paths are left out."""
    notes = []
    for reason, paths in left_out.items():
        if paths:
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            notes.append(f"skipped {paths[0]}{more}: {reason}")
    return notes


def _is_pipe(path: Path) -> bool:
    try:
        return path.is_fifo()
    except OSError:  # reading the file will report why
        return False


def _walk(folder: Path, exclude: Set[Path], left_out: dict[str, list[Path]]) -> Iterator[Path]:
    """Yield the files below a folder. Skipped folders, except hidden ones, are added to `left_out` by reason."""

    def skip(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise SourceError(f"{error.filename}: cannot be read ({error.strerror})")
        left_out[f"cannot be read ({error.strerror})"].append(Path(error.filename))

    for parent, folders, files in os.walk(folder, onerror=skip):
        visible = [Path(parent) / name for name in folders if not name.startswith(".")]
        left_out["a link to a folder is not followed"] += (path for path in visible if path.is_symlink())
        results = {path for path in visible if not path.is_symlink() and path.resolve() in exclude}
        left_out["results are written there"] += sorted(results)
        former = {path for path in visible if _is_of_a_run(path)} - results
        left_out[_RESULTS_REASON] += sorted(former)
        folders[:] = [path.name for path in visible if path not in results | former]
        yield from (Path(parent) / name for name in files if not name.startswith("."))


@dataclass(frozen=True)
class ImageFiles:
    """Image files in a fixed order, each of which can be read by its position.

    A file that does not exist or cannot be decoded is yielded with its problem.

    Attributes:
        description: name of the source, for messages.
        folder: folder that the names are relative to.
        names: paths relative to `folder`, with forward slashes.
        notes: one line for each reason why files were left out.
    """

    description: str
    folder: Path
    names: list[str]
    notes: Sequence[str] = ()
    frames_per_second: ClassVar[float | None] = None

    @property
    def total(self) -> int:
        return len(self.names)

    @property
    def folders(self) -> set[Path]:
        """The folders that contain the images."""
        return {self.folder / parent for parent in {name.rpartition("/")[0] for name in self.names}}

    def __iter__(self) -> Iterator[InputImage]:
        return self.read(range(len(self.names)))

    def read(self, positions: Sequence[int]) -> Iterator[InputImage]:
        """Read the images at these positions of `names`, in the order given."""
        images = read_images((self.names[position], self.folder / self.names[position]) for position in positions)
        return map(lambda position, image: replace(image, position=position), positions, images)

    def digest(self) -> str:
        """SHA-256 of the paths in their order, in hexadecimal."""
        digest = hashlib.sha256(os.fsencode(self.folder.absolute()))
        for name in self.names:
            digest.update(b"\0" + os.fsencode(name))
        return digest.hexdigest()


class VideoFrames:
    """The frames of a video file or a camera.

    Attributes:
        description, names: as those of `ImageFiles`; the names are not known in advance.
        notes: a line, once all frames were read, if many that the file declares are missing.
        folders: the folder of the video; empty for a camera.
        total: number of frames, or None if it is not known in advance.
        frames_per_second: frame rate.
    """

    names: ClassVar[list[str]] = []

    def __init__(self, source: Path | int, stem: str, max_frames: int) -> None:
        self.description = stem if isinstance(source, int) else str(source)
        self.stem = stem
        self.folders = set[Path]() if isinstance(source, int) else {source.parent}
        self.max_frames = max_frames
        self.notes: list[str] = []
        if isinstance(source, Path) and not is_utf8(source):
            raise SourceError(f"{source}: OpenCV opens no video whose path is not valid UTF-8; rename it")
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        if not self._capture.isOpened():
            no_camera = "no such camera, file or folder, or the camera is in use"
            remedy = no_camera if isinstance(source, int) else "not a video that OpenCV reads"
            raise SourceError(f"{self.description}: cannot be opened; {remedy}")
        # Phones store upright videos sideways; OpenCV rotates the frames only if this is set before the first one.
        self._capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
        self.frames_per_second: float = self._capture.get(cv2.CAP_PROP_FPS) or 25.0
        frames = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        known = max(frames, 0) if isinstance(source, Path) else 0
        self._declared = min(known, max_frames or known)
        self.total: int | None = (min(known, max_frames) if known and max_frames else known or max_frames) or None

    def __iter__(self) -> Iterator[InputImage]:
        positions = range(self.max_frames) if self.max_frames else count()
        # A single thread reads ahead, because frames must be decoded in order.
        with closing(map_in_order(self._read, positions, threads=1)) as frames:
            number = -1
            for number, (frame, seconds) in enumerate(takewhile(lambda read: read[0] is not None, frames)):
                yield InputImage(f"{self.stem}_{number + 1:06d}.jpg", frame, position=number, seconds=seconds)
        self._capture.release()
        if number < 0:
            raise SourceError(f"{self.description}: holds no frame that OpenCV reads")
        if number + 1 < _COMPLETE_SHARE * self._declared:
            self.notes.append(
                f"{self.description}: ends after {number + 1} of {self._declared} frames; perhaps damaged"
            )

    def _read(self, number: int) -> tuple[np.ndarray | None, float | None]:
        """Read the next frame, and its time stamp if the source has time stamps."""
        frame = self._capture.read()[1]
        milliseconds = self._capture.get(cv2.CAP_PROP_POS_MSEC)
        return frame, milliseconds / 1000 if milliseconds > 0 or number == 0 else None


Source = ImageFiles | VideoFrames


def read_images(files: Iterable[tuple[str, Path]]) -> Iterator[InputImage]:
    """Read image files, each given with its name, in their order. Threads decode the next few in advance.

    Large images are decoded when they are needed, so that there is never more than one in advance.
    """
    threads = min(_MAX_READER_THREADS, max(2, os.cpu_count() or 2))
    for image, (name, path) in map_in_order(_read_ahead, files, threads):
        yield image or read_named_image(path, name)


def is_large(image: InputImage) -> bool:
    """Whether only one such image should be in memory at a time."""
    return image.pixels is not None and image.pixels[..., 0].size > LARGE_PIXELS


def _read_ahead(file: tuple[str, Path]) -> tuple[InputImage | None, tuple[str, Path]]:
    try:
        return read_named_image(file[1], file[0], allow_large=False), file
    except LargeImageError:
        return None, file


def read_named_image(path: Path, name: str, *, allow_large: bool = True) -> InputImage:
    """Read an image file under the given name; `problem` says why it cannot be read. See `read_image_with_note`."""
    try:
        pixels, note = read_image_with_note(path, allow_large=allow_large)
        return InputImage(name, pixels, note=note)
    except UnreadableImageError as reason:
        return InputImage(name, None, str(reason))
