"""What a person or an annotated model demands of a plan, before it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from furiosa_llm.builder.errors import ConstraintError
from furiosa_llm.builder.factors.analysis import Analysis
from furiosa_llm.builder.factors.factor import Factor, Kind, flatten


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """One dimension of one value is to be split into a number of parts."""

    value: str
    """The value's name in the model as the user gave it."""
    dim: int
    """The dimension, counted from the front."""
    parts: int
    """How many parts; 1: it stays whole on every rank."""
    origin: str
    """Who demands it, as a phrase for messages: `annotation of node MatMul "/lm_head/MatMul"`."""


@dataclasses.dataclass(frozen=True, slots=True)
class LeafParts:
    """Into how many parts a leaf is to be split, and who says so."""

    parts: int
    origin: Constraint


@dataclasses.dataclass(frozen=True, slots=True)
class _Demand:
    """A constraint on a dimension, as the leaves that it is the product of."""

    constraint: Constraint
    leaves: tuple[Factor, ...]
    packed: tuple[Factor, ...]
    """The leaves of concatenations among its factors, which one number of parts cannot split."""


def leaf_parts(constraints: Iterable[tuple[Constraint, ir.Value]], analysis: Analysis) -> Mapping[Factor, LeafParts]:
    """What constraints on values of the analysed graph say of the leaves that plans are made of.

    Leaves that are not mentioned are free. Where several leaves make up a dimension and no other constraint determines
    their shares, the dimension is split outermost first, into contiguous parts. Raises ConstraintError if two
    constraints contradict each other, or if one asks for parts that the dimension cannot have.
    """
    demands = [_demand(constraint, value, analysis) for constraint, value in constraints]
    found: dict[Factor, LeafParts] = {}
    for demand in demands:
        whole = demand.packed if demand.constraint.parts > 1 else (*demand.leaves, *demand.packed)
        for leaf in whole:
            _settle(found, leaf, 1, demand.constraint)
    rest = [demand for demand in demands if demand.constraint.parts > 1]
    while rest:
        undecided = [demand for demand in rest if not _follow(found, demand)]
        if len(undecided) == len(rest):
            _take_outermost(found, undecided[0])
        rest = undecided
    return found


def _demand(constraint: Constraint, value: ir.Value, analysis: Analysis) -> _Demand:
    dims = analysis.dims[value]
    if not 0 <= constraint.dim < len(dims):
        raise ConstraintError(
            f'{constraint.origin} speaks of dimension {constraint.dim} of "{constraint.value}", which has {len(dims)} '
            f"dimensions; use one from 0 to {len(dims) - 1}."
        )
    leaves: list[Factor] = []
    packed: list[Factor] = []
    for factor in _without_prefixes(dims[constraint.dim]):
        (leaves if factor.kind is Kind.LEAF else packed).extend(leaf for leaf in factor.leaves() if leaf.size > 1)
    if constraint.parts > 1 and not leaves:
        found = (
            f"a concatenation, {dims[constraint.dim]!r}, whose segments are split one by one" if packed else "1 long"
        )
        raise ConstraintError(
            f"{_say(constraint)}, but it is {found}; "
            f"{'constrain what is cut out of it instead' if packed else 'leave it whole'}."
        )
    return _Demand(constraint, tuple(leaves), tuple(packed))


def _without_prefixes(factor: Factor) -> list[Factor]:
    """The product that `factor` is; a prefix of whole blocks, the last of them short, is split as its blocks are."""
    return [
        part
        for found in flatten([factor])
        for part in (_without_prefixes(found.kids[0]) if found.kind is Kind.PREFIX else [found])
    ]


def _settle(found: dict[Factor, LeafParts], leaf: Factor, parts: int, constraint: Constraint) -> None:
    before = found.setdefault(leaf, LeafParts(parts, constraint))
    if before.parts != parts:
        raise ConstraintError(
            f"{_say(constraint)}, but {_say(before.origin)}, and these run over the same {leaf.size} indices; "
            "demand the same of both, or drop one."
        )


def _say(constraint: Constraint) -> str:
    how = f"split by {constraint.parts}" if constraint.parts > 1 else "whole"
    return f'{constraint.origin} wants dimension {constraint.dim} of "{constraint.value}" {how}'


def _share(found: Mapping[Factor, LeafParts], demand: _Demand) -> tuple[list[Factor], int]:
    """The leaves of a dimension that are not settled, and the parts that are left for them."""
    free = [leaf for leaf in dict.fromkeys(demand.leaves) if leaf not in found]
    settled = [found[leaf] for leaf in demand.leaves if leaf in found]
    rest, remainder = divmod(demand.constraint.parts, math.prod(leaf.parts for leaf in settled))
    if remainder or (not free and rest != 1):
        other = max(settled, key=lambda leaf: leaf.parts).origin
        raise ConstraintError(
            f"{_say(demand.constraint)}, but {_say(other)}, and these run over the same indices; "
            "demand the same of both, or drop one."
        )
    return free, rest


def _follow(found: dict[Factor, LeafParts], demand: _Demand) -> bool:
    """Settle what follows from a demand; False if it leaves a choice."""
    free, rest = _share(found, demand)
    if rest > 1 and len(free) > 1:
        return False
    for leaf in free:
        _settle(found, leaf, rest, demand.constraint)
    return True


def _take_outermost(found: dict[Factor, LeafParts], demand: _Demand) -> None:
    """Settle the outermost free leaf of a demand so that the dimension's parts are contiguous."""
    free, rest = _share(found, demand)
    leaf = free[0]
    _settle(found, leaf, leaf.size if rest % leaf.size == 0 else rest, demand.constraint)
