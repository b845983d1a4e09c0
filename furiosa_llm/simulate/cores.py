"""How long a step takes where simulated PEs share the cores of a machine, as this project's own engine runs them."""

from __future__ import annotations

import math

import numpy as np

from furiosa_llm.builder.lower.step_costs import StepCosts
from furiosa_llm.simulate.device import Cores, Device, Rates, Software
from furiosa_llm.simulate.placement import Placement
from furiosa_llm.simulate.steps import CAUSES, Steps, Work

_FLOAT32 = 4.0
"""Bytes of a weight."""


class CoreSteps(Steps):
    """All ranks of all stages and replicas share the machine evenly, and one rank has one core at most."""

    @property
    def cores(self) -> Cores:
        """What was measured of the machine."""
        assert self.software.cores is not None
        return self.software.cores

    @property
    def parts(self) -> float:
        """See `Steps.parts`: the machine has no more time for one rank than a core has."""
        return max(self.placement.units, self.cores.count.value)

    def room_nbytes(self) -> float:
        """See `Steps.room_nbytes`."""
        usable = self.device.memory.value * self.software.memory_share.value - self.software.memory_reserved.value
        return usable / self.placement.units

    def prefill(self, new: float, past: float, *, last: bool = True) -> Work:
        """`new` tokens of one prompt, after `past`: the kernel computes the pairs that the mask takes away, too."""
        length = past + new
        return Work(tokens=new, rows=float(last), positions=length, pairs=new * length, length=length)

    def amounts(self, work: Work, stage: int) -> dict[str, float]:
        """What a step in a stage has of each thing that `Cores` has a time or a rate of."""
        last, costs, share = stage == len(self.counts) - 1, self.costs, self.counts[stage] / self.costs.layers
        inside = [one for one in costs.traffic if not one.head]
        collectives = sum(one.count for one in inside) * share + last * sum(t.count for t in costs.traffic if t.head)
        summed = sum(one.count * one.nbytes * one.parts for one in inside) * share / self.placement.tensor_parallel_size
        moved = work.tokens * (costs.activation_nbytes_per_token * share + summed)
        logits = last * work.rows * sum(t.nbytes for t in costs.traffic if t.head)
        pairs = self._pair_flops * work.pairs * self._seen(work.length) * share
        cache = work.positions * self._seen(work.length) * self.kv_nbytes * share
        many = work.tokens > max(work.rows, 1)  # several queries of one sequence
        return {
            "step_time": 1.0,
            "op_time": costs.ops * share * self.parts / self.cores.count.value,
            "collective_time": collectives,
            "sequence_time": last * work.rows,
            "activation_bandwidth": self.parts * (moved + logits),
            "cache_bandwidth": self.parts * cache * (not many),
            "attention_one": self.parts * pairs * (not many),
            "attention_many": self.parts * pairs * many,
        }

    def products(self, work: Work, stage: int) -> tuple[float, float]:
        """The seconds of the products of a stage's layers, and of the head."""
        last, share = stage == len(self.counts) - 1, self.counts[stage] / self.costs.layers
        flops = self.costs.flops_per_token * work.tokens * share
        rows = work.rows * self.costs.flops_per_row * last
        layers = self.parts * flops / rate_at(self._rates("block", self.costs.flops_per_token), work.tokens)
        head = self.parts * rows / rate_at(self._rates("head", self.costs.flops_per_row), work.rows) if rows else 0.0
        return layers, head

    def causes(self, work: Work, stage: int) -> dict[str, float]:
        """See `Steps.causes`."""
        cores, amounts = self.cores, self.amounts(work, stage)
        products, head = self.products(work, stage)
        read = self.parts * self.counts[stage] * self._weights_read(work.tokens) / self.device.bandwidth.value
        found = dict.fromkeys(CAUSES, 0.0)
        found["weights"] = min(products, read)
        found["products"] = products - found["weights"]
        found["products"] += amounts["activation_bandwidth"] / cores.activation_bandwidth.value
        found["cache"] = amounts["cache_bandwidth"] / cores.cache_bandwidth.value
        found["attention"] = amounts["attention_one"] / cores.attention_one.value
        found["attention"] += amounts["attention_many"] / cores.attention_many.value
        found["head"] = head
        found["collectives"] = amounts["collective_time"] * cores.collective_time.value
        found["layers"] = amounts["op_time"] * cores.op_time.value + cores.step_time.value
        found["sequences"] = amounts["sequence_time"] * self.software.sequence_time.value
        return found

    def _rates(self, part: str, flops: float) -> Rates:
        """Those of the weights most like the part's: they have so many bytes for two FLOPs, and so many are read.

        Floating ones are computed in float32, narrower types, too.
        """
        most = max((w for w in self.costs.weights if w.part == part), key=lambda w: w.nbytes, default=None)
        each = _FLOAT32 if most is None or most.floating else 2 * most.nbytes * most.share / (flops or 1.0)
        read = self.placement.units * sum(w.nbytes * w.share for w in self.costs.weights if w.part != "table")

        def unlike(one: Rates) -> tuple[float, float]:
            return abs(math.log(one.nbytes_of_weight / each)), abs(math.log(one.nbytes_read / read))

        return min(self.cores.products, key=unlike)


def rate_at(rates: Rates, rows: float) -> float:
    """FLOPs a second of products of so many rows, between those that were measured."""
    return math.exp(float(np.interp(math.log(max(rows, 1.0)), np.log(rates.rows), np.log(rates.values))))


def steps_on(
    costs: StepCosts,
    device: Device,
    software: Software,
    placement: Placement,
    *,
    weights: str | None = None,
    kv: str | None = None,
    handed_nbytes: float = 0.0,
) -> Steps:
    """The steps of a placement: of cards, or of cores that stand in for them."""
    kind = Steps if software.cores is None else CoreSteps
    return kind(costs, device, software, placement, weights=weights, kv=kv, handed_nbytes=handed_nbytes)
