"""From an analysed graph to its plan: repeated layers are priced once, and the result is checked on the whole graph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import onnx_ir as ir

from furiosa_llm.builder.errors import PlanError
from furiosa_llm.builder.factors.analysis import Analysis, analyse
from furiosa_llm.builder.factors.factor import Factor
from furiosa_llm.builder.factors.probe import PricedStep, Probes
from furiosa_llm.builder.factors.repeats import Reduced, reduce_repeats
from furiosa_llm.builder.factors.states import States, find_states
from furiosa_llm.builder.plan.groups import LeafGroup, candidates, group_leaves
from furiosa_llm.builder.plan.mesh import MAX_PADDING
from furiosa_llm.builder.plan.outcome import Assignment, Axes, Outcome
from furiosa_llm.builder.plan.pricing import Price, Pricer, Subject
from furiosa_llm.builder.plan.search import Decision, Pin, Planner, Refused, assignment_of
from furiosa_llm.runtime.artifact.layout import Mesh


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The outcome of planning one model for one mesh."""

    mesh: Mesh
    choices: Mapping[LeafGroup, Axes]
    assignment: Assignment
    outcome: Outcome
    price: Price
    unsplit: Price
    """The price of the plan that splits nothing."""
    charge: float
    """Bytes that one collective was counted as."""
    refused: tuple[Refused, ...]
    groups: tuple[LeafGroup, ...]
    """Every group that was considered, the largest first."""
    pins: Mapping[Factor, Pin]
    """The choices that the planner was given."""
    evaluations: int
    """How many assignments were priced."""


class Planning:
    """Plans one analysed model, for any number of meshes."""

    def __init__(self, analysis: Analysis, states: States, probes: Probes) -> None:
        self._whole = Subject(analysis=analysis, states=states, decode=probes.decode, longer=probes.longer)
        facts = (analysis.facts, analysis.others, probes.decode.facts, probes.longer.facts)
        reduced = reduce_repeats(analysis.graph, facts)
        self._small = None if reduced is None else _small_subject(self._whole, reduced)
        self._leaves = {} if reduced is None or self._small is None else _leaf_pairs(self._whole, self._small, reduced)

    def plan(self, mesh: Mesh, max_padding: float = MAX_PADDING, pins: Mapping[Factor, Pin] | None = None) -> Plan:
        """The plan for `mesh`; PlanError if `pins` make it impossible."""
        pins = pins or {}
        self._check_pins(pins)
        if self._small is not None:
            small_pins = _carried_over(pins, self._leaves)
            if small_pins is not None:
                decision = Planner(self._small, mesh, max_padding, small_pins).decide()
                plan = self._checked(_on_whole(decision, self._leaves), mesh, pins)
                if plan is not None:
                    return plan
        plan = self._checked(Planner(self._whole, mesh, max_padding, pins).decide(), mesh, pins)
        assert plan is not None, "a plan's price changed when it was priced again"
        return plan

    def follow(self, assignment: Assignment, mesh: Mesh) -> Plan:
        """The plan with an assignment that was made earlier, priced anew; PlanError if this graph does not allow it."""
        analysis, states = self._whole.analysis, self._whole.states
        leaves = candidates(analysis, states)
        strange = [leaf for leaf in assignment if leaf not in set(leaves)]
        if strange:
            raise PlanError(f"the plan splits {strange[0]!r}, which this model's ops use inside; plan anew.")
        pricer = Pricer(self._whole, mesh, leaves)
        priced, unsplit = pricer.price(assignment), pricer.price({})
        if isinstance(priced, str):
            raise PlanError(f"the plan cannot be carried out on this model: {priced}; plan anew.")
        assert not isinstance(unsplit, str), unsplit
        axes = {leaf: tuple(assignment.get(leaf, ())) for leaf in leaves}
        groups = tuple(group_leaves(analysis, states, leaves, apart=axes))
        return Plan(
            mesh=mesh,
            choices={group: axes[group.leaves[0]] for group in groups if axes[group.leaves[0]]},
            assignment=assignment,
            outcome=priced[1],
            price=priced[0],
            unsplit=unsplit[0],
            charge=pricer.charge,
            refused=(),
            groups=groups,
            pins={},
            evaluations=2,
        )

    def _check_pins(self, pins: Mapping[Factor, Pin]) -> None:
        if not pins:
            return
        possible = set(candidates(self._whole.analysis, self._whole.states))
        for leaf, pin in pins.items():
            if pin.parts != 1 and leaf not in possible:
                raise PlanError(
                    f"{pin.origin} splits a dimension of {leaf.size} that cannot be split: it is dynamic, or an op "
                    "uses it inside, or no weight is contracted or looked up along it; leave it whole."
                )

    def _checked(self, decision: Decision, mesh: Mesh, pins: Mapping[Factor, Pin]) -> Plan | None:
        """The plan, if the whole graph gives it the price that the decision was made for."""
        assignment = assignment_of(decision.choices)
        leaves = [leaf for group in decision.groups for leaf in group.leaves]
        priced = Pricer(self._whole, mesh, leaves).price(assignment)
        if isinstance(priced, str) or not _same(priced[0], decision.price):
            return None
        return Plan(
            mesh=mesh,
            choices=decision.choices,
            assignment=assignment,
            outcome=priced[1],
            price=priced[0],
            unsplit=decision.unsplit,
            charge=decision.charge,
            refused=decision.refused,
            groups=decision.groups,
            pins=pins,
            evaluations=decision.evaluations,
        )


