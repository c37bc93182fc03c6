"""Work behind the caller's back: in order, none lost, none piling up, and errors come to the caller."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.runtime.threads import BackgroundWorker, map_in_order


def test_calls_are_made_in_order_and_in_another_thread() -> None:
    made: list[tuple[int, int]] = []
    with BackgroundWorker() as worker:
        for number in range(20):
            worker.submit(lambda value: made.append((value, threading.get_ident())), number)
    assert [number for number, _ in made] == list(range(20))
    assert {thread for _, thread in made}.isdisjoint({threading.get_ident()})


def test_nothing_to_do_is_done() -> None:
    before = threading.active_count()
    with BackgroundWorker():
        pass
    assert threading.active_count() == before


def test_no_more_than_a_few_calls_wait() -> None:
    may_go_on = threading.Event()
    made: list[int] = []

    def slow(number: int) -> None:
        may_go_on.wait(10)
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
        may_go_on.set()
        filling.join()
    assert made == list(range(9))


def test_error_comes_out_and_is_the_end(tmp_path: Path) -> None:
    made: list[int] = []

    def fail(number: int) -> None:
        made.append(number)
        if number == 2:
            raise UserError("disk full")

    with pytest.raises(UserError, match="disk full"), BackgroundWorker() as worker:
        for number in range(1000):
            worker.submit(fail, number)
    assert made == [0, 1, 2]


def test_error_of_the_last_call_comes_out_on_leaving() -> None:
    def fail() -> None:
        raise UserError("disk full")

    with pytest.raises(UserError, match="disk full"), BackgroundWorker() as worker:
        worker.submit(fail)


def test_interruption_loses_nothing_that_was_handed_over() -> None:
    made: list[int] = []
    with pytest.raises(KeyboardInterrupt), BackgroundWorker() as worker:
        for number in range(3):
            worker.submit(made.append, number)
        raise KeyboardInterrupt
    assert made == [0, 1, 2]


def test_results_come_in_the_order_of_the_items() -> None:
    """Though the first takes until another is done."""
    others = threading.Event()

    def work(number: int) -> int:
        if number:
            others.set()
        else:
            others.wait(10)
        return number * number

    assert list(map_in_order(work, range(6), threads=2)) == [0, 1, 4, 9, 16, 25]
    assert list(map_in_order(work, [], threads=2)) == []


def test_an_items_error_comes_in_its_place_and_the_rest_is_left() -> None:
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
