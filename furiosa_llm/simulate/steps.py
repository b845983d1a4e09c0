"""How long a step takes: the costs of a model on one PE, over what the device does of them in a second."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from furiosa_llm.builder.lower.step_costs import StepCosts, Weights
from furiosa_llm.runtime.placement.stages import balance
from furiosa_llm.simulate.device import Device, Software
from furiosa_llm.simulate.errors import PlacementError
from furiosa_llm.simulate.hosts import Ways, count_hosts, ways_of
from furiosa_llm.simulate.placement import Placement

BITS: dict[str, float] = {"fp16": 16, "bf16": 16, "fp8": 8, "int8": 8, "int4": 4.25}
"""Of an element with its scales: a 4-bit one shares a byte with 31 others."""
CAUSES = ("weights", "products", "cache", "attention", "head", "collectives", "layers", "sequences", "links")
"""What the time of a step goes to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step computes."""

    tokens: float
    """New ones, of all sequences."""
    rows: float
    """Sequences whose next token is wanted."""
    positions: float
    """Positions of cache that are read, of all sequences together."""
    pairs: float
    """Of a query and a key."""
    length: float
    """Of the longest sequence; windows of attention cut the others at the same share."""

    def __add__(self, other: Work) -> Work:
        """Both in one step."""
        return Work(
            tokens=self.tokens + other.tokens,
            rows=self.rows + other.rows,
            positions=self.positions + other.positions,
            pairs=self.pairs + other.pairs,
            length=max(self.length, other.length),
        )


class Steps:
    """The times of steps of one stage of a model on a device; each is a pure function of the work."""

    def __init__(
        self,
        costs: StepCosts,
        device: Device,
        software: Software,
        placement: Placement,
        *,
        weights: str | None = None,
        kv: str | None = None,
        handed_nbytes: float = 0.0,
    ) -> None:
        """`handed_nbytes` are those of a token that one stage hands on to the next: `hosts.handed_on`."""
        self.costs = _spread(costs, placement.tensor_parallel_size)
        self.device, self.software, self.placement = device, software, placement
        self._bits = None if weights is None else BITS[weights]
        self._kv = None if kv is None else BITS[kv]
        units = device.units_per_card
        layers = self.costs.layers
        stages = placement.pipeline_parallel_size
        if stages > layers:
            raise PlacementError(f"pp={stages}, but the model has {layers} layers, and a stage is one or more")
        block = sum(self._nbytes(w) for w in self.costs.weights if w.part == "block") / layers
        ends = [sum(self._nbytes(w) for w in self.costs.weights if w.part == part) for part in ("table", "head")]
        costs_of_layers = [round(block)] * (layers - 1) + [round(block + ends[1])]
        self.counts = (layers,) if stages == 1 else balance(costs_of_layers, stages)
        self._block_nbytes, self._ends = block, ends
        self._handed_nbytes = handed_nbytes
        self.stages = _alike(self.counts)
        share = 1 / units
        self._read = 1 / (device.bandwidth.value * share * software.memory_efficiency.value)
        self._read_cache = 1 / (device.bandwidth.value * share * software.attention_efficiency.value)
        wide = device.flops_16.value * share * software.compute_efficiency.value
        narrow = device.flops_8.value * share * software.compute_efficiency.value
        self._wide, self._product = 1 / wide, 1 / (narrow if self._computes_narrow() else wide)
        self._on_chip = device.on_chip.value * share
        self._link, self._hop = self._of_link()
        spans = placement.tensor_parallel_size > units
        self._block_seconds = (software.block_time_spanning if spans else software.block_time).value
        self.kv_nbytes = self.costs.state_nbytes_per_position * self._kv_scale()
        self._experts = [
            (self._nbytes(w) / layers, w.share) for w in self.costs.weights if w.part == "block" and w.share < 1
        ]
        self._dense = sum(self._nbytes(w) for w in self.costs.weights if w.part == "block" and w.share >= 1) / layers
        full = sum(a.flops_per_pair for a in self.costs.attention) or 1.0
        self._windows = [(a.window, a.flops_per_pair / full) for a in self.costs.attention]
        self._pair_flops = 0.0 if not self.costs.attention else full

    @functools.cached_property
    def ways(self) -> Sequence[Ways]:
        """Between the hosts of each replica's stages."""
        first = ways_of(self.device, self.placement, 0, self._handed_nbytes)
        if count_hosts(self.device, self.placement) == 1:
            return [first] * self.placement.data_parallel_size
        rest = range(1, self.placement.data_parallel_size)
        return [first, *(ways_of(self.device, self.placement, n, self._handed_nbytes) for n in rest)]

    @functools.cached_property
    def longest_way(self) -> Ways:
        """That of the replica with the most hops from host to host."""
        return max(set(self.ways), key=lambda ways: sum(ways.crossings))

    # -- memory ----------------------------------------------------------------------------------------------------

    def weight_nbytes(self, stage: int) -> float:
        """On one PE of a stage."""
        first, last = stage == 0, stage == len(self.counts) - 1
        return self.counts[stage] * self._block_nbytes + first * self._ends[0] + last * self._ends[1]

    def room_nbytes(self) -> float:
        """What weights and cache may take of one PE."""
        software, device = self.software, self.device
        usable = device.memory.value * software.memory_share.value - software.memory_reserved.value
        return usable / device.units_per_card

    def cache_tokens(self) -> int:
        """The positions of cache that one replica has room for; negative if the weights do not fit."""
        layers = self.costs.layers
        free = [
            (self.room_nbytes() - self.weight_nbytes(stage), count * self.kv_nbytes / layers)
            for stage, count in enumerate(self.counts)
        ]
        if min(left for left, _ in free) < 0:
            return -1
        return int(min(left / each for left, each in free)) if self.kv_nbytes else 2**40

    def missing_nbytes(self) -> float:
        """By how much the weights are more than the fullest PE has; 0 if they fit."""
        return max(0.0, *(self.weight_nbytes(stage) - self.room_nbytes() for stage in range(len(self.counts))))

    # -- time ------------------------------------------------------------------------------------------------------

    def causes(self, work: Work, stage: int) -> dict[str, float]:
        """The seconds of a step in a stage, by cause."""
        count, layers, costs = self.counts[stage], self.costs.layers, self.costs
        share = count / layers
        read = count * self._weights_read(work.tokens) * self._read
        spilled = (
            max(0.0, costs.activation_nbytes_per_token * work.tokens / layers - self._on_chip) * count * self._read
        )
        computed = costs.flops_per_token * work.tokens * share * self._product
        both = _overlapped(read + spilled, computed)
        seen = self._seen(work.length)
        pairs = self._pair_flops * work.pairs * seen * share * self._wide
        found = dict.fromkeys(CAUSES, 0.0)
        found["weights"] = both * read / ((read + computed) or 1.0)
        found["products"] = both - found["weights"]
        found["cache"] = work.positions * seen * self.kv_nbytes * share * self._read_cache
        found["attention"] = pairs
        if stage == len(self.counts) - 1:
            found["head"] = _overlapped(self._ends[1] * self._read, costs.flops_per_row * work.rows * self._wide)
            found["sequences"] = work.rows * self.software.sequence_time.value
        found["collectives"] = self._collectives(work, share, stage)
        batched = min(max(work.rows - 1, 0.0), 1.0) * self.software.block_time_batched.value
        found["layers"] = count * (self._block_seconds + batched)
        return found

    def seconds(self, work: Work, stage: int) -> float:
        """Of a step in a stage."""
        return sum(self.causes(work, stage).values())

    def demands(self, work: Work, stage: int) -> dict[str, tuple[float, float]]:
        """The FLOPs and the bytes read in a stage: of the layers' products, of attention, and of a head."""
        count, costs, seen = self.counts[stage], self.costs, self._seen(work.length)
        share = count / costs.layers
        found = {
            "products": (costs.flops_per_token * work.tokens * share, count * self._weights_read(work.tokens)),
            "attention": (self._pair_flops * work.pairs * seen * share, work.positions * seen * self.kv_nbytes * share),
        }
        if stage == len(self.counts) - 1:
            found["head"] = costs.flops_per_row * work.rows, self._ends[1]
        return found

    @property
    def parts(self) -> float:
        """How many ranks share what the device does in a second."""
        return self.device.units_per_card

    def peak_flops(self) -> float:
        """Of one rank, in the type that the layers' products are computed in."""
        peak = self.device.flops_8 if self._computes_narrow() else self.device.flops_16
        return peak.value / self.parts

    def peak_bandwidth(self) -> float:
        """Of one rank, bytes a second."""
        return self.device.bandwidth.value / self.parts

    def decode(self, rows: float, length: float) -> Work:
        """One token of each of `rows` sequences that have `length` on average."""
        return Work(tokens=rows, rows=rows, positions=rows * length, pairs=rows * length, length=length)

    def prefill(self, new: float, past: float, *, last: bool = True) -> Work:
        """`new` tokens of one prompt, after `past`; attention is in buckets."""
        bucket = self.software.bucket.value
        length = -(-(past + new) // bucket) * bucket
        pairs = new * length if bucket > 1 else new * (past + new / 2)
        return Work(tokens=new, rows=float(last), positions=past + new, pairs=pairs, length=length)

    @property
    def bits(self) -> float:
        """Of a weight of the layers."""
        own = max((w for w in self.costs.weights if w.part == "block"), key=lambda w: w.nbytes, default=None)
        return self._bits or (16 if own is None else own.bits)

    # -- details ---------------------------------------------------------------------------------------------------

    def _nbytes(self, weights: Weights) -> float:
        """As stored on a PE: `--weights` is of the blocks, and head and tables have 16 bits then, or fewer."""
        if self._bits is None or not weights.floating or weights.bits < min(16, self._bits):
            return weights.nbytes
        return weights.nbytes * (self._bits if weights.part == "block" else min(16, weights.bits)) / weights.bits

    def _computes_narrow(self) -> bool:
        """8-bit weights are multiplied in 8 bits; 4-bit ones are made 16-bit ones first."""
        if self._bits is not None:
            return self._bits == 8
        widest = max((w.bits for w in self.costs.weights if w.part == "block" and w.floating), default=16)
        return widest == 8

    def _kv_scale(self) -> float:
        return 1.0 if self._kv is None or not self.costs.state_bits else self._kv / self.costs.state_bits

    def _weights_read(self, tokens: float) -> float:
        """Bytes of one layer."""
        return self._dense + sum(nbytes * (1 - math.pow(1 - share, tokens)) for nbytes, share in self._experts)

    def _seen(self, length: float) -> float:
        """The share of its context that a query sees."""
        return sum(part * (1.0 if w is None or length <= w else w / length) for w, part in self._windows) or 1.0

    def _of_link(self) -> tuple[float, float]:
        """The seconds of a byte, and of a collective besides, over the slowest link among the ranks."""
        device, size = self.device, self.placement.tensor_parallel_size
        if size <= device.units_per_card:
            return 1 / device.link_in_card.value, 0.0
        if size <= device.units_per_card * device.cards_per_host:
            return 1 / device.link_in_host.value, 0.0
        return 1 / device.link_of_hosts.value, device.latency_of_hosts.value

    def _collectives(self, work: Work, share: float, stage: int) -> float:
        """A ring: every byte but a rank's own is sent once to gather, twice to reduce."""
        nbytes, hops, last = 0.0, 0.0, stage == len(self.counts) - 1
        for one in self.costs.traffic:
            factor = (2 if one.kind == "AllReduce" else 1) * (one.parts - 1) / one.parts
            if one.head:
                nbytes += last * factor * one.nbytes * one.count * work.rows
                hops += last * one.count
            else:
                nbytes += factor * one.nbytes * one.count * work.tokens * share
                hops += one.count * share
        return nbytes * self._link + hops * self._hop


def _alike(counts: Sequence[int]) -> dict[int, int]:
    """A stage of each kind, and how many there are of it: those of as many layers, and the last one with its head."""
    kinds: dict[tuple[int, bool], list[int]] = {}
    for stage, count in enumerate(counts):
        kinds.setdefault((count, stage == len(counts) - 1), []).append(stage)
    return {found[0]: len(found) for found in kinds.values()}


def _overlapped(first: float, second: float) -> float:
    """The time of two things at once: their norm of order 4, near the larger one."""
    large = max(first, second)
    return 0.0 if large == 0 else large * math.sqrt(math.sqrt(1 + (min(first, second) / large) ** 4))


def _spread(costs: StepCosts, size: int) -> StepCosts:
    """`costs` for more ranks than the builder plans for: all but the bytes of collectives is divided evenly."""
    by = size / costs.tensor_parallel_size
    if by == 1:
        return costs
    return replace(
        costs,
        tensor_parallel_size=size,
        weights=tuple(replace(w, nbytes=round(w.nbytes / by)) for w in costs.weights),
        flops_per_token=costs.flops_per_token / by,
        flops_per_row=costs.flops_per_row / by,
        attention=tuple(replace(a, flops_per_pair=a.flops_per_pair / by) for a in costs.attention),
        state_nbytes_per_sequence=costs.state_nbytes_per_sequence / by,
        state_nbytes_per_position=costs.state_nbytes_per_position / by,
        activation_nbytes_per_token=costs.activation_nbytes_per_token / by,
        traffic=tuple(replace(t, parts=max(t.parts, size)) for t in costs.traffic),
    )
