"""Helpers of the scripts: choosing a device, showing progress, and reporting errors in one line."""

from __future__ import annotations

import io
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

from utils.errors import ConfigError, FlagError, UserError

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")


def choose_device(gpu_num: int) -> torch.device:
    """Choose the device of `--gpu_num`: the index of a CUDA device, or -1 for the CPU.

    Without CUDA the CPU is used, with a warning on standard error. Under torchrun each process has the device of its
    local rank, unless the CPU is asked for; if there are more processes than devices, they share them.

    Raises:
        ConfigError: CUDA is available, but this device does not exist or cannot be used.
    """
    import torch  # takes a second to import, and not every command needs it

    if gpu_num == -1:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if os.environ.get("RANK", "0") == "0":
            hint = "(--gpu_num=-1 says so without this line)"
            print(f"warning: no CUDA device found, using the CPU {hint}", file=sys.stderr)
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if "LOCAL_RANK" in os.environ:
        gpu_num = int(os.environ["LOCAL_RANK"]) % count
    if not 0 <= gpu_num < count:
        present = ", ".join(f"{index} ({torch.cuda.get_device_name(index)})" for index in range(count))
        raise ConfigError(f"--gpu_num={gpu_num}: no such device; there are {present}, and -1 for the CPU")
    device = torch.device("cuda", gpu_num)
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:  # for example, another process has the device to itself
        raise ConfigError(f"--gpu_num={gpu_num}: {str(error).splitlines()[0]}; choose another, or -1") from None
    return device


def show_progress(items: Iterable[Item], total: int | None) -> Iterator[Item]:
    """Yield the items under a progress bar; without a terminal print a line every ten items, as the original does."""
    start = time.perf_counter()
    with tqdm(total=total, unit="image", disable=None) as bar:
        number = 0
        for item in items:
            yield item
            del item  # frees its pixels before the next one is made, until which enumerate() would keep them
            number += 1  # noqa: SIM113
            bar.update()
            if bar.disable and number % 10 == 0:
                milliseconds = 1000 * (time.perf_counter() - start) / number
                print(f"im_detect: {number}/{total or '?'} {milliseconds:.1f} ms per image", flush=True)


def _open_closed_streams() -> None:
    """Reopen standard streams that the parent process closed, so that result files do not get their descriptors."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w", closefd=False))


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`.

    A `FlagError` ends it with one line and status 2, another `UserError` with status 1, and Ctrl-C with status 130.
    """
    _open_closed_streams()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # which do not name the file
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name may contain what the terminal cannot show
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, FlagError) else 1)
    except BrokenPipeError:  # the reader of the output has exited, as in `inference.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted; what has been written is complete", file=sys.stderr)
        sys.exit(130)
