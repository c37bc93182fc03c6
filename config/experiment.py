"""Everything that belongs to an experiment: architecture, losses, data, optimisation and thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from config.model import ModelConfig
from utils.options import Options, option, require


@dataclass(frozen=True)
class PostprocessConfig(Options):
    """From raw outputs to detections"""

    confidence_threshold: float = option(0.5, "keep detections with a higher score", minimum=0, maximum=1)
    nms_threshold: float = option(0.3, "IoU above which the weaker of two boxes is suppressed", minimum=0, maximum=1)
    top_k: int = option(0, "candidates that enter the suppression, best first; 0 is no limit", minimum=0)
    keep_top_k: int = option(0, "detections kept per image, best first; 0 is no limit", minimum=0)
    clip_boxes: bool = option(
        True, "clip boxes and landmarks to the image; False leaves them unclipped, like the original"
    )


@dataclass(frozen=True)
class LossConfig(Options):
    """Terms of the multibox loss, summed with these weights in every stage"""

    classification: str = option(
        "ohem_ce",
        "classification loss: cross-entropy with hard negative mining, or the focal loss of all priors",
        choices=("ohem_ce", "focal"),
    )
    box_regression: str = option(
        "smooth_l1",
        "box loss: of the deltas, or the distance or complete IoU of decoded boxes",
        choices=("smooth_l1", "diou", "ciou"),
    )
    landmark_regression: str = option("smooth_l1", "loss of the landmark deltas", choices=("smooth_l1", "wing"))
    class_weight: float = option(1.0, "weight of the classification loss", above=0)
    box_weight: float = option(2.0, "weight of the box loss", above=0)
    landmark_weight: float = option(0.1, "weight of the landmark loss", above=0)
    iou_weight: float = option(1.0, "weight of the IoU branch's loss (tina)", above=0)
    distil_weight: float = option(1.0, "weight of the loss towards the predictions of --teacher", above=0)
    negative_ratio: int = option(7, "hard negatives per positive prior in ohem_ce", above=0)


_FORMER_SCALES = ("min_crop_scale", "max_crop_scale")


@dataclass(frozen=True)
class DataConfig(Options):
    """Training images and their augmentation"""

    dataset: str = option(
        "widerface/", "folder(s) with train/ and val/, a name under data/ or any path; separate several by commas"
    )
    dataset_weights: tuple[float, ...] = option(
        (),
        "how often an image of each folder is drawn relative to those of the others, e.g. 1,0.25; empty draws every "
        "image once an epoch",
        above=0,
    )
    im_size: int = option(640, "side of the training crops in pixels", minimum=32)
    crop_scales: tuple[float, ...] = option(
        (0.3, 0.45, 0.6, 0.8, 1.0),
        "sides of the crops relative to the short side of the image, drawn with equal probability; above 1 crops are "
        "padded and faces get smaller",
        above=0,
        maximum=10,
    )
    crop_rule: str = option(
        "whole_face",
        "what a crop must contain: a whole face (biubug6), or the centre of one (TinaFace)",
        choices=("whole_face", "face_centre"),
    )
    min_face_size: float = option(
        0.0, "faces smaller than this in the crop, in pixels (the root of the area), are ignored", minimum=0
    )
    mosaic_probability: float = option(
        0.5, "probability of a mosaic of four crops of half the side, for small faces", minimum=0, maximum=1
    )
    rotation_degrees: float = option(
        0.0, "crops are rotated by up to this angle in either direction; 0 disables it", minimum=0, maximum=180
    )
    flip_probability: float = option(0.5, "probability that a crop is mirrored", minimum=0, maximum=1)
    colour_probability: float = option(0.5, "probability of each change of colour", minimum=0, maximum=1)
    grey_probability: float = option(0.05, "probability that a crop loses its colour", minimum=0, maximum=1)
    blur_probability: float = option(
        0.0, "probability that a crop is blurred, as if out of focus or in motion", minimum=0, maximum=1
    )
    jpeg_probability: float = option(
        0.0, "probability that a crop is compressed once more, at a quality of 30 to 90", minimum=0, maximum=1
    )
    cache: str = option(
        "none", "keep decoded images in memory (ram) or below ~/.cache (disk)", choices=("none", "ram", "disk")
    )
    num_workers: int = option(
        -1, "processes that read and augment images; 0 reads in the main process, -1 takes one for each free core"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.crop_scales) > 0, "--crop_scales needs at least one number")

    @staticmethod
    def upgrade(values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Translate the options of earlier versions, which drew crop scales from an interval."""
        kept = {name: value for name, value in values.items() if name not in ("cache_side", *_FORMER_SCALES)}
        if not set(_FORMER_SCALES) & set(values):
            return kept
        smallest, largest = values.get("min_crop_scale", 0.3), values.get("max_crop_scale", 1.0)
        steps = [smallest + (largest - smallest) * step / 4 for step in range(5)]
        return {**kept, "crop_scales": [round(scale, 4) for scale in steps]}


