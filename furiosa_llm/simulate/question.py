"""What is asked of a simulation, and the answers with their errors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from furiosa_llm.bench.metrics import Figures, figures_of
from furiosa_llm.runtime.artifact.units import counted
from furiosa_llm.simulate.believed import Belief, belief, outside
from furiosa_llm.simulate.clock import Run, run
from furiosa_llm.simulate.closed_form import Estimate, Kind, Load, estimate, most_sequences, shortage
from furiosa_llm.simulate.cores import steps_on
from furiosa_llm.simulate.device import Device, Software
from furiosa_llm.simulate.errors import LoadError, PlacementError
from furiosa_llm.simulate.hosts import count_hosts, handed_on, hosts_of
from furiosa_llm.simulate.model import Costs
from furiosa_llm.simulate.placement import Placement
from furiosa_llm.simulate.requests import Request
from furiosa_llm.simulate.steps import Steps

FIGURES = ("ttft", "tpot", "output_tps")
_ENOUGH = 0.99
"""The share of requests that must keep the limits."""
_MOST_RANKS = 64
_USERS = tuple(2**n for n in range(11))
_STRETCH = 64.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The model on the device, in whatever placement."""

    costs: Costs
    device: Device
    software_name: str
    software: Mapping[str, Software]
    """All of the device, as calibrated."""
    weights: str | None
    kv: str | None
    input_len: float
    output_len: float

    def steps(self, placement: Placement) -> Steps:
        """The steps in a placement."""
        costs = self.costs.at(placement.tensor_parallel_size)
        software = self.software[self.software_at(placement)]
        handed = 0
        if placement.pipeline_parallel_size > 1 and count_hosts(self.device, placement) > 1:
            handed = handed_on(self.costs.at(max(2, placement.tensor_parallel_size)))  # one rank has no collectives
        return steps_on(costs, self.device, software, placement, weights=self.weights, kv=self.kv, handed_nbytes=handed)

    def software_at(self, placement: Placement) -> str:
        """The name of the software for a placement."""
        return self.device.software_at(self.software_name, placement.tensor_parallel_size)

    def load(self, kind: Kind, amount: float) -> Load:
        """A load of requests of these lengths."""
        return Load(kind=kind, amount=amount, input_len=self.input_len, output_len=self.output_len)

    def beliefs(self, placement: Placement, figures: Sequence[str] = FIGURES) -> dict[str, Belief]:
        """The error of each figure."""
        software = self.software_at(placement)
        beyond = outside(
            self.device.name,
            software,
            tp=placement.tensor_parallel_size,
            pp=placement.pipeline_parallel_size,
            input_len=self.input_len,
            output_len=self.output_len,
        )
        if beyond is None and any(set(hosts_of(self.device, placement, 0))):
            beyond = "stages on several hosts, measured on one"
        return {f: belief(self.device.name, software, f, outside=beyond) for f in figures}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One load on one placement."""

    placement: Placement
    cards: int
    load: Load
    hosts: int
    """That have a stage, or a part of one."""
    hops: int
    """From host to host, of a step of the replica that has the most of them: from the head and back to it, too."""
    estimate: Estimate
    beliefs: Mapping[str, Belief]

    @property
    def user_tps(self) -> float:
        """Tokens a second of one user once its first token is there."""
        return 1 / self.estimate.tpot if self.estimate.tpot else math.inf

    @property
    def card_tps(self) -> float:
        """Tokens a second of a card."""
        return self.estimate.output_tps / self.cards

    def keeps(self, limits: Mapping[str, float]) -> bool:
        """Whether the mean of each latency is within its limit in milliseconds, and the load is done at all."""
        seconds = {"ttft": self.estimate.ttft, "tpot": self.estimate.tpot, "e2el": self.estimate.e2e}
        saturated = self.load.kind == "open" and self.estimate.saturated
        return not saturated and all(1000 * seconds[name] <= limit for name, limit in limits.items())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "placement": dataclasses.asdict(self.placement),
            "cards": self.cards,
            "hosts": self.hosts,
            "hops": self.hops,
            "load": dataclasses.asdict(self.load),
            **dataclasses.asdict(self.estimate),
            "user_tps": self.user_tps,
            "card_tps": self.card_tps,
            "error": {name: dataclasses.asdict(one) for name, one in self.beliefs.items()},
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Clocked:
    """Requests that were served one by one on simulated time."""

    placement: Placement
    hosts: int
    hops: int
    """See `Answer`."""
    load: str
    figures: Figures
    run: Run
    beliefs: Mapping[str, Belief]

    @property
    def keeps(self) -> bool:
        """Whether nearly all requests keep the limits."""
        good, figures = self.figures.goodput, self.figures
        return good is None or good >= _ENOUGH * figures.request_throughput

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "placement": dataclasses.asdict(self.placement),
            "hosts": self.hosts,
            "hops": self.hops,
            "load": self.load,
            **self.figures.as_dict(),
            "preemptions": self.run.preemptions,
            "error": {name: dataclasses.asdict(one) for name, one in self.beliefs.items()},
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that was asked, and the answers."""

    model: str
    setting: Setting
    placement: Placement
    """As asked for and completed; `answers` of a search have others."""
    tried_answers: Sequence[Answer]
    """Of every placement and load that was searched; none without a search."""
    answers: Sequence[Answer]
    limits: Mapping[str, float]
    """In milliseconds."""
    last: Load
    cards: int
    searched: bool
    fewest: Answer | None
    """The fewest cards that do the last load within the limits."""
    clocked: Sequence[Clocked]
    calibrated: bool

    @property
    def keeps(self) -> bool:
        """Whether anything keeps the limits."""
        done = [one.keeps(self.limits) for one in self.answers] + [one.keeps for one in self.clocked]
        return not self.limits or self.fewest is not None or any(done)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "model": self.model,
            "device": self.setting.device.name,
            "software": self.setting.software_name,
            "weights": self.setting.weights,
            "kv": self.setting.kv,
            "tried": len(self.tried_answers),
            "answers": [one.to_json() for one in self.answers],
            "fewest": None if self.fewest is None else self.fewest.to_json(),
            "clocked": [one.to_json() for one in self.clocked],
        }


