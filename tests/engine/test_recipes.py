"""Tests that every recipe overfits two images, resumes exactly, and gives every parameter a gradient."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from config import RECIPES, ROOT, ExperimentConfig, ModelConfig, PostprocessConfig
from engine.training import Trainer
from engine.training_state import TrainingData
from layers.multibox_loss import MultiBoxLoss
from layers.prior_box import feature_sizes
from models.checkpoint import load_checkpoint
from models.detector import FaceDetector
from models.image_pyramid import build_model
from models.initialise import initialise_for_focal_loss, load_model
from models.retinaface import RetinaFace
from tests.engine.helpers import WITHOUT_AUGMENTATION, typical_landmarks
from utils.datasets.labels import LabelledImage
from utils.runtime.experiment import Experiment, load_recipe, save_config
from utils.runtime.images import read_image, write_image
from utils.runtime.logger import RunLog
from utils.structures import Faces, FaceTargets

RECIPE_NAMES = sorted(path.stem for path in RECIPES.glob("*.json"))


def tiny(name: str, epochs: int, side: int = 64) -> ExperimentConfig:
    """A recipe with a small model and an optimiser that is fast on few images, without augmentation.

    Head, pyramid, normalisation, matching and losses are those of the recipe.
    """
    recipe = load_recipe(name, RECIPES).experiment
    model = recipe.model
    if model.backbone.startswith("resnet"):
        # Deformable convolutions need bottlenecks, and 32 groups a wide pyramid.
        backbone = "resnet50" if model.deformable_backbone else "resnet18"
        width = model.fpn_channels if model.norm == "group" else 32
        model = dataclasses.replace(model, backbone=backbone, fpn_channels=width)
    data = dataclasses.replace(WITHOUT_AUGMENTATION, im_size=side, crop_rule=recipe.data.crop_rule)
    train = dataclasses.replace(
        recipe.train,
        epochs=epochs,
        batch_size=2,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=0.0,
        warmup_epochs=0.1,
        milestones=(),
        clip_gradient=10.0,
    )
    return dataclasses.replace(recipe, model=model, data=data, train=train)


@pytest.fixture
def shallow_resnets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build ResNets with one block per layer."""
    get_model = torchvision.models.get_model

    def get_shallow_model(*arguments: Any, **keywords: Any) -> torch.nn.Module:
        model = get_model(*arguments, **keywords)
        for layer in ("layer1", "layer2", "layer3", "layer4"):
            setattr(model, layer, getattr(model, layer)[:1])
        return model

    monkeypatch.setattr(torchvision.models, "get_model", get_shallow_model)


def untrained(config: ExperimentConfig) -> RetinaFace:
    """The initial model, as `train.py` makes it without pretrained weights."""
    torch.manual_seed(0)
    model = build_model(config.model)
    if config.loss.classification == "focal":
        initialise_for_focal_loss(model)
    return model


