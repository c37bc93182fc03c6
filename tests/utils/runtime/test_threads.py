"""Tests of background threads: order, bounded queues, errors and interruption."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.runtime.threads import BackgroundWorker, map_in_order


def test_calls_run_in_order_in_another_thread() -> None:
    made: list[tuple[int, int]] = []
    with BackgroundWorker() as worker:
        for number in range(20):
            worker.submit(lambda value: made.append((value, threading.get_ident())), number)
    assert [number for number, _ in made] == list(range(20))
    assert {thread for _, thread in made}.isdisjoint({threading.get_ident()})


def test_worker_without_calls_ends() -> None:
    before = threading.active_count()
    with BackgroundWorker():
        pass
    assert threading.active_count() == before


def test_queue_of_calls_is_bounded() -> None:
    proceed = threading.Event()
    made: list[int] = []

    def slow(number: int) -> None:
        proceed.wait(10)
        made.append(number)

    with BackgroundWorker() as worker:

        def fill() -> None:
            for number in range(9):
                worker.submit(slow, number)

        filling = threading.Thread(target=fill)
        filling.start()
        filling.join(0.2)
        assert filling.is_alive()
        assert worker._calls.qsize() == 4
        proceed.set()
        filling.join()
    assert made == list(range(9))


def test_error_is_raised_and_ends_the_worker(tmp_path: Path) -> None:
    made: list[int] = []

    def fail(number: int) -> None:
        made.append(number)
        if number == 2:
            raise UserError("disk full")

    with pytest.raises(UserError, match="disk full"), BackgroundWorker() as worker:
        for number in range(1000):
            worker.submit(fail, number)
    assert made == [0, 1, 2]


def test_error_of_the_last_call_is_raised_on_exit() -> None:
    def fail() -> None:
        raise UserError("disk full")

    with pytest.raises(UserError, match="disk full"), BackgroundWorker() as worker:
        worker.submit(fail)


def test_submitted_calls_are_completed_on_interruption() -> None:
    made: list[int] = []
    with pytest.raises(KeyboardInterrupt), BackgroundWorker() as worker:
        for number in range(3):
            worker.submit(made.append, number)
        raise KeyboardInterrupt
    assert made == [0, 1, 2]


def test_results_are_in_the_order_of_the_items() -> None:
    """The first item waits for another one."""
    others = threading.Event()

    def work(number: int) -> int:
        if number:
            others.set()
        else:
            others.wait(10)
        return number * number

    assert list(map_in_order(work, range(6), threads=2)) == [0, 1, 4, 9, 16, 25]
    assert list(map_in_order(work, [], threads=2)) == []


def test_error_of_an_item_is_raised_in_order_and_the_rest_is_not_processed() -> None:
    done: list[int] = []

    def work(number: int) -> int:
        if number == 1:
            raise ValueError("no such number")
        done.append(number)
        return number

    results = map_in_order(work, range(100), threads=2)
    assert next(results) == 0
    with pytest.raises(ValueError, match="no such number"):
        next(results)
    assert len(done) < 5
