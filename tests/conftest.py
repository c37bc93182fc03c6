"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from config import ROOT


@pytest.hookimpl(optionalhook=True, wrapper=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """One worker more than xdist chooses for `-n auto`, because tests that start processes wait for them."""
    workers = yield
    return workers + 1


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Run the test on every available device."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with reference weights, images and detections beside the repository; skip the test without it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder ../shared with reference weights and images")
    return folder
