"""Decide which factor is split over which mesh axes: greedy descent on a price, over groups of like leaves."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

from furiosa_llm.builder.errors import PlanError
from furiosa_llm.builder.factors.factor import Factor
from furiosa_llm.builder.plan.groups import LeafGroup, candidates, group_leaves
from furiosa_llm.builder.plan.mesh import MAX_PADDING
from furiosa_llm.builder.plan.outcome import Axes
from furiosa_llm.builder.plan.pricing import Price, Pricer, Subject
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.units import counted, nbytes

MOVE_CHARGE = 0.01
"""What splitting another group must save even if it adds no collective, as a share of the median weight matrix: each
split adds nodes and files to read."""
MOVE_TOLERANCE = 0.03
"""Moves whose savings per collective differ by less than this share are equally good."""
MAX_DETOUR = 0.2
"""How much of the gain a change may give back at first, when other changes follow from it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """How many parts a leaf must be split into, by the choice of somebody else than the planner."""

    parts: int | None
    """1: it must not be split; None: it must be split, and the planner chooses how far."""
    origin: str
    """Who chose it, for messages."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """An alternative that was not taken."""

    group: LeafGroup
    axes: Axes
    reason: str
    saved_nbytes: float | None = None
    """What it would have saved one rank per decoded token; None if it is infeasible."""
    collectives: int | None = None
    """How many collectives it would have added."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the planner chose for one subject."""

    groups: tuple[LeafGroup, ...]
    """Every group that was considered, the largest first."""
    choices: Mapping[LeafGroup, Axes]
    price: Price
    unsplit: Price
    """The price of the plan that splits nothing."""
    charge: float
    """Bytes that one collective was counted as."""
    refused: tuple[Refused, ...]
    evaluations: int


_Rank = tuple[float, float, float, int]
"""How good a move is: bytes saved per collective added, bytes saved, minus the bytes carried, minus the sums."""


def assignment_of(choices: Mapping[LeafGroup, Axes]) -> dict[Factor, Axes]:
    """The axes of every leaf."""
    return {leaf: axes for group, axes in choices.items() if axes for leaf in group.leaves}


