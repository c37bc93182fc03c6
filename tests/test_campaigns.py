"""Tests that a few cases of each campaign pass; `make campaign` runs thousands."""

from __future__ import annotations

import subprocess
import sys

import cv2
import pytest
import torch

from campaigns import __main__ as campaigns
from campaigns.harness import Tally
from config import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="campaigns fork, and measure memory in Linux's units")


@pytest.mark.parametrize(
    ("names", "count"), [("images", 12), ("labels,predictions,configs,checkpoints", 6), ("names", 1)]
)
def test_a_few_cases_of_each_campaign_pass(names: str, count: int) -> None:
    command = [sys.executable, "-m", "campaigns", f"--only={names}", f"--count={count}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_campaign_with_a_fault_exits_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(campaigns.CAMPAIGNS, "images", (lambda *arguments: Tally(faults=["a fault"]), 1))
    monkeypatch.setattr(sys, "argv", ["campaigns", "--only=images"])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # it would stay set for the following tests
    monkeypatch.setattr(cv2, "setNumThreads", lambda count: None)
    with pytest.raises(SystemExit) as ended:
        campaigns.main()
    assert ended.value.code == 1
    assert "fault: a fault" in capsys.readouterr().out
