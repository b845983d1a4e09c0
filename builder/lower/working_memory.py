"""The most bytes that a PE has alive at once in a step, inside segments too, where an artifact does not show them.

The engine admits requests by the values that wait between segments (`runtime/placement/capacity.py`). Where a single
node makes far more, as in mixtures that gather a matrix for each token, the plan has to show it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import onnx_ir as ir

from furiosa_llm.builder.errors import ShapeError
from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.check_shapes import interpreter
from furiosa_llm.builder.lower.program_shapes import local_inputs
from furiosa_llm.builder.shapes.interface import SizeSet, lengths
from furiosa_llm.builder.shapes.interpreter import Fact, Facts
from furiosa_llm.runtime.artifact.compute import NARROW, QUANTISED
from furiosa_llm.runtime.placement.workload import Workload


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkingMemory:
    """What is alive at once where that is most."""

    nbytes: int
    value: str
    """The largest value among them."""
    op: str
    """The op that makes it."""


FactsOfStep = Callable[[SizeSet], Facts | None]
"""The types and shapes of every value of a program on one rank, at sizes; None if the model does not take them."""


def working_memory(build: Build, workload: Workload, facts_of: FactsOfStep) -> WorkingMemory | None:
    """The most bytes alive at any node of a decode and of a prefill step; None if the model takes neither.

    States do not count, because they are in the KV cache. A view counts as a copy. Kernels' scratch memory is unknown.
    """
    context = workload.max_model_len
    chunk = min(workload.prefill_chunk_size, context)
    steps = (
        decode_sizes(workload),
        SizeSet(batch=1, sequence=chunk, past=context - chunk, encoder=context, others=(1,)),
    )
    peaks = [_peak(build, facts) for sizes in steps if (facts := facts_of(sizes)) is not None]
    return max(peaks, key=lambda peak: peak.nbytes, default=None)


def decode_sizes(workload: Workload) -> SizeSet:
    """A decode step of all sequences at their full length."""
    context, batch = workload.max_model_len, workload.max_batch_size
    return SizeSet(batch=batch, sequence=1, past=context - 1, encoder=context, others=(batch,))


def facts_at(build: Build, sizes: SizeSet, compute: str | None = None) -> Facts | None:
    """A `FactsOfStep` of `build`; `compute` is the type to compute in, None for the model's own."""
    program = ir.Model(build.lowered.graph, ir_version=build.ir_version)
    try:
        facts = interpreter(program, build.plan.mesh).run(local_inputs(build, sizes), lengths(build.model.graph, sizes))
    except ShapeError:
        return None  # a window, or a table of positions, is shorter
    return facts if compute is None else {value: _wide(fact) for value, fact in facts.items()}


def _wide(fact: Fact) -> Fact:
    return dataclasses.replace(fact, dtype=ir.DataType.FLOAT) if fact.dtype.name in NARROW | QUANTISED else fact


def _peak(build: Build, facts: Facts) -> WorkingMemory:
    graph = build.lowered.graph
    states = {str(value.name) for value in build.states.values}
    return _most_alive(list(graph), {str(v.name) for v in graph.outputs} - states, states, facts)


def _most_alive(nodes: Sequence[ir.Node], outputs: set[str], states: set[str], facts: Facts) -> WorkingMemory:
    """What is alive at one node, its own outputs included."""
    last_use = {str(v.name): i for i, node in enumerate(nodes) for v in node.inputs if v is not None}
    last_use.update(dict.fromkeys(outputs, len(nodes)))
    peak = WorkingMemory(nbytes=0, value="", op="")
    alive: dict[ir.Value, int] = {}
    ends: dict[int, list[ir.Value]] = {}
    total = 0
    for i, node in enumerate(nodes):
        for value in node.outputs:
            name = str(value.name)
            alive[value] = 0 if name in states else facts[value].nbytes
            total += alive[value]
            ends.setdefault(last_use.get(name, i), []).append(value)
        if total > peak.nbytes:
            largest = max(alive, key=alive.__getitem__)
            maker = largest.producer()
            peak = WorkingMemory(nbytes=total, value=str(largest.name), op="" if maker is None else maker.op_type)
        total -= sum(alive.pop(value) for value in ends.pop(i, ()))
    return peak
