"""Run the abstract interpreter at the sizes that the analysis and the planner need."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import onnx_ir as ir

from furiosa_llm.builder.errors import ShapeError, UnsupportedModelError
from furiosa_llm.builder.factors.misfit import explained, named
from furiosa_llm.builder.shapes.growth import source_of
from furiosa_llm.builder.shapes.interface import (
    PROBE,
    SECOND_PROBE,
    SizeSet,
    concrete,
    dimension_kinds,
    fixed_sequence,
    is_batch_last,
    lengths,
    open_counts,
    role_of,
    settle_batch_last,
)
from furiosa_llm.builder.shapes.interpreter import Facts, Interpreter, MisfitError, SizeMismatchError
from furiosa_llm.builder.shapes.roles import LENGTHS, Role, settle_role

SMALL = SizeSet(batch=2, sequence=1, past=1, encoder=2, others=(3, 5, 7, 11))
LARGE = SizeSet(batch=2, sequence=1031, past=2053, encoder=1033, others=(1039, 1049, 1051, 1061))
"""Both lie beyond the other sizes: a size that is bounded (by a window, or by a table) is not constant at these."""

DimensionKinds = dict[str, tuple[int | str, ...]]

_MOST_COUNTS = 3
"""How many single integers may be tried as each number of positions."""

CONTEXTS = ((511, 575), (127, 143), (31, 39), (11, 13))
"""Pairs of past lengths to price at, the shorter one first; models with a window take only the small lengths."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """Facts of a graph at several sizes."""

    kinds: DimensionKinds
    """What each dimension of each input is: a size, or the name of a dynamic dimension."""
    facts: Facts
    others: Facts
    """Facts at other sizes of every dynamic dimension."""
    decode: PricedStep
    longer: PricedStep
    extremes: tuple[Facts, ...]
    """Facts at very small and very large sizes, which distinguish a constant size from a bounded one; sizes that the
    model does not take are left out."""

    @property
    def all_facts(self) -> tuple[Facts, ...]:
        """Facts at every size set."""
        return (self.facts, self.others, self.decode.facts, self.longer.facts, *self.extremes)


def probe(model: ir.Model, given: Mapping[str, int], config: Mapping[str, object], *, lenient: bool = False) -> Probes:
    """Interpret `model`; sizes of inputs that follow from the graph are found on the way.

    If `lenient`, the branches of an If need not agree where its condition is known at some sizes.
    """
    kinds = dimension_kinds(model.graph, given, config)
    interpreter = Interpreter(model, lenient=lenient)
    try:
        facts, kinds = _first_accepted(interpreter, model.graph, partial(dimension_kinds, model.graph, given, config))
    except MisfitError as error:
        again = partial(_run, interpreter, model.graph, kinds, SECOND_PROBE)
        raise explained(error, model.graph, kinds, again) from error
    except UnsupportedModelError as error:
        again = partial(_run, interpreter, model.graph, kinds, SECOND_PROBE)
        raise UnsupportedModelError(named(error, kinds, again)) from error
    others = _run(interpreter, model.graph, kinds, SECOND_PROBE)
    decode, longer = _priced_steps(interpreter, model.graph, kinds)
    extremes = tuple(_extreme_runs(interpreter, model.graph, kinds))
    return Probes(kinds=kinds, facts=facts, others=others, decode=decode, longer=longer, extremes=extremes)


def _run(interpreter: Interpreter, graph: ir.Graph, kinds: DimensionKinds, sizes: SizeSet) -> Facts:
    return interpreter.run(concrete(kinds, sizes), lengths(graph, sizes))


def _extreme_runs(interpreter: Interpreter, graph: ir.Graph, kinds: DimensionKinds) -> Iterator[Facts]:
    for sizes in (SMALL, LARGE):
        with contextlib.suppress(ShapeError):
            yield _run(interpreter, graph, kinds, sizes)


def _first_accepted(
    interpreter: Interpreter, graph: ir.Graph, kinds_of: Callable[[], DimensionKinds]
) -> tuple[Facts, DimensionKinds]:
    """The first run that the graph accepts, with what the dimensions are taken for or with what they may be instead.

    Some models are valid for one new position at a time only; some masks cover the new positions alone; some models
    have the batch behind the sequence.
    """
    kinds = kinds_of()
    try:
        return _first_run(interpreter, graph, kinds)
    except ShapeError as error:
        shown = is_batch_last(graph)
        for batch_last in (shown, not shown):
            settle_batch_last(graph, batch_last=batch_last)
            found = _first_other(interpreter, graph, kinds_of())
            if found is not None:
                return found
        settle_batch_last(graph, batch_last=shown)
        raise error


def _first_other(
    interpreter: Interpreter, graph: ir.Graph, kinds: DimensionKinds
) -> tuple[Facts, DimensionKinds] | None:
    """Like `_first_accepted`, for one order of batch and sequence; None if there is no such run."""
    for other in (kinds, *_instead(kinds)):
        with contextlib.suppress(ShapeError):
            return _first_run(interpreter, graph, other)
    counts = [value for value in open_counts(graph) if value.uses()]
    choices = itertools.product(LENGTHS, repeat=len(counts)) if 0 < len(counts) <= _MOST_COUNTS else ()
    fitting: list[tuple[str, ...]] = []
    for roles in choices:
        _settle_counts(counts, roles)
        with contextlib.suppress(ShapeError):
            facts, found = _first_run(interpreter, graph, kinds)
            _run(interpreter, graph, found, SECOND_PROBE)  # a size that was fixed may be the first one's by chance
            if _states_grow(graph, found, facts):
                return facts, found
            fitting.append(roles)
    if fitting:
        _settle_counts(counts, fitting[0])
        return _first_run(interpreter, graph, kinds)
    for value in counts:
        settle_role(value, Role(name="other", why="nothing tells what it counts"))
    return None


def _settle_counts(counts: Sequence[ir.Value], roles: Sequence[str]) -> None:
    for value, role in zip(counts, roles, strict=True):
        settle_role(value, Role(name=role, why="the shapes fit if it is", tie=False))


def _states_grow(graph: ir.Graph, kinds: DimensionKinds, facts: Facts) -> bool:
    """Whether every state with a past comes out as long as the total."""
    given = {facts[value].shape for value in graph.outputs}
    total = PROBE.past + (fixed_sequence(graph) or PROBE.sequence)
    for value in graph.inputs:
        dims, shape = kinds[str(value.name)], facts[value].shape
        if role_of(value) == "state" and "past" in dims:
            grown = tuple(total if dim == "past" else size for dim, size in zip(dims, shape, strict=True))
            if grown not in given:
                return False
    return True


def _instead(kinds: DimensionKinds) -> Iterator[DimensionKinds]:
    names = {kind for dims in kinds.values() for kind in dims}
    if {"total", "sequence"} <= names:
        yield _renamed(kinds, {"total": "sequence"})
    if "sequence" in names and not names & {"total", "past"}:
        yield _renamed(kinds, {"sequence": 1})
    masks = {name: ("sequence", *dims[1:]) for name, dims in kinds.items() if dims == ("batch", "total")}
    if masks and "sequence" in names:
        yield {**kinds, **masks}


def _renamed(kinds: DimensionKinds, names: Mapping[int | str, int | str]) -> DimensionKinds:
    return {name: tuple(names.get(kind, kind) for kind in dims) for name, dims in kinds.items()}


def _first_run(interpreter: Interpreter, graph: ir.Graph, kinds: DimensionKinds) -> tuple[Facts, DimensionKinds]:
    """The facts, and the kinds with the sizes that follow from the graph.

    A size that is found for one layer's cache is guessed for every dimension of the same unknown name, so that the
    number of runs does not grow with the number of layers; a wrong guess is corrected.
    """
    found: dict[tuple[str, int], int] = {}
    guessed: dict[str, int] = {}
    while True:
        tried = {
            name: tuple(_size(name, d, kind, found, guessed) for d, kind in enumerate(dims))
            for name, dims in kinds.items()
        }
        try:
            return _run(interpreter, graph, tried, PROBE), tried
        except SizeMismatchError as error:
            source = source_of(error.value, error.dim, graph.inputs)
            place = _place_of(error.found, tried) if source is None else (str(source[0].name), source[1])
            if place is None or place in found:
                raise
            name, dim = place
            kind = kinds[name][dim]
            if isinstance(kind, int):
                raise
            found[name, dim] = error.expected
            if not hasattr(PROBE, kind):
                guessed.setdefault(kind, error.expected)


def _place_of(size: int, kinds: DimensionKinds) -> tuple[str, int] | None:
    """The first dimension without a known meaning that is probed with `size`, a prime that tells it from others."""
    shapes = concrete(kinds, PROBE)
    return next(
        (
            (name, d)
            for name, dims in kinds.items()
            for d, kind in enumerate(dims)
            if isinstance(kind, str) and shapes[name][d] == size in PROBE.others
        ),
        None,
    )


def _size(
    name: str, d: int, kind: int | str, found: Mapping[tuple[str, int], int], guessed: Mapping[str, int]
) -> int | str:
    if isinstance(kind, int):
        return kind
    return found.get((name, d), guessed.get(kind, kind))


def _priced_steps(interpreter: Interpreter, graph: ir.Graph, kinds: DimensionKinds) -> tuple[PricedStep, PricedStep]:
    """Steps of one new position after each of two contexts; for models without a past, of one and of two positions."""
    names = {kind for dims in kinds.values() for kind in dims}
    has_past = "past" in names or any(role_of(value) in LENGTHS for value in graph.inputs)
    positions = 2 if "sequence" in names and not has_past else 1
    failure: ShapeError | None = None
    for shorter, longer in CONTEXTS:
        sizes = SizeSet(batch=1, sequence=1, past=shorter, encoder=shorter + 1, others=(64,))
        more = SizeSet(batch=1, sequence=positions, past=longer, encoder=longer + 1, others=(64,))
        try:
            first = _run(interpreter, graph, kinds, sizes)
            second = _run(interpreter, graph, kinds, more)
        except ShapeError as error:
            failure = error
            continue
        return PricedStep(first, 1), PricedStep(second, positions)
    assert failure is not None
    raise failure


@dataclasses.dataclass(frozen=True, slots=True)
class PricedStep:
    """The shapes of one step of the model, and how many new positions it has."""

    facts: Facts
    positions: int
