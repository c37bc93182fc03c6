"""Every option of the commands: frozen dataclasses, the flags built from them, and their JSON form.

Each fact about an experiment (anchors, means, thresholds, loss weights ...) is a field here and nowhere else.
`ExperimentConfig` is what training saves as `experiments/<name>/config.json` and what everything else reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent
EXPERIMENTS = ROOT / "experiments"
DEFAULT_EXPERIMENT = "mobilenet0.25_pretrained"


class UserError(Exception):
    """What the user gave cannot be used. Scripts print it as one line: what, where, what to do."""


class ConfigError(UserError):
    """An option or a saved configuration is unknown, malformed or contradictory."""


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        _check(getattr(config, name) > 0, f"--{name} must be positive, got {getattr(config, name)}")


def _check_not_negative(config: Any, *names: str) -> None:
    for name in names:
        _check(getattr(config, name) >= 0, f"--{name} must not be negative, got {getattr(config, name)}")


def _check_choice(config: Any, name: str, choices: Sequence[Any]) -> None:
    value = getattr(config, name)
    _check(value in choices, f"--{name} is one of {', '.join(map(str, choices))}, got {value!r}")


def _check_fraction(config: Any, *names: str) -> None:
    for name in names:
        _check(0 <= getattr(config, name) <= 1, f"--{name} must lie in [0, 1], got {getattr(config, name)}")


# What a backbone brings along unless the configuration says otherwise: (FPN channels, negative slope of LeakyReLU).
# Both pairs are those of biubug6/Pytorch_Retinaface.
BACKBONES: dict[str, tuple[int, float]] = {
    "mobilenet0.25": (64, 0.1),
    "resnet18": (256, 0.0),
    "resnet34": (256, 0.0),
    "resnet50": (256, 0.0),
    "resnet101": (256, 0.0),
    "resnet152": (256, 0.0),
}

# Side lengths in pixels of the square anchors of one cell, one tuple a pyramid level, of strides 8, 16 and 32.
ANCHOR_SIZES: dict[int, tuple[tuple[int, ...], ...]] = {
    2: ((16, 32), (64, 128), (256, 512)),
    3: ((8, 16, 32), (32, 64, 128), (128, 256, 512)),
}
# How many of four levels may be fine: see `ModelConfig.fine_levels`.
FINE_LEVELS = (0, 1, 2, 3)


def anchor_sizes_for(num_anchor: int, fine_levels: int = 0) -> tuple[tuple[int, ...], ...]:
    """The anchor sides in pixels that belong to `--num_anchor` and `--fine_levels`.

    Fine levels have the anchors of the enlarged picture: half as large, seen from its original.
    """
    if num_anchor not in ANCHOR_SIZES:
        raise ConfigError(f"--num_anchor must be one of {sorted(ANCHOR_SIZES)}, got {num_anchor}")
    usual = ANCHOR_SIZES[num_anchor]
    fine = tuple(tuple(size // 2 for size in level) for level in usual[:fine_levels])
    return fine + usual[max(fine_levels - 1, 0) :]


def strides_for(fine_levels: int) -> tuple[int, ...]:
    """Pixels per cell of every pyramid level."""
    return (4, 8, 16, 32) if fine_levels else (8, 16, 32)


def option(
    default: Any, help: str, *, choices: Sequence[Any] | None = None, aliases: Sequence[str] = (), kind: Any = None
) -> Any:
    """A dataclass field that is also a command-line flag of the same name.

    `kind` overrides how the flag's text is parsed; otherwise the field's type hint decides.
    """
    metadata = {"help": help, "choices": choices, "aliases": tuple(aliases), "kind": kind}
    return field(default=default, metadata=metadata)


def parse_bool(text: str) -> bool:
    """`True`, `yes`, `1` ... and `False`, `no`, `0` ..., in any case, as the original took them."""
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


def parse_anchor_sizes(text: str) -> tuple[tuple[int, ...], ...]:
    """`16,32/64,128/256,512`: commas between the anchors of a cell, slashes between levels."""
    try:
        sizes = tuple(tuple(int(size) for size in level.split(",")) for level in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected sizes like 16,32/64,128/256,512, got {text!r}") from None
    return sizes


def parse_numbers(text: str) -> tuple[float, ...]:
    """`1,0.25` as (1.0, 0.25); the empty text as ()."""
    try:
        return tuple(float(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers like 1,0.25, got {text!r}") from None


def parse_integers(text: str) -> tuple[int, ...]:
    """`70,90` as (70, 90); the empty text as ()."""
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers like 70,90, got {text!r}") from None


@dataclass(frozen=True)
class StageConfig:
    """One stage of the cascade: how its priors are matched, and the weight of its losses.

    A prior answers for the face that it overlaps by `match_iou` or more and is background below `negative_iou`; what
    lies between them takes no part in the classification. None is `match_iou`: nothing lies between.
    """

    match_iou: float = 0.35
    loss_weight: float = 1.0
    negative_iou: float | None = None

    def __post_init__(self) -> None:
        _check(0 < self.match_iou < 1, f"match_iou must lie between 0 and 1, got {self.match_iou}")
        _check(self.loss_weight > 0, f"loss_weight must be positive, got {self.loss_weight}")
        _check(
            0 < self.background_iou <= self.match_iou,
            f"negative_iou must be positive and at most match_iou ({self.match_iou}), got {self.negative_iou}",
        )

    @property
    def background_iou(self) -> float:
        """IoU below which a prior is background."""
        return self.match_iou if self.negative_iou is None else self.negative_iou


# What a later stage corrects: the deltas of the stage before it, or the boxes that they decode to.
REFINEMENTS = ("sum", "rematch")


@dataclass(frozen=True)
class ModelConfig:
    """The architecture, complete: two equal `ModelConfig`s build networks with equal tensor names and shapes."""

    backbone: str = option("resnet50", "feature extractor", choices=tuple(BACKBONES))
    model_version: str = option("tina", "tina adds the IoU-aware branch to retina", choices=("retina", "tina"))
    anchor_sizes: tuple[tuple[int, ...], ...] = option(
        ANCHOR_SIZES[3], "anchor sides in pixels, e.g. 16,32/64,128/256,512", kind=parse_anchor_sizes
    )
    fine_levels: int = option(
        0,
        "pyramid levels taken from the picture at twice its size, for faces down to half the size, at about five times "
        "the cost: of the four levels of strides 4, 8, 16 and 32 the first so many; 0 has three levels and none of it",
        choices=FINE_LEVELS,
    )
    activation_slope: float = option(BACKBONES["resnet50"][1], "negative slope of the LeakyReLUs")
    fpn_channels: int = option(BACKBONES["resnet50"][0], "channels of the pyramid and the context modules")
    score_exponent: float = option(
        0.9, "a in the fused score p^a * iou^(1-a) of the tina version; 1 ignores the IoU branch"
    )
    context_share: float = option(
        0.3,
        "part that a fine level's face logit takes from the same place in the picture at its own size, where the "
        "network sees twice as far around a face; 0 looks at the enlarged picture alone",
    )
    coarse_share: float = option(
        0.0,
        "part that every level's face logit takes from the same place in the picture at half its size, at a quarter of "
        "the cost of seeing it at its own; 0 does without",
    )
    refinement: str = option(
        "sum",
        "what the second stage does: sum adds its box deltas to those of the first; rematch takes the first one's "
        "boxes as its anchors and matches them again at a higher IoU (RetinaFace)",
        choices=REFINEMENTS,
    )
    landmarks: bool = True
    strides: tuple[int, ...] = (8, 16, 32)
    variances: tuple[float, float] = (0.1, 0.2)
    pixel_mean: tuple[float, float, float] = (104.0, 117.0, 123.0)  # BGR
    stages: tuple[StageConfig, ...] = (StageConfig(), StageConfig())

    def __post_init__(self) -> None:
        _check(self.backbone in BACKBONES, f"unknown backbone {self.backbone!r}; choose from {', '.join(BACKBONES)}")
        _check(self.model_version in ("retina", "tina"), f"model_version is retina or tina, got {self.model_version!r}")
        _check_choice(self, "fine_levels", FINE_LEVELS)
        _check(
            self.strides == strides_for(self.fine_levels),
            f"--fine_levels={self.fine_levels} has strides {strides_for(self.fine_levels)}, got {self.strides}",
        )
        _check(
            len(self.anchor_sizes) == len(self.strides),
            f"{len(self.anchor_sizes)} levels of anchor_sizes for {len(self.strides)} strides",
        )
        counts = {len(level) for level in self.anchor_sizes}
        _check(len(counts) == 1 and 0 not in counts, f"every level needs as many anchor_sizes, got {self.anchor_sizes}")
        _check(all(size > 0 for level in self.anchor_sizes for size in level), "anchor_sizes must be positive")
        _check(
            self.fpn_channels > 0 and self.fpn_channels % 4 == 0,
            f"fpn_channels must be a multiple of 4, got {self.fpn_channels}",
        )
        _check_fraction(self, "score_exponent", "context_share", "coarse_share")
        _check(len(self.stages) > 0, "a detector needs at least one stage")
        _check(self.refinement in REFINEMENTS, f"refinement is sum or rematch, got {self.refinement!r}")
        _check(
            self.refinement == "sum" or self.cascade,
            "--refinement rematch needs a second stage; add --cascade True, or drop it",
        )

    @classmethod
    def for_backbone(
        cls,
        backbone: str,
        *,
        num_anchor: int = 3,
        fine_levels: int = 0,
        cascade: bool = True,
        refinement: str = "sum",
        **changes: Any,
    ) -> ModelConfig:
        """The usual configuration of a backbone; `changes` are fields set otherwise."""
        if backbone not in BACKBONES:
            raise ConfigError(f"unknown backbone {backbone!r}; choose from {', '.join(BACKBONES)}")
        channels, slope = BACKBONES[backbone]
        defaults: dict[str, Any] = {
            "fpn_channels": channels,
            "activation_slope": slope,
            "anchor_sizes": anchor_sizes_for(num_anchor, fine_levels),
            "fine_levels": fine_levels,
            "strides": strides_for(fine_levels),
            "refinement": refinement,
            "stages": stages_for(cascade, refinement),
        }
        return cls(backbone=backbone, **(defaults | changes))

    @property
    def num_anchor(self) -> int:
        """Anchors per cell."""
        return len(self.anchor_sizes[0])

    @property
    def cascade(self) -> bool:
        return len(self.stages) > 1

    @property
    def iou_aware(self) -> bool:
        return self.model_version == "tina"

    @property
    def name(self) -> str:
        """The original's way to name an experiment, e.g. `resnet50_tina_iou_anc3_casT_fpn3`.

        Its cascade is `sum`; another refinement stands behind the T.
        """
        version = "tina_iou_" if self.iou_aware else ""
        cascade = "T" if self.cascade else "F"
        cascade += "" if self.refinement == "sum" else f"-{self.refinement}"
        return f"{self.backbone}_{version}anc{self.num_anchor}_cas{cascade}_fpn{len(self.strides)}"


def stages_for(cascade: bool, refinement: str = "sum") -> tuple[StageConfig, ...]:
    """The stages that belong to `--cascade` and `--refinement`."""
    if not cascade:
        return (StageConfig(),)
    # RetinaFace's official cascade: decoded boxes fit better than priors, so more may be asked of them.
    second = StageConfig(match_iou=0.5, negative_iou=0.4) if refinement == "rematch" else StageConfig()
    return (StageConfig(), second)


@dataclass(frozen=True)
class DetectionConfig:
    """From raw outputs to detections."""

    confidence_threshold: float = option(0.5, "keep detections with a higher score")
    nms_threshold: float = option(0.3, "IoU above which the weaker of two boxes is suppressed")
    top_k: int = option(0, "candidates that enter the suppression, best first; 0 is no limit")
    keep_top_k: int = option(0, "detections kept per image, best first; 0 is no limit")
    clip_boxes: bool = option(True, "clip boxes to the image; False keeps what reaches outside, as the original did")

    def __post_init__(self) -> None:
        _check_fraction(self, "confidence_threshold", "nms_threshold")
        _check_not_negative(self, "top_k", "keep_top_k")


CLASSIFICATION_LOSSES = ("ohem_ce", "focal")
BOX_LOSSES = ("smooth_l1", "diou", "ciou")
LANDMARK_LOSSES = ("smooth_l1", "wing")


@dataclass(frozen=True)
class LossConfig:
    """Terms of the multibox loss, summed with these weights in every stage."""

    classification: str = option(
        "ohem_ce",
        "loss of the face scores: cross-entropy with mined negatives, or the focal loss of all priors",
        choices=CLASSIFICATION_LOSSES,
    )
    box_regression: str = option(
        "smooth_l1", "loss of the boxes: of their deltas, or the distance or complete IoU", choices=BOX_LOSSES
    )
    landmark_regression: str = option("smooth_l1", "loss of the landmark deltas", choices=LANDMARK_LOSSES)
    class_weight: float = option(1.0, "weight of the classification loss")
    box_weight: float = option(2.0, "weight of the box loss")
    landmark_weight: float = option(0.1, "weight of the landmark loss")
    iou_weight: float = option(1.0, "weight of the IoU branch's loss (tina)")
    distil_weight: float = option(1.0, "weight of the loss towards the scores of --teacher")
    negative_ratio: int = option(7, "hard negatives mined per positive prior by ohem_ce")

    def __post_init__(self) -> None:
        for name, losses in (
            ("classification", CLASSIFICATION_LOSSES),
            ("box_regression", BOX_LOSSES),
            ("landmark_regression", LANDMARK_LOSSES),
        ):
            _check_choice(self, name, losses)
        _check_positive(self, "class_weight", "box_weight", "landmark_weight", "iou_weight", "distil_weight")
        _check_positive(self, "negative_ratio")


CACHES = ("none", "ram", "disk")


@dataclass(frozen=True)
class DataConfig:
    """What is learnt from, and how it is shown to the network."""

    dataset: str = option(
        "widerface/", "folder(s) with train/ and val/, under data/ or any path; separate several by commas"
    )
    dataset_weights: tuple[float, ...] = option(
        (),
        "how often an image of each folder is drawn relative to those of the others, e.g. 1,0.25; empty shows every "
        "image once an epoch",
        kind=parse_numbers,
    )
    im_size: int = option(640, "side of the training crops in pixels")
    min_crop_scale: float = option(0.3, "smallest crop side as a part of the image's short side")
    max_crop_scale: float = option(1.0, "largest crop side likewise; above 1 the crop is padded and faces get smaller")
    mosaic_probability: float = option(0.5, "part of the samples that are four crops of half the side, for small faces")
    rotation_degrees: float = option(0.0, "crops are turned by up to this angle either way; 0 turns none")
    flip_probability: float = option(0.5, "part of the crops that are mirrored")
    colour_probability: float = option(0.5, "probability of each colour change")
    grey_probability: float = option(0.05, "part of the crops that lose their colour")
    blur_probability: float = option(0.0, "part of the crops that are blurred, as if out of focus or shaken")
    jpeg_probability: float = option(0.0, "part of the crops that are compressed once more, at a quality of 30 to 90")
    cache: str = option(
        "none", "keep decoded images in memory (ram) or below ~/.cache (disk); none decodes anew", choices=CACHES
    )
    cache_side: int = option(0, "longest side in pixels to which cached images are reduced; 0 keeps their size")
    num_workers: int = option(2, "processes that read and augment images; 0 reads in the main process")

    def __post_init__(self) -> None:
        _check(self.im_size >= 32, f"--im_size must be at least 32, got {self.im_size}")
        _check(
            0 < self.min_crop_scale <= self.max_crop_scale,
            f"--min_crop_scale must be positive and at most --max_crop_scale, "
            f"got {self.min_crop_scale} and {self.max_crop_scale}",
        )
        _check(
            all(0 < weight < math.inf for weight in self.dataset_weights),
            f"--dataset_weights must be positive, got {self.dataset_weights}",
        )
        _check_not_negative(self, "num_workers", "cache_side")
        _check_fraction(self, "mosaic_probability", "flip_probability", "colour_probability", "grey_probability")
        _check_fraction(self, "blur_probability", "jpeg_probability")
        _check(
            0 <= self.rotation_degrees <= 180, f"--rotation_degrees must lie in [0, 180], got {self.rotation_degrees}"
        )
        _check_choice(self, "cache", CACHES)
        _check(
            self.cache != "none" or self.cache_side == 0,
            f"--cache_side={self.cache_side} needs a --cache: choose ram or disk, or set --cache_side=0",
        )


SCHEDULES = ("multistep", "cosine", "cosine_restarts")
BEST_METRICS = ("mean", "easy", "medium", "hard")


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation."""

    epochs: int = option(8000, "passes over the training images")
    batch_size: int = option(16, "images per batch, over all processes", aliases=("batch_sixe",))
    accumulate: int = option(1, "batches whose gradients are summed before the weights change")
    optimizer: str = option("sgd", "optimiser; adamw wants a learning rate of about a tenth", choices=("sgd", "adamw"))
    learning_rate: float = option(1e-2, "peak learning rate; a hundredth of it suits fine-tuning a trained detector")
    backbone_rate_factor: float = option(1.0, "learning rate of the backbone relative to the rest")
    freeze_backbone_epochs: int = option(0, "epochs at the beginning in which the backbone does not learn")
    new_rate_factor: float = option(
        1.0, "learning rate of what --pretrained_detector lacks, such as the IoU branch, relative to the rest"
    )
    teacher: str | None = option(
        None,
        "checkpoint of a detector whose scores, averaged over a crop and its mirror image, are learnt besides the "
        "labels; it is built with the model's fine levels",
    )
    momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(5e-4, "weight decay")
    schedule: str = option("multistep", "how the rate falls after the warm-up", choices=SCHEDULES)
    milestones: tuple[int, ...] = option(
        (), "epochs at which multistep divides the rate by ten; empty is 70%% and 90%% of the run", kind=parse_integers
    )
    restart_epochs: int = option(30, "epochs from one restart of cosine_restarts to the next")
    warmup_epochs: float = option(1.0, "epochs over which the rate rises linearly from a hundredth of its peak")
    freeze_bn: bool = option(False, "keep the running statistics of batch normalisation, for fine-tuning")
    sync_bn: bool = option(False, "batch normalisation over all processes together (torchrun, CUDA)")
    amp: bool = option(False, "compute in 16 bits where that is safe, on CUDA")
    ema_decay: float = option(0.0, "decay of the averaged weights that are validated and kept as best; 0 averages none")
    clip_gradient: float = option(10.0, "largest gradient norm; 0 does not clip")
    eval_every: int = option(1, "validate every so many epochs (the last is always validated)")
    best_metric: str = option(
        "mean", "AP that makes a checkpoint the best: of a subset, or the mean of all", choices=BEST_METRICS
    )
    patience: int = option(0, "stop after so many validations without a better one; 0 never does")
    save_minutes: float = option(10.0, "write ckpt-last also within epochs, every so many minutes; 0 does not")
    seed: int = option(0, "seed of weights, order and augmentation")

    def __post_init__(self) -> None:
        _check_positive(self, "epochs", "batch_size", "accumulate", "learning_rate", "new_rate_factor", "eval_every")
        _check_positive(self, "restart_epochs")
        _check_not_negative(self, "momentum", "weight_decay", "warmup_epochs", "clip_gradient", "save_minutes")
        _check_not_negative(self, "backbone_rate_factor", "freeze_backbone_epochs", "patience")
        _check(0 <= self.ema_decay < 1, f"--ema_decay must lie in [0, 1), got {self.ema_decay}")
        _check(self.optimizer in ("sgd", "adamw"), f"--optimizer is sgd or adamw, got {self.optimizer!r}")
        _check_choice(self, "schedule", SCHEDULES)
        _check_choice(self, "best_metric", BEST_METRICS)
        _check(not (self.freeze_bn and self.sync_bn), "--freeze_bn leaves --sync_bn nothing to do; drop one of them")


