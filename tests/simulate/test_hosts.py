"""Several hosts: where stages are, as the engine's own placement says, and what the way between them takes."""

from __future__ import annotations

import dataclasses

import pytest

from furiosa_llm.runtime.placement.topology import make_topology
from furiosa_llm.simulate.clock import run
from furiosa_llm.simulate.closed_form import Load, estimate
from furiosa_llm.simulate.device import Device, load_device
from furiosa_llm.simulate.errors import PlacementError
from furiosa_llm.simulate.hosts import Ways, count_hosts, handed_on, hosts_of, on_hosts, ways_of
from furiosa_llm.simulate.placement import Placement
from furiosa_llm.simulate.question import Setting, answer
from furiosa_llm.simulate.requests import drawn
from furiosa_llm.simulate.steps import Steps
from tests.simulate.conftest import LlamaCosts

TOKEN = 8192
"""Bytes of Llama 3.1 8B's hidden state."""


def rngd(cards_per_host: int) -> Device:
    return dataclasses.replace(load_device("rngd"), cards_per_host=cards_per_host)


def place(tp: int, pp: int, dp: int = 1) -> Placement:
    return Placement(tensor_parallel_size=tp, pipeline_parallel_size=pp, data_parallel_size=dp)


def steps_on(costs: LlamaCosts, device: Device, where: Placement) -> Steps:
    software = device.software["furiosa-llm"]
    return Steps(costs.at(where.tensor_parallel_size), device, software, where, handed_nbytes=TOKEN)


@pytest.mark.parametrize(("tp", "pp", "dp"), [(8, 1, 4), (8, 4, 1), (8, 2, 2), (4, 2, 4), (4, 4, 2), (2, 2, 4)])
def test_stages_are_where_the_engine_has_them(tp: int, pp: int, dp: int) -> None:
    engine = make_topology(tp, pipeline_parallel_size=pp, data_parallel_size=dp)
    for cards_per_host in (1, 2, 4):
        device = rngd(cards_per_host)
        for replica, stages in enumerate(engine.replicas):
            cards = [pes[0].npu for pes in stages]
            assert hosts_of(device, place(tp, pp, dp), replica) == tuple(card // cards_per_host for card in cards)
        used = {pe.npu // cards_per_host for pe in engine.pes}
        assert count_hosts(device, place(tp, pp, dp)) == len(used)


def test_stages_that_share_a_card_are_on_one_host() -> None:
    assert hosts_of(rngd(1), place(1, 8), 0) == (0,) * 8
    assert hosts_of(rngd(1), place(1, 16), 0) == (0,) * 8 + (1,) * 8


def test_ranks_on_several_cards_are_counted_whole() -> None:
    assert hosts_of(rngd(4), place(32, 2), 0) == (0, 1)
    assert count_hosts(rngd(2), place(32, 1)) == 2  # of one stage, whose first rank is on the first


def test_the_way_of_a_step() -> None:
    """Head and stage 0 are on one host; stages 1 and 2 on the second, 3 on the third."""
    ways = Ways(latency=1e-3, seconds_per_token=1e-4, crossings=(False, True, False, True, True))
    assert ways.into() == 0
    assert [ways.after(stage, 10) for stage in range(4)] == pytest.approx([2e-3, 0, 2e-3, 1e-3])
    assert ways.all(10) == pytest.approx(5e-3)
    second = ways_of(rngd(1), place(8, 1, 2), 1, TOKEN)
    assert second.crossings == (True, True)  # there with a batch, back with its tokens
    assert second.all(10) == pytest.approx(2 * rngd(1).latency_of_hosts.value)


def test_one_host_takes_as_long_as_before(costs: LlamaCosts) -> None:
    load = Load(kind="closed", amount=8, input_len=512, output_len=64)
    with_link, without = (steps_on(costs, device, place(8, 2)) for device in (rngd(2), load_device("rngd")))
    assert estimate(with_link, load) == estimate(without, load)
    assert estimate(with_link, load).causes["links"] == 0


def test_the_clock_and_the_closed_form_wait_for_the_link(costs: LlamaCosts) -> None:
    """One sequence alone waits for three hops a token, and a prompt for its values, too."""
    two, one = (steps_on(costs, rngd(cards), place(8, 2)) for cards in (1, 2))
    latency, link = two.device.latency_of_hosts.value, two.device.link_of_hosts.value
    found = [run(steps, drawn(1, input_len=512, output_len=3, lengths=None, rate=None, seed=0)) for steps in (two, one)]
    first, second, third = (
        near - far for near, far in zip(*(one.observed.records[0].token_times for one in found), strict=True)
    )
    hop = 2 * latency + TOKEN / link  # stage 1 is on the other host: there, and back to the head
    assert first == pytest.approx(2 * latency + 512 * TOKEN / link)
    assert second - first == pytest.approx(hop)
    assert third - second == pytest.approx(hop)
    said = [estimate(steps, Load(kind="closed", amount=1, input_len=512, output_len=3)) for steps in (two, one)]
    assert said[0].ttft - said[1].ttft == pytest.approx(first)
    assert said[0].ttft == pytest.approx(found[0].observed.records[0].token_times[0], rel=0.05)  # nobody else waits
    assert said[0].tpot - said[1].tpot == pytest.approx(hop) == said[0].causes["links"]


def test_full_stages_hide_the_link(costs: LlamaCosts) -> None:
    load = Load(kind="closed", amount=128, input_len=512, output_len=64)
    two, one = (estimate(steps_on(costs, rngd(cards), place(8, 2)), load) for cards in (1, 2))
    assert two.tpot == pytest.approx(one.tpot, rel=0.01)


def test_ranks_on_several_hosts_pay_for_each_collective(costs: LlamaCosts) -> None:
    near, far = (steps_on(costs, rngd(cards), place(32, 1)) for cards in (4, 1))
    work = near.decode(1, 512)
    more = far.causes(work, 0)["collectives"] - near.causes(work, 0)["collectives"]
    assert more > 66 * far.device.latency_of_hosts.value  # 65 in the layers, one in the head, and slower bytes


def test_the_answer_names_hosts_and_is_extrapolated(setting: Setting) -> None:
    spread = dataclasses.replace(setting, device=on_hosts(setting.device, 2, 2))
    found = answer(spread, place(8, 2), 2, spread.load("closed", 1))
    assert (found.hosts, found.hops) == (2, 2)
    assert {"hosts": 2, "hops": 2}.items() <= found.to_json().items()
    assert all(one.extrapolated for one in found.beliefs.values())
    assert handed_on(setting.costs.at(2)) == TOKEN
    assert found.estimate.tpot > answer(setting, place(8, 2), 2, setting.load("closed", 1)).estimate.tpot


def test_cards_that_are_not_spread_evenly_are_refused() -> None:
    with pytest.raises(PlacementError, match="3 cards are not spread evenly over 2 hosts; give a multiple of 2"):
        on_hosts(load_device("rngd"), 3, 2)
