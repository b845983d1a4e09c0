"""The clock: the product's scheduler on simulated time, against closed forms, and against itself."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from pathlib import Path

import pytest

from furiosa_llm.bench.metrics import figures_of
from furiosa_llm.runtime.errors import CapacityError
from furiosa_llm.simulate.clock import Run, limits_of, run
from furiosa_llm.simulate.closed_form import Load, estimate
from furiosa_llm.simulate.device import load_device
from furiosa_llm.simulate.placement import Placement
from furiosa_llm.simulate.requests import Request, drawn, read_trace
from furiosa_llm.simulate.steps import Steps
from furiosa_llm.simulate.timeline import chrome_trace
from tests.simulate.conftest import LlamaCosts

TRACE = Path(__file__).parents[2] / "benchmarks" / "simulate" / "trace.jsonl"


def steps_on(costs: LlamaCosts, *, pp: int = 1, dp: int = 1, **changed: float) -> Steps:
    device = load_device("rngd")
    software = device.software["furiosa-llm"]
    values = {n: dataclasses.replace(getattr(software, n), value=v) for n, v in changed.items()}
    place = Placement(tensor_parallel_size=8, pipeline_parallel_size=pp, data_parallel_size=dp)
    return Steps(costs.at(8), device, dataclasses.replace(software, **values), place)


def alike(count: int, input_len: int = 200, output_len: int = 20, rate: float | None = None) -> list[Request]:
    return drawn(count, input_len=input_len, output_len=output_len, lengths=None, rate=rate, seed=0)


def throughput(found: Run) -> float:
    """Tokens a second in the middle of the run."""
    times = sorted(at for record in found.observed.records for at in record.token_times)
    cut = len(times) // 6
    return (len(times) - 2 * cut) / (times[-cut] - times[cut])


def test_one_request_takes_what_its_steps_take(costs: LlamaCosts) -> None:
    steps = steps_on(costs)
    found = run(steps, alike(1, 1500, 3)).observed.records[0]
    overhead = steps.software.request_time.value
    first = overhead + steps.seconds(steps.prefill(1024, 0, last=False), 0) + steps.seconds(steps.prefill(476, 1024), 0)
    second = first + steps.seconds(steps.decode(1, 1501), 0)
    third = second + steps.seconds(steps.decode(1, 1502), 0)
    assert found.token_times == pytest.approx([first, second, third])
    assert found.ended == found.token_times[-1]


@pytest.mark.parametrize(("pp", "users"), [(1, 32), (2, 32), (4, 64)])
def test_at_saturation_it_is_the_closed_form(costs: LlamaCosts, pp: int, users: int) -> None:
    steps = steps_on(costs, pp=pp)
    found = run(steps, alike(4 * users, 512, 64), concurrency=users)
    said = estimate(steps, Load(kind="closed", amount=users, input_len=512, output_len=64))
    assert throughput(found) == pytest.approx(said.output_tps, rel=0.06)


@pytest.mark.slow
def test_the_tail_of_an_open_load_is_as_published(costs: LlamaCosts) -> None:
    """Row 22 of benchmarks/simulate/measurements.csv, to which nothing is fitted."""
    arrivals = [one.arrival for one in alike(300, rate=1.5)]
    lengths = read_trace(TRACE)
    requests = [dataclasses.replace(one, arrival=at) for one, at in zip(lengths, arrivals, strict=True)]
    found = figures_of(run(steps_on(costs), requests).observed, {})
    assert found.tpot.p99 == pytest.approx(35.152, rel=0.15)


def test_the_same_requests_give_the_same_times(costs: LlamaCosts) -> None:
    steps = steps_on(costs, pp=2, dp=2)
    one, two = (run(steps, alike(30, rate=5.0), spans=True) for _ in range(2))
    assert one == two
    assert json.dumps(chrome_trace(one)) == json.dumps(chrome_trace(two))


def test_stages_and_replicas_do_one_thing_at_a_time(costs: LlamaCosts) -> None:
    found = run(steps_on(costs, pp=2, dp=2), alike(40, rate=50.0), spans=True)
    for place in {(span.replica, span.stage) for span in found.spans}:
        own = sorted((s for s in found.spans if (s.replica, s.stage) == place), key=lambda s: s.begin)
        assert all(before.end <= after.begin + 1e-12 for before, after in itertools.pairwise(own))
    assert len({(span.replica, span.stage) for span in found.spans}) == 4
    per_replica = [sum(s.tokens for s in found.spans if (s.replica, s.stage) == (r, 0)) for r in (0, 1)]
    assert min(per_replica) > 0.8 * max(per_replica)  # the product's router


def test_a_common_beginning_is_computed_once(costs: LlamaCosts) -> None:
    steps = steps_on(costs)
    alone = run(steps, alike(8, 800, 4), concurrency=1, spans=True)
    shared = run(steps, alike(8, 800, 4), concurrency=1, shared_prefix=600, spans=True)
    computed = [sum(s.tokens for s in found.spans if s.kind == "prefill") for found in (alone, shared)]
    assert computed[0] == 8 * 800
    assert computed[1] == 800 + 7 * 200


def test_what_does_not_fit_at_once_waits_or_is_sent_back(costs: LlamaCosts) -> None:
    small = steps_on(costs, memory_reserved=51e9 - 16.06e9 - 0.35e9)  # 2,600 tokens of cache
    assert limits_of(small).num_pages * 16 < 4000
    found = run(small, alike(8, 300, 400))
    assert all(len(record.token_times) == 400 for record in found.observed.records)
    assert found.preemptions > 0
    with pytest.raises(CapacityError, match="expected at most"):
        run(small, alike(1, 20_000, 2))


def test_a_closed_loop_has_as_many_as_it_says(costs: LlamaCosts) -> None:
    found = run(steps_on(costs), alike(20), concurrency=5).observed
    assert found.max_concurrency == 5
    starts = sorted(record.due for record in found.records)
    assert starts[:5] == [0.0] * 5
    assert starts[5] > 0


def test_the_timeline_is_one_that_perfetto_opens(costs: LlamaCosts) -> None:
    """The trace event format: complete events with begin and duration, names as metadata, and a counter."""
    found = chrome_trace(run(steps_on(costs, pp=2), alike(6), spans=True))
    events = json.loads(json.dumps(found))["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    complete = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] > 0 and {"name", "ts", "pid", "tid"} <= event.keys() for event in complete)
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {"replica 0", "stage 0", "stage 1"}
    counts = [event["args"]["under way"] for event in events if event["ph"] == "C"]
    assert counts[-1] == 0
    assert statistics.fmean(counts) > 0