def _small_subject(whole: Subject, reduced: Reduced) -> Subject:
    """The reduced graph, analysed anew, because its factors are other objects than the whole graph's."""
    facts, others = reduced.facts(whole.analysis.facts), reduced.facts(whole.analysis.others)

    def step(priced: PricedStep) -> PricedStep:
        return PricedStep(reduced.facts(priced.facts), priced.positions)

    return Subject(
        analysis=analyse(reduced.graph, facts, others),
        states=find_states(reduced.graph, facts, others),
        decode=step(whole.decode),
        longer=step(whole.longer),
        counts=reduced.counts,
    )


def _leaf_pairs(whole: Subject, small: Subject, reduced: Reduced) -> dict[Factor, Factor]:
    """Leaf of the whole graph -> the leaf of the reduced graph that stands for it, for leaves of weights and states."""
    analysis = whole.analysis
    values: Iterator[ir.Value] = iter((*analysis.graph.initializers.values(), *whole.states.values))
    pairs: dict[Factor, Factor] = {}
    for value in values:
        if value not in reduced.stand_ins:
            continue  # an unused weight
        others = small.analysis.dims[reduced.stand_ins[value]]
        for factor, other in zip(analysis.dims[value], others, strict=True):
            # Where the trees differ, the price on the whole graph will show it.
            pairs.update(zip(factor.leaves(), other.leaves(), strict=False))
    return pairs


def _carried_over(pins: Mapping[Factor, Pin], leaves: Mapping[Factor, Factor]) -> dict[Factor, Pin] | None:
    """The pins on the reduced graph's leaves; None if leaves with different pins have the same leaf there."""
    carried: dict[Factor, Pin] = {}
    for leaf, pin in pins.items():
        if leaf in leaves:
            carried[leaves[leaf]] = pin
    same = all(pins.get(leaf) == carried.get(small) for leaf, small in leaves.items())
    return carried if same else None


def _on_whole(decision: Decision, leaves: Mapping[Factor, Factor]) -> Decision:
    """The decision in terms of the whole graph's leaves."""
    stood_for: dict[Factor, list[Factor]] = {}
    for leaf, small in leaves.items():
        stood_for.setdefault(small, []).append(leaf)
    groups: dict[LeafGroup, LeafGroup] = {}

    def whole(group: LeafGroup) -> LeafGroup:
        if group not in groups:
            members = tuple(leaf for small in group.leaves for leaf in stood_for.get(small, ()))
            groups[group] = dataclasses.replace(group, leaves=members)
        return groups[group]

    return dataclasses.replace(
        decision,
        groups=tuple(whole(group) for group in decision.groups),
        choices={whole(group): axes for group, axes in decision.choices.items()},
        refused=tuple(dataclasses.replace(r, group=whole(r.group)) for r in decision.refused),
    )


def _same(a: Price, b: Price) -> bool:
    return a.collectives == b.collectives and a.sums == b.sums and math.isclose(a.nbytes, b.nbytes, rel_tol=1e-9)
