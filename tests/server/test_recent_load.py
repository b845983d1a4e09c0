"""The load of the last minute: what overlaps, what is forgotten, and that a prediction is made once for a load."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from furiosa_llm.server.recent_load import Expectation, LoadMeter, RecentLoad
from furiosa_llm.simulate.errors import PlacementError


class Clock:
    """A time that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_two_requests_that_overlap() -> None:
    """One from 0 to 4, one of two sequences from 2 to 4, and one that fails and is in no figure."""
    clock = Clock()
    meter = LoadMeter(clock)
    assert meter.read() is None
    first = meter.begin(1)
    clock.now = 102
    second = meter.begin(2)
    meter.leave(meter.begin(1))
    meter.count(9)
    clock.now = 104
    for mark, generated in ((first, 3), (second, 6)):
        meter.leave(mark)
        meter.served(mark, first=mark.time + 1, last=104, prompt=10, generated=generated)
    assert meter.read() == RecentLoad(
        requests=2,
        concurrency=14 / 6,
        prompt_tokens=10,
        generated_tokens=3,
        ttft=1,
        tpot=(3 / 2 + 1 / 2) / 2,
        output_tps=18 / 6,
    )
    clock.now = 163
    third = meter.begin(1)
    clock.now = 164.1
    meter.leave(third)
    meter.served(third, first=164, last=164.1, prompt=10, generated=2)
    found = meter.read()
    assert found is not None
    assert (found.requests, round(found.concurrency, 6)) == (
        1,
        1,
    )  # the others are forgotten, and are under way no more


def test_a_prompt_that_was_known_and_a_single_token() -> None:
    clock = Clock()
    meter = LoadMeter(clock)
    mark = meter.begin(1)
    clock.now = 101
    meter.leave(mark)
    meter.served(mark, first=101, last=101, prompt=0, generated=1)
    found = meter.read()
    assert found is not None
    assert (found.prompt_tokens, found.generated_tokens, found.tpot, found.concurrency) == (1, 1, None, 1)


def test_a_prediction_is_made_once_for_a_load() -> None:
    asked: list[tuple[float, ...]] = []

    def predict(*load: float) -> Any:
        asked.append(load)
        if load[0] > 8:
            raise PlacementError("no room")
        return SimpleNamespace(ttft=load[0])

    def load(concurrency: float) -> RecentLoad:
        return RecentLoad(
            requests=1, concurrency=concurrency, prompt_tokens=9.6, generated_tokens=5, ttft=1, tpot=1, output_tps=1
        )

    async def ask() -> list[Any]:
        expectation = Expectation("here.toml", predict)
        return [await expectation.of(load(users)) for users in (2.04, 2.0, 9, 9)]

    said = asyncio.run(ask())
    assert [one and one.ttft for one in said] == [2.0, 2.0, None, None]
    assert asked == [(2.0, 10.0, 5.0), (9.0, 10.0, 5.0)]
