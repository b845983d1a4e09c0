"""The most bytes that a PE has alive at once in a step, inside segments too, where an artifact does not show them.

The engine admits requests by the values that wait between segments (`runtime/placement/capacity.py`). Where a single
node makes far more, as in mixtures that gather a matrix for each token, the plan has to show it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from furiosa_llm.builder.errors import ShapeError
from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.check_shapes import interpreter
from furiosa_llm.builder.lower.program_shapes import local_inputs
from furiosa_llm.builder.shapes.interface import SizeSet, lengths
from furiosa_llm.builder.shapes.interpreter import Fact, Facts
from furiosa_llm.runtime.placement.capacity import Workload


def working_nbytes(build: Build, workload: Workload) -> int | None:
    """The most bytes alive at any node of a decode and of a prefill step; None if the model takes neither.

    States do not count, because they are in the KV cache. A view counts as a copy. Kernels' scratch memory is unknown.
    """
    context, batch = workload.max_model_len, workload.max_batch_size
    chunk = min(workload.prefill_chunk_size, context)
    steps = (
        SizeSet(batch=batch, sequence=1, past=context - 1, encoder=context, others=(batch,)),
        SizeSet(batch=1, sequence=chunk, past=context - chunk, encoder=context, others=(1,)),
    )
    return max((peak for sizes in steps if (peak := _peak_nbytes(build, sizes)) is not None), default=None)


def _peak_nbytes(build: Build, sizes: SizeSet) -> int | None:
    graph = build.lowered.graph
    try:
        facts = interpreter(ir.Model(graph, ir_version=build.ir_version), build.plan.mesh).run(
            local_inputs(build, sizes), lengths(build.model.graph, sizes)
        )
    except ShapeError:
        return None  # the model does not take these sizes: a window, or a table of positions, is shorter
    states = {str(value.name) for value in build.states.values}
    return _alive_nbytes(list(graph), {str(v.name) for v in graph.outputs} - states, states, facts)


def _alive_nbytes(nodes: Sequence[ir.Node], outputs: set[str], states: set[str], facts: Facts) -> int:
    """The most bytes alive at one node, its own outputs included."""
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
