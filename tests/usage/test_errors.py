"""Tests that errors of memory, devices, streams, disks and checkpoints do not end in a traceback."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import export
from config import ROOT
from engine.stream import detect_images
from models.checkpoint import load_checkpoint
from models.foreign_checkpoint import CheckpointError
from models.initialise import load_model
from tests.engine.helpers import WholeImageDetector
from utils.errors import ConfigError, UserError
from utils.runtime.files import atomic_write, disk_errors
from utils.runtime.sources import InputImage
from utils.structures import Detections

WEIGHTS = ROOT / "experiments/mobilenet0.25_anc2_casT_fpn3/ckpt/mobilenet0.25_ckpt-best.pth"
IMAGE = np.zeros((40, 64, 3), np.uint8)


class FailingDetector(WholeImageDetector):
    """Raises an error for every batch."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def detect_batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("ONNX Runtime: bad allocation"),
    ],
)
def test_image_that_exceeds_the_memory_is_skipped(error: Exception) -> None:
    ((image, found),) = detect_images(FailingDetector(error), [InputImage("a.jpg", IMAGE)], True)
    assert image.problem == "64x40 pixels are too many for the memory"
    assert len(found) == 0


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors ...",
        "CUDA error: misaligned memory",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    ],
)
def test_other_cuda_errors_end_the_run_in_one_line(text: str) -> None:
    with pytest.raises(UserError) as exc_info:
        list(detect_images(FailingDetector(RuntimeError(text)), [InputImage("a.jpg", IMAGE)] * 2, True))
    assert str(exc_info.value) == f"a.jpg: {text.splitlines()[0]}"


def test_other_errors_are_raised() -> None:
    with pytest.raises(RuntimeError, match="shapes in memory differ"):
        list(
            detect_images(FailingDetector(RuntimeError("shapes in memory differ")), [InputImage("a.jpg", IMAGE)], True)
        )


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_harmless(tmp_path: Path, closed: str) -> None:
    """What is written to standard error must not end up in a file of the results."""
    script = (
        "import sys, os\n"
        "from utils.runtime.cli import run, show_progress\n"
        "def main():\n"
        f"    file = open({str(tmp_path / 'results.txt')!r}, 'w')\n"
        "    os.dup(2); list(show_progress(range(12), 12)); print('warning', file=sys.stderr); os.write(2, b'native')\n"
        "    file.write('results'); file.close()\n"
        "run(main)\n"
    )
    (tmp_path / "script.py").write_text(script)
    command = f'exec "{sys.executable}" {tmp_path}/script.py {closed}'
    result = subprocess.run(command, shell=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert result.returncode == 0
    assert (tmp_path / "results.txt").read_text() == "results"


def test_errors_do_not_name_temporary_files(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with (
        pytest.raises(UserError, match=r"/target: cannot be written \(Is a directory\)"),
        disk_errors(tmp_path),
        atomic_write(tmp_path / "target") as temporary,
    ):
        temporary.touch()
    with (
        pytest.raises(UserError, match=r"the results: cannot be written"),
        disk_errors(Path("the results")),
        atomic_write(tmp_path / "gone/file") as temporary,
    ):
        temporary.touch()
    with pytest.raises(ConfigError, match=rf"--output={tmp_path}: is a folder; give the name of a file"):
        export.main([f"--output={tmp_path}"])


# ------------------------------------------------------------------------------------------------- checkpoints


def test_mutated_checkpoints_are_refused_in_one_line_or_load(tmp_path: Path) -> None:
    data, generator = WEIGHTS.read_bytes(), np.random.default_rng(0)
    path = tmp_path / "experiment/ckpt/a.pth"
    path.parent.mkdir(parents=True)
    pickled = data.index(b"data.pkl")
    refused = 0
    for number in range(60):
        mutated = bytearray(data)
        for place in (
            generator.integers(pickled, pickled + 6000, 3) if number % 3 else generator.integers(0, len(data), 9)
        ):
            mutated[place] = generator.integers(256)
        path.write_bytes(mutated)
        try:
            load_model(load_checkpoint(path))
        except UserError as error:
            refused += 1
            assert str(error).startswith(str(path))
            assert "\n" not in str(error)
    assert refused


@pytest.mark.parametrize(
    "content",
    [
        {"format": "retinaface-2", "config": {}, "model": 3},
        {"format": "retinaface-2", "config": {}, "model": {"a": 3}},
        {"format": ["retinaface-2"], "config": 3},
        {"ClassHead.0.conv1x1.weight": torch.zeros(())},
        {"ClassHead.0.conv1x1.weight": torch.zeros(4, 64, 1, 1), "body.stage1.0.0.weight": torch.zeros(1)},
        {1: 2},
        [1, 2],
    ],
)
def test_content_of_the_wrong_type_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth: "):
        load_model(load_checkpoint(tmp_path / "a.pth"))


def test_error_for_a_pickled_model_says_how_to_convert_it(tmp_path: Path) -> None:
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match=r"holds a pickled torch\.nn.*Sequential.*convert it: torch\.save"):
        load_checkpoint(tmp_path / "whole.pth")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "script.pt"))
    with pytest.raises(CheckpointError, match="holds a TorchScript program"):
        load_checkpoint(tmp_path / "script.pt")
    (tmp_path / "other.pth").write_bytes(pickle.dumps({"a": Path()}))
    with pytest.raises(CheckpointError, match=r"other\.pth: "):
        load_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize("wrapper", ["model_state_dict", "state_dict", "network", "net"])
def test_foreign_weights_load_in_any_wrapper_and_without_counters(tmp_path: Path, shared: Path, wrapper: str) -> None:
    state = torch.load(shared / "weights/mobilenet0.25_Final.pth", map_location="cpu", weights_only=True)
    kept = {f"module.{name}": value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save({wrapper: kept, "epoch": 3}, tmp_path / "a.pth")
    load_model(load_checkpoint(tmp_path / "a.pth"))
