from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from config import USUAL_LEVELS
from layers.matcher import BACKGROUND, IGNORED, MIN_FORCED_IOU, match_priors
from layers.prior_box import prior_boxes
from utils.structures import FaceTargets

# Two priors side by side and one around both, in an image of unit size.
PRIORS = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]])


def batch_of(*images: list[list[float]]) -> FaceTargets:
    """Images by the boxes of their faces."""
    return FaceTargets.join(
        [
            FaceTargets(
                torch.tensor(boxes).view(-1, 4),
                torch.zeros(len(boxes), 5, 2),
                torch.zeros(len(boxes), dtype=torch.bool),
                (len(boxes),),
            )
            for boxes in images
        ]
    )


def test_no_face_leaves_all_background(device: torch.device) -> None:
    matches = match_priors(batch_of([], []).to(device), PRIORS.to(device), StageConfig(0.35))
    assert matches.tolist() == [[BACKGROUND] * 3] * 2


def test_a_prior_takes_the_face_it_overlaps_most(device: torch.device) -> None:
    """The left face fills prior 0 (IoU 1) and half of prior 2 (IoU 0.5); prior 1 does not meet it."""
    faces = batch_of([[0.0, 0.0, 0.5, 1.0]]).to(device)
    assert match_priors(faces, PRIORS.to(device), StageConfig(0.35)).tolist() == [[0, BACKGROUND, 0]]
    assert match_priors(faces, PRIORS.to(device), StageConfig(0.6)).tolist() == [[0, BACKGROUND, BACKGROUND]]


def test_every_face_in_reach_gets_its_best_prior() -> None:
    """A quarter of prior 1 overlaps it by 0.25: under the threshold, yet the best it has."""
    faces = batch_of([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 0.75, 0.5]])
    assert match_priors(faces, PRIORS, StageConfig(0.35)).tolist() == [[0, 1, 0]]


def test_a_face_too_small_for_every_prior_is_background() -> None:
    faces = batch_of([[0.5, 0.0, 0.7, 0.45]])  # 0.09 of prior 1's 0.5: IoU 0.18
    assert match_priors(faces, PRIORS, StageConfig(0.35)).tolist() == [[BACKGROUND] * 3]


def test_faces_of_one_image_take_no_priors_of_another() -> None:
    """The row of a face counts over the batch; the image in the middle has none."""
    faces = batch_of([[0.5, 0.0, 1.0, 1.0]], [], [[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]])
    assert match_priors(faces, PRIORS, StageConfig(0.6)).tolist() == [
        [BACKGROUND, 0, BACKGROUND],
        [BACKGROUND] * 3,
        [1, 2, BACKGROUND],
    ]


def test_what_is_neither_face_nor_background_is_ignored() -> None:
    """The left face overlaps prior 2 by exactly 0.5: taken from 0.5, ignored from 0.4 to 0.6, background under 0.55."""
    faces = batch_of([[0.0, 0.0, 0.5, 1.0]])
    assert match_priors(faces, PRIORS, StageConfig(0.5, negative_iou=0.4)).tolist() == [[0, BACKGROUND, 0]]
    assert match_priors(faces, PRIORS, StageConfig(0.6, negative_iou=0.4)).tolist() == [[0, BACKGROUND, IGNORED]]
    assert match_priors(faces, PRIORS, StageConfig(0.6, negative_iou=0.55)).tolist() == [[0, BACKGROUND, BACKGROUND]]


def test_a_face_without_area_has_no_prior() -> None:
    faces = batch_of([[0.25, 0.5, 0.25, 0.9], [0.3, 0.3, 0.3, 0.3]])
    assert match_priors(faces, PRIORS, StageConfig(0.35)).tolist() == [[BACKGROUND] * 3]


def test_each_image_may_have_priors_of_its_own(device: torch.device) -> None:
    faces = batch_of([[0.0, 0.0, 0.5, 1.0]], [[0.0, 0.0, 0.5, 1.0]]).to(device)
    priors = torch.stack([PRIORS, PRIORS.flip(0)]).to(device)
    assert match_priors(faces, priors, StageConfig(0.6)).tolist() == [[0, BACKGROUND, BACKGROUND], [BACKGROUND, BACKGROUND, 1]]


def match_one_image(face_boxes: Tensor, priors: Tensor, match_iou: float) -> Tensor:
    """The definition, prior by prior and face by face."""
    iou = box_iou(face_boxes, box_convert(priors, "cxcywh", "xyxy"))
    matches = [BACKGROUND] * len(priors)
    if len(face_boxes) == 0:
        return torch.tensor(matches)
    best_iou, best_face = iou.max(dim=0)
    for prior in range(len(priors)):
        if best_iou[prior] >= match_iou:
            matches[prior] = int(best_face[prior])
    for face in range(len(face_boxes)):
        forced_iou, prior = iou[face].max(dim=0)
        if forced_iou >= MIN_FORCED_IOU:
            matches[int(prior)] = face
    return torch.tensor(matches)


@pytest.mark.parametrize("own_priors", [False, True])
@pytest.mark.parametrize("match_iou", [0.35, 0.5])
def test_equal_to_the_definition_image_by_image(match_iou: float, own_priors: bool, device: torch.device) -> None:
    """Random faces, crowds of more than are compared at once, and equal faces, where the first or the last wins."""
    random = torch.Generator().manual_seed(0)
    fixed = prior_boxes((96, 128), USUAL_LEVELS[3])
    priors = fixed.repeat(5, 1, 1)
    if own_priors:
        priors = priors * (0.8 + 0.4 * torch.rand(priors.shape, generator=random))
    images = []
    for count in (3, 0, 90, 1, 40):
        centres, sizes = torch.rand(count, 2, generator=random), 0.01 + torch.rand(count, 2, generator=random) ** 2 / 2
        boxes = torch.cat([centres - sizes / 2, centres + sizes / 2], dim=1)
        boxes = torch.cat([boxes, boxes[: count // 3], box_convert(fixed[: count // 3], "cxcywh", "xyxy")])
        images.append(boxes)
    targets = batch_of(*(boxes.tolist() for boxes in images))
    found = match_priors(targets.to(device), (priors if own_priors else fixed).to(device), StageConfig(match_iou)).cpu()
    first_row = 0
    for boxes, own, matches in zip(images, priors, found, strict=True):
        expected = match_one_image(boxes, own, match_iou)
        assert torch.equal(matches, torch.where(expected == BACKGROUND, BACKGROUND, expected + first_row))
        first_row += len(boxes)