@dataclass(frozen=True)
class TrainConfig(Options):
    """Optimisation"""

    epochs: int = option(8000, "passes over the training images", above=0)
    batch_size: int = option(16, "images per batch, over all processes", above=0, aliases=("batch_sixe",))
    accumulate: int = option(1, "batches whose gradients are summed before an optimiser step", above=0)
    optimizer: str = option("sgd", "optimiser; adamw needs a tenth of the learning rate", choices=("sgd", "adamw"))
    learning_rate: float = option(1e-2, "peak learning rate; a hundredth of it suits fine-tuning", above=0)
    backbone_rate_factor: float = option(1.0, "learning rate of the backbone relative to the rest", minimum=0)
    freeze_backbone_epochs: int = option(0, "epochs at the start in which the backbone is frozen", minimum=0)
    new_rate_factor: float = option(
        1.0, "learning rate, relative to --learning_rate, of parameters that --pretrained_detector lacks", above=0
    )
    teacher: str | None = option(
        None,
        "checkpoint of a detector whose scores, boxes and landmarks, averaged over a crop and its mirror image, are "
        "learnt as well",
    )
    momentum: float = option(0.9, "momentum of SGD", minimum=0)
    weight_decay: float = option(5e-4, "weight decay", minimum=0)
    schedule: str = option(
        "multistep",
        "how the learning rate falls after the warm-up",
        choices=("multistep", "cosine", "cosine_restarts"),
    )
    milestones: tuple[int, ...] = option(
        (), "epochs at which multistep divides the rate by ten; empty is 70%% and 90%% of the run"
    )
    min_rate_factor: float = option(
        0.0, "lowest learning rate of cosine and cosine_restarts relative to the peak", minimum=0, maximum=1
    )
    restart_epochs: int = option(30, "epochs from one restart of cosine_restarts to the next", above=0)
    warmup_epochs: float = option(
        1.0, "epochs over which the rate rises linearly from a hundredth of its peak; 0 starts at the peak", minimum=0
    )
    freeze_bn: bool = option(False, "keep the running statistics of batch normalisation, for fine-tuning")
    sync_bn: bool | None = option(
        None, "batch normalisation over all processes together (default: with several CUDA devices under torchrun)"
    )
    amp: bool = option(False, "automatic mixed precision, on CUDA: bfloat16 where the device has it, else float16")
    ema_decay: float = option(0.0, "decay of the moving average of the weights, which is validated and saved; 0: none")
    clip_gradient: float = option(10.0, "largest gradient norm; 0 disables clipping", minimum=0)
    eval_every: int = option(
        0,
        "validate every N epochs; the last epoch is always validated. 0 chooses N so that validation takes about a "
        "tenth of the time",
        minimum=0,
    )
    best_metric: str = option(
        "mean",
        "AP that selects the best checkpoint: that of a subset, or the mean over all",
        choices=("mean", "easy", "medium", "hard"),
    )
    patience: int = option(0, "stop after N validations without improvement; 0 disables it", minimum=0)
    save_minutes: float = option(10.0, "write ckpt-last every N minutes within an epoch; 0 disables it", minimum=0)
    seed: int = option(0, "seed of weights, order and augmentation")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.ema_decay < 1, f"--ema_decay must lie in [0, 1), got {self.ema_decay}")
        require(not (self.freeze_bn and self.sync_bn), "--sync_bn has no effect with --freeze_bn; drop one of them")


@dataclass(frozen=True)
class ProtocolConfig(Options):
    """Test protocol: how images are shown to the model in an evaluation, and how boxes are written"""

    protocol: str = option(
        "original",
        "size of the images: original; vga, long side 640, padded to a square (SCRFD); 1600x2150, short side 1600 and "
        "long side at most 2150 (biubug6); 1100x1650 (TinaFace) and 800x1200 (RetinaFace) likewise",
        choices=("original", "vga", "1600x2150", "1100x1650", "800x1200"),
    )
    flip: bool = option(False, "also detect in the mirrored image, and merge by box voting")
    multi_scale: bool = option(
        False, "also detect at 0.625, 1.375, 1.75 and 2.125 times the size, and merge by box voting"
    )
    min_face_height: float = option(
        0.0, "drop boxes less than N pixels high in the image; TinaFace drops those below 9", minimum=0
    )
    integer_boxes: bool = option(False, "truncate boxes to whole pixels, as biubug6's test_widerface.py does")


@dataclass(frozen=True)
class ExperimentConfig(Options):
    """Everything that belongs to an experiment, saved beside its checkpoints."""

    model: ModelConfig = ModelConfig()  # noqa: RUF009, frozen
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    inference: PostprocessConfig = PostprocessConfig()
    # Score and NMS thresholds of the published WIDER FACE figures of biubug6/Pytorch_Retinaface.
    evaluation: PostprocessConfig = PostprocessConfig(confidence_threshold=0.02, nms_threshold=0.4)
    protocol: ProtocolConfig = ProtocolConfig()
