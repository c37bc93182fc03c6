"""Train a detector: python train.py --experiment_name=NAME. See README.md, or python train.py --help."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from config import (
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
from engine import Trainer
from models.initialise import initialise_backbone, initialise_from_detector
from models.retinaface import RetinaFace
from utils.checkpoint import load_checkpoint
from utils.cli import choose_device, run
from utils.datasets import find_datasets, has_split, read_split
from utils.experiment import Experiment, make_folder, user_path
from utils.logger import RunLog

OPTIONS = (RunOptions(), StartOptions(), ModelConfig(), DataConfig(), LossConfig(), TrainConfig())


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse_flags(__doc__ or "", OPTIONS, argv)
    start = flags.apply(StartOptions())
    runtime = flags.apply(RunOptions())
    experiment, config = open_experiment(flags, runtime, resume=start.resume)
    device = choose_device(runtime.gpu_num)

    folders = find_datasets(config.data.dataset, ROOT / "data")
    train_images = read_split(folders, "train")
    val_images = read_split(folders, "val") if has_split(folders, "val") else []

    log = RunLog(make_folder(experiment.log_folder))
    torch.manual_seed(config.train.seed)
    network = RetinaFace(config.model)
    trainer = Trainer(network.to(device), config, experiment, train_images, val_images, log)
    if start.resume and trainer.resume():
        log.line(f"continuing after epoch {trainer.progress.epoch}")
    else:
        initialise(network, start, log)
    config.save(experiment.config_file)
    log.line(f"{experiment.folder}: {len(train_images)} training and {len(val_images)} validation images on {device}")
    if not val_images:
        log.line("no val/label.txt: ckpt-best will be the newest epoch, not the best one")
    trainer.fit()
    best = experiment.checkpoint(config.model.backbone, "best")
    log.line(f"done: {best}" + (f", validation AP {trainer.progress.best_ap:.4f}" if val_images else ""))
    log.close()


def open_experiment(flags: Flags, runtime: RunOptions, resume: bool) -> tuple[Experiment, ExperimentConfig]:
    """The experiment's folder, and its configuration: what is saved there, changed by the flags."""
    name = runtime.experiment_name or model_config_from_flags(flags).name
    experiment = Experiment(ROOT / "experiments" / name)
    continued = resume and experiment.config_file.is_file()
    saved = ExperimentConfig.load(experiment.config_file) if continued else ExperimentConfig()
    return experiment, ExperimentConfig(
        model=model_config_from_flags(flags, saved.model if continued else None),
        loss=flags.apply(saved.loss),
        data=flags.apply(saved.data),
        train=flags.apply(saved.train),
        inference=saved.inference,
        evaluation=saved.evaluation,
    )


def initialise(network: RetinaFace, start: StartOptions, log: RunLog) -> None:
    """Give the network the weights that training starts from."""
    if start.pretrained_detector and start.pretrained_backbone != "none":
        raise ConfigError("--pretrained_detector brings its backbone: drop --pretrained_backbone")
    if start.pretrained_detector:
        checkpoint = load_checkpoint(user_path(start.pretrained_detector))
        left = initialise_from_detector(network, checkpoint)
        log.line(f"started from {checkpoint.path.name} ({checkpoint.kind}); {len(left)} tensors start at random")
    else:
        initialise_backbone(network, start.pretrained_backbone)


if __name__ == "__main__":
    run(main)
