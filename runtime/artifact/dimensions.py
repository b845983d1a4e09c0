"""Dynamic dimensions: `name`, `name + name`, `name*int` or `name*name`, as shapes in an artifact write them."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from furiosa_llm.runtime.artifact.errors import ArtifactError

Shape = tuple[int | str, ...]
"""A shape whose strings are dynamic dimensions."""

GROWING = frozenset({"past", "total"})
"""The names whose sizes change in every step of a decoder."""

_NAME = r"[^\s+*0-9][^\s+*]*"
_EXPRESSION = re.compile(rf"({_NAME})(?: ?\+ ?({_NAME})| ?\* ?(?:([0-9]{{1,15}})|({_NAME})))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Expression:
    """A dynamic dimension: the sum of `names` (one or two), or their `product`; one name may have a `factor`."""

    names: tuple[str, ...]
    factor: int = 1
    product: bool = False

    def value(self, sizes: Mapping[str, int]) -> int:
        """The size of the dimension; `sizes` has every name of it."""
        known = [sizes[name] for name in self.names]
        return math.prod(known) if self.product else sum(known) * self.factor


@functools.lru_cache(maxsize=1024)
def parse_dimension(text: str) -> Expression:
    """The expression that `text` writes; raises ArtifactError for any other form."""
    match = _EXPRESSION.fullmatch(text)
    if match is None:
        raise ArtifactError(
            f"a dynamic dimension is `name`, `name + name`, `name*int` or `name*name`; found {text!r:.80}"
        )
    first, added, factor, multiplied = match.groups()
    names = tuple(name for name in (first, added, multiplied) if name is not None)
    return Expression(names=names, factor=int(factor) if factor is not None else 1, product=multiplied is not None)


def shape_of(shape: Sequence[int | str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """`shape` with every dynamic dimension replaced by its size; `sizes` has every name of it."""
    return tuple(dim if isinstance(dim, int) else parse_dimension(dim).value(sizes) for dim in shape)


def bind_sizes(shapes: Iterable[tuple[str, Sequence[int | str], Sequence[int]]]) -> dict[str, int]:
    """The size of every name, from `(what, declared shape, actual shape)` triples.

    Names that stand alone are bound first; a sum or product gives a name that no dimension has alone, and is otherwise
    checked. Raises ArtifactError, naming `what`, where ranks or sizes disagree.
    """
    sizes: dict[str, int] = {}
    origin: dict[str, str] = {}
    compound: list[tuple[str, Expression, int]] = []
    for what, declared, actual in shapes:
        if len(declared) != len(actual):
            found, expected = list(actual), list(declared)
            raise ArtifactError(f"{what}: found shape {found}, expected {len(declared)} dimensions {expected}")
        for position, (dim, size) in enumerate(zip(declared, actual, strict=True)):
            where = f"{what}, dimension {position}"
            if isinstance(dim, int):
                _agree(where, str(dim), dim, size, "the model")
                continue
            expression = parse_dimension(dim)
            if len(expression.names) > 1 or expression.factor != 1:
                compound.append((where, expression, size))
                continue
            _agree(where, dim, sizes.setdefault(dim, size), size, origin.setdefault(dim, where))
    for where, expression, size in compound:
        _bind_compound(where, expression, size, sizes)
    return sizes


def known_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """`sizes` with `total`, which is `past` + `sequence`, where the inputs do not give it."""
    complete = dict(sizes)
    if "total" not in complete and "past" in complete and "sequence" in complete:
        complete["total"] = complete["past"] + complete["sequence"]
    return complete


def _bind_compound(where: str, expression: Expression, size: int, sizes: dict[str, int]) -> None:
    unknown = [name for name in expression.names if name not in sizes]
    if len(set(unknown)) == 1 and expression.factor and not expression.product:
        rest = sum(sizes[name] for name in expression.names if name in sizes)
        share, remainder = divmod(size - rest * expression.factor, expression.factor * len(unknown))
        if remainder == 0 and share >= 0:
            sizes[unknown[0]] = share
            return
    if unknown:
        raise ArtifactError(f"{where}: no size of {' and '.join(unknown)} makes {size}")
    written = (" * " if expression.product else " + ").join(expression.names)
    _agree(where, written, expression.value(sizes), size, "the other inputs")


def _agree(where: str, name: str, expected: int, found: int, origin: str) -> None:
    if expected != found:
        raise ArtifactError(f"{where}: found {found}, expected {expected} ({name!r}, from {origin})")


def vocabulary_dim(shape: Sequence[int | str]) -> int:
    """The dimension of next-token scores that runs over the tokens: the largest fixed one, the last of equals."""
    fixed = [(dim, d) for d, dim in enumerate(shape) if isinstance(dim, int)]
    return max(fixed)[1] if fixed else len(shape) - 1
