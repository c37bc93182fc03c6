"""Tests of detection in streams of images: order, batches, workers and errors."""

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
from tests.engine.helpers import BLACK_IMAGE, WholeImageDetector
from utils.runtime.images import ImageLike, read_image
from utils.runtime.sources import InputImage
from utils.structures import Detections

SMALL, LARGE = BLACK_IMAGE, np.full_like(BLACK_IMAGE, 9)


class OutOfMemoryDetector(FaceDetector):
    """Fails on batches that contain the large image."""

    def __init__(self, error: Exception) -> None:
        model = RetinaFace(usual_config("mobilenet0.25", num_anchor=2))
        super().__init__(model, ExperimentConfig().inference)
        self.error = error

    def detect_batch(self, images: Sequence[ImageLike]) -> list[Detections]:
        if any(image is LARGE for image in images):
            raise self.error
        return super().detect_batch(images)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: you tried 9 bytes")])
def test_image_too_large_for_the_memory_is_skipped(error: Exception) -> None:
    images = [InputImage("a", SMALL), InputImage("b", LARGE), InputImage("c", SMALL), InputImage("d", None, "broken")]
    torch.manual_seed(0)
    results = list(detect_images(OutOfMemoryDetector(error), images, batch_same_sizes=True))
    assert [image.name for image, _ in results] == ["a", "b", "c", "d"]
    problems = [image.problem for image, _ in results]
    assert problems == [None, "64x40 pixels are too many for the memory", None, "broken"]


class TwoImageMemoryDetector(WholeImageDetector):
    """Has enough memory for two images."""

    def detect_batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
        found = super().detect_batch(images)
        if len(images) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return found


def test_batch_that_is_too_large_for_the_memory_is_halved(capsys: pytest.CaptureFixture[str]) -> None:
    detector = TwoImageMemoryDetector()
    images = [InputImage(str(number), SMALL) for number in range(16)]
    found = list(detect_images(detector, images, batch_same_sizes=True))
    assert [image.name for image, _ in found] == [image.name for image in images]
    assert all(len(detections) == 1 for _, detections in found)
    assert detector.batches == [8, 4, 2, 2, 4, 2, 2] * 2
    assert capsys.readouterr().out.count("note: the memory is too small for some batches") == 1


def test_first_reduced_image_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    wide = np.zeros((40, 65, 3), np.uint8)
    images = [
        InputImage("broken", None, "empty"),
        InputImage("small", SMALL),
        InputImage("wide", wide),
        InputImage("too", wide),
    ]
    list(detect_images(WholeImageDetector(40 * 64), images, batch_same_sizes=True))
    assert capsys.readouterr().out == (
        "note: wide: 65x40 pixels; images of more than --max_pixels=2560 pixels are reduced to that\n"
    )


def test_large_images_are_not_batched() -> None:
    large = np.broadcast_to(np.uint8(0), (2048, 2049, 3))
    detector = WholeImageDetector()
    names = [
        image.name
        for image, _ in detect_images(
            detector, [*(InputImage(str(number), large) for number in range(3)), *[InputImage("s", SMALL)] * 9], True
        )
    ]
    assert names == ["0", "1", "2", *["s"] * 9]
    assert detector.batches == [1, 1, 1, 8, 1]


def test_other_errors_are_raised() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        list(
            detect_images(OutOfMemoryDetector(RuntimeError("a bug")), [InputImage("b", LARGE)], batch_same_sizes=False)
        )


class CountingDetector(FaceDetector):
    """Records the number of images in each batch."""

    def __init__(self) -> None:
        super().__init__(RetinaFace(usual_config("mobilenet0.25")), ExperimentConfig().inference)
        self.batch_sizes: list[int] = []

    def detect_batch(self, images: Sequence[ImageLike]) -> list[Detections]:
        self.batch_sizes.append(len(images))
        return [Detections(torch.zeros(0, 4), torch.zeros(0), None)] * len(images)


