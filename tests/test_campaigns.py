"""Tests that a few cases of each campaign pass; `make campaign` runs thousands."""

from __future__ import annotations

import subprocess
import sys

import pytest

from config import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="campaigns fork, and measure memory in Linux's units")


@pytest.mark.parametrize(
    ("names", "count"), [("images", 12), ("labels,predictions,configs,checkpoints", 6), ("names", 1)]
)
def test_a_few_cases_of_each_campaign_pass(names: str, count: int) -> None:
    command = [sys.executable, "-m", "campaigns", f"--only={names}", f"--count={count}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_campaign_with_a_fault_exits_with_status_1() -> None:
    code = (
        "import sys, campaigns.__main__ as it; from campaigns.harness import Tally\n"
        "it.CAMPAIGNS['images'] = (lambda *arguments: Tally(faults=['a fault']), 1)\n"
        "sys.argv = ['campaigns', '--only=images']; it.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "fault: a fault" in result.stdout