class Planner:
    """Prices assignments and descends to a good one."""

    def __init__(
        self,
        subject: Subject,
        mesh: Mesh,
        max_padding: float = MAX_PADDING,
        pins: Mapping[Factor, Pin] | None = None,
    ) -> None:
        """`pins` are choices that are already made."""
        self._mesh = mesh
        self._max_padding = max_padding
        self._pins = dict(pins or {})
        leaves = candidates(subject.analysis, subject.states)
        self.groups = group_leaves(subject.analysis, subject.states, leaves, subject.counts, self._pins)
        self._numbers = {group: number for number, group in enumerate(self.groups)}
        self._pricer = Pricer(subject, mesh, leaves)
        self._charge, self._median = self._pricer.charge, self._pricer.median_matrix
        self._prices: dict[tuple[tuple[int, Axes], ...], Price | str] = {}
        self._runs = _runs(mesh)

    def decide(self) -> Decision:
        """The plan that greedy descent finds, with what it refused; PlanError if the pins are infeasible."""
        unsplit = self._evaluate({})
        assert not isinstance(unsplit, str), unsplit
        choices = self._improve(self._descend(self._pinned()))
        best = self._price_of(choices)
        return Decision(
            groups=tuple(self.groups),
            choices=choices,
            price=best,
            unsplit=unsplit,
            charge=self._charge,
            refused=tuple(self._refusals(choices, best)),
            evaluations=len(self._prices),
        )

    # -- pins ----------------------------------------------------------------------------------------------------

    def _pin(self, group: LeafGroup) -> Pin | None:
        return self._pins.get(group.leaves[0])

    def _pinned(self) -> dict[LeafGroup, Axes]:
        """The choices to start from: pinned groups, each on the axes where that is cheapest."""
        choices: dict[LeafGroup, Axes] = {}
        for group in self.groups:
            pin = self._pin(group)
            if pin is None or pin.parts == 1:
                continue
            results = {axes: self._evaluate({**choices, group: axes}) for axes in self._options(group)}
            possible = {axes: r.total(self._charge) for axes, r in results.items() if not isinstance(r, str)}
            if not possible:
                raise PlanError(self._impossible(group, pin, results))
            choices[group] = min(possible, key=lambda axes: (possible[axes], axes))
        return choices

    def _impossible(self, group: LeafGroup, pin: Pin, results: Mapping[Axes, Price | str]) -> str:
        reasons = [r for r in results.values() if isinstance(r, str)]
        if not reasons:
            fitting = [run for run in self._runs if self._allows(group, run)]
            sizes = sorted({self._mesh.parts(run) for run in self._runs})
            reasons = [self._padding(group, run) for run in fitting] or [f"{self._mesh.size} ranks allow {sizes} parts"]
        parts = "parts" if pin.parts is None else f"{pin.parts} parts"
        return (
            f"{pin.origin} splits {group.role} ({group.size}: {', '.join(group.weights[:3])}) into {parts}, "
            f"which cannot be: {reasons[0]}; take it back, or choose another number of parts."
        )

    def _allows(self, group: LeafGroup, axes: Axes) -> bool:
        pin = self._pin(group)
        if pin is None:
            return True
        parts = self._mesh.parts(axes)
        return parts > 1 if pin.parts is None else parts == pin.parts

    def _options(self, group: LeafGroup) -> list[Axes]:
        """The axes that a group may be split over."""
        return [axes for axes in self._runs if self._fits(group, axes) and self._allows(group, axes)]

    # -- search --------------------------------------------------------------------------------------------------

    def _price_of(self, choices: Mapping[LeafGroup, Axes]) -> Price:
        result = self._evaluate(choices)
        assert not isinstance(result, str), result
        return result

    def _descend(self, choices: dict[LeafGroup, Axes]) -> dict[LeafGroup, Axes]:
        """Make the best move as long as there is one."""
        while (move := self._best_move(choices)) is not None:
            choices = move
        return choices

    def _best_move(self, choices: dict[LeafGroup, Axes]) -> dict[LeafGroup, Axes] | None:
        """The move with the most bytes saved per collective added, if it is worth its collectives."""
        best = self._price_of(choices)
        found: dict[LeafGroup, Axes] | None = None
        found_rank: _Rank = (0.0, 0.0, 0.0, 0)
        moves = ((group, axes) for group in self.groups if not choices.get(group) for axes in self._options(group))
        for group, axes in moves:
            trial = {**choices, group: axes}
            price = self._evaluate(trial)
            if isinstance(price, str):
                continue
            saved, added = best.nbytes - price.nbytes, price.collectives - best.collectives
            if best.total(self._charge) - price.total(self._charge) <= MOVE_CHARGE * self._median:
                continue
            ratio = saved / added if added > 0 else math.inf
            rank = (ratio, saved, -price.payload_nbytes, -price.sums)
            if found is None or _outranks(rank, found_rank):
                found, found_rank = trial, rank
        return found

    def _improve(self, choices: dict[LeafGroup, Axes]) -> dict[LeafGroup, Axes]:
        """Try every other choice for each group, and what follows from it, until none is cheaper."""
        best = self._price_of(choices)
        unsplit = self._price_of({})
        gain = unsplit.total(self._charge) - best.total(self._charge)
        improved = True
        while improved:
            improved = False
            limit = best.total(self._charge) + MAX_DETOUR * gain
            others = ((group, axes) for group in self.groups for axes in ((), *self._options(group)))
            for group, axes in others:
                if axes == choices.get(group, ()) or not self._allows(group, axes):
                    continue
                for trial, _ in self._trials(choices, group, axes):
                    price = self._evaluate(trial)
                    if isinstance(price, str) or price.total(self._charge) > limit:
                        continue
                    settled = self._descend(trial) if _gives_up(choices, trial) else trial
                    price = self._price_of(settled)
                    if price.total(self._charge) < best.total(self._charge) - MOVE_CHARGE * self._median:
                        choices, best, improved = settled, price, True
        return {g: a for g, a in choices.items() if a}

    def _trials(
        self, choices: Mapping[LeafGroup, Axes], group: LeafGroup, axes: Axes
    ) -> Iterator[tuple[dict[LeafGroup, Axes], LeafGroup | None]]:
        """The choice itself and, where it collides with another group's, the choice with those axes taken away from
        that group, which is named.
        """
        trial = {**choices, group: axes}
        yield trial, None
        if not axes or not isinstance(self._evaluate(trial), str):
            return
        for other, taken in choices.items():
            if other is not group and set(taken) & set(axes):
                left = tuple(a for a in taken if a not in axes)
                if self._allows(other, left):
                    yield {**trial, other: left}, other

    def _refusals(self, choices: Mapping[LeafGroup, Axes], best: Price) -> Iterator[Refused]:
        """What wider splits of each group would have cost, and what each group that is split would cost whole."""
        for group in self.groups:
            chosen = choices.get(group, ())
            for axes in (*self._runs, ()):
                if len(axes) > len(chosen) or (chosen and not axes):
                    yield self._refusal(choices, best, group, axes)

    def _refusal(self, choices: Mapping[LeafGroup, Axes], best: Price, group: LeafGroup, axes: Axes) -> Refused:
        if not self._fits(group, axes):
            return Refused(group=group, axes=axes, reason=self._padding(group, axes))
        pin = self._pin(group)
        if pin is not None and not self._allows(group, axes):
            return Refused(group=group, axes=axes, reason=f"{pin.origin} says otherwise")
        trials = [
            (trial, f"instead of {other.role}: " if other else "")
            for trial, other in self._trials(choices, group, axes)
        ]
        alone = {g: a for g, a in choices.items() if g is group or not set(a) & set(axes)} | {group: axes}
        if all(self._allows(g, alone.get(g, ())) for g in choices):
            trials.append((alone, "with nothing else split over these PEs: "))
        priced = [(p, place) for trial, place in trials if not isinstance(p := self._evaluate(trial), str)]
        if not priced:
            return Refused(group=group, axes=axes, reason=str(self._evaluate(trials[0][0])))
        price, place = min(priced, key=lambda pair: pair[0].total(self._charge))
        more, saved = price.collectives - best.collectives, best.nbytes - price.nbytes
        reason = place + _bargain(saved, more)
        return Refused(group=group, axes=axes, reason=reason, saved_nbytes=saved, collectives=more)

    def _fits(self, group: LeafGroup, axes: Axes) -> bool:
        parts = self._mesh.parts(axes)
        return group.size > 1 and math.ceil(group.size / parts) * parts <= self._max_padding * group.size

    def _padding(self, group: LeafGroup, axes: Axes) -> str:
        parts = self._mesh.parts(axes)
        padded = math.ceil(group.size / parts) * parts
        factor, limit = padded / group.size, self._max_padding
        return f"{group.size} over {parts} needs padding to {padded} ({factor:.2f}x, limit {limit}x)"

    def _evaluate(self, choices: Mapping[LeafGroup, Axes]) -> Price | str:
        key = tuple(sorted((self._numbers[g], a) for g, a in choices.items() if a))
        if key not in self._prices:
            priced = self._pricer.price(assignment_of(choices))
            self._prices[key] = priced if isinstance(priced, str) else priced[0]
        return self._prices[key]


