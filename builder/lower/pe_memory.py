"""What a lowered program keeps in the memory of one PE: weights, KV cache and activations, whole or cut into stages."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import onnx_ir as ir

from furiosa_llm.builder.errors import ShapeError
from furiosa_llm.builder.lower.blocks import find_blocks
from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.check_shapes import interpreter, local_shape
from furiosa_llm.builder.shapes.interface import SizeSet, concrete, lengths
from furiosa_llm.builder.shapes.interpreter import Fact, Facts


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is to be served at once."""

    context: int
    """Positions that each sequence may reach."""
    batch: int
    """Sequences decoded together."""
    chunk: int
    """New positions of one sequence in a prefill step."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockMemory:
    """What one block keeps on each PE, in bytes."""

    weights: frozenset[str]
    """The stored tensors that it reads."""
    states: frozenset[str]
    """The state inputs whose next values it makes, and those that it reads and nothing makes."""


class Memory:
    """The memory that a build needs for a workload. All figures are bytes on one PE."""

    def __init__(self, build: Build, workload: Workload) -> None:
        self._build = build
        self._workload = workload
        self._tensors = {name: tensor.local_nbytes for name, tensor in build.lowered.tensors.items()}
        read = {str(v.name) for node in build.lowered.graph for v in node.inputs if v is not None}
        self._read = read & self._tensors.keys()

    @property
    def weights_nbytes(self) -> int:
        """Stored tensors that the program reads."""
        return sum(self._tensors[name] for name in self._read)

    @functools.cached_property
    def states_nbytes(self) -> dict[str, int]:
        """State input -> what it holds when every sequence is as long as it may get."""
        names = {str(value.name) for value in self._build.states.values}
        shapes = self._local_inputs(self._sizes(self._workload.batch, 0, self._workload.context))
        inputs = {str(v.name): self._build.probes.facts[v].dtype for v in self._build.model.graph.inputs}
        return {name: math.prod(shape) * inputs[name].bitwidth // 8 for name, shape in shapes.items() if name in names}

    @property
    def state_nbytes(self) -> int:
        """The KV cache at the workload's context and batch."""
        return sum(self.states_nbytes.values())

    @functools.cached_property
    def activation_nbytes(self) -> int | None:
        """The most that is alive between two nodes, of a decode and of a prefill step; None if neither can be told.

        States are left out: they are in the KV cache. Kernels' own scratch memory is not known.
        """
        work = self._workload
        chunk = min(work.chunk, work.context)
        steps = (self._sizes(work.batch, 1, work.context - 1), self._sizes(1, chunk, work.context - chunk))
        peaks = [peak for sizes in steps if (peak := self._peak_nbytes(sizes)) is not None]
        return max(peaks, default=None)

    def _sizes(self, batch: int, sequence: int, past: int) -> SizeSet:
        return SizeSet(batch=batch, sequence=sequence, past=past, encoder=self._workload.context, others=(batch,))

    def _local_inputs(self, sizes: SizeSet) -> dict[str, tuple[int, ...]]:
        layouts, mesh = self._build.lowered.input_layouts, self._build.plan.mesh
        shapes = concrete(self._build.probes.kinds, sizes)
        return {name: local_shape(layouts[name], shape, mesh) for name, shape in shapes.items()}

    def _peak_nbytes(self, sizes: SizeSet) -> int | None:
        graph = self._build.lowered.graph
        model = ir.Model(graph, ir_version=self._build.ir_version)
        try:
            facts = interpreter(model, self._build.plan.mesh).run(
                self._local_inputs(sizes), lengths(self._build.model.graph, sizes)
            )
        except ShapeError:
            return None  # the model does not take these sizes: a window, or a table of positions, is shorter
        states = {str(value.name) for value in self._build.states.values}
        return _peak_nbytes(list(graph), {str(v.name) for v in graph.outputs} - states, states, facts)

    # -- stages --------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _block_nodes(self) -> list[list[ir.Node]]:
        graph = self._build.lowered.graph
        states = [str(pair.input.name) for pair in self._build.states.pairs]
        nodes = list(graph)
        starts = [span.first_node for span in find_blocks(graph, states, self._build.lowered.tensors)]
        return [nodes[start:stop] for start, stop in zip(starts, [*starts[1:], len(nodes)], strict=True)]

    @functools.cached_property
    def blocks(self) -> list[BlockMemory]:
        """What each block keeps; stages are runs of blocks."""
        next_of = {str(pair.output.name): str(pair.input.name) for pair in self._build.states.pairs}
        kept_as_they_are = self.states_nbytes.keys() - next_of.values()
        found = []
        for nodes in self._block_nodes:
            read = {str(v.name) for node in nodes for v in node.inputs if v is not None}
            made = {str(v.name) for node in nodes for v in node.outputs}
            states = {next_of[name] for name in made & next_of.keys()} | (read & kept_as_they_are)
            found.append(BlockMemory(weights=frozenset(read & self._tensors.keys()), states=frozenset(states)))
        return found

    def stages_nbytes(self, count: int) -> list[int] | None:
        """Weights and KV cache of each of `count` pipeline stages, cut so that the fullest is about the least full.

        None if there are fewer blocks than stages. A weight that two stages read (a tied embedding) is in both.
        """
        starts = self._stage_starts(count)
        if starts is None:
            return None
        return [
            self._kept_nbytes(self.blocks[start:stop])
            for start, stop in zip(starts, [*starts[1:], len(self.blocks)], strict=True)
        ]

    def stages_of_values(self, count: int) -> dict[str, int] | None:
        """Which of `count` stages computes each value of the program, by its name; None if there are too few blocks."""
        starts = self._stage_starts(count)
        if starts is None:
            return None
        found: dict[str, int] = {}
        for position, nodes in enumerate(self._block_nodes):
            stage = sum(start <= position for start in starts) - 1
            found.update((str(value.name), stage) for node in nodes for value in node.outputs)
        return found

    def _stage_starts(self, count: int) -> list[int] | None:
        """The first block of each stage."""
        if count > len(self.blocks):
            return None
        sizes = [self._kept_nbytes([block]) for block in self.blocks]
        low, high = max(sizes), sum(sizes)
        while low < high:  # the least limit that `count` stages can keep
            limit = (low + high) // 2
            low, high = (low, limit) if len(_cut(sizes, limit, count)) <= count else (limit + 1, high)
        return _cut(sizes, low, count)

    def _kept_nbytes(self, blocks: Sequence[BlockMemory]) -> int:
        weights = frozenset[str]().union(*(block.weights for block in blocks))
        states = frozenset[str]().union(*(block.states for block in blocks))
        return sum(self._tensors[w] for w in weights) + sum(self.states_nbytes[s] for s in states)


