"""Tests of matching priors to faces, with examples by hand and reference loops."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from config import USUAL_LEVELS, StageConfig
from layers.matcher import BACKGROUND, IGNORED, MAX_BACKGROUND_IOU, MIN_FORCED_IOU, match_priors
from layers.prior_box import prior_boxes
from utils.structures import FaceTargets

# Two priors side by side and one around both, in an image of unit size.
PRIORS = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]])


def batch_of(*images: list[list[float]], ignored: Sequence[Sequence[bool]] | None = None) -> FaceTargets:
    """Return a batch of images, given by the boxes of their faces, some of which may be ignored."""
    flags = ignored or [[False] * len(boxes) for boxes in images]
    return FaceTargets.join(
        [
            FaceTargets(
                torch.tensor(boxes).view(-1, 4),
                torch.zeros(len(boxes), 5, 2),
                torch.zeros(len(boxes), dtype=torch.bool),
                torch.tensor(chosen, dtype=torch.bool),
                (len(boxes),),
            )
            for boxes, chosen in zip(images, flags, strict=True)
        ]
    )


def test_without_faces_all_priors_are_background(device: torch.device) -> None:
    matches = match_priors(batch_of([], []).to(device), PRIORS.to(device), StageConfig(0.35))
    assert matches.tolist() == [[BACKGROUND] * 3] * 2


def test_prior_matches_the_face_with_the_highest_iou(device: torch.device) -> None:
    """The left face fills prior 0 (IoU 1) and half of prior 2 (IoU 0.5); prior 1 does not overlap it."""
    faces = batch_of([[0.0, 0.0, 0.5, 1.0]]).to(device)
    assert match_priors(faces, PRIORS.to(device), StageConfig(0.35)).tolist() == [[0, BACKGROUND, 0]]
    assert match_priors(faces, PRIORS.to(device), StageConfig(0.6)).tolist() == [[0, BACKGROUND, BACKGROUND]]


def test_every_reachable_face_matches_its_best_prior() -> None:
    """Prior 1 has an IoU of 0.25 with the second face: below the threshold, but the best of all priors."""
    faces = batch_of([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 0.75, 0.5]])
    assert match_priors(faces, PRIORS, StageConfig(0.35)).tolist() == [[0, 1, 0]]


def test_priors_on_an_unreachable_face_are_background_or_ignored() -> None:
    """Prior 1 has an IoU of more than 0.1 with it and is ignored, prior 2 of less."""
    faces = batch_of([[0.5, 0.0, 0.7, 0.45]])  # 0.09 of prior 1's 0.5: IoU 0.18
    as_background = StageConfig(0.35, ignore_unreachable=False)
    assert match_priors(faces, PRIORS, as_background).tolist() == [[BACKGROUND] * 3]
    assert match_priors(faces, PRIORS, StageConfig(0.35)).tolist() == [[BACKGROUND, IGNORED, BACKGROUND]]


def test_face_below_the_threshold_is_unreachable_without_forced_matches() -> None:
    """Prior 1 has an IoU of 0.25 with it, and prior 2 of 0.125."""
    faces = batch_of([[0.5, 0.0, 0.75, 0.5]])
    assert match_priors(faces, PRIORS, StageConfig(0.35)).tolist() == [[BACKGROUND, 0, BACKGROUND]]
    unforced = StageConfig(0.35, force_match=False)
    assert match_priors(faces, PRIORS, unforced).tolist() == [[BACKGROUND, IGNORED, IGNORED]]
    unforced = StageConfig(0.35, force_match=False, ignore_unreachable=False)
    assert match_priors(faces, PRIORS, unforced).tolist() == [[BACKGROUND] * 3]


@pytest.mark.parametrize("ignore_unreachable", [True, False])
def test_priors_on_an_ignored_face_are_neither_positive_nor_negative(ignore_unreachable: bool) -> None:
    """The ignored face fills prior 0 and half of prior 2; another face may still match prior 2."""
    stage = StageConfig(0.35, ignore_unreachable=ignore_unreachable)
    ignored = [[0.0, 0.0, 0.5, 1.0]]
    targets = batch_of(ignored, ignored, ignored=[[True], [False]])
    assert match_priors(targets, PRIORS, stage).tolist() == [[IGNORED, BACKGROUND, IGNORED], [1, BACKGROUND, 1]]
    both = batch_of([*ignored, [0.0, 0.0, 1.0, 1.0]], ignored=[[True, False]])
    assert match_priors(both, PRIORS, stage).tolist() == [[1, 1, 1]]


def test_faces_match_only_priors_of_their_own_image() -> None:
    """Matches are indices of faces in the whole batch; the image in the middle has no face."""
    faces = batch_of([[0.5, 0.0, 1.0, 1.0]], [], [[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]])
    assert match_priors(faces, PRIORS, StageConfig(0.6)).tolist() == [
        [BACKGROUND, 0, BACKGROUND],
        [BACKGROUND] * 3,
        [1, 2, BACKGROUND],
    ]


def test_priors_between_the_thresholds_are_ignored() -> None:
    """Prior 2 has an IoU of 0.5: matched from 0.5, ignored between 0.4 and 0.6, background below 0.55."""
    faces = batch_of([[0.0, 0.0, 0.5, 1.0]])
    assert match_priors(faces, PRIORS, StageConfig(0.5, negative_iou=0.4)).tolist() == [[0, BACKGROUND, 0]]
    assert match_priors(faces, PRIORS, StageConfig(0.6, negative_iou=0.4)).tolist() == [[0, BACKGROUND, IGNORED]]
    assert match_priors(faces, PRIORS, StageConfig(0.6, negative_iou=0.55)).tolist() == [[0, BACKGROUND, BACKGROUND]]


def test_a_face_without_area_has_no_prior() -> None:
    faces = batch_of([[0.25, 0.5, 0.25, 0.9], [0.3, 0.3, 0.3, 0.3]])
    assert match_priors(faces, PRIORS, StageConfig(0.35)).tolist() == [[BACKGROUND] * 3]


def test_each_image_may_have_its_own_priors(device: torch.device) -> None:
    faces = batch_of([[0.0, 0.0, 0.5, 1.0]], [[0.0, 0.0, 0.5, 1.0]]).to(device)
    priors = torch.stack([PRIORS, PRIORS.flip(0)]).to(device)
    assert match_priors(faces, priors, StageConfig(0.6)).tolist() == [
        [0, BACKGROUND, BACKGROUND],
        [BACKGROUND, BACKGROUND, 1],
    ]


def match_one_image(face_boxes: Tensor, ignored: Tensor, priors: Tensor, stage: StageConfig) -> Tensor:
    """Reference implementation in loops over priors and faces."""
    iou = box_iou(face_boxes, box_convert(priors, "cxcywh", "xyxy")).tolist()
    skipped = ignored.tolist()
    matches = [BACKGROUND] * len(priors)
    least_iou = MIN_FORCED_IOU if stage.force_match else stage.match_iou
    may_match = [not skipped[face] and max(iou[face]) >= least_iou for face in range(len(face_boxes))]
    for prior in range(len(priors)):
        best_iou, best_face = 0.0, BACKGROUND
        for face in range(len(face_boxes)):
            if may_match[face] and iou[face][prior] > best_iou:
                best_iou, best_face = iou[face][prior], face
            is_avoided = skipped[face] or (stage.ignore_unreachable and not may_match[face])
            if is_avoided and iou[face][prior] > MAX_BACKGROUND_IOU:
                matches[prior] = IGNORED
        if best_iou >= stage.background_iou:
            matches[prior] = best_face if best_iou >= stage.match_iou else IGNORED
    for face in range(len(face_boxes)):
        if may_match[face]:
            matches[iou[face].index(max(iou[face]))] = face
    return torch.tensor(matches)


@pytest.mark.parametrize("own_priors", [False, True])
@pytest.mark.parametrize(
    "stage",
    [
        StageConfig(0.35, ignore_unreachable=False),
        StageConfig(0.35),
        StageConfig(0.5),
        StageConfig(0.5, negative_iou=0.4, force_match=False),
        StageConfig(0.7, negative_iou=0.3),
    ],
)
def test_matches_equal_the_reference_loops(stage: StageConfig, own_priors: bool, device: torch.device) -> None:
    """Random faces, crowds larger than a chunk of the comparison, and equal faces, where the first or last wins."""
    random = torch.Generator().manual_seed(0)
    fixed = prior_boxes((96, 128), USUAL_LEVELS[3])
    priors = fixed.repeat(5, 1, 1)
    if own_priors:
        priors = priors * (0.8 + 0.4 * torch.rand(priors.shape, generator=random))
    images, ignored = [], []
    for count in (3, 0, 90, 1, 40):
        centres, sizes = torch.rand(count, 2, generator=random), 0.01 + torch.rand(count, 2, generator=random) ** 2 / 2
        boxes = torch.cat([centres - sizes / 2, centres + sizes / 2], dim=1)
        boxes = torch.cat([boxes, boxes[: count // 3], box_convert(fixed[: count // 3], "cxcywh", "xyxy")])
        images.append(boxes)
        ignored.append(torch.rand(len(boxes), generator=random) < 0.2)
    targets = batch_of(*(boxes.tolist() for boxes in images), ignored=[flags.tolist() for flags in ignored])
    found = match_priors(targets.to(device), (priors if own_priors else fixed).to(device), stage).cpu()
    first_row = 0
    for boxes, flags, own, matches in zip(images, ignored, priors, found, strict=True):
        expected = match_one_image(boxes, flags, own, stage)
        assert torch.equal(matches, torch.where(expected < 0, expected, expected + first_row))
        first_row += len(boxes)
