"""The training loop, the validation loop, and what keeps a run safe."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import ExperimentConfig, TrainConfig, UserError
from layers.multibox_loss import MultiBoxLoss
from models.detector import FaceDetector
from models.retinaface import RetinaFace
from utils.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from utils.datasets import FaceDataset, collate
from utils.evaluation_set import EvaluationSet
from utils.experiment import Experiment
from utils.labels import LabelledImage
from utils.logger import RunLog
from utils.sources import Picture, read_picture
from utils.structures import Detections, FaceTargets
from utils.wider_predictions import write_predictions

_LOG_EVERY_STEPS = 20
_BATCH_SIZE = 8  # images of one size that share a pass at inference
_NOTHING = Detections(torch.zeros(0, 4), torch.zeros(0), None)


class TrainingError(UserError):
    """Training cannot go on."""


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0  # epochs completed
    best_ap: float = -1.0


class BatchDetector(Protocol):
    """What finds faces in images of one size; `FaceDetector` and `ProtocolDetector` do."""

    def detect_batch(self, images: Sequence[np.ndarray]) -> list[Detections]: ...


class Trainer:
    """Trains one experiment, epoch by epoch, and can be stopped and continued between any two.

    `ckpt-best` is that of the best validation AP, the mean of easy, medium and hard where the official ground truth is
    there; without validation images it is that of the newest epoch.

    Order and augmentation of an epoch depend on the seed and the epoch's number alone, so a continued run sees what
    an undisturbed one would have seen.
    """

    def __init__(
        self,
        network: RetinaFace,
        config: ExperimentConfig,
        experiment: Experiment,
        train_images: Sequence[LabelledImage],
        validation: EvaluationSet | None,
        log: RunLog,
        new_parameters: Sequence[str] = (),
    ) -> None:
        """Prepare a run; `new_parameters` are those that start at random while the others do not."""
        self.network = network.to(memory_format=torch.channels_last)
        self.device = network.pixel_mean.device
        self.config = config
        self.experiment = experiment
        self.validation = validation
        self.log = log
        self.loss = MultiBoxLoss(config.loss, config.model)
        self.shuffle = torch.Generator()
        self.loader = build_loader(train_images, config, self.shuffle, pin_memory=self.device.type == "cuda")
        self.new_parameters = list(new_parameters)
        self.optimizer = build_optimizer(network, config.train, self.new_parameters)
        self.averaged = build_average(network, config.train.ema_decay)
        self.scheduler = build_scheduler(self.optimizer, config.train, steps_per_epoch=len(self.loader))
        self.progress = Progress()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a `ckpt-last` of the same experiment.

        Raises:
            CheckpointError: it is of another architecture.
        """
        if checkpoint.model != self.config.model:
            raise CheckpointError(f"{checkpoint.path}: is of another architecture; use another --experiment_name")
        self.network.load_state_dict(checkpoint.state)
        self.optimizer.load_state_dict(checkpoint.training["optimizer"])
        self.scheduler.load_state_dict(checkpoint.training["scheduler"])
        if self.averaged is not None and checkpoint.training["averaged"]:
            self.averaged.load_state_dict(checkpoint.training["averaged"])
        self.progress = Progress(checkpoint.training["epoch"], checkpoint.training["best_ap"])

    def fit(self) -> None:
        """Train the epochs that are left."""
        train = self.config.train
        for epoch in range(self.progress.epoch + 1, train.epochs + 1):
            start = time.perf_counter()
            metrics = self._train_epoch(epoch)
            metrics["images_per_second"] = (
                len(self.loader) * (self.loader.batch_size or 1) / (time.perf_counter() - start)
            )
            if self.validation is None:
                self._save("best", self.result, epoch=epoch)
            elif epoch % train.eval_every == 0 or epoch == train.epochs:
                metrics |= self._validate(self.validation)
                if metrics["val/ap"] > self.progress.best_ap:
                    self.progress.best_ap = metrics["val/ap"]
                    self._save("best", self.result, epoch=epoch, val_ap=self.progress.best_ap)
            self.progress.epoch = epoch
            # Before ckpt-last: a run killed in between repeats the epoch and replaces its row, so none is ever missing.
            self.log.epoch(epoch, metrics)
            self._save(
                "last",
                self.network,
                averaged={} if self.averaged is None else self.averaged.state_dict(),
                new_parameters=self.new_parameters,
                epoch=epoch,
                best_ap=self.progress.best_ap,
                optimizer=self.optimizer.state_dict(),
                scheduler=self.scheduler.state_dict(),
            )

    @property
    def result(self) -> RetinaFace:
        """The network that training is for: the averaged one, if there is an average."""
        return self.network if self.averaged is None else cast(RetinaFace, self.averaged.module)

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training images; returns the mean of every loss term and the last learning rate."""
        seed = self.config.train.seed * 1_000_003 + epoch
        torch.manual_seed(seed)
        self.shuffle.manual_seed(seed)
        self.network.train()
        if self.config.train.freeze_bn:
            freeze_batch_norm(self.network)
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        # No bar where nobody watches it: the log has a line every few steps instead.
        bar = tqdm(self.loader, desc=f"epoch {epoch}/{self.config.train.epochs}", disable=None, leave=False)
        for step, (images, targets) in enumerate(bar, start=1):
            terms = self._step(images.to(self.device, non_blocking=True), [faces.to(self.device) for faces in targets])
            for name, value in terms.items():
                sums[name] += value
            if step % _LOG_EVERY_STEPS == 0 or step == len(self.loader):
                loss = float(sums["loss"]) / step
                if not math.isfinite(loss):
                    raise TrainingError(
                        f"epoch {epoch}, step {step}: the loss is {loss}; "
                        "the last checkpoint is kept; lower --learning_rate or look at the newest images"
                    )
                bar.set_postfix(loss=f"{loss:.3f}")
                if bar.disable:
                    self.log.line(f"epoch {epoch} step {step}/{len(self.loader)}: mean loss {loss:.4f}")
        means = {name: float(value) / len(self.loader) for name, value in sums.items()}
        return {**means, "learning_rate": float(self.scheduler.get_last_lr()[0])}

    def _step(self, images: Tensor, targets: list[FaceTargets]) -> dict[str, Tensor]:
        images = images.float().contiguous(memory_format=torch.channels_last)
        outputs = self.network(images)
        terms = self.loss(outputs, targets, (images.shape[2], images.shape[3]))
        total = torch.stack(list(terms.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        if self.config.train.clip_gradient:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.train.clip_gradient)
        self.optimizer.step()
        self.scheduler.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.network)
        return {"loss": total.detach()} | {name: value.detach() for name, value in terms.items()}

    def _validate(self, validation: EvaluationSet) -> dict[str, float]:
        """The mean average precision as `val/ap`, and where there are several subsets, that of each."""
        detector = FaceDetector(self.result, self.config.evaluation)
        files = list(zip(validation.names, validation.images or [], strict=True))
        found = detect_files(detector, files)
        predictions = {}
        for picture, detections in tqdm(found, total=len(files), desc="validation", disable=None, leave=False):
            if picture.problem:
                self.log.line(f"warning: {picture.name}: {picture.problem}; nothing is found in it")
            predictions[picture.name] = prediction_rows(detections)
        precisions = validation.evaluate(predictions).average_precisions
        subsets = {f"val/ap_{subset}": value for subset, value in precisions.items()} if len(precisions) > 1 else {}
        return {"val/ap": sum(precisions.values()) / len(precisions), **subsets}

    def _save(self, which: Literal["best", "last"], network: RetinaFace, **training: Any) -> None:
        path = self.experiment.checkpoint(self.config.model.backbone, which)
        save_checkpoint(path, self.config, network.state_dict(), **training)


def freeze_batch_norm(network: nn.Module) -> None:
    """Let batch normalisation use and keep its running statistics; its scale and shift still learn."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def detect_files(
    detector: BatchDetector, files: Iterable[tuple[str, Path]], batch_same_sizes: bool = True
) -> Iterator[tuple[Picture, Detections]]:
    """Detect in image files, each with its name, in their order; see `detect_pictures`."""
    return detect_pictures(detector, (read_picture(path, name) for name, path in files), batch_same_sizes)


