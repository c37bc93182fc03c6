"""Tests of the shipped detector on the sample images."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou

from config import DEFAULT_EXPERIMENT, ROOT
from models.detector import FaceDetector
from utils.datasets.label_file import read_labels
from utils.datasets.labels import LabelledImage
from utils.runtime.experiment import load_config
from utils.runtime.images import read_image

SAMPLES = [
    labelled
    for folder in ("sample_widerface", "sample_mask")
    for labelled in read_labels(ROOT / "data" / folder / "label.txt", ROOT / "data" / folder / "images")
]


@pytest.fixture(scope="module")
def detector() -> FaceDetector:
    return FaceDetector.from_experiment()


def test_every_sample_image_is_labelled() -> None:
    assert set(ROOT.glob("data/sample_*/images/*")) == {labelled.path for labelled in SAMPLES}


@pytest.mark.parametrize("labelled", SAMPLES, ids=lambda labelled: labelled.path.name)
def test_exactly_the_labelled_faces_are_detected(labelled: LabelledImage, detector: FaceDetector) -> None:
    found = detector.detect(read_image(labelled.path))
    overlap = box_iou(torch.from_numpy(labelled.faces.boxes), found.boxes)
    assert overlap.max(dim=1).values.min() > 0.4
    assert len(found) == len(labelled.faces)


def test_landmarks_are_in_anatomical_order(detector: FaceDetector) -> None:
    """Eyes above nose above mouth, left of right, all within the face."""
    found = detector.detect(read_image(ROOT / "data/sample_widerface/images/astronaut.jpg"))
    assert found.landmarks is not None
    left_eye, right_eye, nose, left_mouth, right_mouth = found.landmarks[0].tolist()
    assert left_eye[0] < nose[0] < right_eye[0]
    assert left_mouth[0] < nose[0] < right_mouth[0]
    assert max(left_eye[1], right_eye[1]) < nose[1] < min(left_mouth[1], right_mouth[1])
    x1, y1, x2, y2 = found.boxes[0].tolist()
    assert all(x1 < x < x2 and y1 < y < y2 for x, y in found.landmarks[0].tolist())


def test_experiment_is_complete_and_small() -> None:
    folder = ROOT / "experiments" / DEFAULT_EXPERIMENT
    model = load_config(folder / "config.json").model
    assert (model.backbone, model.cascade, model.iou_aware) == ("mobilenet0.25", False, False)
    (weights,) = (folder / "ckpt").glob("*best.pth")
    assert weights.stat().st_size < 5e6
    assert (folder / "README.md").is_file()


def test_torch_hub_loads_the_detector() -> None:
    detector = torch.hub.load(str(ROOT), "face_detector", source="local", confidence_threshold=0.3)
    assert detector.config.confidence_threshold == 0.3
    assert len(detector.detect(read_image(ROOT / "data/sample_widerface/images/astronaut.jpg"))) == 1
