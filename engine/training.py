"""The training loop, the validation loop, and what keeps a run safe."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import EVALUATION_MEMORY, ExperimentConfig, UserError
from engine.evaluation import prediction_rows
from engine.optimisation import build_average, build_optimizer, build_scheduler, freeze_batch_norm
from engine.stream import detect_files
from layers.multibox_loss import MultiBoxLoss
from models.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from models.detector import FaceDetector
from models.retinaface import RetinaFace
from models.teacher import Teacher
from utils.datasets.face_dataset import Batch, FaceDataset, collate
from utils.datasets.labels import LabelledImage
from utils.datasets.sampler import EpochSampler
from utils.evaluation.ground_truth import EvaluationSet
from utils.results.drawing import draw_detections
from utils.runtime.distributed import (
    ALONE,
    Processes,
    any_of_processes,
    copy_from_main,
    mean_over_processes,
    merge_over_processes,
)
from utils.runtime.experiment import Experiment
from utils.runtime.logger import RunLog
from utils.runtime.signals import StopRequest

_LOG_EVERY_STEPS = 20
_ASK_EVERY_STEPS = 10  # steps after which processes agree whether to stop, for to ask costs a message
_PICTURES_IN_LOG = 4
# A network that has learnt little finds faces everywhere, and to sort them out takes minutes; a trained one has fewer.
_VALIDATION_TOP_K = 10_000


class TrainingError(UserError):
    """Training cannot go on."""


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        epoch: epochs completed.
        position: images of the next one that have been learnt from, over all processes.
        sums: of each loss term over its batches so far.
        best_ap: of all validations.
        waited: validations since the best.
        unreadable: images that could not be read, and why.
    """

    epoch: int = 0
    position: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    best_ap: float = -1.0
    waited: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        within = f" and {self.position} images of the next" if self.position else ""
        return f"epoch {self.epoch}{within}"


