"""Decide which factor is split over which mesh axes: greedy descent on a price, over groups of like leaves.

The price of a plan is what one rank reads and receives for one decoded token: bytes of weights and KV cache, bytes
that collectives carry, and a fixed charge for each collective. The charge is relative to the model (a collective must
save three tenths of the median weight matrix), so that the plan of a model does not depend on its scale.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir

from furiosa_llm.builder.analysis import Analysis
from furiosa_llm.builder.factors import Factor, to_dim
from furiosa_llm.builder.outcome import Assignment, Axes, Collective, InfeasibleError, Outcome
from furiosa_llm.builder.shapes import Facts
from furiosa_llm.builder.states import States
from furiosa_llm.builder.sweep import Sweeper, find_weight_derived
from furiosa_llm.runtime.artifact.layout import Mesh, local_size

COLLECTIVE_CHARGE = 0.3
"""What a collective must save, as a share of the median weight matrix."""
MOVE_CHARGE = 0.01
"""What splitting another group must save even if it adds no collective: each split adds nodes and files to read."""
MOVE_TOLERANCE = 0.03
"""Moves whose savings per collective differ by less than this share are equally good."""
MAX_DETOUR = 0.2
"""How much of the gain a change may give back at first, when other changes follow from it."""
MAX_PADDING = 1.34
"""How much larger padding may make one factor."""


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Leaves that play the same part in every layer, and are therefore split alike."""

    leaves: tuple[Factor, ...]
    size: int
    nbytes: int
    """Bytes of the weights that the leaves occur in."""
    description: str


@dataclasses.dataclass(frozen=True, slots=True)
class Price:
    """What a plan costs one rank for one decoded token."""

    nbytes: float
    """Weights, KV cache and collectives' payload."""
    payload_nbytes: float
    """Of those, what collectives carry, as often as a rank touches it."""
    collectives: int

    def total(self, charge: float) -> float:
        """Everything in bytes, when a collective is worth `charge` bytes."""
        return self.nbytes + charge * self.collectives


@dataclasses.dataclass(frozen=True, slots=True)
class PricedStep:
    """The shapes of one step of the model, and how many new positions it has."""

    facts: Facts
    positions: int


@dataclasses.dataclass(frozen=True, slots=True)
class Refused:
    """An alternative that was priced and not taken."""

    group: Group
    axes: Axes
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """The outcome of planning."""

    mesh: Mesh
    choices: Mapping[Group, Axes]
    assignment: Assignment
    outcome: Outcome
    price: Price
    unsplit: Price
    """The price of the plan that splits nothing."""
    refused: tuple[Refused, ...]
    evaluations: int


_Rank = tuple[float, float, float, int]
"""How good a move is: bytes saved per collective added, bytes saved, less bytes carried, less sums."""

_Place = tuple[str, int, tuple[int, ...], int, int]
"""Where a leaf occurs: op type, operand, the operand's shape, dimension, position in the dimension."""


def candidates(analysis: Analysis, states: States) -> list[Factor]:
    """Leaves worth splitting: those of weights that are contracted or looked up, which no op uses inside.

    What follows the positions in a KV cache (the head vector) stays whole, too: attention kernels work on whole heads.
    So do the inputs of the model that are no state: every rank is given them as they are.
    """
    weights = find_weight_derived(analysis)
    kept_whole = set(analysis.pinned) | set(_behind_positions(analysis, states))
    for value in analysis.graph.inputs:
        if value not in states.values:
            kept_whole.update(leaf for factor in analysis.dims[value] for leaf in factor.leaves())
    found: dict[Factor, None] = {}
    for info in analysis.nodes:
        if not info.reduced and not info.looked_up:
            continue
        for weight in info.node.inputs:
            if weight is None or weight not in weights or len(analysis.dims[weight]) < 2:
                continue
            for d, factor in enumerate(analysis.dims[weight]):
                if not analysis.is_dynamic(weight, d):
                    found.update(dict.fromkeys(leaf for leaf in factor.leaves() if leaf.size > 1))
    return [leaf for leaf in found if leaf not in kept_whole]


