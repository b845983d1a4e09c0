"""The driver threads: they meet, they fail together, and they end."""

from __future__ import annotations

import threading

import pytest

from furiosa_llm.runtime.driver import Barrier, Drivers, ranks_of, thread_of
from furiosa_llm.runtime.errors import ExecutionError


@pytest.mark.parametrize("count", [1, 2, 4])
def test_nobody_passes_a_barrier_before_all_have_come(count: int) -> None:
    rounds = 200
    arrived = [0] * count
    early: list[int] = []

    def body(thread: int, barrier: Barrier) -> None:
        for number in range(1, rounds + 1):
            arrived[thread] = number
            barrier.wait(thread)
            early.extend(other for other in arrived if other < number)

    drivers = Drivers(count)
    drivers.run(body)
    drivers.close()
    assert arrived == [rounds] * count
    assert early == []


@pytest.mark.parametrize("failing", [0, 1, 3])
@pytest.mark.parametrize("before", [0, 1, 5])
def test_a_failure_ends_all_threads_and_is_raised(failing: int, before: int) -> None:
    def body(thread: int, barrier: Barrier) -> None:
        for number in range(10):
            if thread == failing and number == before:
                raise KeyError(thread)
            barrier.wait(thread)

    drivers = Drivers(4)
    for _ in range(20):
        with pytest.raises(KeyError, match=str(failing)):
            drivers.run(body)
    passed: list[int] = []

    def fine(thread: int, barrier: Barrier) -> None:
        barrier.wait(thread)
        passed.append(thread)

    drivers.run(fine)
    drivers.close()
    assert sorted(passed) == [0, 1, 2, 3]


def test_two_failures_raise_one() -> None:
    def body(thread: int, barrier: Barrier) -> None:
        raise KeyError(thread)

    drivers = Drivers(3)
    with pytest.raises(KeyError):
        drivers.run(body)
    drivers.close()


def test_closing_ends_the_threads() -> None:
    before = threading.active_count()
    drivers = Drivers(4)
    drivers.run(lambda thread, barrier: barrier.wait(thread))
    assert threading.active_count() == before + 3
    drivers.close()
    assert threading.active_count() == before
    with pytest.raises(ExecutionError, match="the executor is closed"):
        drivers.run(lambda thread, barrier: None)


@pytest.mark.parametrize(("ranks", "threads"), [(8, 1), (8, 2), (8, 3), (4, 4), (5, 2)])
def test_every_rank_has_one_thread(ranks: int, threads: int) -> None:
    rows = [ranks_of(thread, ranks, threads) for thread in range(threads)]
    assert [rank for row in rows for rank in row] == list(range(ranks))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1
    assert all(thread_of(rank, ranks, threads) == thread for thread, row in enumerate(rows) for rank in row)
