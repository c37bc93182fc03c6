"""Tests of test-time augmentation: image sizes, mirroring and box voting of the test protocols."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest
import torch

from config import ROOT, ExperimentConfig, ModelConfig, PostprocessConfig, ProtocolConfig
from models.architecture import usual_config
from models.detector import FaceDetector
from models.retinaface import RetinaFace
from models.tta import TestTimeAugmentation, resized_size
from utils.runtime.images import read_image
from utils.structures import Detections


@pytest.mark.parametrize(
    ("size_hw", "protocol", "factor", "expected"),
    [
        ((683, 1024), "original", 1, (683, 1024)),
        ((400, 1000), "original", 1.375, (550, 1375)),
        ((512, 1024), "vga", 1, (320, 640)),
        ((100, 50), "vga", 1, (640, 320)),
        ((683, 1024), "1600x2150", 1, (1434, 2150)),  # 1600 / 683 would make the long side 2399
        ((1000, 1200), "1600x2150", 1, (1600, 1920)),
        ((3200, 3200), "1600x2150", 1, (1600, 1600)),
        ((1, 5000), "vga", 1, (1, 640)),
    ],
)
def test_size_of_each_protocol(
    size_hw: tuple[int, int], protocol: str, factor: float, expected: tuple[int, int]
) -> None:
    assert resized_size(size_hw, protocol, factor) == expected


class RedSquareDetector:
    """A stub detector that finds one face around the red pixels of an image, with its left eye at their left."""

    def __init__(self, clip_boxes: bool = True) -> None:
        self.config = PostprocessConfig(confidence_threshold=0.02, nms_threshold=0.4, clip_boxes=clip_boxes)
        self.model = type("Model", (), {"model_config": ModelConfig()})()
        self.shown: list[np.ndarray] = []

    def detect_batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
        self.shown += images
        return [self._detect(image) for image in images]

    def _detect(self, image: np.ndarray) -> Detections:
        rows, columns = np.nonzero((image[:, :, 2] > 200) & (image[:, :, 0] < 50))
        box = torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], dtype=torch.float32)
        x1, y1, x2, y2 = box[0].tolist()
        points = [[x1, y1], [x2, y1], [(x1 + x2) / 2, (y1 + y2) / 2], [x1, y2], [x2, y2]]
        return Detections(box, torch.tensor([0.9]), torch.tensor([points]))


def red_square_image() -> np.ndarray:
    """Return 60 x 100 white pixels with a red square from (10, 20) to (30, 40)."""
    image = np.full((60, 100, 3), 255, np.uint8)
    image[20:40, 10:30] = (0, 0, 255)
    return image


def found_by(protocol: ProtocolConfig, detector: RedSquareDetector) -> Detections:
    (found,) = TestTimeAugmentation(cast(FaceDetector, detector), protocol).detect_batch([red_square_image()])
    return found


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("multi_scale", [False, True])
@pytest.mark.parametrize("protocol", ["original", "vga", "1600x2150"])
def test_boxes_and_landmarks_are_in_pixels_of_the_image(protocol: str, flip: bool, multi_scale: bool) -> None:
    found = found_by(ProtocolConfig(protocol, flip=flip, multi_scale=multi_scale), RedSquareDetector())
    assert found.boxes[0].tolist() == pytest.approx([10, 20, 30, 40], abs=0.7)
    assert found.scores.tolist() == pytest.approx([0.9])
    assert found.landmarks is not None
    expected = torch.tensor([[10, 20], [30, 20], [20, 30], [10, 40], [30, 40]], dtype=torch.float32)
    assert (found.landmarks[0] - expected).abs().max() < 1


def test_vga_pads_to_a_square_with_the_mean_colour() -> None:
    detector = RedSquareDetector()
    found_by(ProtocolConfig("vga"), detector)
    (shown,) = detector.shown
    assert shown.shape == (640, 640, 3)
    assert shown[384:].reshape(-1, 3).tolist() == [[104, 117, 123]] * (256 * 640)
    assert (shown[:384, 300:] == 255).all()


def test_flip_and_multi_scale_make_ten_passes() -> None:
    detector = RedSquareDetector()
    found_by(ProtocolConfig(flip=True, multi_scale=True), detector)
    widths = [image.shape[1] for image in detector.shown]
    assert widths == [62, 62, 100, 100, 138, 138, 175, 175, 212, 212]
    assert np.array_equal(detector.shown[3], red_square_image()[:, ::-1])


@pytest.mark.parametrize(
    ("protocol", "size"),
    [
        (ProtocolConfig(), (300, 400)),
        (ProtocolConfig(flip=True), (300, 400)),
        (ProtocolConfig(protocol="vga"), (640, 640)),
        (ProtocolConfig(protocol="1600x2150"), (1600, 2133)),
        (ProtocolConfig(multi_scale=True), (638, 850)),
    ],
)
def test_size_of_the_largest_pass(protocol: ProtocolConfig, size: tuple[int, int]) -> None:
    detector = FaceDetector.from_experiment()
    detector.max_pixels = 0
    assert TestTimeAugmentation(detector, protocol).size_seen((300, 400)) == size


@pytest.mark.parametrize("protocol", [ProtocolConfig("vga", flip=True), ProtocolConfig("800x1200", multi_scale=True)])
def test_batching_images_of_several_sizes_does_not_change_the_detections(protocol: ProtocolConfig) -> None:
    """With 800x1200 both have 1200x800 pixels, but differ by a row at another scale."""
    detector = TestTimeAugmentation(cast(FaceDetector, RedSquareDetector()), protocol)
    images = (
        [red_square_image()[:, :67], red_square_image()[:99, :66]]
        if protocol.protocol == "vga"
        else [red_square_image(), red_square_image()[:, :99]]
    )
    for found, image in zip(detector.detect_batch(images), images, strict=True):
        assert torch.equal(found.boxes, detector.detect_batch([image])[0].boxes)
        assert len(found) == 1


def test_single_pass_at_the_original_size_equals_the_detector() -> None:
    torch.manual_seed(0)
    model = usual_config("mobilenet0.25", num_anchor=2)
    thresholds = dataclasses.replace(ExperimentConfig().evaluation, confidence_threshold=0.5)
    detector = FaceDetector(RetinaFace(model), thresholds)
    image = np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
    (found,) = TestTimeAugmentation(detector, ProtocolConfig()).detect_batch([image])
    assert torch.equal(found.boxes, detector.detect(image).boxes)


def test_real_detector_finds_the_same_face_in_every_protocol() -> None:
    image = read_image(ROOT / "data/sample_widerface/images/astronaut.jpg")
    detector = FaceDetector.from_experiment()
    expected = detector.detect(image)
    for protocol in (ProtocolConfig("vga"), ProtocolConfig(flip=True), ProtocolConfig(multi_scale=True)):
        (found,) = TestTimeAugmentation(detector, protocol).detect_batch([image])
        assert len(expected) == 1
        assert (found.boxes[0] - expected.boxes[0]).abs().max() < 10  # of a face 90 px wide
        assert found.landmarks is not None
        assert found.landmarks[0, 0, 0] < found.landmarks[0, 1, 0]  # left eye left of right eye, mirrored or not


def test_box_voting_without_faces() -> None:
    torch.manual_seed(0)
    detector = FaceDetector(RetinaFace(usual_config("mobilenet0.25")), PostprocessConfig(confidence_threshold=1.0))
    (found,) = TestTimeAugmentation(detector, ProtocolConfig(flip=True)).detect_batch([red_square_image()])
    assert len(found) == 0
    assert found.landmarks is not None
    assert found.landmarks.shape == (0, 5, 2)
