"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from config import ExperimentConfig
from engine.optimisation import Optimization, freeze_batch_norm
from engine.training_state import (
    Progress,
    TrainingData,
    TrainingError,
    check_options,
    describe_duration,
    describe_loss_shares,
    must_sync_batch_norm,
    usual_eval_every,
)
from engine.validation import validate
from layers.multibox_loss import MultiBoxLoss
from models.checkpoint import Checkpoint, save_checkpoint
from models.foreign_checkpoint import CheckpointError
from models.retinaface import RetinaFace
from models.teacher import Teacher
from utils.datasets.face_dataset import Batch
from utils.datasets.loader import build_loader
from utils.datasets.sampler import EpochSampler
from utils.runtime.distributed import SINGLE_PROCESS, DistributedContext, any_process, reduce_mean
from utils.runtime.experiment import Experiment
from utils.runtime.logger import RunLog
from utils.runtime.signals import StopRequest

_LOG_EVERY_STEPS, _CHECK_STOP_EVERY_STEPS = 20, 10  # the latter with several processes, which must communicate


class Trainer:
    """Trains one experiment, and can be stopped and resumed at any step.

    `ckpt-best` is the checkpoint of the highest validation AP, or the newest one without validation images. Order and
    augmentation of an epoch depend only on the seed and the number of the epoch, so a resumed run sees what an
    uninterrupted one would have seen. Several processes share each batch.
    """

    def __init__(
        self,
        model: RetinaFace,
        config: ExperimentConfig,
        experiment: Experiment,
        data: TrainingData,
        log: RunLog,
        *,
        context: DistributedContext = SINGLE_PROCESS,
        new_parameters: Sequence[str] = (),
        teacher: Teacher | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            model: model on the target device.
            config: configuration of the experiment.
            experiment: folder of the checkpoints.
            data: training and validation images.
            log: receives lines and metrics.
            context: rank and number of processes.
            new_parameters: names of the randomly initialised parameters, if the others are pretrained.
            teacher: teacher for distillation, on the device of the model and with the same priors.

        Raises:
            TrainingError: an option needs CUDA, or the batch cannot be shared by the processes.
        """
        self.device = model.device
        check_options(config, data, self.device, context)
        train = config.train
        if must_sync_batch_norm(train, self.device, context):
            log.line(f"batch normalisation is synchronised over {context.world_size} devices")
            model = cast(RetinaFace, nn.SyncBatchNorm.convert_sync_batchnorm(model))
        self.model = model.to(memory_format=torch.channels_last)
        self.ddp_model: nn.Module = self.model
        self.config, self.experiment, self.data, self.log = config, experiment, data, log
        self.context, self.teacher = context, teacher
        self.loss = MultiBoxLoss(config.loss, config.model)
        world_size = context.world_size
        self.batch_size = min(train.batch_size, max(len(data.images) // world_size, 1) * world_size)
        self.sampler = EpochSampler(
            len(data.images),
            self.batch_size // world_size,
            seed=train.seed,
            weights=data.weights,
            rank=context.rank,
            world_size=world_size,
        )
        self.loader = build_loader(data.images, config, self.sampler, pin_memory=self.device.type == "cuda")
        self.steps_per_epoch = len(self.sampler) * world_size // self.batch_size
        self.new_parameters = list(new_parameters)
        self.eval_every = train.eval_every or usual_eval_every(data, config.data.im_size)
        self.progress = Progress()
        self.updates_per_epoch = math.ceil(self.steps_per_epoch / train.accumulate)
        self.optimization = Optimization(model, train, self.new_parameters, self.updates_per_epoch, self.device)
        self._saved_at = time.monotonic()
        self._steps_timed, self._timed_from = 0, 0.0

    @property
    def trained_model(self) -> RetinaFace:
        """The model that is validated and kept: the averaged one, if weights are averaged."""
        averaged = self.optimization.averaged
        return self.model if averaged is None else cast(RetinaFace, averaged.module)

    def fit(self) -> None:
        """Train the remaining epochs.

        Raises:
            TrainingError: the loss is not finite.
            KeyboardInterrupt: a signal asked to stop; everything is saved.
        """
        train, progress = self.config.train, self.progress
        with StopRequest() as self.stop:
            for epoch in range(progress.epoch + 1, train.epochs + 1):
                if train.patience and progress.validations_without_improvement >= train.patience:
                    self.log.line(f"no improvement in {train.patience} validations: stopping early")
                    break
                self._start_epoch(epoch)
                start, first_position = time.perf_counter(), progress.position
                for step, batch in self._batches(epoch):
                    self._train_step(batch, epoch, step)
                    self._log_step(epoch, step)
                    self._log_duration(epoch, step)
                    self._save_within_epoch(step)
                seconds = time.perf_counter() - start
                rate = (self.steps_per_epoch * self.batch_size - first_position) / seconds
                metrics = self._epoch_metrics()
                if epoch == 1:
                    self.log.line(describe_loss_shares(metrics))
                progress.epoch, progress.position, progress.sums = epoch, 0, {}
                metrics |= self._validate_and_save_best(epoch)
                # Before ckpt-last: a run that is killed in between repeats the epoch and replaces its row.
                self.log.epoch(epoch, metrics, rate)
                self._save_last()
                if epoch < train.epochs and any_process(self.stop.requested, self.device):
                    self._stop()
        if progress.unreadable:
            names = ", ".join(f"{name} ({reason})" for name, reason in progress.unreadable.items())
            self.log.line(f"{len(progress.unreadable)} training images could not be read: {names}")

    def _start_epoch(self, epoch: int) -> None:
        """Set modes and frozen parameters of the epoch, and wrap the model where several processes train it."""
        train = self.config.train
        # Crops have one size, so cuDNN's search for the fastest algorithms pays off at once.
        torch.backends.cudnn.benchmark = self.device.type == "cuda"
        self.model.train()
        backbone_is_frozen = epoch <= train.freeze_backbone_epochs
        if train.freeze_bn:
            freeze_batch_norm(self.model, self.new_parameters)
        for backbone in self.model.backbones:
            backbone.requires_grad_(not backbone_is_frozen)
            if backbone_is_frozen:
                freeze_batch_norm(backbone)
        # DistributedDataParallel only handles parameters that were trainable when it was built: wrap after unfreezing.
        must_wrap = self.ddp_model is self.model or epoch == train.freeze_backbone_epochs + 1
        if self.context.world_size > 1 and must_wrap:
            devices = None if self.device.type == "cpu" else [self.device.index]
            self.ddp_model = DistributedDataParallel(self.model, device_ids=devices)
        self.sampler.set_epoch(epoch, start=self.progress.position)

    def _batches(self, epoch: int) -> Iterator[tuple[int, Batch]]:
        """The remaining batches of the epoch with their steps, counted from 1, under a progress bar."""
        # Without a terminal there is no bar; the log has a line every few steps.
        self.bar = tqdm(
            total=self.steps_per_epoch * self.batch_size,
            initial=self.progress.position,
            desc=f"epoch {epoch}/{self.config.train.epochs}",
            unit="image",
            leave=False,
            disable=None if self.context.is_main else True,
        )
        with self.bar:
            for batch in self.loader:
                self._warn_about_unreadable(batch)
                yield self.progress.position // self.batch_size + 1, batch
                self.bar.update(self.batch_size)

    def _train_step(self, batch: Batch, epoch: int, step: int) -> None:
        """Run forward, loss and backward of one batch; step the optimiser after every `accumulate` batches."""
        accumulate, amp_dtype = self.config.train.accumulate, self.optimization.amp_dtype
        images = batch.images.to(self.device, non_blocking=True).float().contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, amp_dtype, enabled=amp_dtype is not None):
            outputs = self.ddp_model(images)
            taught = self.teacher(images) if self.teacher else None
        terms = self.loss(outputs, batch.targets.to(self.device), (images.shape[2], images.shape[3]), taught)
        total = torch.stack(list(terms.values())).sum()

        group_start = (step - 1) // accumulate * accumulate
        group_size = min(group_start + accumulate, self.steps_per_epoch) - group_start
        self.optimization.backward(total / group_size)
        is_last_of_group = step == group_start + group_size
        finite = torch.isfinite(total.detach())
        if is_last_of_group:
            norm = self.optimization.clip_gradients()
            # Scaled gradients may overflow, which the scaler handles.
            finite = finite if self.optimization.scaler.is_enabled() else finite & torch.isfinite(norm)
        if not finite:
            self._raise_non_finite(batch, f"epoch {epoch}, step {step}", float(total.detach()))
        if is_last_of_group:
            self.optimization.step()
        means = reduce_mean(torch.stack([total, *terms.values()]).detach())
        for name, value in zip(("loss", *terms), means, strict=True):
            self.progress.sums[name] = self.progress.sums.get(name, torch.zeros_like(value)) + value
        self.progress.position += self.batch_size

    def _raise_non_finite(self, batch: Batch, where: str, loss: float) -> NoReturn:
        names = ", ".join(str(self.data.images[index].path) for index in batch.indices)
        raise TrainingError(
            f"{where}: the loss is {loss} or has no finite gradient; the last checkpoint is kept; lower "
            f"--learning_rate, or look at the images of this batch: {names}"
        )

    def _warn_about_unreadable(self, batch: Batch) -> None:
        for name, reason in batch.replaced:
            if name not in self.progress.unreadable:
                self.progress.unreadable[name] = reason
                self.log.line(f"warning: {name}: {reason}; taking another image")

    def _log_step(self, epoch: int, step: int) -> None:
        if step % _LOG_EVERY_STEPS and step != self.steps_per_epoch:
            return
        loss = float(self.progress.sums["loss"]) / step
        self.bar.set_postfix(loss=f"{loss:.3f}")
        self.log.step((epoch - 1) * self.steps_per_epoch + step, loss, self.optimization.learning_rate)
        if self.bar.disable:
            self.log.line(f"epoch {epoch} step {step}/{self.steps_per_epoch}: mean loss {loss:.4f}")

    def _log_duration(self, epoch: int, step: int) -> None:
        """Say once, after the first steps of this process, how long the run will take."""
        if self._steps_timed == 0:  # The first step includes the start of the workers.
            self._timed_from = time.perf_counter()
        if self._steps_timed == _LOG_EVERY_STEPS:
            seconds = (time.perf_counter() - self._timed_from) / _LOG_EVERY_STEPS
            remaining = (self.config.train.epochs - epoch + 1) * self.steps_per_epoch - step
            self.log.line(describe_duration(remaining, seconds))
        self._steps_timed += 1

    def _epoch_metrics(self) -> dict[str, float]:
        """Mean of every loss term over the whole epoch, and the last learning rate."""
        means = {name: float(value) / self.steps_per_epoch for name, value in self.progress.sums.items()}
        return {**means, "learning_rate": self.optimization.learning_rate}

    def _validate_and_save_best(self, epoch: int) -> dict[str, float]:
        """Validate if this epoch is due, and save the model if it is the best so far; returns the metrics."""
        train, progress, validation = self.config.train, self.progress, self.data.validation
        if validation is None:
            self._save("best", self.trained_model, epoch=epoch)
            return {}
        if epoch % self.eval_every and epoch != train.epochs:
            return {}
        torch.backends.cudnn.benchmark = False  # Validation images differ in size.
        metrics = validate(self.trained_model, self.config, validation, self.context, self.log, epoch)
        value = metrics["val/ap" if train.best_metric == "mean" else f"val/ap_{train.best_metric}"]
        progress.validations_without_improvement += 1
        if value > progress.best_ap:
            progress.best_ap, progress.validations_without_improvement = value, 0
            self._save("best", self.trained_model, epoch=epoch, val_ap=value)
        return metrics

    def _save_within_epoch(self, step: int) -> None:
        """Save if enough time has passed or a signal has arrived; stop after a signal."""
        if step % self.config.train.accumulate or step == self.steps_per_epoch:
            return
        minutes = (time.monotonic() - self._saved_at) / 60
        is_due = bool(self.config.train.save_minutes) and minutes >= self.config.train.save_minutes
        may_stop = step % _CHECK_STOP_EVERY_STEPS == 0 or self.context.world_size == 1
        must_stop = may_stop and any_process(self.stop.requested, self.device)
        if is_due or must_stop:
            self._save_last()
        if must_stop:
            self._stop()

    def _stop(self) -> NoReturn:
        self.log.line(f"stopped after {self.progress.describe()}; the same command continues from here")
        raise KeyboardInterrupt

    def _save_last(self) -> None:
        self._save(
            "last",
            self.model,
            new_parameters=self.new_parameters,
            **self.optimization.state_dict(),
            **vars(self.progress),
        )
        self._saved_at = time.monotonic()

    def _save(self, which: str, model: RetinaFace, **training: Any) -> None:
        if self.context.is_main:
            path = self.experiment.checkpoint(self.config.model.backbone, which)
            save_checkpoint(path, self.config, model.state_dict(), **training)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a `ckpt-last` of the same experiment, with the learning rates of the configuration.

        Raises:
            CheckpointError: the checkpoint has another architecture or another kind of optimiser.
        """
        saved = checkpoint.training
        if checkpoint.model_config != self.config.model:
            raise CheckpointError(f"{checkpoint.path}: has another architecture; use another --experiment_name")
        if checkpoint.experiment and checkpoint.experiment.train.optimizer != self.config.train.optimizer:
            raise CheckpointError(
                f"{checkpoint.path}: was trained with --optimizer={checkpoint.experiment.train.optimizer}; keep it, or "
                "use another --experiment_name"
            )
        self.model.load_state_dict(checkpoint.state)
        self.progress = Progress(**{name: saved[name] for name in vars(self.progress) if name in saved})
        self.progress.sums = {name: value.to(self.device) for name, value in self.progress.sums.items()}
        updates = self.progress.epoch * self.updates_per_epoch
        updates += self.progress.position // self.batch_size // self.config.train.accumulate
        try:
            self.optimization.load_state_dict(saved, updates)
        except ValueError as error:
            raise CheckpointError(
                f"{checkpoint.path}: its optimiser has other groups of parameters ({error}); "
                "keep --new_rate_factor and --backbone_rate_factor as they were"
            ) from None