class Trainer:
    """Trains one experiment, and can be stopped and continued at any step.

    `ckpt-best` is that of the best validation AP; without validation images it is that of the newest epoch.

    Order and augmentation of an epoch depend on the seed and the epoch's number alone, so a continued run sees what
    an undisturbed one would have seen. Several processes share each batch.
    """

    def __init__(
        self,
        network: RetinaFace,
        config: ExperimentConfig,
        experiment: Experiment,
        images: Sequence[LabelledImage],
        validation: EvaluationSet | None,
        log: RunLog,
        *,
        weights: Sequence[float] | None = None,
        processes: Processes = ALONE,
        new_parameters: Sequence[str] = (),
        teacher: Teacher | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            network: on its device.
            images: to learn from.
            weights: how often each is drawn relative to the others; None draws each once an epoch.
            validation: what decides which checkpoint is the best.
            new_parameters: names of those that start at random while the others do not.
            teacher: on the same device, of the same priors.

        Raises:
            TrainingError: what is asked for needs CUDA, or the batch cannot be shared.
        """
        train = config.train
        self.device = network.pixel_mean.device
        if train.sync_bn and self.device.type == "cuda" and processes.count > 1:
            network = cast(RetinaFace, nn.SyncBatchNorm.convert_sync_batchnorm(network))
        self.network = network.to(memory_format=torch.channels_last)
        self.config = config
        self.experiment = experiment
        self.images = images
        self.validation = validation
        self.teacher = teacher
        self.log = log
        self.processes = processes
        self.parallel: nn.Module = self.network
        self._check()
        self.loss = MultiBoxLoss(config.loss, config.model)
        self.batch_size = min(train.batch_size, max(len(images) // processes.count, 1) * processes.count)
        self.sampler = EpochSampler(
            len(images),
            self.batch_size // processes.count,
            seed=train.seed,
            weights=weights,
            rank=processes.rank,
            world_size=processes.count,
        )
        self.loader = build_loader(images, config, self.sampler, pin_memory=self.device.type == "cuda")
        self.batches = len(self.sampler) * processes.count // self.batch_size
        self.new_parameters = list(new_parameters)
        self.progress = Progress()
        self.optimizer = build_optimizer(network, train, self.new_parameters)
        self.averaged = build_average(network, train.ema_decay)
        self.scheduler = self._build_scheduler()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=train.amp)
        self._saved_at = time.monotonic()

    def _check(self) -> None:
        train, device, count = self.config.train, self.device, self.processes.count
        if train.amp and device.type != "cuda":
            raise TrainingError("--amp needs a CUDA device; drop it")
        if train.sync_bn and (device.type != "cuda" or count == 1):
            raise TrainingError("--sync_bn needs several processes with a CUDA device each; use torchrun, or drop it")
        if train.batch_size % count:
            raise TrainingError(f"--batch_size={train.batch_size} cannot be shared by {count} processes evenly")
        if train.best_metric != "mean" and not (self.validation and self.validation.official):
            raise TrainingError(
                f"--best_metric={train.best_metric} needs the official ground truth in val/gt; use mean, or add it"
            )

    @property
    def result(self) -> RetinaFace:
        """The network that training is for: the averaged one, if there is an average."""
        return self.network if self.averaged is None else cast(RetinaFace, self.averaged.module)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a `ckpt-last` of the same experiment; rates and decays are those of the configuration.

        Raises:
            CheckpointError: it is of another architecture or of another kind of optimiser.
        """
        saved = checkpoint.training
        if checkpoint.model != self.config.model:
            raise CheckpointError(f"{checkpoint.path}: is of another architecture; use another --experiment_name")
        if checkpoint.experiment and checkpoint.experiment.train.optimizer != self.config.train.optimizer:
            raise CheckpointError(
                f"{checkpoint.path}: was trained with --optimizer={checkpoint.experiment.train.optimizer}; keep it, or "
                "use another --experiment_name"
            )
        self.network.load_state_dict(checkpoint.state)
        asked = [{name: group[name] for name in group if name != "params"} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(saved["optimizer"])
        except ValueError as error:
            raise CheckpointError(
                f"{checkpoint.path}: its optimiser has other groups of parameters ({error}); "
                "keep --new_rate_factor and --backbone_rate_factor as they were"
            ) from None
        for group, options in zip(self.optimizer.param_groups, asked, strict=True):
            group.update(options)
        if self.averaged is not None and saved["averaged"]:
            self.averaged.load_state_dict(saved["averaged"])
        if saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])
        self.progress = Progress(**{name: saved[name] for name in vars(self.progress) if name in saved})
        self.progress.sums = {name: value.to(self.device) for name, value in self.progress.sums.items()}
        self.scheduler = self._build_scheduler()

    def fit(self) -> None:
        """Train the epochs that are left.

        Raises:
            TrainingError: the loss is not finite.
            KeyboardInterrupt: a signal asked to stop; all is saved.
        """
        train = self.config.train
        with StopRequest() as self.stop:
            for epoch in range(self.progress.epoch + 1, train.epochs + 1):
                if train.patience and self.progress.waited >= train.patience:
                    self.log.line(f"no better validation in {train.patience} of them: stopping early")
                    break
                self._run_epoch(epoch)
        if self.progress.unreadable:
            names = ", ".join(f"{name} ({reason})" for name, reason in self.progress.unreadable.items())
            self.log.line(f"{len(self.progress.unreadable)} training images could not be read: {names}")

    def _run_epoch(self, epoch: int) -> None:
        train = self.config.train
        start, at_start = time.perf_counter(), self.progress.position
        metrics = self._train_epoch(epoch)
        images_per_second = (self.batches * self.batch_size - at_start) / (time.perf_counter() - start)
        self.progress.epoch, self.progress.position, self.progress.sums = epoch, 0, {}
        if self.validation is None:
            self._save("best", self.result, epoch=epoch)
        elif epoch % train.eval_every == 0 or epoch == train.epochs:
            metrics |= self._validate(self.validation, epoch)
            better = metrics[self._best_metric] > self.progress.best_ap
            self.progress.waited = 0 if better else self.progress.waited + 1
            if better:
                self.progress.best_ap = metrics[self._best_metric]
                self._save("best", self.result, epoch=epoch, val_ap=self.progress.best_ap)
        # Before ckpt-last: a run killed in between repeats the epoch and replaces its row, so none is ever missing.
        self.log.epoch(epoch, metrics, images_per_second)
        self._save_last()
        if epoch < train.epochs and any_of_processes(self.stop.asked, self.device):
            self._stop()

    @property
    def _best_metric(self) -> str:
        metric = self.config.train.best_metric
        return "val/ap" if metric == "mean" else f"val/ap_{metric}"

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        """The rest of an epoch; returns the mean of every loss term over the whole of it, and the last rate."""
        parallel = self._prepare(epoch)
        self.sampler.set_epoch(epoch, start=self.progress.position)
        total = self.batches * self.batch_size
        # No bar where nobody watches it: the log has a line every few steps instead.
        bar = tqdm(
            total=total,
            initial=self.progress.position,
            desc=f"epoch {epoch}/{self.config.train.epochs}",
            unit="image",
            leave=False,
            disable=None if self.processes.is_main else True,
        )
        with bar:
            for batch in self.loader:
                self._learn(parallel, batch, epoch)
                self.progress.position += self.batch_size
                bar.update(self.batch_size)
                step = self.progress.position // self.batch_size
                if step % _LOG_EVERY_STEPS == 0 or step == self.batches:
                    loss = float(self.progress.sums["loss"]) / step
                    bar.set_postfix(loss=f"{loss:.3f}")
                    self.log.step((epoch - 1) * self.batches + step, loss, float(self.scheduler.get_last_lr()[0]))
                    if bar.disable:
                        self.log.line(f"epoch {epoch} step {step}/{self.batches}: mean loss {loss:.4f}")
                if step % self.config.train.accumulate == 0 and step < self.batches:
                    self._save_in_between(step)
        sums = {name: mean_over_processes(value) for name, value in self.progress.sums.items()}
        means = {name: float(value) / self.batches for name, value in sums.items()}
        return {**means, "learning_rate": float(self.scheduler.get_last_lr()[0])}

    def _prepare(self, epoch: int) -> nn.Module:
        """The network as this epoch trains it: modes, what learns, and the wrapper that shares gradients."""
        train = self.config.train
        self.network.train()
        freezes_backbone = epoch <= train.freeze_backbone_epochs
        backbone = self.network.backbone
        backbone.requires_grad_(not freezes_backbone)
        if train.freeze_bn:
            freeze_batch_norm(self.network, self.new_parameters)
        if freezes_backbone:
            freeze_batch_norm(backbone)
        if self.processes.count > 1 and self._must_wrap(epoch):
            # Anew where other parameters begin to learn, for it expects gradients of those that did when it was made.
            devices = None if self.device.type == "cpu" else [self.device.index]
            self.parallel = DistributedDataParallel(self.network, device_ids=devices)
        return self.parallel

    def _must_wrap(self, epoch: int) -> bool:
        """Whether the network is not wrapped yet, or learns with other parameters from this epoch on."""
        return self.parallel is self.network or epoch == self.config.train.freeze_backbone_epochs + 1

    def _learn(self, parallel: nn.Module, batch: Batch, epoch: int) -> None:
        train = self.config.train
        step = self.progress.position // self.batch_size + 1
        for name, reason in batch.replaced:
            if name not in self.progress.unreadable:
                self.progress.unreadable[name] = reason
                self.log.line(f"warning: {name}: {reason}; taking another image")
        images = batch.images.to(self.device, non_blocking=True).float().contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.float16, enabled=train.amp):
            outputs = parallel(images)
            lesson = self.teacher(images) if self.teacher else None
        terms = self.loss(outputs, batch.targets.to(self.device), (images.shape[2], images.shape[3]), lesson)
        total = torch.stack(list(terms.values())).sum()
        first_of_group = (step - 1) // train.accumulate * train.accumulate
        self.scaler.scale(total / (min(first_of_group + train.accumulate, self.batches) - first_of_group)).backward()
        health = total.detach()
        if step % train.accumulate == 0 or step == self.batches:
            norm = self._gradient_norm()
            health = health if train.amp else health + norm  # scaled gradients may overflow; the scaler sees to it
        if not torch.isfinite(health):
            self._refuse(batch, f"epoch {epoch}, step {step}", float(total.detach()))
        if step % train.accumulate == 0 or step == self.batches:
            self._update()
        for name, value in {"loss": total, **terms}.items():
            self.progress.sums[name] = self.progress.sums.get(name, torch.zeros_like(total)) + value.detach()

    def _gradient_norm(self) -> Tensor:
        """The norm of all gradients, which are clipped to the largest one that is allowed."""
        self.scaler.unscale_(self.optimizer)
        parameters = [weights for weights in self.network.parameters() if weights.grad is not None]
        if self.config.train.clip_gradient:
            return nn.utils.clip_grad_norm_(parameters, self.config.train.clip_gradient)
        return nn.utils.get_total_norm([weights.grad for weights in parameters if weights.grad is not None])

    def _update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.network)

    def _refuse(self, batch: Batch, where: str, loss: float) -> NoReturn:
        names = ", ".join(str(self.images[index].path) for index in batch.indices)
        raise TrainingError(
            f"{where}: the loss is {loss} or has no finite gradient; the last checkpoint is kept; lower "
            f"--learning_rate, or look at the images of this batch: {names}"
        )

    def _build_scheduler(self) -> LRScheduler:
        """The schedule, put where the progress is."""
        steps_per_epoch = math.ceil(self.batches / self.config.train.accumulate)
        within = self.progress.position // self.batch_size // self.config.train.accumulate
        done = self.progress.epoch * steps_per_epoch + within
        return build_scheduler(self.optimizer, self.config.train, steps_per_epoch, done)

    def _save_in_between(self, step: int) -> None:
        """Save where time or a signal asks for it; after a signal, end."""
        minutes = (time.monotonic() - self._saved_at) / 60
        due = bool(self.config.train.save_minutes) and minutes >= self.config.train.save_minutes
        asks = step % _ASK_EVERY_STEPS == 0 or self.processes.count == 1
        stop = asks and any_of_processes(self.stop.asked, self.device)
        if due or stop:
            self._save_last()
        if stop:
            self._stop()

    def _stop(self) -> NoReturn:
        self.log.line(f"stopped after {self.progress.describe()}; the same command goes on from here")
        raise KeyboardInterrupt

    def _validate(self, validation: EvaluationSet, epoch: int) -> dict[str, float]:
        """The mean average precision as `val/ap`, and where there are several subsets, that of each.

        Every process detects in its share of the images.
        """
        copy_from_main(self.result)
        thresholds = self.config.evaluation
        thresholds = replace(thresholds, top_k=thresholds.top_k or _VALIDATION_TOP_K)
        detector = FaceDetector(self.result, thresholds, max_pixels=EVALUATION_MEMORY.max_pixels)
        files = list(zip(validation.names, validation.images or [], strict=True))
        own = files[self.processes.rank :: self.processes.count]
        quiet = None if self.processes.is_main else True
        found = tqdm(detect_files(detector, own), total=len(own), desc="validation", disable=quiet, leave=False)
        predictions = {}
        for number, (picture, detections) in enumerate(found):
            if picture.problem:
                self.log.line(f"warning: {picture.name}: {picture.problem}; nothing is found in it")
            elif number < _PICTURES_IN_LOG and picture.image is not None:
                sure = detections.select(detections.scores >= self.config.inference.confidence_threshold)
                self.log.picture(f"validation/{number}", draw_detections(picture.image, sure), epoch)
            predictions[picture.name] = prediction_rows(detections)
        evaluation = validation.evaluate(merge_over_processes(predictions))
        self.log.curves(evaluation.curves, epoch)
        precisions = evaluation.average_precisions
        subsets = {f"val/ap_{subset}": value for subset, value in precisions.items()} if len(precisions) > 1 else {}
        return {"val/ap": sum(precisions.values()) / len(precisions), **subsets}

    def _save_last(self) -> None:
        self._save(
            "last",
            self.network,
            averaged={} if self.averaged is None else self.averaged.state_dict(),
            new_parameters=self.new_parameters,
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            **vars(self.progress),
        )
        self._saved_at = time.monotonic()

    def _save(self, which: Literal["best", "last"], network: RetinaFace, **training: Any) -> None:
        if self.processes.is_main:
            path = self.experiment.checkpoint(self.config.model.backbone, which)
            save_checkpoint(path, self.config, network.state_dict(), **training)


def build_loader(
    images: Sequence[LabelledImage], config: ExperimentConfig, sampler: EpochSampler, pin_memory: bool
) -> DataLoader[Any]:
    """Batches of this process's share of the augmented crops, in the order of the sampler."""
    return DataLoader(
        FaceDataset(images, config.data, fill=config.model.pixel_mean),
        batch_size=sampler.batch_size,
        sampler=sampler,
        num_workers=config.data.num_workers,
        persistent_workers=config.data.num_workers > 0,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_prepare_worker,
    )


def _prepare_worker(_worker: int) -> None:
    """Workers are parallel already, so OpenCV must not start threads; and Ctrl-C is for the main process to handle."""
    import cv2

    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
