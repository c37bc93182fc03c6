"""What the loops learn, and what they do when something goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from config import ROOT, DataConfig, DetectionConfig, ExperimentConfig, LossConfig, ModelConfig, TrainConfig
from engine import Trainer, TrainingError, detect_pictures, predict_files
from models.detector import FaceDetector
from models.retinaface import RetinaFace
from utils.experiment import Experiment
from utils.images import read_image, write_image
from utils.labels import LabelledImage
from utils.logger import RunLog
from utils.sources import Picture
from utils.structures import Detections

SMALL, LARGE = np.zeros((40, 64, 3), np.uint8), np.full((40, 64, 3), 9, np.uint8)


class ShortOfMemory(FaceDetector):
    """Fails on batches that hold the large picture."""

    def __init__(self, error: Exception) -> None:
        model = ModelConfig.for_backbone("mobilenet0.25", num_anchor=2)
        super().__init__(RetinaFace(model), ExperimentConfig().inference)
        self.error = error

    def detect_batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
        if any(image is LARGE for image in images):
            raise self.error
        return super().detect_batch(images)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: you tried 9 bytes")])
def test_a_picture_too_large_for_the_memory_stops_no_other(error: Exception) -> None:
    pictures = [Picture("a", SMALL), Picture("b", LARGE), Picture("c", SMALL), Picture("d", None, "broken")]
    torch.manual_seed(0)
    results = list(detect_pictures(ShortOfMemory(error), pictures, batch_same_sizes=True))
    assert [picture.name for picture, _ in results] == ["a", "b", "c", "d"]
    problems = [picture.problem for picture, _ in results]
    assert problems == [None, "64x40 pixels are too many for the memory", None, "broken"]


class FindsTheWhole:
    """One face in every image, as large as the image."""

    def __init__(self, max_pixels: int = 0) -> None:
        self.max_pixels = max_pixels
        self.batches: list[int] = []

    def detect_batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
        self.batches.append(len(images))
        height, width = images[0].shape[:2]
        box = torch.tensor([[0.0, 0, width, height]])
        return [Detections(box, torch.ones(1), None)] * len(images)


def test_reduced_picture_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    pictures = [Picture("small", SMALL), Picture("wide", np.zeros((40, 65, 3), np.uint8))]
    list(detect_pictures(FindsTheWhole(40 * 64), pictures, batch_same_sizes=True))
    assert capsys.readouterr().out == ("note: wide: 65x40 pixels, more than --max_pixels=2560; detecting in less\n")


def test_large_pictures_share_no_pass() -> None:
    large = np.broadcast_to(np.uint8(0), (2048, 2049, 3))
    detector = FindsTheWhole()
    names = [
        picture.name
        for picture, _ in detect_pictures(
            detector, [*(Picture(str(number), large) for number in range(3)), *[Picture("s", SMALL)] * 9], True
        )
    ]
    assert names == ["0", "1", "2", *["s"] * 9]
    assert detector.batches == [1, 1, 1, 8, 1]


def test_predictions_are_all_there_when_the_iterator_is_closed(tmp_path: Path) -> None:
    """As after Ctrl-C: what came out has been written."""
    for name in "abc":
        write_image(tmp_path / f"{name}.png", SMALL)
    files = [(name, tmp_path / f"{name}.png") for name in "abc"]
    found = predict_files(FindsTheWhole(), files, tmp_path / "out", integer_boxes=False)
    names = [next(found).name]
    found.close()
    assert names == ["a"]
    assert (tmp_path / "out/a.txt").read_text() == "a\n1\n0.000 0.000 64.000 40.000 1\n"


def test_predictions_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", SMALL)
    (tmp_path / "out").touch()
    with pytest.raises(OSError, match="out"):
        list(predict_files(FindsTheWhole(), [("a", tmp_path / "a.png")], tmp_path / "out", integer_boxes=False))


def test_other_failures_are_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        list(detect_pictures(ShortOfMemory(RuntimeError("a bug")), [Picture("b", LARGE)], batch_same_sizes=False))


class CountingDetector(FaceDetector):
    """Notes how many pictures each pass has."""

    def __init__(self) -> None:
        super().__init__(RetinaFace(ModelConfig.for_backbone("mobilenet0.25")), ExperimentConfig().inference)
        self.passes: list[int] = []

    def detect_batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
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
    pictures = [Picture(str(position), SMALL, position=position) for position in positions]
    assert len(list(detect_pictures(detector, pictures, batch_same_sizes=True))) == len(pictures)
    assert detector.passes == passes


WHOLE = DataConfig(
    im_size=128,
    min_crop_scale=1,
    mosaic_probability=0,
    flip_probability=0,
    colour_probability=0,
    grey_probability=0,
    num_workers=0,
)


@pytest.fixture
def two_images(tmp_path: Path) -> list[LabelledImage]:
    """A face of 100 x 141 pixels in 256 x 256, and the same two times, smaller, mirrored and upright."""
    face = read_image(ROOT / "data/sample_widerface/images/astronaut.jpg")[:256, 100:356]
    pair = np.full((256, 256, 3), 90, np.uint8)
    pair[20:148, :128] = face[::2, ::2]
    pair[100:228, 128:] = face[::2, 254::-2]
    box = np.array([79, 55, 172, 176], np.float32)
    left = box / 2 + (0, 20, 0, 20)
    right = np.array([256 - box[2] / 2, box[1] / 2 + 100, 256 - box[0] / 2, box[3] / 2 + 100])
    images = []
    for name, image, boxes in (("one.png", face, [box]), ("two.png", pair, [left, right])):
        write_image(tmp_path / name, image)
        landmarks = np.stack([_points(each) for each in boxes])
        images.append(LabelledImage(tmp_path / name, np.array(boxes, np.float32), landmarks, np.ones(len(boxes), bool)))
    return images


def _points(box: np.ndarray) -> np.ndarray:
    """Five landmarks at their usual places in a box."""
    places = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]])
    points: np.ndarray = (box[:2] + places * (box[2:] - box[:2])).astype(np.float32)
    return points


@pytest.mark.parametrize("version", ["retina", "tina"])
@pytest.mark.parametrize("cascade", ["one stage", "sum", "rematch"])
@pytest.mark.parametrize("backbone", ["mobilenet0.25", "resnet18"])
def test_two_images_are_learnt_by_heart(
    backbone: str, cascade: str, version: str, two_images: list[LabelledImage], tmp_path: Path, device: torch.device
) -> None:
    refinement = "rematch" if cascade == "rematch" else "sum"
    model = ModelConfig.for_backbone(
        backbone, cascade=cascade != "one stage", refinement=refinement, model_version=version, fpn_channels=64
    )
    train = TrainConfig(epochs=2, batch_size=2, optimizer="adamw", learning_rate=2e-3, warmup_epochs=0.1)
    config = ExperimentConfig(model=model, loss=LossConfig(landmark_weight=0.2), data=WHOLE, train=train)
    torch.manual_seed(0)
    network = RetinaFace(model).to(device)
    Trainer(network, config, Experiment(tmp_path), two_images * 40, None, RunLog(None)).fit()
    detector = FaceDetector(network, DetectionConfig(confidence_threshold=0.5, nms_threshold=0.3))
    for labelled in two_images:
        found = detector.detect(read_image(labelled.path)[::2, ::2])
        overlaps = box_iou(torch.from_numpy(labelled.boxes / 2), found.boxes)
        assert len(found) >= len(labelled.boxes)
        assert overlaps.max(dim=1).values.min() > 0.5


def test_batch_that_cannot_be_shared_is_refused(two_images: list[LabelledImage], tmp_path: Path) -> None:
    from utils.distributed import Processes

    model = ModelConfig.for_backbone("mobilenet0.25")
    config = ExperimentConfig(model=model, data=WHOLE, train=TrainConfig(batch_size=3))
    with pytest.raises(TrainingError, match="--batch_size=3 cannot be shared by 2 processes evenly"):
        Trainer(
            RetinaFace(model), config, Experiment(tmp_path), two_images, None, RunLog(None), processes=Processes(0, 2)
        )
