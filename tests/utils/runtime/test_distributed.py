"""Tests of communication between processes; in a single process all of it is the identity."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from config import ROOT
from utils.errors import UserError
from utils.runtime.distributed import (
    SINGLE_PROCESS,
    DistributedContext,
    any_process,
    broadcast_buffers,
    broadcast_from_main,
    distributed_context,
    gather_dicts,
    reduce_mean,
    run_on_all,
    run_on_main,
    shard_positions,
    share_of_count,
)

CPU = torch.device("cpu")


def test_single_process_changes_nothing() -> None:
    with distributed_context(CPU) as context:
        assert context == SINGLE_PROCESS
        assert context.is_main
    assert reduce_mean(torch.tensor(3.0)).item() == 3
    assert share_of_count(torch.tensor(5)).item() == 5
    assert share_of_count(torch.tensor(0)).item() == 1
    assert any_process(True, CPU)
    assert not any_process(False, CPU)
    assert gather_dicts({"a": 1}) == {"a": 1}
    assert broadcast_from_main([1, 2]) == [1, 2]
    assert run_on_all(lambda: 3) == run_on_main(lambda: 3) == 3
    with pytest.raises(UserError, match="broken"):
        run_on_all(fail)


def fail() -> int:
    raise UserError("broken")


def test_blocks_are_distributed_round_robin() -> None:
    nothing = np.arange(0)
    assert shard_positions(10, nothing, 4, SINGLE_PROCESS) == list(range(10))
    assert shard_positions(10, nothing, 4, DistributedContext(0, 2)) == [0, 1, 2, 3, 8, 9]
    assert shard_positions(10, nothing, 4, DistributedContext(1, 2)) == [4, 5, 6, 7]
    assert shard_positions(10, nothing, 4, DistributedContext(3, 4)) == []
    assert shard_positions(0, nothing, 4, SINGLE_PROCESS) == []
    done = np.array([0, 1, 2, 3, 5])
    assert shard_positions(10, done, 4, DistributedContext(0, 2)) == [4, 5, 6, 7]
    assert shard_positions(10, done, 4, DistributedContext(1, 2)) == [8, 9]
    assert shard_positions(10, done, 1, SINGLE_PROCESS) == [4, 6, 7, 8, 9]


# Two processes with 3 and 0 faces; the second one requests a stop.
TWO_PROCESSES = """
import torch
from torch import nn
from utils.errors import UserError
from utils.runtime.distributed import run_on_all, run_on_main
from utils.runtime.distributed import any_process, broadcast_buffers, distributed_context, reduce_mean
from utils.runtime.distributed import gather_dicts, share_of_count, broadcast_from_main
with distributed_context(torch.device("cpu")) as context:
    rank = context.rank
    assert context.world_size == 2
    assert reduce_mean(torch.tensor(float(rank))).item() == 0.5
    assert share_of_count(torch.tensor(3 - 3 * rank)).item() == 1.5
    assert share_of_count(torch.tensor(0)).item() == 0.5
    assert any_process(rank == 1, torch.device("cpu"))
    assert not any_process(False, torch.device("cpu"))
    assert gather_dicts({f"image {rank}": rank}) == {"image 0": 0, "image 1": 1}
    assert broadcast_from_main("main" if rank == 0 else None) == "main"
    assert run_on_all(lambda: rank) == rank
    assert run_on_main(lambda: rank) == 0
    def fail():
        if rank == 1:
            raise UserError("broken")
    try:
        run_on_all(fail)
    except (UserError, SystemExit) as error:
        assert isinstance(error, UserError) == (rank == 1)
    else:
        raise AssertionError("went on")
    norm = nn.BatchNorm2d(2)
    norm.running_mean.fill_(rank)
    broadcast_buffers(norm)
    assert norm.running_mean.tolist() == [0, 0]
print("good")
"""


LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]

HANGING = """
import time
from datetime import timedelta
import torch
from utils.runtime.distributed import distributed_context, reduce_mean
with distributed_context(torch.device("cpu"), timedelta(seconds=2)) as context:
    if context.rank == 1:
        time.sleep(600)
    reduce_mean(torch.tensor(1.0))
"""


def test_process_that_waits_for_a_hanging_one_times_out() -> None:
    result = subprocess.run(
        [*LAUNCHER, sys.executable, "-c", HANGING], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode != 0
    assert "timed out" in result.stderr.lower()


def test_two_processes_agree() -> None:
    result = subprocess.run(
        [*LAUNCHER, sys.executable, "-c", TWO_PROCESSES], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("good") == 2


def test_broadcasting_buffers_in_a_single_process_changes_nothing() -> None:
    norm = nn.BatchNorm2d(1)
    broadcast_buffers(norm)
    assert norm.running_mean is not None
    assert norm.running_mean.tolist() == [0]
