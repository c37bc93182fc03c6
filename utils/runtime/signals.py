"""Stopping where it does no harm."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """While open, Ctrl-C and SIGTERM set `asked` instead of interrupting; a second one interrupts.

    >>> with StopRequest() as stop:
    ...     while not stop.asked:
    ...         work()
    """

    def __init__(self) -> None:
        self.asked = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
