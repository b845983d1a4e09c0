"""Write the GroupQueryAttention that replaces a match: its operands, its mask, and the sizes that it is given.

The op is causal by itself and knows padding only after the valid positions. So everything that the graph adds to the
scores, computed as in the graph, becomes the op's bias, and every sequence is given the whole length.
"""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import onnx_ir as ir

from furiosa_llm.builder.rewrite.fusion.match import Heads, LeftAloneError, Match, Term
from furiosa_llm.builder.rewrite.fusion.sizes import Sizes, size_of
from furiosa_llm.builder.rules.view import MICROSOFT
from furiosa_llm.builder.shapes.interpreter import Facts, Shape


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """New nodes in the graph that nothing reads yet, and their results."""

    nodes: tuple[ir.Node, ...]
    results: tuple[ir.Value, ir.Value, ir.Value]
    """The results in the order of `Match.results`."""
    bias: ir.Value | None
    """The value that is added to the scores, `b|1 h|1 s t`; no element is lower than the type's lowest number."""
    in_place: bool
    """Whether the op may write into the caches that it reads: no size comes from a cache."""


def is_in_place(found: Match, sizes: Sizes) -> bool:
    """Whether the caches of `found` are graph inputs, and other inputs show how much of them is valid."""
    caches = (found.key.past, found.value.past)
    return sizes.has("batch", "sequence", "total") and all(v.is_graph_input() for v in caches)


def replace(found: Match, facts: tuple[Facts, Facts], sizes: Sizes) -> Replacement:
    """Write the replacement of `found` before its anchor; raises LeftAloneError if the op has no such form."""
    return _Replacing(found, facts, sizes).run()


@dataclasses.dataclass(frozen=True, slots=True)
class _Bias:
    """The bias so far: a value of 4 dimensions, and its shapes at the two sets of sizes."""

    value: ir.Value
    shapes: tuple[Shape, ...]