def _behind_positions(analysis: Analysis, states: States) -> Iterator[Factor]:
    for value in states.values:
        dynamic = [d for d in range(1, len(analysis.dims[value])) if analysis.is_dynamic(value, d)]
        if dynamic:
            for factor in analysis.dims[value][dynamic[-1] + 1 :]:
                yield from factor.leaves()


def group_leaves(analysis: Analysis, leaves: Sequence[Factor]) -> list[Group]:
    """Leaves with the same signature: where they occur in which operand of which weight, and in what place."""
    wanted = set(leaves)
    signatures: dict[Factor, list[_Place]] = {leaf: [] for leaf in leaves}
    nbytes: dict[Factor, int] = dict.fromkeys(leaves, 0)
    seen: dict[Factor, set[ir.Value]] = {leaf: set() for leaf in leaves}
    weights = find_weight_derived(analysis)
    for info in analysis.nodes:
        for port, value in enumerate(info.node.inputs):
            if value is None or value not in weights:
                continue
            fact = analysis.facts[value]
            for d, factor in enumerate(analysis.dims[value]):
                for position, leaf in enumerate(factor.leaves()):
                    if leaf in wanted:
                        signatures[leaf].append((info.node.op_type, port, fact.shape, d, position))
                        if value not in seen[leaf] and value.is_initializer():
                            seen[leaf].add(value)
                            nbytes[leaf] += math.prod(fact.shape) * fact.dtype.bitwidth // 8
    groups: dict[tuple[int, tuple[_Place, ...]], list[Factor]] = {}
    for leaf in leaves:
        groups.setdefault((leaf.size, tuple(sorted(signatures[leaf]))), []).append(leaf)
    built = [_group(members, signatures, nbytes) for members in groups.values()]
    return sorted(built, key=lambda g: -g.nbytes)


def _group(members: list[Factor], signatures: Mapping[Factor, list[_Place]], nbytes: Mapping[Factor, int]) -> Group:
    first = members[0]
    places = sorted({f"{op}[{port}]{list(shape)} dim {d}" for op, port, shape, d, _ in signatures[first]})
    return Group(tuple(members), first.size, sum(nbytes[m] for m in members), ", ".join(places))