@dataclass(frozen=True)
class ExperimentConfig:
    """All that belongs to an experiment, saved beside its checkpoints."""

    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    inference: DetectionConfig = DetectionConfig()
    # Score threshold and NMS of the published WIDER FACE figures of biubug6/Pytorch_Retinaface.
    evaluation: DetectionConfig = DetectionConfig(confidence_threshold=0.02, nms_threshold=0.4)

    def save(self, path: Path) -> None:
        """Write the configuration as JSON, whole or not at all."""
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(to_dict(self), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> ExperimentConfig:
        """Read what `save` wrote.

        Raises:
            ConfigError: the file is not JSON, or a field is unknown or has a value of the wrong kind.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read as a configuration ({error})") from None
        return from_dict(cls, values, where=str(path))


@dataclass(frozen=True)
class RunOptions:
    """Where and on what a command runs; never part of an experiment."""

    gpu_num: int = option(0, "CUDA device; -1 is the CPU. Without CUDA the CPU is used, with a warning")
    experiment_name: str | None = option(
        None, f"folder under experiments/ (default: {DEFAULT_EXPERIMENT}; train.py names a new one by its architecture)"
    )

    def __post_init__(self) -> None:
        _check(self.gpu_num >= -1, f"--gpu_num is the index of a CUDA device or -1 for the CPU, got {self.gpu_num}")


@dataclass(frozen=True)
class WeightOptions:
    """Which checkpoint a command reads."""

    model_weight: str = option(
        "ckpt-best.pth", "file in the experiment's ckpt/ or the path of any supported checkpoint"
    )


BACKENDS = ("auto", "torch", "compile", "onnx")


@dataclass(frozen=True)
class SpeedOptions:
    """How the network is computed; the faces found do not depend on it but for rounding."""

    backend: str = option(
        "auto",
        "what runs the network: torch; compile, which takes up to a minute to start; onnx, ONNX Runtime on the CPU; "
        "auto is the fastest that is installed, onnx on a CPU and torch elsewhere",
        choices=BACKENDS,
    )
    fuse: bool = option(True, "fold batch normalisation into the convolutions before it")
    amp: bool = option(False, "compute in 16 bits where that is safe, on CUDA; scores change in their third digit")
    cudnn_benchmark: bool = option(
        False,
        "have cuDNN try which of its algorithms is the fastest, for sizes of images that repeat, on CUDA; the last "
        "digits may then differ between runs",
    )

    def __post_init__(self) -> None:
        _check_choice(self, "backend", BACKENDS)


@dataclass(frozen=True)
class MemoryOptions:
    """What bounds the memory, and how large a face can be in the network's eyes."""

    max_pixels: int = option(
        2_250_000,
        "the network sees larger pictures reduced to so many pixels; boxes stay in the original's. 0 is no limit: "
        "small faces in large pictures are found, close-ups are not",
    )

    def __post_init__(self) -> None:
        _check_not_negative(self, "max_pixels")


# WIDER FACE is measured at its own size, whatever that is.
EVALUATION_MEMORY = MemoryOptions(max_pixels=16_000_000)


@dataclass(frozen=True)
class StartOptions:
    """What training starts from."""

    resume: bool = option(True, "continue from the experiment's ckpt-last where there is one; False starts anew")
    pretrained_backbone: str = option(
        "none", "start the backbone from a file, from torchvision's ImageNet weights (imagenet), or at random (none)"
    )
    pretrained_detector: str | None = option(
        None,
        "start from any supported checkpoint; it brings its architecture, which flags change. A second stage that "
        "it lacks copies the first",
    )
    show_batch: int = option(0, "draw so many crops as the network will see them into log/batch.png, and stop")

    def __post_init__(self) -> None:
        _check_not_negative(self, "show_batch")


# Sizes at which a detector is measured: what is done to each image before the network sees it.
PROTOCOLS = ("original", "vga", "1600x2150")


@dataclass(frozen=True)
class ProtocolConfig:
    """How images are shown to the network in a measurement, and how its boxes are written."""

    protocol: str = option(
        "original",
        "size of the images: original; vga, long side 640, padded to a square (SCRFD); "
        "1600x2150, short side 1600 and long side at most 2150 (RetinaFace, biubug6)",
        choices=PROTOCOLS,
    )
    flip: bool = option(False, "also detect in the mirrored image; boxes vote")
    multi_scale: bool = option(False, "also detect at 0.625, 1.375, 1.75 and 2.125 times the size; boxes vote")
    integer_boxes: bool = option(False, "cut boxes to whole pixels, as biubug6's test_widerface.py writes them")

    def __post_init__(self) -> None:
        _check_choice(self, "protocol", PROTOCOLS)


@dataclass(frozen=True)
class EvaluationOptions:
    """What test.py measures, and on what."""

    dataset: str = option("widerface/", "folder with val/, under data/ or any path")
    gt_dir: str | None = option(
        None, "folder with the official .mat files (default: the dataset's val/gt; without one, its label.txt counts)"
    )
    pred_dir: str | None = option(
        None, "measure predictions that any detector left as <event>/<image>.txt, instead of running one"
    )
    resume: bool = option(False, "keep the predictions of an interrupted run and detect in the other images only")
    bootstrap: int = option(0, "draw the images anew so many times (100 or more) to give the AP a standard error")
    save_errors: int = option(0, "draw so many false positives and so many missed faces into errors.png")

    def __post_init__(self) -> None:
        _check_not_negative(self, "save_errors")
        _check(
            self.bootstrap == 0 or self.bootstrap >= 2, f"--bootstrap is 0, or 2 and more samples, got {self.bootstrap}"
        )


@dataclass(frozen=True)
class InferenceOptions:
    """What inference.py reads and writes."""

    inference_dir: str = option(
        "sample_widerface/images/",
        "folder under data/ or any path, an image, a pattern such as 'photos/*.jpg', a .txt with a path a line, "
        "a video, or a camera's index",
    )
    inference_save_folder: str = option("inference_results", "where results are written")
    infer_imsize_same: bool = option(True, "images of one size are batched; never changes the result")
    save_img: bool = option(False, "write pictures with the detections drawn")
    mask: bool = option(False, "segment the head of every face")
    save_mask: bool = option(False, "write masks and crops; needs --mask")
    segmenter_model: str | None = option(None, "a .tflite for --mask; default: the one mediapipe carries")
    max_frames: int = option(0, "stop a video or camera after so many frames; 0 is no limit")
    resume: bool = option(False, "keep the results of an interrupted run and do the other images only")

    def __post_init__(self) -> None:
        _check(self.mask or not self.save_mask, "--save_mask needs --mask: add it, or drop --save_mask")
        _check(self.mask or self.segmenter_model is None, "--segmenter_model needs --mask: add it, or drop the model")
        _check_not_negative(self, "max_frames")


# ---------------------------------------------------------------------------------------------------- flags

Config = TypeVar("Config")


@dataclass(frozen=True)
class Flags:
    """The flags that the user gave, and only those, by name."""

    given: Mapping[str, Any]

    def apply(self, config: Config) -> Config:
        """`config` with every flag that is one of its fields set to what the user gave."""
        names = {item.name for item in dataclasses.fields(config)}  # type: ignore[arg-type]
        return dataclasses.replace(config, **{k: v for k, v in self.given.items() if k in names})  # type: ignore[type-var]


class _Parser(argparse.ArgumentParser):
    """Refuses in one line, and knows no abbreviations: `--im` must not become `--im_size` by luck."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **keywords)

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parse_flags(description: str, groups: Sequence[Any], argv: Sequence[str] | None = None) -> Flags:
    """Parse a command line made of the options of `groups`, plus the original's own flags for parts of a model.

    Args:
        description: for `--help`.
        groups: configurations whose values are the defaults that `--help` shows, or their classes, where the
            defaults come with the experiment.
        argv: words of the command line; None takes the program's.

    Exits with status 2 and one line for an unknown or malformed flag.
    """
    parser = _Parser(description=description)
    for group in groups:
        cls = group if isinstance(group, type) else type(group)
        section = parser.add_argument_group((group.__doc__ or "").split("\n")[0].rstrip("."))
        hints = typing.get_type_hints(cls)
        for item in dataclasses.fields(cls):
            if item.metadata:
                default = "the experiment's" if group is cls else getattr(group, item.name)
                _add_flag(section, item, hints[item.name], default)
        if cls is ModelConfig:
            section.add_argument("--num_anchor", type=int, choices=sorted(ANCHOR_SIZES), help="anchors per cell")
            section.add_argument("--cascade", help="two stages, or one", **_BOOLEAN)
            section.add_argument("--landmark_loss", help="False: a model without landmarks", **_BOOLEAN)
    namespace = parser.parse_args(argv)
    return Flags({name: value for name, value in vars(namespace).items() if value is not None})


_BOOLEAN: dict[str, Any] = {"nargs": "?", "const": True, "type": parse_bool, "metavar": "BOOL"}


def _add_flag(section: Any, item: dataclasses.Field[Any], hint: Any, default: Any) -> None:
    names = [f"--{name}" for name in (item.name, *item.metadata["aliases"])]
    shown = "" if default is None else f" (default: {default})"
    keywords: dict[str, Any] = {"help": item.metadata["help"] + shown, "dest": item.name}
    if hint is bool:
        keywords |= _BOOLEAN
    else:
        keywords |= {"type": item.metadata["kind"] or _plain_type(hint), "choices": item.metadata["choices"]}
    section.add_argument(*names, **keywords)


def _plain_type(hint: Any) -> Any:
    """`str` for `str | None`, the hint itself otherwise."""
    return hint if isinstance(hint, type) else next(kind for kind in typing.get_args(hint) if kind is not type(None))


def model_config_from_flags(flags: Flags, base: ModelConfig | None = None) -> ModelConfig:
    """The architecture that the flags ask for, on top of `base` or of the backbone's usual configuration."""
    given = dict(flags.given)
    if base is None:
        base = ModelConfig.for_backbone(given.get("backbone", ModelConfig.backbone))
    elif given.get("backbone", base.backbone) != base.backbone:
        base = ModelConfig.for_backbone(
            given["backbone"],
            anchor_sizes=base.anchor_sizes,
            fine_levels=base.fine_levels,
            refinement=base.refinement,
            stages=base.stages,
        )
    priors = given.get("num_anchor", base.num_anchor), given.get("fine_levels", base.fine_levels)
    if "anchor_sizes" not in given and priors != (base.num_anchor, base.fine_levels):
        given["anchor_sizes"] = anchor_sizes_for(*priors)
    given["strides"] = strides_for(priors[1])
    if not given.get("cascade", base.cascade):
        given.setdefault("refinement", "sum")  # there is nothing to refine
    cascade, refinement = given.get("cascade", base.cascade), given.get("refinement", base.refinement)
    if (cascade, refinement) != (base.cascade, base.refinement):
        given["stages"] = stages_for(cascade, refinement)
    if not base.iou_aware and given.get("model_version") == "tina":
        given.setdefault("score_exponent", ModelConfig.score_exponent)  # a new branch takes part in the score
    if "landmark_loss" in given:
        given["landmarks"] = given["landmark_loss"]
    model = Flags(given).apply(base)
    if given.get("num_anchor", model.num_anchor) != model.num_anchor:
        raise ConfigError(
            f"--num_anchor={given['num_anchor']} contradicts --anchor_sizes with {model.num_anchor} a cell; drop one"
        )
    return model


# ----------------------------------------------------------------------------------------------------- JSON


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dictionaries, lists, strings and numbers."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values


def from_dict(cls: type[Config], values: Any, where: str) -> Config:
    """Invert `to_dict`. Fields that are absent take their defaults.

    Raises:
        ConfigError: names `where`, the field and what was expected.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected an object with the fields of {cls.__name__}, got {values!r}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(sorted(hints))}")
    try:
        return cls(**{name: _convert(hints[name], value, f"{where}: {name}") for name, value in values.items()})
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        kinds = typing.get_args(hint)
        repeated = kinds[0] if kinds[-1] is Ellipsis else None
        if repeated is None and len(kinds) != len(value):
            raise ConfigError(f"{where}: expected {len(kinds)} values, got {value!r}")
        return tuple(_convert(repeated or kinds[i], part, f"{where}[{i}]") for i, part in enumerate(value))
    if isinstance(hint, types.UnionType) and value is None:
        return None
    kind = _plain_type(hint)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value
