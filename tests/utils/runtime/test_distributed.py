"""What processes tell each other; alone, all of it is the identity."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from config import ROOT, UserError
from utils.runtime.distributed import (
    ALONE,
    Processes,
    any_of_processes,
    copy_from_main,
    done_by_main,
    in_step,
    join_processes,
    mean_over_processes,
    merge_over_processes,
    own_share,
    share_of_count,
    value_of_main,
)

CPU = torch.device("cpu")


def test_alone_nothing_changes() -> None:
    with join_processes(CPU) as processes:
        assert processes == ALONE
        assert processes.is_main
    assert mean_over_processes(torch.tensor(3.0)).item() == 3
    assert share_of_count(torch.tensor(5)).item() == 5
    assert share_of_count(torch.tensor(0)).item() == 1
    assert any_of_processes(True, CPU)
    assert not any_of_processes(False, CPU)
    assert merge_over_processes({"a": 1}) == {"a": 1}
    assert value_of_main([1, 2]) == [1, 2]
    assert in_step(lambda: 3) == done_by_main(lambda: 3) == 3
    with pytest.raises(UserError, match="broken"):
        in_step(fail)


def fail() -> int:
    raise UserError("broken")


def test_blocks_go_around_the_processes() -> None:
    nothing = np.arange(0)
    assert own_share(10, nothing, 4, ALONE) == list(range(10))
    assert own_share(10, nothing, 4, Processes(0, 2)) == [0, 1, 2, 3, 8, 9]
    assert own_share(10, nothing, 4, Processes(1, 2)) == [4, 5, 6, 7]
    assert own_share(10, nothing, 4, Processes(3, 4)) == []
    assert own_share(0, nothing, 4, ALONE) == []
    done = np.array([0, 1, 2, 3, 5])
    assert own_share(10, done, 4, Processes(0, 2)) == [4, 5, 6, 7]
    assert own_share(10, done, 4, Processes(1, 2)) == [8, 9]
    assert own_share(10, done, 1, ALONE) == [4, 6, 7, 8, 9]


# Two processes with 3 and 0 faces, of which the second wants to stop.
TWO = """
import torch
from torch import nn
from config import UserError
from utils.runtime.distributed import done_by_main, in_step
from utils.runtime.distributed import any_of_processes, copy_from_main, join_processes, mean_over_processes
from utils.runtime.distributed import merge_over_processes, share_of_count, value_of_main
with join_processes(torch.device("cpu")) as processes:
    rank = processes.rank
    assert processes.count == 2
    assert mean_over_processes(torch.tensor(float(rank))).item() == 0.5
    assert share_of_count(torch.tensor(3 - 3 * rank)).item() == 1.5
    assert share_of_count(torch.tensor(0)).item() == 0.5
    assert any_of_processes(rank == 1, torch.device("cpu"))
    assert not any_of_processes(False, torch.device("cpu"))
    assert merge_over_processes({f"image {rank}": rank}) == {"image 0": 0, "image 1": 1}
    assert value_of_main("main" if rank == 0 else None) == "main"
    assert in_step(lambda: rank) == rank
    assert done_by_main(lambda: rank) == 0
    def fail():
        if rank == 1:
            raise UserError("broken")
    try:
        in_step(fail)
    except (UserError, SystemExit) as error:
        assert isinstance(error, UserError) == (rank == 1)
    else:
        raise AssertionError("went on")
    norm = nn.BatchNorm2d(2)
    norm.running_mean.fill_(rank)
    copy_from_main(norm)
    assert norm.running_mean.tolist() == [0, 0]
print("good")
"""


def test_two_processes_agree() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
    result = subprocess.run(
        [*launcher, sys.executable, "-c", TWO], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("good") == 2


def test_buffers_stay_alone() -> None:
    norm = nn.BatchNorm2d(1)
    copy_from_main(norm)
    assert norm.running_mean is not None
    assert norm.running_mean.tolist() == [0]
