"""Train a detector: python train.py --experiment_name=NAME. See README.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from config import (
    DATA,
    EXPERIMENTS,
    RECIPES,
    DataConfig,
    ExperimentConfig,
    LossConfig,
    MatchingOverrides,
    ModelConfig,
    ModelOverrides,
    RunOptions,
    StartOptions,
    TrainConfig,
)
from models.architecture import apply_matching, apply_overrides, check_name, combine_overrides, describe_architecture
from utils.datasets.folders import describe_faces_outside, find_datasets, read_split
from utils.datasets.labels import DatasetError, LabelledImage, count_faces
from utils.errors import ConfigError
from utils.evaluation.ground_truth import open_validation_set
from utils.options import Flags, parse_flags
from utils.runtime.cli import choose_device, run
from utils.runtime.experiment import Experiment, load_config, load_recipe, save_config
from utils.runtime.files import disk_errors, locked, make_folder, user_path

# PyTorch takes seconds to import, so functions import what needs it, after the flags have been checked.
if TYPE_CHECKING:
    import torch

    from engine.training_state import TrainingData
    from models.checkpoint import Checkpoint
    from models.retinaface import RetinaFace
    from utils.runtime.distributed import DistributedContext

# Processes that train wait for one another in every step and in every validation.
_HANG_TIMEOUT = timedelta(minutes=30)

GROUPS = (
    RunOptions(),
    StartOptions(),
    ModelOverrides(),
    MatchingOverrides(),
    DataConfig(),
    LossConfig(),
    TrainConfig(),
)


@dataclass(frozen=True)
class TrainingRun:
    """A resolved command line.

    Attributes:
        experiment: folder of the experiment.
        config: configuration of the experiment.
        start: options that say where training starts.
        checkpoint: checkpoint whose detector initialises the model, or None.
        notes: messages for the user.
    """

    experiment: Experiment
    config: ExperimentConfig
    start: StartOptions
    checkpoint: Checkpoint | None
    notes: Sequence[str]


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse_flags(__doc__ or "", GROUPS, argv)
    from utils.runtime.distributed import distributed_context

    device = choose_device(flags.apply(RunOptions()).gpu_num)
    with distributed_context(device, _HANG_TIMEOUT) as context, ExitStack() as stack:
        train(resolve(flags), device, context, stack)


def resolve(flags: Flags) -> TrainingRun:
    """Resolve the folder of the experiment, its configuration, and the checkpoint that it starts from.

    The configuration is the one saved in the folder, or in its state to continue from, if training continues there, or
    that of the recipe, changed by the flags. A new experiment has the architecture of the checkpoint that it starts
    from, or that of the detector of the same name, which is kept, or the one that its name says, or the default one,
    changed by the flags.
    """
    from models.checkpoint import load_checkpoint

    start, name = flags.apply(StartOptions()), flags.apply(RunOptions()).experiment_name
    if start.pretrained_detector and start.pretrained_backbone not in (None, "none"):
        raise ConfigError("--pretrained_detector brings its backbone: drop --pretrained_backbone")
    checkpoint = load_checkpoint(user_path(start.pretrained_detector)) if start.pretrained_detector else None
    recipe = open_recipe(start.recipe) if start.recipe else None
    named = Experiment(EXPERIMENTS / name).for_training if name else None
    overrides = flags.apply(ModelOverrides())
    base: ModelConfig | None
    former = saved_config(named) if named and start.resume else None
    if named and former and (named.can_continue or not (recipe or checkpoint)):
        saved, base = former, former.model
    elif recipe:
        saved, base = recipe, recipe.model
    else:
        saved = ExperimentConfig()
        base = checkpoint.model_config if checkpoint else published_architecture(name) if name else None
        overrides = combine_overrides(overrides, name or "")
    model_config = apply_matching(flags.apply(MatchingOverrides()), apply_overrides(overrides, base))
    if recipe:
        check_name(name or "", model_config)
    config = dataclasses.replace(
        saved,
        model=model_config,
        loss=flags.apply(saved.loss),
        data=flags.apply(saved.data),
        train=flags.apply(saved.train),
    )
    usual = Experiment(EXPERIMENTS / (name or start.recipe or model_config.name))
    experiment = usual.for_training
    if experiment.can_continue:
        check_architecture(experiment, model_config)
    kept = f"{usual.folder} holds a detector, which is kept: training in {experiment.folder}"
    return TrainingRun(experiment, config, start, checkpoint, [] if experiment == usual else [kept])


def published_architecture(name: str) -> ModelConfig | None:
    """The architecture of the detector of this name that training keeps, if there is one with a configuration."""
    published = Experiment(EXPERIMENTS / name)
    config = saved_config(published) if published.for_training != published else None
    return config.model if config else None


def open_recipe(name: str) -> ExperimentConfig:
    """The configuration of a published recipe, or that of an existing experiment, such as a shipped one."""
    config_file = Experiment(EXPERIMENTS / name).config_file
    is_experiment = not (RECIPES / f"{name}.json").is_file() and config_file.is_file()
    return load_config(config_file) if is_experiment else load_recipe(name, RECIPES).experiment


def saved_config(experiment: Experiment) -> ExperimentConfig | None:
    """The configuration in the folder of an experiment, or that of its state to continue from; None without either."""
    from models.checkpoint import load_checkpoint

    if experiment.config_file.is_file():
        return load_config(experiment.config_file)
    for path in sorted(experiment.folder.glob("ckpt/*ckpt-last.pth")):
        return load_checkpoint(path).configuration
    return None


def check_architecture(experiment: Experiment, model_config: ModelConfig) -> None:
    """Ensure that the configuration of existing checkpoints is not replaced by another architecture.

    Raises:
        ConfigError: the experiment has another architecture.
    """
    saved = saved_config(experiment)
    if saved and saved.model != model_config:
        trained = describe_architecture(saved.model)
        raise ConfigError(
            f"{experiment.folder}: was trained with another architecture ({trained}); use another --experiment_name"
        )


def describe_continuation(training: TrainingRun, resumed: Checkpoint) -> list[str]:
    """Describe, for the user, the flags that have no effect because training continues.

    Raises:
        ConfigError: the run is complete but --dataset differs, or the checkpoint has no training state.
    """
    if not {"epoch", "optimizer", "new_parameters"} <= resumed.training.keys():
        raise ConfigError(f"{resumed.path}: holds no state to continue from; give it as --pretrained_detector")
    flags = ("recipe", "pretrained_backbone", "pretrained_detector")
    idle = [f"--{name}" for name in flags if getattr(training.start, name)]
    lines = [f"{idle[0]} has no effect, because training continues; --resume=False starts again"] if idle else []
    epochs, dataset = training.config.train.epochs, training.config.data.dataset
    former = resumed.experiment.data.dataset if resumed.experiment else dataset
    is_other = [Path(part) for part in former.split(",")] != [Path(part) for part in dataset.split(",")]
    if resumed.training["epoch"] < epochs:
        return [*lines, f"--dataset was {former}, now it is {dataset}"] if is_other else lines
    done = f"all {epochs} epochs are done; give more --epochs, or another --experiment_name"
    if is_other:
        raise ConfigError(f"{training.experiment.folder}: --dataset was {former}, not {dataset}, and {done}")
    return [*lines, done]


def train(training: TrainingRun, device: torch.device, context: DistributedContext, stack: ExitStack) -> None:
    """Train; the folder of the experiment is locked until `stack` is closed."""
    import torch

    from engine.training import Trainer
    from models.checkpoint import load_checkpoint
    from models.image_pyramid import build_model
    from models.teacher import open_teacher
    from utils.datasets.contact_sheet import write_contact_sheet
    from utils.datasets.loader import ended_workers
    from utils.runtime.distributed import run_on_main
    from utils.runtime.logger import RunLog

    config, experiment, start = training.config, training.experiment, training.start
    teacher = config.train.teacher
    folders = find_datasets(config.data.dataset, DATA)
    data = open_data(config.data, folders)
    notes = list(training.notes)
    torch.manual_seed(config.train.seed)
    model = build_model(config.model)
    last = experiment.checkpoint(config.model.backbone, "last")
    resumed = load_checkpoint(last) if start.resume and last.is_file() and not start.show_batch else None
    notes += describe_continuation(training, resumed) if resumed else []
    new_parameters = resumed.training["new_parameters"] if resumed else initialise(model, training)
    has_origin = training.checkpoint or start.pretrained_backbone or config.model.backbone.startswith("resnet")
    if not (resumed or has_origin or start.show_batch):
        notes.append(
            "the backbone starts from random weights; --pretrained_backbone=mobilenetV1X0.25_pretrain.tar (of "
            "biubug6/Pytorch_Retinaface) starts from ImageNet's"
        )
    run_on_main(lambda: stack.enter_context(locked(experiment.folder)))
    log = RunLog(make_folder(experiment.log_folder) if context.is_main else None)
    for note in notes:
        log.line(note)
    trainer = Trainer(
        model.to(device),
        config,
        experiment,
        data,
        log,
        context=context,
        new_parameters=new_parameters,
        teacher=open_teacher(user_path(teacher), config.model, device) if teacher else None,
    )
    with disk_errors(experiment.folder), ended_workers(trainer.loader):
        if start.show_batch:
            sheet = experiment.log_folder / "batch.png"
            write_contact_sheet(sheet, trainer.loader, start.show_batch)
            log.line(f"augmented crops: {sheet}")
            return
        if resumed:
            trainer.resume(resumed)
            if trainer.progress.epoch < config.train.epochs:
                log.line(f"continuing after {trainer.progress.describe()}")
        elif training.checkpoint:
            origin = f"{training.checkpoint.path.name}{training.checkpoint.suffix}"
            log.line(f"started from {origin}; {len(new_parameters)} tensors are randomly initialised")
        if context.is_main:
            save_config(config, experiment.config_file)
        log.line(f"architecture: {describe_architecture(config.model)}")
        log.line(
            f"{len(data.images)} training images on {device}, {context.world_size} process(es)",
            f"; dataset {', '.join(map(str, folders))}; experiment {experiment.folder}",
        )
        log.line(describe_faces(data.images))
        if outside := describe_faces_outside(data.images):
            log.line(f"warning: {outside}")
        log.line(describe_validation(data))
        trainer.fit()
    best = experiment.checkpoint(config.model.backbone, "best")
    log.line("done" + (f", best validation AP {trainer.progress.best_ap:.4f}" if data.validation else ""), f": {best}")
    log.close()


def open_data(config: DataConfig, folders: Sequence[Path]) -> TrainingData:
    """Read the labels of the datasets.

    Raises:
        DatasetError: no face can be learnt.
    """
    from engine.training_state import TrainingData
    from utils.datasets.sampler import image_weights

    parts = read_split(folders, "train")
    weights = image_weights(config.dataset_weights, [len(part) for part in parts])
    images = list(chain.from_iterable(parts))
    if not count_faces(images).used:
        raise DatasetError(f"--dataset {config.dataset}: nothing to learn; {describe_faces(images)}")
    return TrainingData(images, weights, open_validation_set(folders))


def describe_faces(images: Sequence[LabelledImage]) -> str:
    """The number of faces to train on, and the number of unused faces by reason."""
    counts = count_faces(images)
    return (
        f"faces: {counts.used} used, {counts.with_landmarks} with landmarks, {counts.ignored} marked to be ignored, "
        f"{counts.dropped} without area dropped"
    )


def describe_validation(data: TrainingData) -> str:
    if data.validation is None:
        return "no val/ with label.txt or gt/: ckpt-best will be the newest epoch, not the best one"
    if not data.validation.faces_counted:
        return f"validation: no face of {data.validation.source} counts, so that its AP is always 0"
    kind = "mean of easy, medium and hard AP" if data.validation.official else "AP over all labelled faces"
    return f"validation: {kind} on the {len(data.validation.truths)} images of {data.validation.source}"


def initialise(model: RetinaFace, training: TrainingRun) -> list[str]:
    """Load the initial weights; returns the names of parameters that a pretrained detector lacks."""
    from models.initialise import initialise_backbone, initialise_for_focal_loss, initialise_from_detector

    if training.start.show_batch:  # no weights are used
        return []
    if training.checkpoint:
        return initialise_from_detector(model, training.checkpoint)
    usual = "imagenet" if training.config.model.backbone.startswith("resnet") else "none"
    initialise_backbone(model, training.start.pretrained_backbone or usual)
    if training.config.loss.classification == "focal":
        initialise_for_focal_loss(model)
    return []


if __name__ == "__main__":
    run(main)
