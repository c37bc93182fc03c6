"""Pictures through a detector: in order, whatever their sizes, and one that fails stops no other."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from config import ROOT, ComputeOptions, ExperimentConfig
from engine.stream import detect_images
from models.architecture import usual_config
from models.detector import FaceDetector
from models.onnx_graph import missing_onnx_packages
from models.retinaface import RetinaFace
from tests.engine.whole import PICTURE, FindsTheWhole
from utils.runtime.images import ImageLike, read_image
from utils.runtime.sources import InputImage
from utils.structures import Detections

SMALL, LARGE = PICTURE, np.full_like(PICTURE, 9)


class ShortOfMemory(FaceDetector):
    """Fails on batches that hold the large picture."""

    def __init__(self, error: Exception) -> None:
        model = RetinaFace(usual_config("mobilenet0.25", num_anchor=2))
        super().__init__(model, ExperimentConfig().inference)
        self.error = error

    def detect_batch(self, images: Sequence[ImageLike]) -> list[Detections]:
        if any(image is LARGE for image in images):
            raise self.error
        return super().detect_batch(images)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: you tried 9 bytes")])
def test_a_picture_too_large_for_the_memory_stops_no_other(error: Exception) -> None:
    pictures = [InputImage("a", SMALL), InputImage("b", LARGE), InputImage("c", SMALL), InputImage("d", None, "broken")]
    torch.manual_seed(0)
    results = list(detect_images(ShortOfMemory(error), pictures, batch_same_sizes=True))
    assert [picture.name for picture, _ in results] == ["a", "b", "c", "d"]
    problems = [picture.problem for picture, _ in results]
    assert problems == [None, "64x40 pixels are too many for the memory", None, "broken"]


class RoomForTwo(FindsTheWhole):
    """Has memory for two images."""

    def detect_batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
        found = super().detect_batch(images)
        if len(images) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return found


def test_batch_that_is_too_large_for_the_memory_is_halved(capsys: pytest.CaptureFixture[str]) -> None:
    detector = RoomForTwo()
    images = [InputImage(str(number), SMALL) for number in range(16)]
    found = list(detect_images(detector, images, batch_same_sizes=True))
    assert [image.name for image, _ in found] == [image.name for image in images]
    assert all(len(detections) == 1 for _, detections in found)
    assert detector.batches == [8, 4, 2, 2, 4, 2, 2] * 2
    assert capsys.readouterr().out.count("note: the memory is too small for some batches") == 1


def test_first_reduced_picture_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    wide = np.zeros((40, 65, 3), np.uint8)
    pictures = [
        InputImage("broken", None, "empty"),
        InputImage("small", SMALL),
        InputImage("wide", wide),
        InputImage("too", wide),
    ]
    list(detect_images(FindsTheWhole(40 * 64), pictures, batch_same_sizes=True))
    assert capsys.readouterr().out == (
        "note: wide: 65x40 pixels; images of more than --max_pixels=2560 pixels are reduced to that\n"
    )


def test_large_pictures_share_no_pass() -> None:
    large = np.broadcast_to(np.uint8(0), (2048, 2049, 3))
    detector = FindsTheWhole()
    names = [
        picture.name
        for picture, _ in detect_images(
            detector, [*(InputImage(str(number), large) for number in range(3)), *[InputImage("s", SMALL)] * 9], True
        )
    ]
    assert names == ["0", "1", "2", *["s"] * 9]
    assert detector.batches == [1, 1, 1, 8, 1]


def test_other_failures_are_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        list(detect_images(ShortOfMemory(RuntimeError("a bug")), [InputImage("b", LARGE)], batch_same_sizes=False))


class CountingDetector(FaceDetector):
    """Notes how many pictures each pass has."""

    def __init__(self) -> None:
        super().__init__(RetinaFace(usual_config("mobilenet0.25")), ExperimentConfig().inference)
        self.passes: list[int] = []

    def detect_batch(self, images: Sequence[ImageLike]) -> list[Detections]:
        self.passes.append(len(images))
        return [Detections(torch.zeros(0, 4), torch.zeros(0), None)] * len(images)


@pytest.mark.parametrize(
    ("positions", "passes"),
    [
        ([0] * 11, [8, 3]),  # of no source
        (range(11), [8, 3]),
        (range(8, 19), [8, 3]),
        ([6, 7, 8, 9, 15, 16], [2, 3, 1]),
        ([], []),
    ],
)
def test_pictures_share_a_pass_within_blocks_of_positions(positions: Sequence[int], passes: list[int]) -> None:
    detector = CountingDetector()
    pictures = [InputImage(str(position), SMALL, position=position) for position in positions]
    assert len(list(detect_images(detector, pictures, batch_same_sizes=True))) == len(pictures)
    assert detector.passes == passes


class TwoWorkers(FindsTheWhole):
    """Two threads call it at once, or wait in vain; a dark picture is a bug."""

    num_workers = 2

    def __init__(self) -> None:
        super().__init__()
        self.alone: list[int] = []
        self.together = threading.Barrier(2, timeout=10)

    def for_worker(self) -> Worker:
        return Worker(self)

    def detect_batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
        self.alone.append(len(images))
        return super().detect_batch(images)


class Worker(FindsTheWhole):
    def __init__(self, whole: TwoWorkers) -> None:
        super().__init__()
        self.whole = whole

    def detect_batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
        self.whole.together.wait()
        if not images[0].any():
            raise RuntimeError("a bug")
        return super().detect_batch(images)


def wide(width: int) -> np.ndarray:
    return np.full((4, width, 3), 7, np.uint8)


def test_threads_detect_at_once_and_the_order_stays() -> None:
    detector = TwoWorkers()
    pictures = [InputImage(str(width), wide(width)) for width in range(1, 9)]
    found = list(detect_images(detector, pictures, batch_same_sizes=True))
    assert [picture.name for picture, _ in found] == [picture.name for picture in pictures]
    assert [int(detections.boxes[0, 2]) for _, detections in found] == list(range(1, 9))
    assert not detector.alone


def test_large_picture_is_detected_in_while_no_other_is() -> None:
    """With all cores, and the memory to itself."""
    detector = TwoWorkers()
    large = InputImage("large", np.broadcast_to(np.uint8(1), (2048, 2049, 3)))
    small = [InputImage(str(number), wide(number + 1)) for number in range(4)]
    found = detect_images(detector, [*small[:2], large, InputImage("d", None, "broken"), *small[2:]], True)
    assert [picture.name for picture, _ in found] == ["0", "1", "large", "d", "2", "3"]
    assert detector.alone == [1]


def test_failure_in_a_thread_comes_out_where_its_picture_would() -> None:
    pictures = [
        InputImage("a", wide(1)),
        InputImage("b", wide(2)),
        InputImage("c", 0 * wide(3)),
        InputImage("d", wide(4)),
    ]
    found = detect_images(TwoWorkers(), pictures, batch_same_sizes=True)
    assert [next(found)[0].name, next(found)[0].name] == ["a", "b"]
    with pytest.raises(RuntimeError, match="a bug"):
        next(found)


@pytest.mark.skipif(bool(missing_onnx_packages()), reason="PyTorch uses all cores for one picture")
def test_workers_find_what_is_found_alone() -> None:
    """To the bit: results must not depend on the number of cores, nor on which pictures share a pass."""
    image = read_image(ROOT / "data/sample_widerface/images/astronaut.jpg")
    pictures = [InputImage(str(number), image[: 200 + 10 * (number // 3)], position=number) for number in range(12)]
    detector = FaceDetector.from_experiment(
        "mobilenet0.25_anc2_casT_fpn3", compute=ComputeOptions(backend="onnx"), confidence_threshold=1e-3
    )
    detector.backend.num_workers = 3
    found = list(detect_images(detector, pictures, batch_same_sizes=True))
    assert len(found) == len(pictures)
    for picture, detections in found:
        assert picture.pixels is not None
        expected = detector.detect(picture.pixels)
        assert len(expected) > 3
        assert torch.equal(detections.boxes, expected.boxes)
        assert torch.equal(detections.scores, expected.scores)