def answer(setting: Setting, placement: Placement, cards: int, load: Load) -> Answer:
    """The answer for one load. Raises PlacementError if the model does not fit."""
    return _answer(setting, setting.steps(placement), cards, load, setting.beliefs(placement))


def _answer(setting: Setting, steps: Steps, cards: int, load: Load, beliefs: Mapping[str, Belief]) -> Answer:
    return Answer(
        placement=steps.placement,
        cards=cards,
        load=load,
        hosts=count_hosts(setting.device, steps.placement),
        hops=sum(steps.longest_way.crossings),
        estimate=estimate(steps, load),
        beliefs=beliefs,
    )


def clocked(
    setting: Setting,
    placement: Placement,
    load: str,
    requests: Sequence[Request],
    limits: Mapping[str, float],
    *,
    concurrency: int | None = None,
    shared_prefix: int = 0,
    spans: bool = False,
) -> Clocked:
    """Serve `requests` with the product's scheduler on simulated time; see `clock.run`."""
    steps = setting.steps(placement)
    found = run(steps, requests, concurrency=concurrency, shared_prefix=shared_prefix, spans=spans)
    typical = dataclasses.replace(
        setting,
        input_len=sum(one.input_len for one in requests) / len(requests),
        output_len=sum(one.output_len for one in requests) / len(requests),
    )
    beliefs = typical.beliefs(placement, (*FIGURES, "tpot_p99"))
    return Clocked(
        placement=placement,
        hosts=count_hosts(setting.device, placement),
        hops=sum(steps.longest_way.crossings),
        load=load,
        figures=figures_of(found.observed, limits),
        run=found,
        beliefs=beliefs,
    )


def placements(device: Device, cards: int, layers: int) -> Iterator[Placement]:
    """Every way to use all of so many cards: ranks and stages are powers of two, the rest are replicas."""
    units = cards * device.units_per_card
    powers = [2**n for n in range(units.bit_length()) if 2**n <= min(units, _MOST_RANKS)]
    in_host = device.units_per_card * device.cards_per_host
    for stages in powers:
        for ranks in powers:
            if units % (ranks * stages) == 0 and stages <= layers and ranks <= in_host:
                yield Placement(
                    tensor_parallel_size=ranks,
                    pipeline_parallel_size=stages,
                    data_parallel_size=units // (ranks * stages),
                )


