"""Stopping a run on Ctrl-C or SIGTERM without losing work."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """While open, Ctrl-C and SIGTERM set `requested` instead of interrupting. A second signal interrupts.

    >>> with StopRequest() as stop:
    ...     while not stop.requested:
    ...         work()
    """

    def __init__(self) -> None:
        self.requested = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
