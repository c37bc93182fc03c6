"""Fixtures that tests of all parts share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from config import ROOT


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that there is; a test that takes this runs on each."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Weights, labelled images and reference detections that lie beside the repository where there are any."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder ../shared with reference weights and images")
    return folder