def _cut(sizes: Sequence[int], limit: int, count: int) -> list[int]:
    """Where stages start that hold at most `limit`, each as long as can be while every later one gets a block."""
    starts, kept = [0], sizes[0]
    for position, size in enumerate(sizes[1:], start=1):
        if kept + size > limit or len(sizes) - position <= count - len(starts):
            starts.append(position)
            kept = 0
        kept += size
    return starts


def _peak_nbytes(nodes: Sequence[ir.Node], outputs: set[str], states: set[str], facts: Facts) -> int:
    """The most that is alive at one node, its own outputs included."""
    last_use = {str(v.name): i for i, node in enumerate(nodes) for v in node.inputs if v is not None}
    last_use.update(dict.fromkeys(outputs, len(nodes)))
    alive = peak = 0
    ends: dict[int, int] = {}
    for i, node in enumerate(nodes):
        for value in node.outputs:
            name = str(value.name)
            nbytes = 0 if name in states else _nbytes(facts[value])
            alive += nbytes
            until = last_use.get(name, i)
            ends[until] = ends.get(until, 0) + nbytes
        peak = max(peak, alive)
        alive -= ends.pop(i, 0)
    return peak


def _nbytes(fact: Fact) -> int:
    return math.prod(fact.shape) * fact.dtype.bitwidth // 8
