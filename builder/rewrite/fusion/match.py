"""What the matcher finds: the values around one attention, and how the scores are computed between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import onnx_ir as ir

from furiosa_llm.builder.shapes.dimension_names import dimension, names_of_sizes
from furiosa_llm.builder.shapes.interpreter import Shape

Form = Literal["heads first", "heads inside", "packed"]
"""How a value holds heads: `b h s d`, `b s h d` or `b s (h d)`."""


class LeftAloneError(Exception):
    """Why an attention stays as it is; the report shows the message.

    `shapes` are those that the message has room for, each at the two sets of sizes of the probes.
    """

    def __init__(self, message: str, *shapes: Sequence[Shape]) -> None:
        super().__init__(message)
        self._shapes = shapes

    def told(self, kinds: Mapping[str, tuple[int | str, ...]]) -> str:
        """The message, in which dynamic dimensions have names instead of the sizes of the probes."""
        names = names_of_sizes(kinds)
        forms = (
            ", ".join(str(dimension(pair, names) or "?") for pair in zip(*one, strict=True)) for one in self._shapes
        )
        return str(self).format(*forms) if self._shapes else str(self)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """A value with one vector for each head and position."""

    value: ir.Value
    form: Form
    num_heads: int
    size: int
    """The number of elements of a head's vector."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """Keys or values of the positions before this step, of this step's, and of both: each is `b kv t d`."""

    past: ir.Value
    new: Heads
    present: ir.Value


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One step from the scaled scores to the softmax, which adds a value to them or puts it where they are hidden."""

    before: ir.Value
    after: ir.Value
    value: ir.Value | None = None
    """None for a step that only changes the scores' form or type, from `before` to `after`."""
    condition: ir.Value | None = None
    """If present, scores stay where it equals `keeps`, and the others become `value`."""
    keeps: bool = True


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """One attention: softmax(softcap(scale q k^T) + terms) v, with keys and values appended to a cache."""

    anchor: ir.Node
    """The node that weighs the values, which names the attention in the report."""
    query: Heads
    key: Cache
    value: Cache
    output: Heads
    scale: float
    softcap: float
    """0 without a soft cap."""
    terms: tuple[Term, ...]
    """The terms in the order of the computation."""

    @property
    def boundary(self) -> tuple[ir.Value, ...]:
        """The values that the attention is computed from, except for its mask."""
        return (self.query.value, self.key.new.value, self.value.new.value, self.key.past, self.value.past)

    @property
    def results(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The values that a replacement must give."""
        return (self.output.value, self.key.present, self.value.present)
