"""Threads that process work in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Queue
from threading import Thread
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Item = TypeVar("Item")
Result = TypeVar("Result")

_QUEUE_SIZE = 4  # bounds the memory of waiting calls


class BackgroundWorker:
    """Context manager that runs calls one after the other in a thread.

    No calls run after one that fails. Its error is raised by the next `submit`, or on leaving the context. Leaving
    waits for all calls, even while an exception such as Ctrl-C propagates; a second Ctrl-C drops the waiting calls.

    >>> with BackgroundWorker() as worker:
    ...     worker.submit(writer.add, name, image)
    """

    def __init__(self) -> None:
        self._calls: Queue[Callable[[], object] | None] = Queue(_QUEUE_SIZE)
        self._error: BaseException | None = None
        self._dropped = False
        self._thread = Thread(target=self._run, name="background")

    def submit(
        self, function: Callable[Arguments, object], /, *arguments: Arguments.args, **keywords: Arguments.kwargs
    ) -> None:
        """Queue a call; blocks while the queue is full.

        Raises:
            Exception: an earlier call failed; this is its exception.
        """
        self._calls.put(lambda: function(*arguments, **keywords))
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Wait until all calls have been run."""
        self._calls.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._error is None and not self._dropped:
                try:
                    call()
                except BaseException as error:  # raised again in the caller's thread
                    self._error = error
            del call  # frees the image that it refers to
            self._calls.task_done()

    def __enter__(self) -> BackgroundWorker:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self._finish()
        except KeyboardInterrupt:
            self._dropped = True
            self._finish()
            raise
        if error is None and self._error is not None:
            raise self._error

    def _finish(self) -> None:
        self._calls.put(None)
        self._thread.join()


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Generator[Result, None, None]:
    """Apply a function in threads and yield the results in the order of the items.

    The threads work on the next few items while the caller handles a result; no more are held in memory.

    Raises:
        Exception: the function failed; its exception is raised in place of the result.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                del item
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
