"""The architecture of a detector, and the flags that change it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.options import Options, from_dict, require, to_dict

BACKBONES = ("mobilenet0.25", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
_MAX_CHANNELS = 4096
_MAX_ANCHOR_SIZE = 100_000  # pixels


def _require_channels(name: str, channels: int) -> None:
    is_valid = 0 < channels <= _MAX_CHANNELS and channels % 4 == 0
    require(is_valid, f"{name} must be a multiple of 4 up to {_MAX_CHANNELS}, got {channels}")


@dataclass(frozen=True)
class LevelConfig(Options):
    """One level of the feature pyramid.

    Attributes:
        stride: pixels per cell, a power of two from 4 to 128.
        anchor_sizes: side of each anchor of a cell in pixels; the square root of the area if it is not square.
        channels: number of channels of the level; None means `ModelConfig.fpn_channels`.
    """

    stride: int
    anchor_sizes: tuple[float, ...]
    channels: int | None = None

    def __post_init__(self) -> None:
        require(self.stride > 0, f"a level's stride must be positive, got {self.stride}")
        require(len(self.anchor_sizes) > 0, f"the level of stride {self.stride} has no anchor_sizes")
        require(
            all(0 < size <= _MAX_ANCHOR_SIZE for size in self.anchor_sizes),
            f"anchor_sizes must be positive and at most {_MAX_ANCHOR_SIZE}, got {self.anchor_sizes}",
        )


@dataclass(frozen=True)
class StageConfig(Options):
    """One stage of the cascade: the matching of its priors and the weight of its losses.

    A prior is positive if its IoU with a face is at least `match_iou` and negative if it is below `negative_iou`.
    Priors in between are ignored. Without a `negative_iou` there are none in between. With `force_match` every face
    also gets the prior with which it has the highest IoU, even below `match_iou`. With `ignore_unreachable` the priors
    around a face that no prior matches are ignored; otherwise they are negatives.
    """

    match_iou: float = 0.35
    loss_weight: float = 1.0
    negative_iou: float | None = None
    force_match: bool = True
    ignore_unreachable: bool = True

    def __post_init__(self) -> None:
        require(0 < self.match_iou < 1, f"match_iou must lie between 0 and 1, got {self.match_iou}")
        require(self.loss_weight > 0, f"loss_weight must be positive, got {self.loss_weight}")
        require(
            0 < self.background_iou <= self.match_iou,
            f"negative_iou must be positive and at most match_iou ({self.match_iou}), got {self.negative_iou}",
        )

    @property
    def background_iou(self) -> float:
        """IoU below which a prior is negative."""
        return self.match_iou if self.negative_iou is None else self.negative_iou


@dataclass(frozen=True)
class ImagePyramidConfig(Options):
    """The other scales of the image at which a model is evaluated within one forward pass.

    Attributes:
        upsampled_levels: number of pyramid levels, finest first, that are computed on the image at twice its size.
            They have half the stride and half the anchor sizes, in pixels of the image.
        native_scale_weight: weight of the logits of the native scale in the face logits of the upsampled levels.
        half_scale_weight: weight of the logits of the image at half its size in the face logits of all levels.
        upsampled_channels: channels of every upsampled level, which then have a backbone and a feature pyramid of their
            own. Empty means that they share those of the native scale.
    """

    upsampled_levels: int = 0
    native_scale_weight: float = 0.0
    half_scale_weight: float = 0.0
    upsampled_channels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(self.upsampled_levels >= 0, f"--fine_levels must not be negative, got {self.upsampled_levels}")
        for flag, weight in (("context_share", self.native_scale_weight), ("coarse_share", self.half_scale_weight)):
            require(0 <= weight <= 1, f"--{flag} must lie in [0, 1], got {weight}")
        require(
            len(self.upsampled_channels) in (0, self.upsampled_levels),
            f"--fine_channels has {len(self.upsampled_channels)} number(s) for --fine_levels={self.upsampled_levels}",
        )
        for channels in self.upsampled_channels:
            _require_channels("--fine_channels", channels)


# The usual levels of three strides, by the number of anchors of a cell.
USUAL_LEVELS: dict[int, tuple[LevelConfig, ...]] = {
    2: (LevelConfig(8, (16, 32)), LevelConfig(16, (64, 128)), LevelConfig(32, (256, 512))),
    3: (LevelConfig(8, (8, 16, 32)), LevelConfig(16, (32, 64, 128)), LevelConfig(32, (128, 256, 512))),
}

# Permitted values of the fields of `ModelConfig` that are names.
CHOICES = {
    "backbone": BACKBONES,
    "model_version": ("retina", "tina"),
    "refinement": ("sum", "rematch"),
    "norm": ("batch", "group"),
    "fpn": ("merged", "lateral", "output"),
    "upsampling": ("nearest", "bilinear"),
    "head": ("ssh", "tower"),
    "channel_order": ("bgr", "rgb"),
}


@dataclass(frozen=True)
class ModelConfig(Options):
    """The complete architecture. Equal configurations build models with equal tensor names and shapes.

    Attributes:
        backbone: feature extractor, one of `BACKBONES`.
        two_resolutions: whether a second MobileNet of half the strides runs beside the first one.
        norm: `batch` or `group` normalisation, with 32 groups.
        deformable_backbone: deformable 3x3 convolutions in C4 and C5 of a ResNet with bottlenecks (TinaFace).
        deformable_context: deformable 3x3 convolutions in context modules and between levels (RetinaFace).
        fpn: `merged` (RetinaFace), `lateral` (insightface's RetinaFace) or `output` (arXiv:1612.03144, TinaFace); see
            `models.net`.
        upsampling: interpolation between levels, `nearest` or `bilinear`.
        head: `ssh`, a context module and 1x1 predictors per level, or `tower`, the head of TinaFace.
        model_version: `tina` adds the IoU-aware branch of TinaFace to `retina`.
        levels: levels of the feature pyramid, finest first. Levels coarser than stride 32 are computed by
            convolutions of stride 2.
        anchor_ratio: height of the anchors relative to their width.
        anchor_offset: centre of the anchors from the corner of their cell, in cells.
        activation_slope: negative slope of the LeakyReLUs; 0 makes them ReLUs.
        fpn_channels: channels of the feature pyramid and of the context modules.
        score_exponent: a in the score p^a * iou^(1-a) of a `tina` model; 1 disregards the IoU branch.
        score_power: exponent of the whole score; TinaFace squares it.
        refinement: what a later stage corrects: `sum` the box deltas of the stage before it, `rematch` its decoded
            boxes, which become the priors of the later stage and are matched again (RetinaFace).
        landmarks: whether five landmarks are predicted for every face.
        variances: divisors of the centre and the size deltas of boxes.
        channel_order: order in which the model sees colours, `bgr` or `rgb`; images are always given in BGR.
        pixel_mean: mean that is subtracted from the image, 0 to 255, in that order.
        pixel_std: standard deviation that the image is divided by, in that order.
        stages: stages of the cascade.
        image_pyramid: other scales of the image at which the model is evaluated.
    """

    backbone: str = "resnet50"
    two_resolutions: bool = False
    norm: str = "batch"
    deformable_backbone: bool = False
    deformable_context: bool = False
    fpn: str = "merged"
    upsampling: str = "nearest"
    head: str = "ssh"
    model_version: str = "tina"
    levels: tuple[LevelConfig, ...] = USUAL_LEVELS[3]
    anchor_ratio: float = 1.0
    anchor_offset: float = 0.5
    activation_slope: float = 0.0
    fpn_channels: int = 256
    score_exponent: float = 0.9
    score_power: float = 1.0
    refinement: str = "sum"
    landmarks: bool = True
    variances: tuple[float, float] = (0.1, 0.2)
    channel_order: str = "bgr"
    pixel_mean: tuple[float, float, float] = (104.0, 117.0, 123.0)
    pixel_std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    stages: tuple[StageConfig, ...] = (StageConfig(), StageConfig())
    image_pyramid: ImagePyramidConfig = ImagePyramidConfig()

    def __post_init__(self) -> None:
        for name, permitted in CHOICES.items():
            value = getattr(self, name)
            require(value in permitted, f"{name} is one of {', '.join(permitted)}, got {value!r}")
        self._check_levels()
        self._check_layers()
        require(0 <= self.score_exponent <= 1, f"--score_exponent must lie in [0, 1], got {self.score_exponent}")
        require(len(self.stages) > 0, "a detector needs at least one stage")
        require(
            self.refinement == "sum" or self.cascade,
            "--refinement rematch needs a second stage; add --cascade True, or drop it",
        )
        self._check_image_pyramid()

    def _check_levels(self) -> None:
        strides = [level.stride for level in self.levels]
        require(len(strides) > 0, "a detector needs at least one level")
        require(
            strides == [strides[0] * 2**index for index in range(len(strides))] and 4 <= strides[0] <= 32,
            f"strides must double from one level to the next and start at 4 to 32, got {strides}",
        )
        require(strides[-1] <= 128, f"strides must be at most 128, got {strides}")
        for channels in self.level_channels:
            _require_channels("fpn_channels", channels)

    def _check_layers(self) -> None:
        is_resnet = self.backbone.startswith("resnet")
        require(not self.two_resolutions or not is_resnet, "--two_resolutions needs --backbone=mobilenet0.25")
        require(
            not self.two_resolutions or self.levels[0].stride == 4,
            "--two_resolutions needs a level of stride 4, such as --strides=4,8,16,32 with --anchor_sizes",
        )
        require(self.norm == "batch" or is_resnet, "norm group needs a ResNet")
        require(
            # A quarter of them is normalised in 32 groups, which need more than one value even in a single cell.
            self.norm == "batch" or all(channels % 256 == 0 for channels in self.level_channels),
            f"fpn_channels must be a multiple of 256 with norm group, got {self.level_channels}",
        )
        has_bottlenecks = is_resnet and self.backbone not in ("resnet18", "resnet34")
        require(not self.deformable_backbone or has_bottlenecks, "deformable_backbone needs resnet50 or a deeper one")
        is_uniform = len({(len(level.anchor_sizes), level.channels) for level in self.levels}) == 1
        require(
            self.head == "ssh" or is_uniform, "a tower head needs equal numbers of anchors and channels in all levels"
        )
        require(self.fpn != "output" or is_uniform, "fpn output needs equal channels in all levels")
        require(self.anchor_ratio > 0, f"anchor_ratio must be positive, got {self.anchor_ratio}")
        require(min(self.variances) > 0, f"variances must be positive, got {self.variances}")
        require(min(self.pixel_std) > 0, f"pixel_std must be positive, got {self.pixel_std}")

    def _check_image_pyramid(self) -> None:
        count, channels = self.image_pyramid.upsampled_levels, self.image_pyramid.upsampled_channels
        require(count <= len(self.levels), f"--fine_levels={count} exceeds the {len(self.levels)} levels of the model")
        require(
            not channels or (self.fpn, self.head, self.norm) == ("merged", "ssh", "batch"),
            "--fine_channels needs fpn merged, head ssh and norm batch",
        )
        require(
            not channels or self.levels[count - 1].stride <= 32,
            "--fine_channels needs --fine_levels of strides up to 32",
        )

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of every level, finest first."""
        return tuple(level.channels or self.fpn_channels for level in self.levels)

    @property
    def num_anchor(self) -> int:
        """Anchors per cell of the finest level."""
        return len(self.levels[0].anchor_sizes)

    @property
    def cascade(self) -> bool:
        return len(self.stages) > 1

    @property
    def has_onnx_graph(self) -> bool:
        """Whether ONNX has all operators of the model; it has no deformable convolution."""
        return not (self.deformable_backbone or self.deformable_context)

    @property
    def iou_aware(self) -> bool:
        return self.model_version == "tina"

    @property
    def name(self) -> str:
        """The original's name of an experiment with this architecture, such as `resnet50_anc2_casT_fpn3`."""
        version = "tina_iou_" if self.iou_aware else ""
        cascade = "T" if self.cascade else "F"
        cascade += "" if self.refinement == "sum" else f"-{self.refinement}"
        return f"{self.backbone}_{version}anc{self.num_anchor}_cas{cascade}_fpn{len(self.levels)}"

    @staticmethod
    def upgrade(values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Translate the fields that earlier versions saved: see `utils.options.from_dict`."""
        former = {item.name for item in dataclasses.fields(_FormerLevels)} & set(values)
        if not former:
            return values
        saved = from_dict(_FormerLevels, {name: values[name] for name in former}, where)
        return {
            **{name: value for name, value in values.items() if name not in former},
            "levels": [to_dict(level) for level in saved.levels],
            "image_pyramid": to_dict(saved.image_pyramid),
        }


@dataclass(frozen=True)
class _FormerLevels(Options):
    """The levels as earlier versions saved them: in the order of the priors, by stride and size in the image.

    With --fine_levels=2, strides 4 and 8 were levels of the image at twice its size, and 16 and 32 of the image itself.
    """

    anchor_sizes: tuple[tuple[float, ...], ...] = tuple(level.anchor_sizes for level in USUAL_LEVELS[3])
    strides: tuple[int, ...] = (8, 16, 32)
    fine_levels: int = 0
    context_share: float = 0.3
    coarse_share: float = 0.0

    def __post_init__(self) -> None:
        strides = (4, 8, 16, 32) if self.fine_levels else (8, 16, 32)
        require(self.strides == strides, f"--fine_levels={self.fine_levels} has strides {strides}, got {self.strides}")
        require(
            len(self.anchor_sizes) == len(strides),
            f"{len(self.anchor_sizes)} levels of anchor_sizes for {len(strides)} strides",
        )

    @property
    def levels(self) -> tuple[LevelConfig, ...]:
        """The levels of the model, all at the native scale."""
        count = self.fine_levels
        levels = [LevelConfig(*level) for level in zip(self.strides, self.anchor_sizes, strict=True)]
        finest = [
            LevelConfig(2 * level.stride, tuple(2 * size for size in level.anchor_sizes))
            for level in levels[: max(count - 1, 0)]
        ]
        return (*finest, *levels[count:])

    @property
    def image_pyramid(self) -> ImagePyramidConfig:
        # Earlier versions saved a weight of the native scale even without upsampled levels.
        return ImagePyramidConfig(self.fine_levels, self.context_share if self.fine_levels else 0.0, self.coarse_share)
