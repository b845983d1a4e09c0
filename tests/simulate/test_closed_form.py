"""Times of steps and of loads: against published figures, and against what must be true of any device."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from furiosa_llm.simulate.closed_form import Estimate, Load, estimate, most_sequences
from furiosa_llm.simulate.device import load_device
from furiosa_llm.simulate.errors import LoadError, PlacementError
from furiosa_llm.simulate.placement import Placement
from furiosa_llm.simulate.steps import Steps
from tests.simulate.conftest import LlamaCosts


def steps_on(costs: LlamaCosts, device: str, software: str, placement: Placement, weights: str | None = None) -> Steps:
    found = load_device(device)
    size = placement.tensor_parallel_size
    return Steps(costs.at(size), found, found.software[software], placement, weights=weights, kv=weights)


def rngd(costs: LlamaCosts, *, pp: int = 1, dp: int = 1) -> Steps:
    place = Placement(tensor_parallel_size=8, pipeline_parallel_size=pp, data_parallel_size=dp)
    return steps_on(costs, "rngd", "furiosa-llm", place)


def closed(steps: Steps, users: float, input_len: float = 857, output_len: float = 652) -> Estimate:
    return estimate(steps, Load(kind="closed", amount=users, input_len=input_len, output_len=output_len))


@pytest.mark.parametrize(
    ("users", "tpot", "tps"),
    [(1, 15.71, 63.1), (3.98, 19.48, 200.9), (15.59, 26.05, 598.2), (59.2, 44.54, 1277.0), (107.2, 67.88, 1473.3)],
)
def test_rngd_is_as_published(costs: LlamaCosts, users: float, tpot: float, tps: float) -> None:
    """Rows 1 to 16 of benchmarks/simulate/measurements.csv."""
    found = closed(rngd(costs), users)
    assert 1000 * found.tpot == pytest.approx(tpot, rel=0.06)
    assert found.output_tps == pytest.approx(tps, rel=0.06)


def test_the_room_is_as_published(costs: LlamaCosts) -> None:
    assert rngd(costs).cache_tokens() == pytest.approx(246_079, rel=0.03)  # row 240


def test_a_trt_llm_figure_is_as_published(costs: LlamaCosts) -> None:
    steps = steps_on(costs, "h100", "trt-llm", Placement(tensor_parallel_size=1), "fp8")
    found = estimate(steps, Load(kind="max", amount=0, input_len=1000, output_len=1000))
    assert found.output_tps == pytest.approx(15_220, rel=0.1)  # row 73


def test_the_causes_are_the_time(costs: LlamaCosts) -> None:
    found = closed(rngd(costs), 16)
    assert sum(found.causes.values()) == pytest.approx(found.tpot)
    one = closed(rngd(costs), 1)
    assert one.causes["prefill"] == 0
    assert one.e2e == pytest.approx(one.ttft + 651 * one.tpot)


def test_more_users_are_slower_each_and_faster_together(costs: LlamaCosts) -> None:
    found = [closed(rngd(costs), users) for users in (1, 2, 4, 8, 16, 32, 64)]
    for less, more in itertools.pairwise(found):
        assert more.tpot > less.tpot
        assert more.output_tps > less.output_tps


def test_replicas_share_the_load(costs: LlamaCosts) -> None:
    one, two = closed(rngd(costs), 8), closed(rngd(costs, dp=2), 16)
    assert two.tpot == one.tpot
    assert two.output_tps == pytest.approx(2 * one.output_tps)


def test_stages_hold_more_and_are_no_faster_for_one(costs: LlamaCosts) -> None:
    one, two = rngd(costs), rngd(costs, pp=2)
    assert two.cache_tokens() > 2 * one.cache_tokens()
    assert closed(two, 1).tpot == pytest.approx(closed(one, 1).tpot)
    assert closed(two, 64).output_tps > 1.3 * closed(one, 64).output_tps


def test_an_open_load_follows_littles_law(costs: LlamaCosts) -> None:
    found = estimate(rngd(costs), Load(kind="open", amount=1.0, input_len=857, output_len=652))
    assert not found.saturated
    assert found.concurrency == pytest.approx(1.0 * found.e2e, rel=0.01)
    assert found.output_tps == 652


def test_a_rate_that_is_too_high_grows_a_queue(costs: LlamaCosts) -> None:
    found = estimate(rngd(costs), Load(kind="open", amount=50.0, input_len=857, output_len=652))
    assert found.saturated
    assert found.output_tps < 50 * 652


def test_users_beyond_the_room_wait(costs: LlamaCosts) -> None:
    steps = rngd(costs)
    most = most_sequences(steps, 857 + 652)
    full, over = closed(steps, most), closed(steps, 4 * most)
    assert over.saturated
    assert over.output_tps == pytest.approx(full.output_tps, rel=0.35)
    assert over.ttft > 2 * full.e2e


def test_what_does_not_fit_says_by_how_much(costs: LlamaCosts) -> None:
    big = dataclasses.replace(
        costs.at(8), weights=tuple(dataclasses.replace(w, nbytes=8 * w.nbytes) for w in costs.at(8).weights)
    )
    device = load_device("rngd")
    steps = Steps(big, device, device.software["furiosa-llm"], Placement(tensor_parallel_size=8))
    with pytest.raises(PlacementError, match=r"tp 8, pp 1, dp 1: the weights need 9\.\d\d GB more on a PE"):
        closed(steps, 1)
    with pytest.raises(PlacementError, match=r"room for 24\d,\d+ tokens of cache, and one sequence has 300,001"):
        closed(rngd(costs), 1, input_len=300_000, output_len=1)


@pytest.mark.parametrize(
    ("kind", "amount", "input_len"),
    [("closed", 0, 1), ("open", float("inf"), 1), ("closed", float("nan"), 1), ("max", 0, 0)],
)
def test_loads_that_are_none_are_refused(kind: str, amount: float, input_len: float) -> None:
    with pytest.raises(LoadError, match="expected"):
        Load(kind=kind, amount=amount, input_len=input_len, output_len=1)  # type: ignore[arg-type]


def test_experts_are_read_as_they_are_chosen(costs: LlamaCosts) -> None:
    """Two of eight: one token reads a quarter, and many read all."""
    one = costs.at(8)
    experts = dataclasses.replace(one.weights[0], share=0.25)
    mixture = dataclasses.replace(one, weights=(experts, *one.weights[1:]))
    device = load_device("rngd")
    steps = Steps(mixture, device, device.software["furiosa-llm"], Placement(tensor_parallel_size=8))
    dense = rngd(costs)
    few, many = (steps.causes(steps.decode(rows, 1), 0)["weights"] for rows in (1, 64))
    whole = dense.causes(dense.decode(1, 1), 0)["weights"]
    assert few == pytest.approx(whole / 4, rel=0.05)
    assert many == pytest.approx(dense.causes(dense.decode(64, 1), 0)["weights"], rel=0.01)


def test_narrow_weights_are_read_faster(costs: LlamaCosts) -> None:
    place = Placement(tensor_parallel_size=1)
    wide, narrow = (steps_on(costs, "h100", "trt-llm", place, w) for w in ("bf16", "fp8"))
    assert closed(narrow, 1).tpot < 0.75 * closed(wide, 1).tpot
    assert narrow.kv_nbytes == wide.kv_nbytes / 2
