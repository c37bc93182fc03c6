"""Choosing a device, and how a command ends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from config import ROOT
from utils.errors import ConfigError, UserError
from utils.runtime.cli import choose_device, run


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("gpu_num", "expected"), [(-1, "cpu"), (0, "cuda:0"), (1, "cuda:1")])
def test_number_is_the_device(gpu_num: int, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_device(gpu_num) == torch.device(expected)
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("gpu_num", [2, -2])
def test_absent_device_is_refused_with_those_that_there_are(gpu_num: int) -> None:
    with pytest.raises(ConfigError, match=rf"--gpu_num={gpu_num}: .* 0 \(card 0\), 1 \(card 1\), and -1 for the CPU"):
        choose_device(gpu_num)


def test_without_cuda_one_line_says_that_the_cpu_is_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(-1) == torch.device("cpu")
    assert capsys.readouterr().err == ""
    assert choose_device(0) == torch.device("cpu")
    assert capsys.readouterr().err.count("\n") == 1


def test_users_error_ends_in_one_line() -> None:
    def main() -> None:
        raise UserError("a.jpg: gone")

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == "error: a.jpg: gone"  # Python prints a text to standard error and exits with 1


def test_interruption_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_own_mistakes_keep_their_traceback_and_success_just_returns() -> None:
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main)
    called = []
    run(lambda: called.append(True))
    assert called == [True]


def test_names_that_the_terminal_cannot_show_are_escaped() -> None:
    code = "from utils.runtime.cli import run; run(lambda: print('caf\\u00e9 \\udce9.jpg'))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert shown.stdout == b"caf\\xe9 \\udce9.jpg\n"
