"""Tests of choosing a device, and of the exit status and messages of commands."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NoReturn

import pytest
import torch

from config import ROOT
from utils.errors import ConfigError, FlagError, UserError
from utils.runtime.cli import choose_device, run
from utils.runtime.distributed import distributed_context


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)  # no device to put them on


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("gpu_num", "expected"), [(-1, "cpu"), (0, "cuda:0"), (1, "cuda:1")])
def test_gpu_num_is_the_index_of_the_device(gpu_num: int, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_device(gpu_num) == torch.device(expected)
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("two_gpus")
def test_more_processes_than_devices_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []
    for rank in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        devices.append(str(choose_device(0)))
    assert devices == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]


@pytest.mark.usefixtures("two_gpus")
def test_device_that_cannot_be_used_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors ...")

    monkeypatch.setattr(torch, "zeros", busy)
    with pytest.raises(ConfigError, match=r"^--gpu_num=0: CUDA error: all .* unavailable; choose another, or -1$"):
        choose_device(0)


@pytest.mark.usefixtures("two_gpus")
def test_training_needs_a_device_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with (
        pytest.raises(UserError, match="3 processes need a CUDA device each, and there are 2; start fewer"),
        distributed_context(torch.device("cuda", 0)),
    ):
        pass


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("gpu_num", [2, -2])
def test_missing_device_is_refused_with_the_available_ones(gpu_num: int) -> None:
    with pytest.raises(ConfigError, match=rf"--gpu_num={gpu_num}: .* 0 \(card 0\), 1 \(card 1\), and -1 for the CPU"):
        choose_device(gpu_num)


def test_without_cuda_the_cpu_is_used_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(-1) == torch.device("cpu")
    assert capsys.readouterr().err == ""
    assert choose_device(0) == torch.device("cpu")
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status"), [(UserError("a.jpg: gone"), 1), (ConfigError("a.jpg: gone"), 1), (FlagError("a.jpg: gone"), 2)]
)
def test_user_error_ends_in_one_line(error: UserError, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == status
    assert capsys.readouterr().err == "error: a.jpg: gone\n"


def test_interruption_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_bugs_keep_their_traceback_and_success_returns() -> None:
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