@pytest.mark.parametrize(
    ("positions", "batch_sizes"),
    [
        ([0] * 11, [8, 3]),  # without a source
        (range(11), [8, 3]),
        (range(8, 19), [8, 3]),
        ([6, 7, 8, 9, 15, 16], [2, 3, 1]),
        ([], []),
    ],
)
def test_images_are_batched_within_blocks_of_positions(positions: Sequence[int], batch_sizes: list[int]) -> None:
    detector = CountingDetector()
    images = [InputImage(str(position), SMALL, position=position) for position in positions]
    assert len(list(detect_images(detector, images, batch_same_sizes=True))) == len(images)
    assert detector.batch_sizes == batch_sizes


class TwoWorkerDetector(WholeImageDetector):
    """Requires two workers to detect at the same time; a black image raises an error."""

    num_workers = 2

    def __init__(self) -> None:
        super().__init__()
        self.own_batches: list[int] = []
        self.barrier = threading.Barrier(2, timeout=10)

    def for_worker(self) -> Worker:
        return Worker(self)

    def detect_batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
        self.own_batches.append(len(images))
        return super().detect_batch(images)


class Worker(WholeImageDetector):
    def __init__(self, parent: TwoWorkerDetector) -> None:
        super().__init__()
        self.parent = parent

    def detect_batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
        self.parent.barrier.wait()
        if not images[0].any():
            raise RuntimeError("a bug")
        return super().detect_batch(images)


def wide(width: int) -> np.ndarray:
    return np.full((4, width, 3), 7, np.uint8)


def test_workers_detect_in_parallel_and_keep_the_order() -> None:
    detector = TwoWorkerDetector()
    images = [InputImage(str(width), wide(width)) for width in range(1, 9)]
    found = list(detect_images(detector, images, batch_same_sizes=True))
    assert [image.name for image, _ in found] == [image.name for image in images]
    assert [int(detections.boxes[0, 2]) for _, detections in found] == list(range(1, 9))
    assert not detector.own_batches


def test_large_image_is_detected_alone() -> None:
    """It gets all cores and all of the memory."""
    detector = TwoWorkerDetector()
    large = InputImage("large", np.broadcast_to(np.uint8(1), (2048, 2049, 3)))
    small = [InputImage(str(number), wide(number + 1)) for number in range(4)]
    found = detect_images(detector, [*small[:2], large, InputImage("d", None, "broken"), *small[2:]], True)
    assert [image.name for image, _ in found] == ["0", "1", "large", "d", "2", "3"]
    assert detector.own_batches == [1]


def test_error_of_a_worker_is_raised_in_the_order_of_the_images() -> None:
    images = [
        InputImage("a", wide(1)),
        InputImage("b", wide(2)),
        InputImage("c", 0 * wide(3)),
        InputImage("d", wide(4)),
    ]
    found = detect_images(TwoWorkerDetector(), images, batch_same_sizes=True)
    assert [next(found)[0].name, next(found)[0].name] == ["a", "b"]
    with pytest.raises(RuntimeError, match="a bug"):
        next(found)


@pytest.mark.skipif(bool(missing_onnx_packages()), reason="PyTorch uses all cores for one image")
def test_workers_find_the_same_faces_as_a_single_detector() -> None:
    """Bitwise: results depend neither on the number of cores nor on which images share a batch."""
    photo = read_image(ROOT / "data/sample_widerface/images/astronaut.jpg")
    images = [InputImage(str(number), photo[: 200 + 10 * (number // 3)], position=number) for number in range(12)]
    detector = FaceDetector.from_experiment(
        "mobilenet0.25_anc2_casT_fpn3", compute=ComputeOptions(backend="onnx"), confidence_threshold=1e-3
    )
    detector.backend.num_workers = 3
    found = list(detect_images(detector, images, batch_same_sizes=True))
    assert len(found) == len(images)
    for image, detections in found:
        assert image.pixels is not None
        expected = detector.detect(image.pixels)
        assert len(expected) > 3
        assert torch.equal(detections.boxes, expected.boxes)
        assert torch.equal(detections.scores, expected.scores)
