from __future__ import annotations

import torch

from layers.matcher import BACKGROUND, match_priors

# Two priors side by side and one around both, in an image of unit size.
PRIORS = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]])


def test_no_face_leaves_all_background(device: torch.device) -> None:
    matches = match_priors(torch.zeros(0, 4, device=device), PRIORS.to(device), 0.35)
    assert matches.tolist() == [BACKGROUND] * 3


def test_a_prior_takes_the_face_it_overlaps_most(device: torch.device) -> None:
    """The left face fills prior 0 (IoU 1) and half of prior 2 (IoU 0.5); prior 1 does not meet it."""
    faces = torch.tensor([[0.0, 0.0, 0.5, 1.0]], device=device)
    assert match_priors(faces, PRIORS.to(device), 0.35).tolist() == [0, BACKGROUND, 0]
    assert match_priors(faces, PRIORS.to(device), 0.6).tolist() == [0, BACKGROUND, BACKGROUND]


def test_every_face_in_reach_gets_its_best_prior() -> None:
    """A quarter of prior 1 overlaps it by 0.25: under the threshold, yet the best it has."""
    faces = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 0.75, 0.5]])
    assert match_priors(faces, PRIORS, 0.35).tolist() == [0, 1, 0]


def test_a_face_too_small_for_every_prior_is_background() -> None:
    faces = torch.tensor([[0.5, 0.0, 0.7, 0.45]])  # 0.09 of prior 1's 0.5: IoU 0.18
    assert match_priors(faces, PRIORS, 0.35).tolist() == [BACKGROUND] * 3
