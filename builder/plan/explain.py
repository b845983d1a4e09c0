"""Why a plan is as it is: for every group of dimensions what was chosen, what it costs, and what was not taken."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import onnx_ir as ir

from furiosa_llm.builder.factors.analysis import Analysis
from furiosa_llm.builder.plan.groups import LeafGroup
from furiosa_llm.builder.plan.outcome import Axes
from furiosa_llm.builder.plan.plan import Plan
from furiosa_llm.builder.plan.search import Refused
from furiosa_llm.runtime.artifact.units import counted, nbytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A split that was not taken. Bytes are of one PE and one decoded token."""

    parts: int
    axes: tuple[int, ...]
    reason: str
    saved_nbytes: float | None
    """What it would save (negative: cost); None if it is infeasible."""
    collectives: int | None
    """How many collectives it would add (negative: save)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """One group of dimensions: a choice and its reasons."""

    role: str
    size: int
    count: int
    """How many dimensions (usually one per layer) the choice is for."""
    axes: tuple[int, ...]
    """The mesh axes it is split over; empty if it is whole on every PE."""
    parts: int
    padded_size: int
    weights: tuple[str, ...]
    """Names of the weights of the first layer."""
    nbytes: int
    """Bytes of the weights that have this dimension, in the unsplit model."""
    replicated_nbytes: int
    """Bytes of them that every PE holds beyond an even share over all PEs; padding is not counted."""
    padding_nbytes: int
    """Bytes that every PE holds because this dimension is padded."""
    pinned_by: str | None
    """Who made the choice, if not the planner."""
    why: str
    alternatives: tuple[Alternative, ...]


def explain(plan: Plan, analysis: Analysis) -> tuple[Explained, ...]:
    """Every group of the plan of an analysed graph, the largest weights first."""
    holdings = _Holdings(plan, analysis)
    return tuple(_explained(plan, group, holdings) for group in plan.groups)


class _Holdings:
    """What one PE holds of every weight."""

    def __init__(self, plan: Plan, analysis: Analysis) -> None:
        self._plan = plan
        self._analysis = analysis
        self._members: dict[LeafGroup, list[ir.Value]] = {}
        groups = {leaf: group for group in plan.groups for leaf in group.leaves}
        for value in analysis.graph.initializers.values():
            leaves = {leaf for factor in analysis.dims[value] for leaf in factor.leaves()}
            for group in {groups[leaf] for leaf in leaves if leaf in groups}:
                self._members.setdefault(group, []).append(value)

    def model_nbytes(self, group: LeafGroup) -> int:
        return sum(self._nbytes(value) for value in self._members.get(group, ()))

    def replicated_nbytes(self, group: LeafGroup) -> int:
        """What a PE holds of the group's weights beyond an even share."""
        size = self._plan.mesh.size
        return sum(round(self._nbytes(v) * (1 / self._parts(v) - 1 / size)) for v in self._members.get(group, ()))

    def padding_nbytes(self, group: LeafGroup, padded_size: int) -> int:
        """What a PE holds of the group's weights because this dimension is padded."""
        more = padded_size / group.size - 1
        return sum(round(self._nbytes(v) / self._parts(v) * more) for v in self._members.get(group, ()))

    def _parts(self, value: ir.Value) -> int:
        leaves = dict.fromkeys(leaf for factor in self._analysis.dims[value] for leaf in factor.leaves())
        axes = {a for leaf in leaves for a in self._plan.assignment.get(leaf, ())}
        return self._plan.mesh.parts(sorted(axes))

    def _nbytes(self, value: ir.Value) -> int:
        fact = self._analysis.facts[value]
        return math.prod(fact.shape) * fact.dtype.bitwidth // 8


def _explained(plan: Plan, group: LeafGroup, holdings: _Holdings) -> Explained:
    axes = plan.choices.get(group, ())
    parts = plan.mesh.parts(axes)
    padded = -(-group.size // parts) * parts
    pin = next((plan.pins[leaf] for leaf in group.leaves if leaf in plan.pins), None)
    alternatives = tuple(_alternatives(plan, [r for r in plan.refused if r.group is group]))
    return Explained(
        role=group.role,
        size=group.size,
        count=len(group.leaves),
        axes=axes,
        parts=parts,
        padded_size=padded,
        weights=group.weights,
        nbytes=holdings.model_nbytes(group),
        replicated_nbytes=holdings.replicated_nbytes(group),
        padding_nbytes=holdings.padding_nbytes(group, padded) if padded != group.size else 0,
        pinned_by=None if pin is None else pin.origin,
        why=_why(plan, group, axes, padded, alternatives, pin.origin if pin else None),
        alternatives=alternatives,
    )


def _alternatives(plan: Plan, refused: Iterable[Refused]) -> Iterable[Alternative]:
    """One for each number of parts: the best of its runs of mesh axes."""
    best: dict[int, Refused] = {}
    for r in refused:
        parts = plan.mesh.parts(r.axes)
        if parts not in best or _merit(r, plan.charge) > _merit(best[parts], plan.charge):
            best[parts] = r
    for parts, r in sorted(best.items()):
        yield Alternative(
            parts=parts, axes=r.axes, reason=r.reason, saved_nbytes=r.saved_nbytes, collectives=r.collectives
        )


def _merit(refused: Refused, charge: float) -> float:
    if refused.saved_nbytes is None or refused.collectives is None:
        return -math.inf
    return refused.saved_nbytes - charge * refused.collectives


def _why(
    plan: Plan, group: LeafGroup, axes: Axes, padded: int, alternatives: tuple[Alternative, ...], pinned_by: str | None
) -> str:
    """One sentence."""
    if pinned_by is not None:
        return f"{pinned_by} says so"
    parts = plan.mesh.parts(axes)
    whole = next((a for a in alternatives if a.parts == 1), None)
    wider = [a for a in alternatives if a.parts > parts]
    reasons = []
    if axes and whole is not None:
        reasons.append(_worth(whole))
    if padded != group.size:
        reasons.append(f"{group.size} padded to {padded}, +{padded / group.size - 1:.0%}")
    if axes and parts < plan.mesh.size:
        reasons.append(f"held alike by {plan.mesh.size // parts} PEs each where nothing else splits the weight")
    if not axes:
        reasons.append("no other split is cheaper" if wider else "no split of it is possible")
    return "; ".join(reasons)


def _worth(whole: Alternative) -> str:
    if whole.saved_nbytes is None or whole.collectives is None:
        return f"whole is impossible beside the other choices ({whole.reason})"
    counts = f", for {counted(-whole.collectives, 'collective')}" if whole.collectives else ""
    return f"saves each PE {nbytes(-whole.saved_nbytes)} per token{counts}"
