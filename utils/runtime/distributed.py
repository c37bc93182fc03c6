"""Communication between the processes that torchrun starts. All functions also work in a single process."""

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

from utils.errors import UserError

# How long processes wait for one another where each has its own shard of the work: longer than shards can differ.
SHARD_TIMEOUT = timedelta(days=14)

Value = TypeVar("Value")


@dataclass(frozen=True)
class DistributedContext:
    """The rank of this process and the number of processes. The process of rank 0 writes and prints."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


SINGLE_PROCESS = DistributedContext()


@contextmanager
def distributed_context(device: torch.device, timeout: timedelta = SHARD_TIMEOUT) -> Iterator[DistributedContext]:
    """Join the processes that torchrun started, or run alone.

    Args:
        device: device of the tensors that the processes exchange; each CUDA process has its own.
        timeout: how long a process waits for another one that hangs. One that ends is noticed at once.

    Raises:
        UserError: the other processes cannot be reached, or CUDA devices are fewer than the processes.
    """
    if "WORLD_SIZE" not in os.environ:
        yield SINGLE_PROCESS
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        processes, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if processes > devices:
            raise UserError(f"{processes} processes need a CUDA device each, and there are {devices}; start fewer")
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot join the processes of torchrun: {str(error).splitlines()[0]}") from None
    try:
        yield DistributedContext(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def shard_positions(count: int, done: np.ndarray, block: int, context: DistributedContext) -> list[int]:
    """The positions below `count` that this process has to process.

    Positions are assigned in blocks that start at multiples of `block`, so neighbours stay together, whatever is done
    already. A block with a missing position is processed completely.

    Args:
        count: number of positions.
        done: (N,) positions that are done.
        block: number of neighbours that stay together.

    Returns:
        Positions in ascending order. Those of `done` that share a block with a missing one are among them.
    """
    missing = np.ones(count, bool)
    missing[done] = False
    blocks = np.unique(np.flatnonzero(missing) // block)[context.rank :: context.world_size]
    positions = (blocks[:, None] * block + np.arange(block)).ravel()
    return positions[positions < count].tolist()


def reduce_mean(value: Tensor) -> Tensor:
    """The mean of the values of all processes."""
    return _sum(value) / _world_size()


def share_of_count(count: Tensor) -> Tensor:
    """This process's share of the total count of all processes, where the total is at least 1.

    DistributedDataParallel averages gradients over the processes. With sums divided by this share, the average is the
    mean over the whole batch, as a single process would compute it.
    """
    return _sum(count).clamp(min=1) / _world_size()


def _sum(value: Tensor) -> Tensor:
    """The sum of the values of all processes."""
    total = value.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process; a collective call."""
    if not dist.is_initialized():
        return flag
    raised = torch.tensor(int(flag), device=device)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised.item())


def gather_dicts(part: dict[str, Value]) -> dict[str, Value]:
    """The entries of the dictionaries of all processes, in every process."""
    if not dist.is_initialized():
        return part
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return {name: value for each in parts for name, value in each.items()}


def broadcast_from_main(value: Value | None) -> Value:
    """The value of the main process, in every process; the values of the others are ignored."""
    values: list[Any] = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return cast(Value, values[0])


def run_on_all(action: Callable[[], Value]) -> Value:
    """Run `action` in every process, and return its value once all have finished.

    Raises:
        UserError: the action raised one here; if it did so in several processes, only the first reports it.
        SystemExit: the action raised a `UserError` in another process, which reports it.
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


def run_on_main(action: Callable[[], Value]) -> Value:
    """Run `action` in the main process only, and return its value in every process; see `run_on_all`."""
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    return broadcast_from_main(run_on_all(lambda: action() if is_main else None))


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process the main one's buffers, such as the statistics of batch normalisation."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
