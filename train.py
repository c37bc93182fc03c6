"""Train a detector: python train.py --experiment_name=NAME. See README.md, or python train.py --help."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import chain

import torch

from config import (
    EXPERIMENTS,
    ROOT,
    ConfigError,
    DataConfig,
    ExperimentConfig,
    Flags,
    LossConfig,
    ModelConfig,
    RunOptions,
    StartOptions,
    TrainConfig,
    model_config_from_flags,
    parse_flags,
)
from engine.training import Trainer
from models.checkpoint import Checkpoint, load_checkpoint
from models.initialise import expect_few_faces, initialise_backbone, initialise_from_detector
from models.retinaface import RetinaFace
from models.teacher import Teacher
from utils.datasets.contact_sheet import write_contact_sheet
from utils.datasets.folders import find_datasets, read_split
from utils.datasets.sampler import image_weights
from utils.evaluation.ground_truth import open_validation_set
from utils.runtime.cli import choose_device, run
from utils.runtime.distributed import Processes, join_processes
from utils.runtime.experiment import Experiment, make_folder, user_path
from utils.runtime.files import disk_errors
from utils.runtime.logger import RunLog

OPTIONS = (RunOptions(), StartOptions(), ModelConfig(), DataConfig(), LossConfig(), TrainConfig())


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse_flags(__doc__ or "", OPTIONS, argv)
    device = choose_device(flags.apply(RunOptions()).gpu_num)
    with join_processes(device) as processes:
        train(flags, device, processes)


def train(flags: Flags, device: torch.device, processes: Processes) -> None:
    start = flags.apply(StartOptions())
    experiment, config, checkpoint = open_experiment(flags, start, flags.apply(RunOptions()))
    folders = find_datasets(config.data.dataset, ROOT / "data")
    parts = read_split(folders, "train")
    images = list(chain.from_iterable(parts))
    weights = image_weights(config.data.dataset_weights, [len(part) for part in parts])
    validation = open_validation_set(folders)

    torch.manual_seed(config.train.seed)
    network = RetinaFace(config.model)
    last = experiment.checkpoint(config.model.backbone, "last")
    resumed = load_checkpoint(last) if start.resume and last.is_file() and not start.show_batch else None
    new = resumed.training["new_parameters"] if resumed else initialise(network, start, checkpoint, config.loss)
    log = RunLog(make_folder(experiment.log_folder) if processes.is_main else None)
    network.to(device)
    trainer = Trainer(
        network,
        config,
        experiment,
        images,
        validation,
        log,
        weights=weights,
        processes=processes,
        new_parameters=new,
        teacher=open_teacher(config, device),
    )
    with disk_errors(experiment.folder):
        if start.show_batch:
            sheet = experiment.log_folder / "batch.png"
            write_contact_sheet(sheet, trainer.loader, start.show_batch)
            log.line(f"what the network will see: {sheet}")
            return
        if resumed:
            trainer.resume(resumed)
            log.line(f"continuing after {trainer.progress.describe()}")
        elif checkpoint:
            log.line(f"started from {checkpoint.path.name} ({checkpoint.kind}); {len(new)} tensors start at random")
        if processes.is_main:
            config.save(experiment.config_file)
        log.line(f"{len(images)} training images on {device}, {processes.count} process(es)", f", {experiment.folder}")
        if validation:
            kind = "mean of easy, medium and hard AP" if validation.official else "AP over all labelled faces"
            log.line(f"validation: {kind} on the {len(validation.truths)} images of {validation.source}")
        else:
            log.line("no val/ with label.txt or gt/: ckpt-best will be the newest epoch, not the best one")
        trainer.fit()
    best = experiment.checkpoint(config.model.backbone, "best")
    log.line("done" + (f", best validation AP {trainer.progress.best_ap:.4f}" if validation else ""), f": {best}")
    log.close()


def open_experiment(
    flags: Flags, start: StartOptions, runtime: RunOptions
) -> tuple[Experiment, ExperimentConfig, Checkpoint | None]:
    """The experiment's folder, its configuration, and the checkpoint that it starts from.

    The configuration is the one saved in the folder, if training goes on there, changed by the flags. A new
    experiment has the architecture of the checkpoint that it starts from, changed by the flags.
    """
    if start.pretrained_detector and start.pretrained_backbone != "none":
        raise ConfigError("--pretrained_detector brings its backbone: drop --pretrained_backbone")
    named = Experiment(EXPERIMENTS / runtime.experiment_name) if runtime.experiment_name else None
    saved, architecture, checkpoint = ExperimentConfig(), None, None
    if start.resume and named and named.config_file.is_file():
        saved = ExperimentConfig.load(named.config_file)
        architecture = saved.model
    elif start.pretrained_detector:
        checkpoint = load_checkpoint(user_path(start.pretrained_detector))
        architecture = checkpoint.model
    model = model_config_from_flags(flags, architecture)
    config = ExperimentConfig(
        model=model,
        loss=flags.apply(saved.loss),
        data=flags.apply(saved.data),
        train=flags.apply(saved.train),
        inference=saved.inference,
        evaluation=saved.evaluation,
    )
    return named or Experiment(EXPERIMENTS / model.name), config, checkpoint


def open_teacher(config: ExperimentConfig, device: torch.device) -> Teacher | None:
    """The detector that `--teacher` names, if it does, with the levels of the model."""
    if config.train.teacher is None:
        return None
    checkpoint = load_checkpoint(user_path(config.train.teacher))
    names = ("fine_levels", "strides", "anchor_sizes", "context_share", "coarse_share")
    levels = {name: getattr(config.model, name) for name in names}
    network = RetinaFace(dataclasses.replace(checkpoint.model, **levels))
    if initialise_from_detector(network, checkpoint):
        raise ConfigError(f"--teacher {checkpoint.path}: its anchors are not those of the model; choose another")
    return Teacher(network.to(device))


def initialise(network: RetinaFace, start: StartOptions, checkpoint: Checkpoint | None, loss: LossConfig) -> list[str]:
    """Give the network the weights that training starts from; returns what a detector's checkpoint lacked of them."""
    if checkpoint:
        return initialise_from_detector(network, checkpoint)
    initialise_backbone(network, start.pretrained_backbone)
    if loss.classification == "focal":
        expect_few_faces(network)
    return []


if __name__ == "__main__":
    run(main)