class _Replacing:
    def __init__(self, found: Match, facts: tuple[Facts, Facts], sizes: Sizes) -> None:
        self._match = found
        self._facts = facts
        self._sizes = sizes
        self._new = sizes.writer()
        self._in_place = is_in_place(found, sizes)
        self._total = self._total_size()
        self._dtype = facts[0][found.query.value].dtype

    def run(self) -> Replacement:
        """See `replace`."""
        found = self._match
        bias = self._bias()
        total = self._new.add("Cast", [self._total], to=int(ir.DataType.INT32))
        operands: list[ir.Value | None] = [
            *map(self._packed, (found.query, found.key.new, found.value.new)),
            found.key.past,
            found.value.past,
            self._last_positions(total),
            self._new.add("Gather", [total, self._new.constant(np.array(0, dtype=np.int64))]),
        ]
        if bias is not None:
            operands += [None, None, None, bias]
        attributes: dict[str, object] = {
            "num_heads": found.query.num_heads,
            "kv_num_heads": found.key.new.num_heads,
            "scale": found.scale,
        }
        if found.softcap:
            attributes["softcap"] = found.softcap
        output, key, value = self._new.add_all(
            "GroupQueryAttention", operands, [""] * 3, domain=MICROSOFT, attributes=attributes
        )
        wanted = self._facts[0][found.results[0]].dtype
        if wanted != self._dtype:  # the scores have another type than the caches, and nothing after them casts back
            output = self._new.add("Cast", [output], to=int(wanted))
        results = (self._unpacked(output), key, value)
        nodes = self._new.put_before(found.anchor)
        return Replacement(nodes=nodes, results=results, bias=bias, in_place=self._in_place)

    # -- sizes ---------------------------------------------------------------------------------------------------

    def _total_size(self) -> ir.Value:
        """The number of positions, past and new together."""
        if self._in_place:
            return self._sizes["total"]
        past = size_of(self._new, self._match.key.past, 2)
        return self._new.add("Add", [past, self._sequence_size()])

    def _sequence_size(self) -> ir.Value:
        if self._sizes.has("sequence"):
            return self._sizes["sequence"]
        new = self._match.key.new
        return size_of(self._new, new.value, 2 if new.form == "heads first" else 1)

    def _last_positions(self, total: ir.Value) -> ir.Value:
        """For each sequence the index of its last position."""
        batch = self._sizes["batch"] if self._sizes.has("batch") else size_of(self._new, self._match.query.value, 0)
        last = self._new.add("Sub", [total, self._new.constant(np.array([1], dtype=np.int32))])
        return self._new.add("Expand", [last, batch])

    # -- forms ---------------------------------------------------------------------------------------------------

    def _packed(self, heads: Heads) -> ir.Value:
        value = heads.value
        if heads.form == "packed":
            return value
        if heads.form == "heads first":
            value = self._new.add("Transpose", [value], perm=[0, 2, 1, 3])
        return self._new.add("Reshape", [value, self._new.vector(0, 0, -1)])

    def _unpacked(self, value: ir.Value) -> ir.Value:
        form, size = self._match.output.form, self._match.output.size
        if form != "packed":
            value = self._new.add("Reshape", [value, self._new.vector(0, 0, -1, size)])
        return self._new.add("Transpose", [value], perm=[0, 2, 1, 3]) if form == "heads first" else value

    # -- the mask ------------------------------------------------------------------------------------------------

    def _bias(self) -> ir.Value | None:
        """The bias: the result of applying the terms to scores of zero."""
        bias: _Bias | None = None
        dtype: ir.DataType | None = None
        for term in self._match.terms:
            if term.value is None and term.condition is None:
                continue
            dtype, before = self._dtype_of(term), dtype
            if bias is not None and dtype != before:
                bias = _Bias(self._new.add("Cast", [bias.value], to=int(dtype)), bias.shapes)
            bias = self._with(bias, term, dtype)
        if bias is None:
            return None
        value = self._spread(bias)
        if dtype != self._dtype:
            value = self._new.add("Cast", [value], to=int(self._dtype))
        return self._new.add("Max", [value, self._number(self._lowest(self._dtype), self._dtype)])

    def _dtype_of(self, term: Term) -> ir.DataType:
        return self._dtype if term.value is None else self._facts[0][term.value].dtype

    def _with(self, bias: _Bias | None, term: Term, dtype: ir.DataType) -> _Bias:
        rank = len(self._facts[0][term.before].shape)
        number = self._lowest(dtype)
        value = self._number(number, dtype) if term.value is None else term.value
        shapes = tuple(() for _ in self._facts) if term.value is None else self._shapes(value)
        other = _Bias(value, shapes) if term.value is None else self._as_4d(value, rank)
        if term.condition is None:
            return other if bias is None else self._combined("Add", [bias, other])
        kept = bias or _Bias(self._number(0.0, dtype), tuple(() for _ in self._facts))
        condition = self._as_4d(term.condition, rank)
        return self._combined("Where", [condition, *((kept, other) if term.keeps else (other, kept))])

    def _combined(self, op_type: str, operands: list[_Bias]) -> _Bias:
        shapes = tuple(np.broadcast_shapes(*at) for at in zip(*(o.shapes for o in operands), strict=True))
        return _Bias(self._new.add(op_type, [o.value for o in operands]), shapes)

    def _as_4d(self, value: ir.Value, rank: int) -> _Bias:
        """`value`, which is broadcast to scores of `rank` dimensions, broadcast to `b h s t` instead."""
        shapes = self._shapes(value)
        if rank == 4 or len(shapes[0]) < 3:
            return _Bias(value, shapes)
        if rank != 3:
            raise LeftAloneError(f"its scores have {rank} dimensions")
        value = self._new.add("Unsqueeze", [value, self._new.vector(0)])
        if all(s[0] == 1 for s in shapes):
            return _Bias(value, tuple((1, *s) for s in shapes))
        heads = self._match.query.num_heads
        value = self._new.add("Reshape", [value, self._new.vector(-1, heads, 0, 0)])
        return _Bias(value, tuple((s[0] // heads, heads, *s[1:]) for s in shapes))

    def _spread(self, bias: _Bias) -> ir.Value:
        """The bias with one dimension of all new positions and one of all positions, as the op requires."""
        query, rows = self._match.query, []
        at = 2 if query.form == "heads first" else 1
        shapes = [(1,) * (4 - len(shape)) + shape for shape in bias.shapes]
        scores = []
        for facts in self._facts:
            asked, kept = facts[query.value].shape, facts[self._match.key.present].shape
            scores.append((kept[0], query.num_heads, asked[at], kept[2]))
        for shape, full in zip(shapes, scores, strict=True):
            if any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
                raise LeftAloneError("its mask has the form [{}], its scores have [{}]", shapes, scores)
            rows.append(shape[2:] == full[2:])
        value, missing = bias.value, 4 - len(bias.shapes[0])
        if missing > 0:
            value = self._new.add("Unsqueeze", [value, self._new.vector(*range(missing))])
        if all(rows):
            return value
        ones = self._new.vector(1, 1)
        target = self._new.add("Concat", [ones, self._sequence_size(), self._total], axis=0)
        return self._new.add("Expand", [value, target])

    def _shapes(self, value: ir.Value) -> tuple[Shape, ...]:
        return tuple(facts[value].shape for facts in self._facts)

    def _number(self, number: float, dtype: ir.DataType) -> ir.Value:
        return self._new.constant(np.array(number, dtype=dtype.numpy()))

    @staticmethod
    def _lowest(dtype: ir.DataType) -> float:
        return float(ml_dtypes.finfo(dtype.numpy()).min)  # type: ignore[no-untyped-call] # it has no annotations
