"""Sharding rules as data: which dimensions of an op run over the same indices, and what the op does with them.

A rule is a line of text in the manner of Shardy's sharding rules (https://openxla.org/shardy/sharding_rules):

    b m k, k n -> b m n; reduce k

One operand per comma, one word per dimension. A word is a symbol; `(h d)`, a row-major product of symbols;
`[h d|kv d]`, a concatenation of products; `k<q w>`, named k, the first indices of a product whose last block is filled
in part; `1`, a dimension of size 1 that is broadcast; `.`, a dimension about which nothing is said; `*`, a dimension
that must be whole on every rank; `_` alone is an absent operand. Clauses:

    reduce k   k is contracted: if it is split, the output is a partial sum
    full s     every dimension that contains s must be whole on every rank
    pin d      d is used inside the op and may never be split, anywhere
    lookup v   v indexes a table: if it is split, ranks look up what they hold and the output is a partial sum
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Literal


@dataclasses.dataclass(frozen=True, slots=True)
class DimExpr:
    """One dimension of a rule's operand."""

    kind: Literal["one", "any", "full", "product", "concatenation", "prefix"]
    segments: tuple[tuple[str, ...], ...] = ()
    """The products that are concatenated; a product and a prefix have one."""
    name: str | None = None
    """The symbol of a prefix."""

    @property
    def symbols(self) -> frozenset[str]:
        """Every symbol in this dimension."""
        named = () if self.name is None else (self.name,)
        return frozenset((*named, *(symbol for segment in self.segments for symbol in segment)))


_PREFIX = re.compile(r"(?P<name>\w+)<(?P<product>[^>]+)>")

Operand = tuple[DimExpr, ...] | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """A rule's text, parsed."""

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    reduce: frozenset[str]
    full: frozenset[str]
    pin: frozenset[str]
    lookup: frozenset[str]


@dataclasses.dataclass(frozen=True, slots=True)
class ShapeOperand:
    """An input that holds sizes or positions, to be made local where the dimension that it refers to is split."""

    port: int
    kind: Literal["dims", "repeats", "split", "starts", "ends"]
    """`dims`: the sizes of output 0's dimensions; `repeats`: how often input 0 is in output 0, by dimensions;
    `split`: the outputs' sizes on the axis; Slice's bounds."""
    kept: tuple[int, ...] = ()
    """Sizes that are right locally, too, because the op itself replaces them by actual sizes."""


Padding = Literal["moves", "product", "sum", "finite", "fragile", "lost"]
"""What an op makes of padding, which lies at the same places in its inputs and outputs.

`moves`: what the inputs hold there (and f(0) = 0); `product`: zero if any input has zeros; `sum`: zero if all inputs
have zeros; `finite`: something finite; `fragile`: zero from zeros, but perhaps NaN from anything else; `lost`:
anything.
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What the partitioner must know about one node."""

    text: str
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Sizes of the symbols that never stand alone in a dimension."""
    linear: tuple[int, ...] = ()
    """The inputs in which the op is jointly linear: partial sums may pass through these."""
    bilinear: bool = False
    """A partial sum may pass through either input, one at a time."""
    ignores_values: bool = False
    """The output depends on the inputs' shapes alone."""
    average: bool = False
    """The reduction divides by the number of elements."""
    masked: tuple[int, ...] = ()
    """Inputs that are added after the contraction: only one rank may add them when it is split."""
    attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Attributes that are sizes, each as the product of symbols whose local size it must have.

    Products with commas between them are the elements of a list."""
    shape_operands: tuple[ShapeOperand, ...] = ()
    padding: Padding = "lost"
    """What the outputs hold where the inputs have padding."""
    padding_ports: tuple[int, ...] | None = None
    """The inputs that `padding` refers to; None: all of them."""
    offset: tuple[int, ...] = ()
    """Inputs from which something is subtracted before they are contracted, so that their zeros add to the sum."""
    divisor: int | None = None
    """The input that is divided by."""
    indices: int | None = None
    """The input that holds positions, which must be in range even where they are padding."""
    axis: int | None = None
    """The axis that Split, Slice-like and lookup ops work on, counted from the front."""
    note: str | None = None
    """Why the op could not be split any better, for the build report."""


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Signature:
    """The signature that a rule's text denotes; ValueError if it is malformed (our own mistake)."""
    body, *clauses = (part.strip() for part in text.split(";"))
    left, arrow, right = body.partition("->")
    if not arrow:
        raise ValueError(f"a rule needs '->': {text!r}")
    named: dict[str, frozenset[str]] = {
        "reduce": frozenset(),
        "full": frozenset(),
        "pin": frozenset(),
        "lookup": frozenset(),
    }
    for clause in clauses:
        keyword, *symbols = clause.split()
        if keyword not in named:
            raise ValueError(f"unknown clause {keyword!r} in rule {text!r}")
        named[keyword] |= frozenset(symbols)
    signature = Signature(inputs=_operands(left), outputs=_operands(right), **named)
    known = {s for o in (*signature.inputs, *signature.outputs) if o for dim in o for s in dim.symbols}
    unknown = frozenset().union(*named.values()) - known
    if unknown:
        raise ValueError(f"clause of rule {text!r} names unknown symbols {sorted(unknown)}")
    return signature


def _operands(text: str) -> tuple[Operand, ...]:
    if not text.strip():
        return ()
    return tuple(None if part.strip() == "_" else _dims(part) for part in text.split(","))


def _dims(text: str) -> tuple[DimExpr, ...]:
    dims: list[DimExpr] = []
    rest = text.strip()
    while rest:
        if rest[0] in "([":
            end = rest.index(")" if rest[0] == "(" else "]")
            segments = tuple(tuple(part.split()) for part in rest[1:end].split("|"))
            dims.append(DimExpr("product" if len(segments) == 1 else "concatenation", segments))
            rest = rest[end + 1 :].strip()
            continue
        if found := _PREFIX.match(rest):
            dims.append(DimExpr("prefix", (tuple(found["product"].split()),), found["name"]))
            rest = rest[found.end() :].strip()
            continue
        word, _, rest = rest.partition(" ")
        rest = rest.strip()
        match word:
            case "1":
                dims.append(DimExpr("one"))
            case ".":
                dims.append(DimExpr("any"))
            case "*":
                dims.append(DimExpr("full"))
            case _:
                dims.append(DimExpr("product", ((word,),)))
    return tuple(dims)
