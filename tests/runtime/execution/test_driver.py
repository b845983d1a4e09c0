"""The cores of a host: threads that meet, fail together, share the lanes, and end."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from furiosa_llm.runtime.errors import ExecutionError
from furiosa_llm.runtime.execution.driver import Crew, Waits
from furiosa_llm.runtime.program.lanes import ranks_of


@contextmanager
def crew_of(count: int) -> Iterator[Crew]:
    crew = Crew(count)
    try:
        yield crew
    finally:
        crew.close()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_nobody_passes_a_barrier_before_all_have_come(count: int) -> None:
    rounds = 200
    arrived = [0] * count
    early: list[int] = []

    def body(lanes: Sequence[int], member: int, barrier: Waits) -> None:
        assert list(lanes) == [member]
        for number in range(1, rounds + 1):
            arrived[member] = number
            barrier.wait(member)
            early.extend(other for other in arrived if other < number)

    with crew_of(count) as crew:
        crew.run(body, count)
    assert arrived == [rounds] * count
    assert early == []


@pytest.mark.parametrize("failing", [0, 1, 3])
@pytest.mark.parametrize("before", [0, 1, 5])
def test_a_failure_ends_all_threads_and_is_raised(failing: int, before: int) -> None:
    def body(lanes: Sequence[int], member: int, barrier: Waits) -> None:
        for number in range(10):
            if member == failing and number == before:
                raise KeyError(member)
            barrier.wait(member)

    passed: list[int] = []

    def fine(lanes: Sequence[int], member: int, barrier: Waits) -> None:
        barrier.wait(member)
        passed.append(member)

    with crew_of(4) as crew:
        for _ in range(20):
            with pytest.raises(KeyError, match=str(failing)):
                crew.run(body, 4)
        crew.run(fine, 4)
    assert sorted(passed) == [0, 1, 2, 3]


def test_two_failures_raise_one() -> None:
    def body(lanes: Sequence[int], member: int, barrier: Waits) -> None:
        raise KeyError(member)

    with crew_of(3) as crew, pytest.raises(KeyError):
        crew.run(body, 3)


def test_closing_ends_the_threads() -> None:
    before = set(threading.enumerate())
    crew = Crew(4)
    crew.run(lambda lanes, member, barrier: barrier.wait(member), 4)
    assert len(set(threading.enumerate()) - before) == 3
    crew.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(ExecutionError, match="the executor is closed"):
        crew.run(lambda lanes, member, barrier: None, 4)


@pytest.mark.parametrize(("lanes", "cores"), [(8, 3), (3, 8), (5, 1), (4, 4)])
def test_lanes_are_shared_between_the_cores(lanes: int, cores: int) -> None:
    shares: dict[int, list[int]] = {}

    def body(own: Sequence[int], member: int, barrier: Waits) -> None:
        shares[member] = list(own)

    with crew_of(cores) as crew:
        crew.run(body, lanes)
    assert len(shares) == min(lanes, cores)
    assert [lane for member in sorted(shares) for lane in shares[member]] == list(range(lanes))
    assert max(map(len, shares.values())) - min(map(len, shares.values())) <= 1


def test_two_who_expect_to_run_get_half_the_cores_each() -> None:
    members: list[int] = []
    together = threading.Barrier(2)

    def body(lanes: Sequence[int], member: int, barrier: Waits) -> None:
        if member == 0:
            together.wait(10)
        members.append(len(lanes))

    with crew_of(4) as crew:

        def work() -> None:
            with crew.expect():
                together.wait(10)
                crew.run(body, 4)

        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert members == [2, 2, 2, 2]
        members.clear()
        crew.run(lambda lanes, member, barrier: members.append(len(lanes)), 4)
        assert members == [1, 1, 1, 1]


@pytest.mark.parametrize(("ranks", "lanes"), [(8, 1), (8, 2), (8, 3), (4, 4), (5, 2)])
def test_every_rank_has_one_lane(ranks: int, lanes: int) -> None:
    rows = [ranks_of(lane, ranks, lanes) for lane in range(lanes)]
    assert [rank for row in rows for rank in row] == list(range(ranks))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1
