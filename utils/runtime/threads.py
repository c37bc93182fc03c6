"""Work that is done in a thread while the caller goes on, in the order in which it was handed over."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Queue
from threading import Thread
from types import TracebackType
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Item = TypeVar("Item")
Result = TypeVar("Result")

_WAITING = 4  # calls that may wait; what they hold is all that memory is needed for


class Background:
    """Makes calls one after the other in a thread. A context manager.

    A call that fails is the last one: its error comes out of the next `submit`, or on leaving. Leaving waits for all
    calls, also where an exception such as Ctrl-C is on its way out; a second Ctrl-C drops those that wait.

    >>> with Background() as background:
    ...     background.submit(writer.add, name, image)
    """

    def __init__(self) -> None:
        self._calls: Queue[Callable[[], object] | None] = Queue(_WAITING)
        self._error: BaseException | None = None
        self._gives_up = False
        self._thread = Thread(target=self._run, name="background")

    def submit(
        self, function: Callable[Arguments, object], /, *arguments: Arguments.args, **keywords: Arguments.kwargs
    ) -> None:
        """Have a call made after those before it; waits where several wait already.

        Raises:
            what an earlier call raised.
        """
        self._calls.put(lambda: function(*arguments, **keywords))
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._error is None and not self._gives_up:
                try:
                    call()
                except BaseException as error:  # for the caller's thread to handle
                    self._error = error
            del call  # with the picture that it holds

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._finish()
        except KeyboardInterrupt:
            self._gives_up = True
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
    """Apply a function in threads; the results come in the order of the items.

    The threads work on the next few items while the caller is busy with a result; no more are held in memory.

    Raises:
        what the function raised, in the place of its result.
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
