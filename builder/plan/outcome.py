"""What a sweep of the graph under one assignment finds: where collectives go, and what else each node needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from furiosa_llm.builder.factors.analysis import NodeInfo, Port
from furiosa_llm.builder.factors.factor import Factor

Axes = tuple[int, ...]
Assignment = Mapping[Factor, Axes]
"""Leaf -> the mesh axes it is split over. Leaves that are absent are replicated."""


class InfeasibleError(Exception):
    """An assignment that no program can realise; the message says why. Caught by the planner."""


@dataclasses.dataclass(frozen=True, slots=True)
class Collective:
    """A collective that the plan needs."""

    kind: str
    """AllReduce or AllGather."""
    value: ir.Value
    axes: Axes
    dim: int | None = None
    """The dimension that is gathered."""


@dataclasses.dataclass(slots=True)
class NodeAction:
    """What to do at one node, besides the node itself."""

    info: NodeInfo
    reduce: list[ir.Value] = dataclasses.field(default_factory=list)
    """Inputs to AllReduce first; every later use sees the sum."""
    gather: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """Input number -> dimensions to make whole for this node."""
    mask: dict[int, Axes] = dataclasses.field(default_factory=dict)
    """Input number -> the axes over which it counts once: the first rank contributes it, the others give zeros."""
    clear: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    """Input number -> dimensions whose padding to replace by zeros for this node."""
    slices: list[Port] = dataclasses.field(default_factory=list)
    """Output dimensions that are computed whole and cut to the rank's part afterwards."""
    lookup: Axes = ()
    """The axes that the table is split over: a rank looks up the rows that it holds, and gives zeros for the rest."""
    average_parts: int = 1
    """How many local means are added up; the sum is divided by it."""
    partial: Axes = ()
    """The axes over which the outputs are partial sums."""


@dataclasses.dataclass(slots=True)
class Outcome:
    """What a sweep found."""

    steps: dict[ir.Node, NodeAction] = dataclasses.field(default_factory=dict)
    """Nodes at which there is something to do; all others run as they are."""
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    output_reduce: list[ir.Value] = dataclasses.field(default_factory=list)
    """Graph outputs that are partial at the end."""
    output_gather: dict[ir.Value, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """Graph outputs and their dimensions to make whole at the end."""
    weight_layouts: dict[ir.Value, set[tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    """For initializers that are wanted whole in some dimensions: those dimensions, for each way they are used."""
