"""The price of a plan: what one rank reads and receives for one decoded token.

Bytes of weights and KV cache, bytes that collectives carry, and a fixed charge for each collective. The charge is
relative to the model (a collective must save three tenths of the median weight matrix), so that the plan of a model
does not depend on its scale.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from furiosa_llm.builder.factors.analysis import Analysis
from furiosa_llm.builder.factors.factor import Factor, to_dim
from furiosa_llm.builder.factors.probe import PricedStep
from furiosa_llm.builder.factors.states import States
from furiosa_llm.builder.plan.outcome import Assignment, Collective, InfeasibleError, Outcome
from furiosa_llm.builder.plan.sweep import Sweeper
from furiosa_llm.builder.shapes.interpreter import Facts
from furiosa_llm.runtime.artifact.layout import Mesh, local_size

COLLECTIVE_CHARGE = 0.3
"""What a collective must save, as a share of the median weight matrix."""


@dataclasses.dataclass(frozen=True, slots=True)
class Price:
    """What a plan costs one rank for one decoded token."""

    nbytes: float
    """Weights, KV cache and collectives' payload."""
    payload_nbytes: float
    """The part of `nbytes` that collectives carry, counted as often as a rank touches it."""
    collectives: int
    sums: int
    """How many of them are AllReduces."""

    def total(self, charge: float) -> float:
        """The whole price in bytes, if a collective counts as `charge` bytes."""
        return self.nbytes + charge * self.collectives


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is planned: an analysed graph, and the steps at which it is priced."""

    analysis: Analysis
    states: States
    decode: PricedStep
    """The step that is priced."""
    longer: PricedStep
    """A step with more context, to see which collectives grow with it."""
    counts: Mapping[ir.Value, int] = dataclasses.field(default_factory=dict)
    """In a graph without its repeated layers: how many values of the model a value represents."""

    def count(self, value: ir.Value) -> int:
        """How many values of the model `value` represents."""
        return self.counts.get(value, 1)


class Pricer:
    """Prices assignments of one subject."""

    def __init__(self, subject: Subject, mesh: Mesh, leaves: Sequence[Factor]) -> None:
        """`leaves` are the leaves that assignments may split."""
        self._subject = subject
        self._mesh = mesh
        self._sweeper = Sweeper(subject.analysis, mesh, leaves, subject.states)
        wanted = set(leaves)
        analysis, states = subject.analysis, subject.states
        read = (*analysis.graph.initializers.values(), *(v for v in analysis.graph.inputs if v in states.values))
        self._read = [(v, [f for f in analysis.dims[v] if wanted.intersection(f.leaves())]) for v in read]
        self.median_matrix = self._median_matrix()
        """Bytes of the median weight matrix among those that can be split."""
        self.charge = COLLECTIVE_CHARGE * self.median_matrix
        """Bytes that a collective counts as."""

    def _median_matrix(self) -> float:
        facts = self._subject.decode.facts
        beside = find_scales(self._subject.analysis)
        matrices = [
            self._nbytes(value)
            for value, factors in self._read
            if factors and value.is_initializer() and len(facts[value].shape) > 1 and value not in beside
            for _ in range(self._subject.count(value))
        ]
        return statistics.median(matrices) if matrices else 0.0

    def _nbytes(self, value: ir.Value, facts: Facts | None = None) -> float:
        fact = (facts or self._subject.decode.facts)[value]
        return math.prod(fact.shape) * fact.dtype.bitwidth / 8

    def price(self, assignment: Assignment) -> tuple[Price, Outcome] | str:
        """The price of an assignment and what its sweep found, or why it is infeasible."""
        try:
            outcome = self._sweeper.sweep(assignment)
        except InfeasibleError as error:
            return str(error)
        nbytes = sum(self._count_nbytes(v) * self._share(factors, assignment) for v, factors in self._read)
        for value, whole_sets in outcome.weight_layouts.items():
            nbytes += sum(self._count_nbytes(value) for whole in whole_sets if whole)
        carried, counts = 0.0, Counter[str]()
        for collective in outcome.collectives:
            payload = self._payload(collective, assignment, self._subject.decode)
            if payload < self._payload(collective, assignment, self._subject.longer):
                return f"{collective.kind} of {collective.value.name} would grow with the context"
            count = self._subject.count(collective.value)
            carried += count * payload * _passes_over_payload(collective)
            counts[collective.kind] += count
        return Price(nbytes + carried, carried, counts.total(), counts["AllReduce"]), outcome

    def _count_nbytes(self, value: ir.Value) -> float:
        return self._nbytes(value) * self._subject.count(value)

    def _payload(self, collective: Collective, assignment: Assignment, step: PricedStep) -> float:
        """Bytes that one rank receives for a collective, per new position."""
        value = collective.value
        factors = [
            f
            for d, f in enumerate(self._subject.analysis.dims[value])
            if d != collective.dim and any(leaf in assignment for leaf in f.leaves())
        ]
        return self._nbytes(value, step.facts) / step.positions * self._share(factors, assignment)

    def _share(self, factors: Iterable[Factor], assignment: Assignment) -> float:
        """Local size over global size of some dimensions."""
        share = 1.0
        for factor in factors:
            if any(leaf in assignment for leaf in factor.leaves()):
                share *= local_size(to_dim(factor, assignment), self._mesh) / factor.find().size
        return share


def find_scales(analysis: Analysis) -> set[ir.Value]:
    """Scales, zero points and biases: weights whose leaves are some of those of another weight of their node."""
    found: set[ir.Value] = set()
    for info in analysis.nodes:
        weights = [v for v in info.node.inputs if v is not None and v.is_initializer()]
        if len(weights) < 2:
            continue
        runs = {v: {leaf for factor in analysis.dims[v] for leaf in factor.leaves() if leaf.size > 1} for v in weights}
        found.update(v for v in weights if any(runs[v] < runs[other] for other in weights))
    return found


def _passes_over_payload(collective: Collective) -> int:
    """How often a rank touches the payload.

    A rank receives a sum and adds it. It receives a gathered value and puts it into its new order, unless the value
    leaves the program at once.
    """
    if collective.kind == "AllReduce":
        return 2
    return 1 if collective.value.is_graph_output() else 3
