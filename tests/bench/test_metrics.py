"""The figures of a load, against what is counted by hand."""

from __future__ import annotations

import pytest

from furiosa_llm.bench.load import Observed, Record
from furiosa_llm.bench.metrics import Spread, figures_of, latencies

LOAD = Observed(
    records=(
        Record(due=0.0, num_prompt=10, token_times=[1.0, 1.5, 2.5], ended=2.5),
        Record(due=1.0, num_prompt=20, token_times=[1.25], ended=1.25),
        Record(due=2.0, num_prompt=30, token_times=[3.0], ended=4.0, error="the replica failed"),
    ),
    duration=4.0,
    max_concurrency=2,
)


def test_throughput_counts_what_was_completed() -> None:
    figures = figures_of(LOAD, {})
    assert (figures.completed, figures.failed, figures.max_concurrency) == (2, 1, 2)
    assert (figures.input_tokens, figures.output_tokens) == (30, 4)
    assert figures.request_throughput == 2 / 4
    assert figures.output_throughput == 4 / 4
    assert figures.total_throughput == 34 / 4


def test_latencies() -> None:
    found = latencies(LOAD)
    assert found == {"ttft": [1000.0, 250.0], "tpot": [750.0], "itl": [500.0, 1000.0], "e2el": [2500.0, 250.0]}
    figures = figures_of(LOAD, {})
    assert figures.ttft == Spread.of([1.0, 0.25])
    assert figures.tpot == Spread.of([0.75])
    assert figures.itl == Spread.of([0.5, 1.0])
    assert figures.e2el == Spread.of([2.5, 0.25])


def test_a_spread_is_in_milliseconds() -> None:
    spread = Spread.of([second / 1000 for second in range(1, 101)])
    assert spread.mean == pytest.approx(50.5)
    assert spread.p50 == pytest.approx(50.5)
    assert spread.p90 == pytest.approx(90.1)
    assert spread.p99 == pytest.approx(99.01)
    assert spread.max == pytest.approx(100)


def test_nothing_has_no_spread() -> None:
    assert Spread.of([]) == Spread(mean=None, p50=None, p90=None, p99=None, max=None)


@pytest.mark.parametrize(
    ("objectives", "good"),
    [
        ({"ttft": 1000.0}, 2),
        ({"ttft": 999.0}, 1),
        ({"ttft": 249.0}, 0),
        ({"tpot": 750.0}, 2),  # a completion of one token has none, and breaks no limit of it
        ({"tpot": 749.0}, 1),
        ({"e2el": 2499.0}, 1),
        ({"ttft": 1000.0, "e2el": 100.0}, 0),
    ],
)
def test_goodput_is_of_requests_that_keep_every_objective(objectives: dict[str, float], good: int) -> None:
    assert figures_of(LOAD, objectives).goodput == good / 4


def test_without_objectives_there_is_no_goodput() -> None:
    assert figures_of(LOAD, {}).goodput is None
