"""The flags that change an architecture."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from config.model import CHOICES, USUAL_LEVELS
from utils.options import Options, option


def parse_anchor_sizes(text: str) -> tuple[tuple[float, ...], ...]:
    """Parse `16,32/64,128/256,512`: commas between the anchors of a cell, slashes between levels."""
    try:
        return tuple(tuple(float(size) for size in level.split(",")) for level in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected sizes like 16,32/64,128/256,512, got {text!r}") from None


@dataclass(frozen=True)
class ModelOverrides(Options):
    """Architecture (default: that of the experiment, recipe or checkpoint)"""

    backbone: str | None = option(None, "feature extractor", choices=CHOICES["backbone"])
    model_version: str | None = option(
        None, "tina adds the IoU-aware branch of TinaFace to retina", choices=CHOICES["model_version"]
    )
    num_anchor: int | None = option(None, "anchors per cell", choices=tuple(USUAL_LEVELS))
    cascade: bool | None = option(None, "two stages, or one")
    landmark_loss: bool | None = option(None, "False builds a model without landmarks")
    anchor_sizes: tuple[tuple[float, ...], ...] | None = option(
        None, "anchor sides in pixels, e.g. 16,32/64,128/256,512, one group per level", parse=parse_anchor_sizes
    )
    strides: tuple[int, ...] | None = option(
        None, "strides of the pyramid levels, e.g. 4,8,16,32; needs --anchor_sizes"
    )
    variances: tuple[float, ...] | None = option(
        None, "divisors of the centre and the size deltas of boxes, e.g. 0.1,0.2"
    )
    two_resolutions: bool | None = option(
        None, "a second MobileNet of half the strides beside the first one, for smaller faces, at three times the cost"
    )
    fine_levels: int | None = option(
        None, "pyramid levels computed on the image at twice its size, for smaller faces, at about five times the cost"
    )
    fine_channels: tuple[int, ...] | None = option(
        None,
        "channels of every level of --fine_levels, which then have a backbone and pyramid of their own, e.g. 40,48",
    )
    activation_slope: float | None = option(None, "negative slope of the LeakyReLUs")
    fpn_channels: int | None = option(None, "channels of the feature pyramid and the context modules")
    score_exponent: float | None = option(
        None, "a in the score p^a * iou^(1-a) of a tina model; 1 disregards the IoU branch"
    )
    context_share: float | None = option(
        None, "weight of the face logits of the image at its own size in those of --fine_levels"
    )
    coarse_share: float | None = option(
        None, "weight of the image at half its size in all face logits; 0 skips it, which is slightly faster"
    )
    refinement: str | None = option(
        None,
        "how the second stage refines the first: sum adds its deltas to those of the first; rematch takes the decoded "
        "boxes as anchors, and matches them at a higher IoU (RetinaFace)",
        choices=CHOICES["refinement"],
    )


@dataclass(frozen=True)
class MatchingOverrides(Options):
    """Matching of faces with priors (default: that of the experiment, recipe or checkpoint)"""

    match_iou: tuple[float, ...] | None = option(
        None, "IoU from which a prior is positive, one number per stage, e.g. 0.7,0.5"
    )
    negative_iou: tuple[float, ...] | None = option(
        None, "IoU below which a prior is negative, one number per stage (default: the value of --match_iou)"
    )
    force_match: bool | None = option(None, "also match the best prior of every face below --match_iou")
