"""Several processes that do one job together, as torchrun starts them; a single process is the simplest case."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from config import UserError

# How long processes wait for one another. One that dies is noticed at once; this is for shares of the work that take
# one process days longer than another.
_PATIENCE = timedelta(days=14)

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """This process among all: `rank` counts from 0, and rank 0 is the one that writes and speaks."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


ALONE = Processes()


def own_share(count: int, done: np.ndarray, block: int, processes: Processes) -> list[int]:
    """The positions of 0 to `count` that this process is to do.

    Positions go around in blocks, so that neighbours stay together, and as blocks that begin where they always do: one
    of which something is missing is looked at whole.

    Args:
        done: (N,) positions that need not be done.
        block: positions that stay together.

    Returns:
        Positions, ascending, among them those of `done` that lie in a block with others that are not.
    """
    missing = np.ones(count, bool)
    missing[done] = False
    blocks = np.unique(np.flatnonzero(missing) // block)[processes.rank :: processes.count]
    positions = (blocks[:, None] * block + np.arange(block)).ravel()
    return positions[positions < count].tolist()


@contextmanager
def join_processes(device: torch.device) -> Iterator[Processes]:
    """Meet the other processes that torchrun started, if it did, over NCCL on CUDA and gloo elsewhere."""
    if "WORLD_SIZE" not in os.environ:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of each process's value; the value itself where there is one process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def share_of_count(count: Tensor) -> Tensor:
    """This process's share of what all count together, at least 1 in all.

    A sum that each process divides by this has, averaged over the processes as DistributedDataParallel averages
    gradients, the mean over everything: as one process with all of the batch would have it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return count.clamp(min=1)
    total = count.clone()
    dist.all_reduce(total)
    return total.clamp(min=1) / dist.get_world_size()


def any_of_processes(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process; all must ask."""
    if not dist.is_initialized():
        return flag
    raised = torch.tensor(int(flag), device=device)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised.item())


def merge_over_processes(part: dict[str, Value]) -> dict[str, Value]:
    """The entries of all processes' dictionaries, in every process."""
    if not dist.is_initialized():
        return part
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return {name: value for each in parts for name, value in each.items()}


def value_of_main(value: Value | None) -> Value:
    """The main process's value, in every process; what the others give does not matter."""
    values: list[Any] = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return cast(Value, values[0])


def in_step(action: Callable[[], Value]) -> Value:
    """What `action` returns, once it has been done in every process.

    Raises:
        UserError: it raised one; where several did, only the first process says so.
        SystemExit: it raised one in another process, which says so.
    """
    if not dist.is_initialized():
        return action()
    value, error = None, None
    try:
        value = action()
    except UserError as raised:
        error = raised
    failed: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failed, error is not None)
    if any(failed):
        raise error if error is not None and failed.index(True) == dist.get_rank() else SystemExit(1)
    return cast(Value, value)


def done_by_main(action: Callable[[], Value]) -> Value:
    """What `action` returns in the main process, in every process; the others do not do it.

    Raises:
        UserError: it raised one; the other processes leave without a word.
    """
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    return value_of_main(in_step(lambda: action() if is_main else None))


def copy_from_main(module: nn.Module) -> None:
    """Give every process the buffers of the main one, such as the statistics of batch normalisation."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