def placed(setting: Setting, cards: int, tp: int | None, pp: int | None, dp: int | None) -> Placement:
    """The placement that was asked for, completed by what fits with the fewest stages, and then the fewest whole cards.

    Raises PlacementError if the numbers contradict each other, or nothing fits: by how much, and what would.
    """
    wanted = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "data_parallel_size": dp}
    given = {name: value for name, value in wanted.items() if value is not None}
    units, layers = cards * setting.device.units_per_card, setting.costs.at(1).layers
    if tp and pp and math.prod(given.values()) > units:
        raise PlacementError(
            f"tp {tp} x pp {pp} x dp {dp or 1} is more than the {units} PEs of {counted(cards, 'card')}"
        )
    if tp and pp:
        return Placement(
            tensor_parallel_size=tp, pipeline_parallel_size=pp, data_parallel_size=dp or units // (tp * pp)
        )
    possible = [
        place
        for place in placements(setting.device, cards, layers)
        if all(getattr(place, name) == value for name, value in given.items())
    ]
    if not possible:
        asked = ", ".join(f"{name.split('_')[0]} {value}" for name, value in given.items())
        raise PlacementError(
            f"no placement uses the {units} PEs of {counted(cards, 'card')} with {asked}; leave one out"
        )
    a_card = setting.device.units_per_card
    order = sorted(possible, key=lambda p: (p.pipeline_parallel_size, p.tensor_parallel_size < a_card))
    for place in order:
        if fits(setting, place):
            return place
    raise PlacementError(_no_place(setting, cards, min(order, key=lambda p: setting.steps(p).missing_nbytes())))


def fits(setting: Setting, place: Placement) -> bool:
    """Whether weights and one sequence fit."""
    return setting.steps(place).cache_tokens() >= setting.input_len + setting.output_len


def _no_place(setting: Setting, cards: int, largest: Placement) -> str:
    """By how much the model does not fit, and on how many cards it would."""
    reason = shortage(setting.steps(largest), setting.input_len + setting.output_len)
    layers = setting.costs.at(1).layers
    for more in (2**n for n in range(1, 7)):
        if more > cards and any(fits(setting, place) for place in placements(setting.device, more, layers)):
            return f"{reason}; it fits on {more} cards"
    return f"{reason}; it fits on no number of cards to 64: use smaller weights or shorter requests"


def search(setting: Setting, cards: int, loads: Sequence[Load] | None) -> Iterator[Answer]:
    """Every placement under each of the loads, or with one user to as many as there is room for."""
    for place in placements(setting.device, cards, setting.costs.at(1).layers):
        steps = setting.steps(place)
        length = setting.input_len + setting.output_len
        if steps.cache_tokens() < length:
            continue
        most = most_sequences(steps, length) * place.data_parallel_size
        beliefs = setting.beliefs(place)
        users = sorted({u for u in _USERS if u < most} | {int(most)})
        for load in loads or [setting.load("closed", n) for n in users]:
            yield _answer(setting, steps, cards, load, beliefs)


def front(answers: Sequence[Answer]) -> list[Answer]:
    """Those that no other beats in both tokens a second of a user and tokens a second of a card."""
    best, found = -1.0, []
    for one in sorted(answers, key=lambda a: (-a.user_tps, -a.card_tps)):
        if one.card_tps > best:
            best = one.card_tps
            found.append(one)
    return found


def fewest_cards(setting: Setting, load: Load, limits: Mapping[str, float], most: int) -> Answer | None:
    """The fewest cards that do the load within the limits, with the placement that has the most tokens a second."""
    layers = setting.costs.at(1).layers
    for cards in range(1, most + 1):
        good = []
        for place in placements(setting.device, cards, layers):
            if fits(setting, place):
                one = answer(setting, place, cards, load)
                if one.keeps(limits):
                    good.append(one)
        if good:
            return max(good, key=lambda one: one.estimate.output_tps)
    return None


def calibrated(setting: Setting, placement: Placement, metric: str, value: float, users: float) -> Setting:
    """The setting with the times of layers, or for `ttft` of requests, such that a measured figure comes out.

    Raises LoadError where no such time does that.
    """
    name = setting.software_at(placement)
    old = setting.software[name]
    names = ("request_time",) if metric == "ttft" else ("block_time", "block_time_spanning", "block_time_batched")

    def at(stretch: float) -> tuple[Setting, float]:
        found = {n: getattr(old, n) for n in names}
        changed = {n: dataclasses.replace(c, value=c.value * stretch) for n, c in found.items()}
        software = {**setting.software, name: dataclasses.replace(old, **changed)}
        other = dataclasses.replace(setting, software=software)
        said = estimate(other.steps(placement), other.load("closed", users))
        return other, 1000 * (said.ttft if metric == "ttft" else said.tpot)

    low, high = 0.0, _STRETCH
    if not at(low)[1] <= value <= at(high)[1]:
        raise LoadError(
            f"no time of {'requests' if metric == 'ttft' else 'layers'} makes {metric} {value:g} ms at {users:g} "
            f"users: it is {at(low)[1]:.3g} to {at(high)[1]:.3g} ms; is the device, the software or --weights another?"
        )
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[1] < value else (low, middle)
    return at(high)[0]