@pytest.fixture(scope="module")
def two_images(tmp_path_factory: pytest.TempPathFactory) -> list[LabelledImage]:
    """The face of a sample image, and its mirror image at three quarters of the size, both with landmarks."""
    folder = tmp_path_factory.mktemp("two_images")
    face = read_image(ROOT / "data/sample_widerface/images/astronaut.jpg")[:256, 100:356]
    small = np.full_like(face, 90)
    small[40:232, 20:212] = face[::, ::-1][np.ix_(np.arange(192) * 4 // 3, np.arange(192) * 4 // 3)]
    box = np.array([79, 55, 172, 176], np.float32)
    left, right = (256 - box[2]) * 0.75 + 20, (256 - box[0]) * 0.75 + 20
    boxes = (box, np.array([left, box[1] * 0.75 + 40, right, box[3] * 0.75 + 40], np.float32))
    images = []
    for name, image, each in zip(("one.png", "two.png"), (face, small), boxes, strict=True):
        write_image(folder / name, image)
        faces = Faces(each[None], typical_landmarks(each)[None], np.array([True]), np.array([False]))
        images.append(LabelledImage(folder / name, faces))
    return images


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_every_parameter_gets_a_gradient(name: str, device: torch.device) -> None:
    """Parameters that start at zero are randomised, because they let no gradient through."""
    config = load_recipe(name, RECIPES).experiment
    model = untrained(config).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.01)
    images = torch.rand(2, 3, 64, 96, device=device) * 255
    targets = one_face_per_level(model.priors(images).cpu(), config.model, (64, 96)).to(device)
    terms = MultiBoxLoss(config.loss, config.model)(model(images), targets, (64, 96))
    torch.stack(list(terms.values())).sum().backward()
    without = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []


def one_face_per_level(priors: Tensor, model_config: ModelConfig, size_hw: tuple[int, int]) -> FaceTargets:
    """Return two images, each with one face per level that equals a prior in the middle of the image."""
    counts = [
        height * width * len(level.anchor_sizes)
        for (height, width), level in zip(feature_sizes(size_hw, model_config.levels), model_config.levels, strict=True)
    ]
    chosen = torch.stack([part[len(part) // 2] for part in priors.split(counts)])
    boxes, count = box_convert(chosen, "cxcywh", "xyxy"), len(chosen)
    faces = FaceTargets(
        boxes=boxes,
        landmarks=torch.rand(count, 5, 2),
        has_landmarks=torch.ones(count, dtype=torch.bool),
        ignored=torch.zeros(count, dtype=torch.bool),
        counts=(count,),
    )
    return FaceTargets.join([faces, faces])


@pytest.mark.usefixtures("shallow_resnets")
@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_two_images_can_be_overfitted(
    name: str, two_images: list[LabelledImage], tmp_path: Path, device: torch.device
) -> None:
    side = 48 if name == "tinaface_r50_gn_dcn" else 64  # its head takes longest
    steps_per_epoch = 40 if name == "biubug6_mobilenet0.25" else 20  # smaller models need more steps
    config = tiny(name, epochs=2, side=side)
    model = untrained(config).to(device)
    Trainer(model, config, Experiment(tmp_path), TrainingData(two_images * steps_per_epoch), RunLog(None)).fit()
    # TinaFace raises its score to a power.
    threshold = 0.5**config.model.score_power
    detector = FaceDetector(model, PostprocessConfig(confidence_threshold=threshold))
    for labelled in two_images:
        image = read_image(labelled.path)
        found = detector.detect(cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA))
        overlaps = box_iou(torch.from_numpy(labelled.faces.boxes * side / len(image)), found.boxes)
        assert overlaps.numel() > 0
        assert overlaps.max() > 0.6


class InterruptedTrainer(Trainer):
    """Training that is interrupted when the first epoch has been saved."""

    def _save_last(self) -> None:
        super()._save_last()
        raise KeyboardInterrupt


@pytest.mark.usefixtures("shallow_resnets")
@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_resumed_run_equals_an_uninterrupted_one(
    name: str, two_images: list[LabelledImage], tmp_path: Path, device: torch.device
) -> None:
    """Bitwise, from the files of the run, which also hold the thresholds and the protocol of the recipe."""
    config = tiny(name, epochs=2, side=32)
    data = TrainingData(two_images)
    whole = untrained(config).to(device)
    Trainer(whole, config, Experiment(tmp_path / "whole"), data, RunLog(None)).fit()

    experiment = Experiment(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        InterruptedTrainer(untrained(config).to(device), config, experiment, data, RunLog(None)).fit()
    save_config(config, experiment.config_file)
    last = load_checkpoint(experiment.checkpoint(config.model.backbone, "last"))
    assert last.experiment == config
    resumed = load_model(last).to(device)
    trainer = Trainer(resumed, config, experiment, data, RunLog(None))
    trainer.resume(last)
    assert trainer.progress.epoch == 1
    trainer.fit()
    expected = whole.state_dict()
    assert [name for name, tensor in resumed.state_dict().items() if not torch.equal(tensor, expected[name])] == []
