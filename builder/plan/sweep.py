"""The state sweep: follow partial sums through the graph under one assignment of factors to mesh axes.

How a value is split is never stored: it follows from its dimensions' factors and the assignment. Which values are
*partial* (to be summed over some mesh axes) is found here, in one topological pass that decides where collectives go.
The same sweep prices a plan and drives the lowering.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from furiosa_llm.builder.factors.analysis import Analysis, NodeInfo
from furiosa_llm.builder.factors.factor import Factor, has_concatenation, leaves_in_prefixes
from furiosa_llm.builder.factors.states import States
from furiosa_llm.builder.plan.outcome import Assignment, InfeasibleError, Outcome
from furiosa_llm.builder.plan.sweep_pass import Ground, SweepPass
from furiosa_llm.runtime.artifact.layout import Mesh


class Sweeper:
    """Sweeps one analysed graph; what does not depend on the assignment is computed once."""

    def __init__(self, analysis: Analysis, mesh: Mesh, candidates: Iterable[Factor], states: States) -> None:
        """`candidates` are all the leaves that assignments may split."""
        wanted = set(candidates)
        leaves = {
            value: tuple(
                (d, found)
                for d, factor in enumerate(dims)
                if (found := tuple(leaf for leaf in factor.leaves() if leaf in wanted))
            )
            for value, dims in analysis.dims.items()
        }
        self._ground = Ground(
            analysis=analysis,
            mesh=mesh,
            states=states,
            leaves=leaves,
            packed=frozenset(
                (value, d)
                for value in analysis.graph.initializers.values()
                for d, _ in leaves[value]
                if has_concatenation(analysis.dims[value][d])
            ),
            storable={},
            in_prefixes=leaves_in_prefixes(factor for dims in analysis.dims.values() for factor in dims),
            active=_find_active(analysis, {value for value, dims in leaves.items() if dims}),
            consumers=_count_consumers(analysis),
        )
        self._dynamic_leaves = frozenset(
            leaf
            for value, dims in leaves.items()
            for d, found in dims
            if analysis.is_dynamic(value, d)
            for leaf in found
        )

    def sweep(self, assignment: Assignment) -> Outcome:
        """Where collectives go under `assignment`; InfeasibleError if it cannot be realised."""
        self._check_leaves(assignment)
        first = SweepPass(self._ground, assignment, frozenset())
        outcome = first.run()
        deferrable = first.deferrable()
        return SweepPass(self._ground, assignment, deferrable).run() if deferrable else outcome

    def _check_leaves(self, assignment: Assignment) -> None:
        for leaf, axes in assignment.items():
            if leaf in self._ground.analysis.pinned and axes:
                raise InfeasibleError(f"factor of {leaf.size} is used whole inside an op")
            if leaf.size <= 1 and axes:
                raise InfeasibleError("a factor of 1 would be split")  # dimensions of 1 are not tied to each other
            uneven = leaf.size % self._ground.mesh.parts(axes) or leaf in self._ground.in_prefixes
            if leaf in self._dynamic_leaves and uneven and axes:
                raise InfeasibleError(f"factor of {leaf.size} would be padded inside a dynamic dimension")


def _find_active(analysis: Analysis, touched_values: set[ir.Value]) -> list[NodeInfo]:
    """Nodes that a candidate or a partial sum can reach."""
    active: list[NodeInfo] = []
    partial: set[ir.Value] = set()
    for info in analysis.nodes:
        touched = not touched_values.isdisjoint((*info.node.inputs, *info.node.outputs))
        reached = not partial.isdisjoint(info.node.inputs)
        if touched or reached:
            active.append(info)
        passes = reached and (info.rule.linear or info.rule.bilinear)
        if passes or (touched and (info.reduced or info.looked_up)):
            partial.update(info.node.outputs)
    return active


def _count_consumers(analysis: Analysis) -> dict[ir.Value, int]:
    """How many nodes read a value's elements, graph outputs counted.

    A node that reads only the value's shape does not count, nor does a node whose outputs only such nodes read.
    """
    counts: dict[ir.Value, int] = dict.fromkeys(analysis.graph.outputs, 1)
    for info in reversed(analysis.nodes):
        if info.rule.ignores_values or not any(counts.get(v) for v in info.node.outputs):
            continue
        for value in info.node.inputs:
            if value is not None:
                counts[value] = counts.get(value, 0) + 1
    return counts