def _bargain(saved: float, more: int) -> str:
    """An alternative's price compared with the plan's: bytes that a rank reads and receives per token, collectives."""
    compared = "less" if saved >= 0 else "more"
    counts = f", {counted(abs(more), 'fewer collective' if more < 0 else 'more collective')}" if more else ""
    return f"{nbytes(abs(saved))} {compared} per PE and token{counts}"


def _runs(mesh: Mesh) -> list[Axes]:
    """Contiguous runs of mesh axes, the longest first."""
    runs = [tuple(range(a, b)) for a, b in itertools.combinations(range(len(mesh.shape) + 1), 2)]
    return sorted(runs, key=lambda run: (-len(run), run))


def _outranks(rank: _Rank, other: _Rank) -> bool:
    """Whether a move is better; of two that save about the same, the one whose collectives carry and add less is."""
    if math.isinf(rank[0]) or math.isinf(other[0]):
        return rank > other
    if abs(rank[0] - other[0]) <= MOVE_TOLERANCE * max(rank[0], other[0]):
        return rank[2:] > other[2:]
    return rank[0] > other[0]


def _gives_up(choices: Mapping[LeafGroup, Axes], trial: Mapping[LeafGroup, Axes]) -> bool:
    """Whether a trial leaves axes unused that the choices use, so that other groups may take them."""
    return any(set(axes) - set(trial.get(group, ())) for group, axes in choices.items())