class Planner:
    """Prices assignments and descends to a good one."""

    def __init__(
        self,
        analysis: Analysis,
        mesh: Mesh,
        states: States,
        decode: PricedStep,
        longer: PricedStep,
        max_padding: float = MAX_PADDING,
    ) -> None:
        """`decode` is the step that is priced; `longer` has more context, to see which collectives grow with it."""
        self._analysis = analysis
        self._mesh = mesh
        self._decode, self._longer = decode, longer
        self._max_padding = max_padding
        leaves = candidates(analysis, states)
        self.groups = group_leaves(analysis, leaves)
        self.sweeper = Sweeper(analysis, mesh, leaves, states)
        wanted = set(leaves)
        self._priced = [
            (value, [f for f in analysis.dims[value] if wanted.intersection(f.leaves())])
            for value in (
                *analysis.graph.initializers.values(),
                *(v for v in analysis.graph.inputs if v in states.values),
            )
        ]
        self._median = self._median_matrix()
        self.charge = COLLECTIVE_CHARGE * self._median
        self._prices: dict[tuple[tuple[int, Axes], ...], tuple[Price, Outcome] | str] = {}

    def _median_matrix(self) -> float:
        matrices = [
            self._nbytes(value)
            for value, factors in self._priced
            if factors and value.is_initializer() and len(self._decode.facts[value].shape) > 1
        ]
        return statistics.median(matrices) if matrices else 0.0

    def _nbytes(self, value: ir.Value, facts: Facts | None = None) -> float:
        fact = (facts or self._decode.facts)[value]
        return math.prod(fact.shape) * fact.dtype.bitwidth / 8

    def decide(self) -> Plan:
        """The plan that greedy descent finds, with what it refused."""
        unsplit = self._evaluate({})
        assert not isinstance(unsplit, str), unsplit
        choices = self._improve(self._descend({}))
        best, outcome = self._priced_choices(choices)
        return Plan(
            mesh=self._mesh,
            choices=choices,
            assignment=self._assignment(choices),
            outcome=outcome,
            price=best,
            unsplit=unsplit[0],
            refused=tuple(self._refusals(choices, best)),
            evaluations=len(self._prices),
        )

    def _priced_choices(self, choices: Mapping[Group, Axes]) -> tuple[Price, Outcome]:
        result = self._evaluate(choices)
        assert not isinstance(result, str), result
        return result

    def _assignment(self, choices: Mapping[Group, Axes]) -> dict[Factor, Axes]:
        return {leaf: axes for group, axes in choices.items() if axes for leaf in group.leaves}

    def _runs(self) -> list[Axes]:
        count = len(self._mesh.shape)
        runs = [tuple(range(a, b)) for a, b in itertools.combinations(range(count + 1), 2)]
        return sorted(runs, key=lambda run: (-len(run), run))

    def _fits(self, group: Group, axes: Axes) -> bool:
        parts = self._mesh.parts(axes)
        return group.size > 1 and math.ceil(group.size / parts) * parts <= self._max_padding * group.size

    def _descend(self, choices: dict[Group, Axes]) -> dict[Group, Axes]:
        """Make the best move as long as there is one."""
        while (move := self._best_move(choices)) is not None:
            choices = move
        return choices

    def _best_move(self, choices: dict[Group, Axes]) -> dict[Group, Axes] | None:
        """The move with the most bytes saved per collective added, if it is worth its collectives."""
        best, _ = self._priced_choices(choices)
        found: dict[Group, Axes] | None = None
        found_rank: _Rank = (0.0, 0.0, 0.0, 0)
        for group, axes in itertools.product(self.groups, self._runs()):
            if choices.get(group) or not self._fits(group, axes):
                continue
            trial = {**choices, group: axes}
            result = self._evaluate(trial)
            if isinstance(result, str):
                continue
            price, outcome = result
            saved, added = best.nbytes - price.nbytes, price.collectives - best.collectives
            if best.total(self.charge) - price.total(self.charge) <= MOVE_CHARGE * self._median:
                continue
            ratio = saved / added if added > 0 else math.inf
            sums = sum(collective.kind == "AllReduce" for collective in outcome.collectives)
            rank = (ratio, saved, -price.payload_nbytes, -sums)
            if found is None or _outranks(rank, found_rank):
                found, found_rank = trial, rank
        return found

    def _improve(self, choices: dict[Group, Axes]) -> dict[Group, Axes]:
        """Try every other choice for each group, and what follows from it, until none is cheaper."""
        best, _ = self._priced_choices(choices)
        unsplit, _ = self._priced_choices({})
        gain = unsplit.total(self.charge) - best.total(self.charge)
        improved = True
        while improved:
            improved = False
            limit = best.total(self.charge) + MAX_DETOUR * gain
            for group, axes in itertools.product(self.groups, [(), *self._runs()]):
                if axes == choices.get(group, ()) or (axes and not self._fits(group, axes)):
                    continue
                for trial in self._trials(choices, group, axes):
                    result = self._evaluate(trial)
                    if isinstance(result, str) or result[0].total(self.charge) > limit:
                        continue
                    settled = self._descend(trial) if _gives_up(choices, trial) else trial
                    price, _ = self._priced_choices(settled)
                    if price.total(self.charge) < best.total(self.charge) - MOVE_CHARGE * self._median:
                        choices, best, improved = settled, price, True
        return {g: a for g, a in choices.items() if a}

    def _trials(self, choices: dict[Group, Axes], group: Group, axes: Axes) -> Iterator[dict[Group, Axes]]:
        """The choice itself and, where it collides with another group's, the choice with those axes taken away."""
        trial = {**choices, group: axes}
        yield trial
        if not axes or not isinstance(self._evaluate(trial), str):
            return
        for other, taken in choices.items():
            if other is not group and set(taken) & set(axes):
                yield {**trial, other: tuple(a for a in taken if a not in axes)}

    def _refusals(self, choices: Mapping[Group, Axes], best: Price) -> Iterator[Refused]:
        """For every group that is not split over the whole mesh, what the next wider split would have cost."""
        for group in self.groups:
            chosen = choices.get(group, ())
            for axes in self._runs():
                if len(axes) <= len(chosen):
                    continue
                result = (
                    self._evaluate({**choices, group: axes}) if self._fits(group, axes) else self._padding(group, axes)
                )
                if isinstance(result, str):
                    yield Refused(group, axes, result)
                else:
                    more = result[0].collectives - best.collectives
                    saved = best.nbytes - result[0].nbytes
                    yield Refused(group, axes, f"would save {saved:.0f} bytes per rank for {more} more collectives")

    def _padding(self, group: Group, axes: Axes) -> str:
        parts = self._mesh.parts(axes)
        padded = math.ceil(group.size / parts) * parts
        factor, limit = padded / group.size, self._max_padding
        return f"{group.size} over {parts} needs padding to {padded} ({factor:.2f}x, limit {limit}x)"

    def _evaluate(self, choices: Mapping[Group, Axes]) -> tuple[Price, Outcome] | str:
        key = tuple(sorted((self.groups.index(g), a) for g, a in choices.items() if a))
        if key not in self._prices:
            self._prices[key] = self._price(self._assignment(choices))
        return self._prices[key]

    def _price(self, assignment: dict[Factor, Axes]) -> tuple[Price, Outcome] | str:
        try:
            outcome = self.sweeper.sweep(assignment)
        except InfeasibleError as error:
            return str(error)
        nbytes = sum(self._nbytes(v) * self._share(factors, assignment) for v, factors in self._priced)
        for value, whole_sets in outcome.weight_layouts.items():
            nbytes += sum(self._nbytes(value) for whole in whole_sets if whole)
        carried = 0.0
        for collective in outcome.collectives:
            payload = self._payload(collective, assignment, self._decode)
            if payload != self._payload(collective, assignment, self._longer):
                return f"{collective.kind} of {collective.value.name} would grow with the context"
            carried += payload * _passes_over_payload(collective)
        return Price(nbytes + carried, carried, len(outcome.collectives)), outcome

    def _payload(self, collective: Collective, assignment: Assignment, step: PricedStep) -> float:
        """Bytes that one rank receives for a collective, per new position."""
        value = collective.value
        factors = [
            f
            for d, f in enumerate(self._analysis.dims[value])
            if d != collective.dim and any(leaf in assignment for leaf in f.leaves())
        ]
        return self._nbytes(value, step.facts) / step.positions * self._share(factors, assignment)

    def _share(self, factors: Iterable[Factor], assignment: Assignment) -> float:
        """Local size over global size of some dimensions."""
        share = 1.0
        for factor in factors:
            if any(leaf in assignment for leaf in factor.leaves()):
                share *= local_size(to_dim(factor, dict(assignment)), self._mesh) / factor.find().size
        return share


def _passes_over_payload(collective: Collective) -> int:
    """How often a rank touches the payload: a sum is received and added; a gathered value is received and put into
    its new order, unless it leaves the program at once.
    """
    if collective.kind == "AllReduce":
        return 2
    return 1 if collective.value.is_graph_output() else 3


def _outranks(rank: _Rank, other: _Rank) -> bool:
    """Whether a move is better; of two that save about the same the one whose collectives carry and add less."""
    if math.isinf(rank[0]) or math.isinf(other[0]):
        return rank > other
    if abs(rank[0] - other[0]) <= MOVE_TOLERANCE * max(rank[0], other[0]):
        return rank[2:] > other[2:]
    return rank[0] > other[0]


def _gives_up(choices: Mapping[Group, Axes], trial: Mapping[Group, Axes]) -> bool:
    """Whether a trial leaves axes unused that the choices use, so that other groups may take them."""
    return any(set(axes) - set(trial.get(group, ())) for group, axes in choices.items())