def predict_files(
    detector: BatchDetector, files: Iterable[tuple[str, Path]], folder: Path, integer_boxes: bool
) -> Iterator[Picture]:
    """Detect in image files and write the predictions of each below `folder` before it comes out.

    Pictures that come out with a `problem` have no predictions. See `write_predictions`.

    Raises:
        OSError: predictions cannot be written.
    """
    for picture, detections in detect_files(detector, files):
        if picture.problem is None:
            write_predictions(folder, picture.name, prediction_rows(detections), integer_boxes=integer_boxes)
        yield picture


def prediction_rows(detections: Detections) -> np.ndarray:
    """(N, 5) float64 x, y, width, height, score in pixels, as the WIDER FACE evaluation takes them."""
    x1, y1, x2, y2 = detections.boxes.double().numpy().T
    return np.stack([x1, y1, x2 - x1, y2 - y1, detections.scores.double().numpy()], axis=1)


def detect_pictures(
    detector: BatchDetector, pictures: Iterable[Picture], batch_same_sizes: bool
) -> Iterator[tuple[Picture, Detections]]:
    """Detect in a stream of pictures, in its order.

    A picture that could not be read, or is too large for the memory, comes out with its `problem` and no detections.

    Args:
        batch_same_sizes: pass neighbours of one size through the network together.
    """
    limit = _BATCH_SIZE if batch_same_sizes else 1
    waiting: list[Picture] = []
    for picture in pictures:
        shape = None if picture.image is None else picture.image.shape
        if waiting and (shape is None or len(waiting) == limit or waiting[0].image.shape != shape):  # type: ignore[union-attr]
            yield from _detect_batch(detector, waiting)
            waiting = []
        if shape is None:
            yield picture, _NOTHING
        else:
            waiting.append(picture)
    yield from _detect_batch(detector, waiting)


