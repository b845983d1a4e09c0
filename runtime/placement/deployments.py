"""Which stages and replicas of a model fit on a number of cards, and how many sequences they hold at once.

The arithmetic is that of `capacity.py`, so that it is the engine's to the byte.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from furiosa_llm.runtime.artifact.card import PES_PER_CARD
from furiosa_llm.runtime.artifact.reader import SplitModel
from furiosa_llm.runtime.placement.block_reads import read_blocks
from furiosa_llm.runtime.placement.capacity import Memory, StageMemory, card_memory, kv_pages
from furiosa_llm.runtime.placement.stages import Stage, divide_blocks
from furiosa_llm.runtime.placement.topology import RefusedTopologyError, Topology, make_topology
from furiosa_llm.runtime.placement.workload import MOST_CARDS, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """The deployment on a number of cards that has the fewest pipeline stages."""

    cards: int
    pipeline_parallel_size: int
    data_parallel_size: int
    pe_nbytes: int
    """Weights, KV cache and activations on a PE of the fullest card, whose PEs share its memory."""
    fits: bool
    free_tokens: int
    """How many more positions of KV cache each replica has room for; 0 if the model does not fit, or has no cache."""


class Deployments:
    """The deployments of a model on cards, for any workload."""

    def __init__(self, model: SplitModel) -> None:
        self._size = model.manifest.mesh.size
        self._blocks = read_blocks(model)
        self._memory = Memory(model)
        self._stages = functools.cache(self._stages_of)
        self._cut = functools.cache(self._cut_into)
        self._bare_stages = functools.cache(self._bare_stages_of)
        self._topology = functools.cache(self._topology_of)

    @property
    def num_blocks(self) -> int:
        """The most pipeline stages."""
        return len(self._blocks)

    def stages(self, count: int, workload: Workload) -> tuple[StageMemory, ...]:
        """What each of `count` stages keeps on each PE."""
        return self._stages(count, workload)

    def all_on(self, cards: int, workload: Workload) -> Iterator[Deployment]:
        """Every deployment on so many cards that fits, by the number of stages."""
        for topology in self._topologies(cards):
            if self._fits_bare(topology, workload) and (found := self._deployment(topology, cards, workload)).fits:
                yield found

    def on(self, cards: int, workload: Workload) -> Deployment | None:
        """What fits on `cards` cards with the fewest stages, or else has the most stages.

        None where no number of stages uses all PEs, as with ranks that are more than the PEs of a card.
        """
        if (found := next(self.all_on(cards, workload), None)) is not None:
            return found
        possible = tuple(self._topologies(cards))
        return self._deployment(possible[-1], cards, workload) if possible else None

    def fewest(self, workload: Workload, cards: Sequence[int] = range(1, MOST_CARDS + 1)) -> Deployment | None:
        """What fits on the fewest cards of `cards`; None if none does."""
        return next((d for n in cards for d in self.all_on(n, workload)), None)

    def least_cards(self, workload: Workload, cards: Sequence[int]) -> int | None:
        """The fewest cards of `cards` that would do if there were no activations."""
        return next((n for n in cards if any(self._fits_bare(t, workload) for t in self._topologies(n))), None)

    def most_sequences(self, deployment: Deployment, workload: Workload) -> int:
        """How many sequences of the workload's length fit at once, all replicas together."""

        def free(batch: int) -> int:
            return self._free(deployment, replace(workload, max_batch_size=batch))

        return _largest(free) * deployment.data_parallel_size

    def longest(self, deployment: Deployment, workload: Workload) -> int:
        """The most tokens of each sequence if every replica has as many as the workload; 0 if not even one fits."""

        def free(length: int) -> int:
            return self._free(deployment, replace(workload, max_model_len=length))

        return _largest(free)

    def _topologies(self, cards: int) -> Iterator[Topology]:
        """What uses all PEs of so many cards, by the number of stages."""
        if self._size <= PES_PER_CARD:  # else the ranks of a stage are on several cards
            counts = range(1, min(cards, self.num_blocks) + 1)
            yield from (topology for n in counts if (topology := self._topology(cards, n)) is not None)

    def _stages_of(self, count: int, workload: Workload) -> tuple[StageMemory, ...]:
        return self._memory.of_stages(self._cut(count), workload)

    def _bare_stages_of(self, count: int) -> tuple[StageMemory, ...]:
        return self._memory.without_activations(self._cut(count))

    def _cut_into(self, count: int) -> tuple[Stage, ...]:
        return divide_blocks(self._blocks, pipeline_parallel_size=count)

    def _fits_bare(self, topology: Topology, workload: Workload) -> bool:
        """Whether weights and KV cache fit, which is known sooner than the activations are."""
        used = card_memory(topology, self._bare_stages(topology.pipeline_parallel_size), workload)
        return all(card.free_nbytes >= 0 for card in used)

    def _topology_of(self, cards: int, count: int) -> Topology | None:
        """None where so many stages do not use all PEs."""
        if cards * PES_PER_CARD % (self._size * count):
            return None
        devices = [f"npu:{number}" for number in range(cards)]
        try:
            return make_topology(self._size, pipeline_parallel_size=count, devices=devices)
        except RefusedTopologyError:
            return None

    def _deployment(self, topology: Topology, cards: int, workload: Workload) -> Deployment:
        stages = self.stages(topology.pipeline_parallel_size, workload)
        used = card_memory(topology, stages, workload)
        fits = all(card.free_nbytes >= 0 for card in used)
        tokens = kv_pages(topology, stages, page_size=1) if fits else None
        return Deployment(
            cards=cards,
            pipeline_parallel_size=topology.pipeline_parallel_size,
            data_parallel_size=topology.data_parallel_size,
            pe_nbytes=max(card.pe_nbytes for card in used),
            fits=fits,
            free_tokens=0 if tokens is None else tokens - workload.max_batch_size * workload.max_model_len,
        )

    def _free(self, deployment: Deployment, workload: Workload) -> int:
        """What is left on the fullest card; negative if the workload does not fit."""
        count = deployment.pipeline_parallel_size
        topology = self._topology(deployment.cards, count)
        assert topology is not None  # it is a deployment
        return min(card.free_nbytes for card in card_memory(topology, self.stages(count, workload), workload))


_ENDLESS = 2**20
"""Counts beyond it are not told apart."""
_GUESSES = 8


def _largest(free: Callable[[int], int]) -> int:
    """The largest count for which `free`, which falls about linearly, is not negative; 0 if it is negative for 1.

    The first guesses follow the line through 1 and the last guess; after those the interval is halved.
    """
    first = free(1)
    if first < 0:
        return 0
    low, high, guess, tries = 1, _ENDLESS, 2, 0
    while high - low > 1:
        there = free(guess)
        low, high = (guess, high) if there >= 0 else (low, guess)
        step = (first - there) // (guess - 1)
        line = guess + there // step if step > 0 else _ENDLESS
        guess = min(max(line, low + 1), high - 1) if tries < _GUESSES else (low + high) // 2
        tries += 1
    return low
