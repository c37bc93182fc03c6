"""Tests of the training loop: overfitting two images, batch sizes and mixed precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from config import ROOT, ExperimentConfig, LossConfig, PostprocessConfig, TrainConfig
from engine.training import Trainer
from engine.training_state import TrainingData, TrainingError
from models.architecture import usual_config
from models.detector import FaceDetector
from models.retinaface import RetinaFace
from tests.engine.helpers import WITHOUT_AUGMENTATION, typical_landmarks
from utils.datasets.labels import LabelledImage
from utils.runtime.distributed import DistributedContext
from utils.runtime.experiment import Experiment
from utils.runtime.images import read_image, write_image
from utils.runtime.logger import RunLog
from utils.structures import Faces


@pytest.fixture
def two_images(tmp_path: Path) -> list[LabelledImage]:
    """An image of one face, and one with two copies of it at half the size, one of them mirrored."""
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
        landmarks = np.stack([typical_landmarks(each) for each in boxes])
        faces = Faces(np.array(boxes, np.float32), landmarks, np.ones(len(boxes), bool), np.zeros(len(boxes), bool))
        images.append(LabelledImage(tmp_path / name, faces))
    return images


@pytest.mark.parametrize("cascade", ["one stage", "sum", "rematch"])
def test_two_images_can_be_overfitted(
    cascade: str, two_images: list[LabelledImage], tmp_path: Path, device: torch.device
) -> None:
    """With an IoU branch; models without one are overfitted in the tests of the recipes."""
    refinement = "rematch" if cascade == "rematch" else "sum"
    model_config = usual_config(
        "mobilenet0.25", cascade=cascade != "one stage", refinement=refinement, model_version="tina", fpn_channels=64
    )
    train = TrainConfig(epochs=2, batch_size=2, optimizer="adamw", learning_rate=2e-3, warmup_epochs=0.1)
    config = ExperimentConfig(
        model=model_config, loss=LossConfig(landmark_weight=0.2), data=WITHOUT_AUGMENTATION, train=train
    )
    torch.manual_seed(0)
    model = RetinaFace(model_config).to(device)
    Trainer(model, config, Experiment(tmp_path), TrainingData(two_images * 40), RunLog(None)).fit()
    detector = FaceDetector(model, PostprocessConfig(confidence_threshold=0.5, nms_threshold=0.3))
    for labelled in two_images:
        found = detector.detect(read_image(labelled.path)[::2, ::2])
        overlaps = box_iou(torch.from_numpy(labelled.faces.boxes / 2), found.boxes)
        assert len(found) >= len(labelled.faces)
        assert overlaps.max(dim=1).values.min() > 0.5


def test_batch_size_that_processes_cannot_share_evenly_is_refused(
    two_images: list[LabelledImage], tmp_path: Path
) -> None:
    model_config = usual_config("mobilenet0.25")
    config = ExperimentConfig(model=model_config, data=WITHOUT_AUGMENTATION, train=TrainConfig(batch_size=3))
    with pytest.raises(TrainingError, match="--batch_size=3 cannot be shared by 2 processes evenly"):
        Trainer(
            RetinaFace(model_config),
            config,
            Experiment(tmp_path),
            TrainingData(two_images),
            RunLog(None),
            context=DistributedContext(0, 2),
        )


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_float16_training_with_gradient_scaling(two_images: list[LabelledImage], tmp_path: Path) -> None:
    """As on a CUDA device without bfloat16. The initial scale overflows, so the first steps are skipped."""
    config = ExperimentConfig(
        model=usual_config("mobilenet0.25", cascade=False, model_version="retina", fpn_channels=16),
        data=WITHOUT_AUGMENTATION,
        train=TrainConfig(epochs=1, batch_size=2, optimizer="adamw", learning_rate=2e-3, warmup_epochs=0.1),
    )
    torch.manual_seed(0)
    log = RunLog(None)
    trainer = Trainer(RetinaFace(config.model), config, Experiment(tmp_path), TrainingData(two_images * 12), log)
    trainer.optimization.amp_dtype = torch.float16
    trainer.optimization.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    trainer.fit()
    assert 1 < trainer.optimization.scaler.get_scale() < 2.0**40
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    started = trainer.optimization.optimizer.state.values()
    assert {float(state["step"]) for state in started} <= set(range(1, 12))