def _detect_batch(detector: BatchDetector, pictures: Sequence[Picture]) -> Iterator[tuple[Picture, Detections]]:
    images = [picture.image for picture in pictures if picture.image is not None]
    if not images:
        return
    try:
        found = detector.detect_batch(images)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
    else:
        yield from zip(pictures, found, strict=True)
        return
    if len(pictures) > 1:
        for picture in pictures:
            yield from _detect_batch(detector, [picture])
    else:
        size = "x".join(map(str, images[0].shape[1::-1]))
        yield replace(pictures[0], image=None, problem=f"{size} pixels are too many for the memory"), _NOTHING


def build_loader(
    images: Sequence[LabelledImage], config: ExperimentConfig, shuffle: torch.Generator, pin_memory: bool
) -> DataLoader[Any]:
    """Batches of augmented crops in an order that `shuffle` decides; a last incomplete batch is left out."""
    batch_size = min(config.train.batch_size, len(images))
    return DataLoader(
        FaceDataset(images, config.data, fill=config.model.pixel_mean),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=config.data.num_workers,
        collate_fn=collate,
        generator=shuffle,
        pin_memory=pin_memory,
        worker_init_fn=_use_one_thread,
    )


def _use_one_thread(_worker: int) -> None:
    """Workers are parallel already; OpenCV's own threads would fight with the network's for the cores."""
    import cv2

    cv2.setNumThreads(0)


def build_optimizer(network: RetinaFace, config: TrainConfig, new_parameters: Sequence[str]) -> Optimizer:
    """SGD in which the parameters named `new_parameters` have a rate of their own."""
    groups = [
        {
            "params": [weights for name, weights in network.named_parameters() if (name in new_parameters) == is_new],
            "lr": config.learning_rate * (config.new_rate_factor if is_new else 1),
        }
        for is_new in (False, True)
    ]
    return SGD(
        [group for group in groups if group["params"]],
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def build_average(network: RetinaFace, decay: float) -> AveragedModel | None:
    """An exponential moving average of the weights, and of batch normalisation's statistics; None for a decay of 0."""
    if decay == 0:
        return None
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def build_scheduler(optimizer: Optimizer, config: TrainConfig, steps_per_epoch: int) -> LRScheduler:
    """Linear warm-up, then steps or a cosine; it advances once a step."""
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total - 1)
    if config.schedule == "cosine":
        main: LRScheduler = CosineAnnealingLR(optimizer, T_max=total - warmup)
    else:
        epochs = config.milestones or (round(0.7 * config.epochs), round(0.9 * config.epochs))
        main = MultiStepLR(optimizer, [max(0, epoch * steps_per_epoch - warmup) for epoch in epochs], gamma=0.1)
    if warmup == 0:
        return main
    rise = LinearLR(optimizer, start_factor=0.01, total_iters=warmup)
    return SequentialLR(optimizer, [rise, main], milestones=[warmup])
