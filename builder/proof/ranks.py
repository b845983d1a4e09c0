"""Where ranks differ on purpose: masks that count a value once, rows of split tables, parts of whole dimensions."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from furiosa_llm.builder.proof import pieces
from furiosa_llm.builder.proof.by_rule import check_axes
from furiosa_llm.builder.proof.interpretation import LocalFacts
from furiosa_llm.builder.proof.pieces import Dim, of_layout
from furiosa_llm.builder.proof.placement import (
    REBUILD,
    Axes,
    ContradictionError,
    Held,
    LocalSizes,
    Placement,
    RankConstant,
    RankFunction,
    Rows,
    whole,
)
from furiosa_llm.builder.rules import op_of
from furiosa_llm.builder.rules.facts import present
from furiosa_llm.builder.rules.padding import Content
from furiosa_llm.runtime.artifact.layout import Leaf, Mesh

Array = npt.NDArray[Any]
Constants = Callable[[str, int], Array]
"""The elements of a stored tensor on one rank."""

# These are not facts about ops, but the form of the lookups that the builder writes (lower/lookup.py). Any other form
# is refused.
# fmt: off
ELEMENTWISE = frozenset((
    "Add", "And", "Cast", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mul", "Not", "Or",
    "Sub", "Where",
))
# fmt: on
_SHAPED = frozenset(("Unsqueeze", "Identity"))


class RankTransfer:
    """Transfers of nodes that have an operand made by the builder, different from rank to rank."""

    def __init__(self, facts: LocalFacts, mesh: Mesh, constants: Constants, known: Sequence[Dim]) -> None:
        """`known` are the dimensions that the manifest describes; they are the readings to try for a part of one."""
        self._facts = facts
        self._mesh = mesh
        self._constants = constants
        self._known = known

    def outputs(self, node: ir.Node, held: Sequence[Held | None]) -> list[Held]:
        """The outputs' placements; ContradictionError if no unsplit node explains them."""
        if node.op_type == "Where" and isinstance(held[0], RankConstant):
            return [self._masked(node, held[0], held)]
        if node.op_type == "Where" and any(isinstance(one, Rows) for one in held):
            return [self._looked_up(node, held)]
        if node.op_type == "Gather" and isinstance(held[1], RankConstant):
            return [self._own_part(node, held)]
        if node.domain == "" and node.op_type in ELEMENTWISE | _SHAPED:
            return [self._function(node, held)]
        raise ContradictionError("an operand that differs between ranks", "a mask or the rows of a table", REBUILD)

    def _of_ranks(self, value: ir.Value) -> list[Array]:
        return [self._constants(str(value.name), rank) for rank in range(self._mesh.size)]

    # -- masks ---------------------------------------------------------------------------------------------------

    def _masked(self, node: ir.Node, mask: RankConstant, held: Sequence[Held | None]) -> Held:
        """`Where(mask, x, 0)`: x on some ranks or in some places, zeros elsewhere."""
        condition, kept, other = (present(value) for value in node.inputs)
        inverted = self._facts.is_zero(kept)
        data = held[2 if inverted else 1]
        if not (inverted or self._facts.is_zero(other)) or not isinstance(data, Placement):
            raise ContradictionError("a mask of ranks between two tensors", "a tensor and zero", REBUILD)
        masks = [~m if inverted else m for m in self._of_ranks(condition)]
        if mask.dims:
            return self._cleared(data, masks)
        counts = [sum(bool(masks[rank]) for rank in group) for group in self._mesh.groups(mask.axes)]
        if counts != [1] * len(counts):
            raise ContradictionError(
                f"a mask over axes {list(mask.axes)} that lets {counts} ranks of each group through",
                "one rank of each group",
                REBUILD,
            )
        if data.partial & set(mask.axes):
            raise ContradictionError(
                "a partial sum that is masked over its own axes", "a tensor that is whole", REBUILD
            )
        partial = data.partial | set(mask.axes)
        check_axes(data.dims, partial)
        if data.scale != 1:
            raise ContradictionError("a mean of parts that is not divided by their number", "a product first", REBUILD)
        return dataclasses.replace(data, partial=partial)

    def _cleared(self, data: Placement, masks: Sequence[Array]) -> Held:
        """`data` with zeros in the padding of one dimension, and only there."""
        d = len(data.dims) - masks[0].ndim
        if d < 0 or masks[0].shape[1:] != (1,) * (masks[0].ndim - 1):
            raise ContradictionError(f"a mask of local shape {masks[0].shape}", "one dimension's places", REBUILD)
        for rank, mask in enumerate(masks):
            if not np.array_equal(mask.reshape(-1), pieces.index_map(data.dims[d], self._mesh, rank) >= 0):
                raise ContradictionError(
                    f"a mask that on rank {rank} does not tell the padding of dimension {d} "
                    f"({pieces.text(data.dims[d])})",
                    "true at elements, false at padding",
                    REBUILD,
                )
        cleared = dict.fromkeys(pieces.places(data.dims[d]), Content.ZERO)
        return dataclasses.replace(data, contents={**data.contents, **cleared})

    # -- parts of a dimension ------------------------------------------------------------------------------------

    def _own_part(self, node: ir.Node, held: Sequence[Held | None]) -> Held:
        """`Gather(x, indices of the rank)`: a dimension that was computed whole is cut to the rank's part."""
        data = held[0]
        if not isinstance(data, Placement) or data.scale != 1:
            raise ContradictionError("a table that differs between ranks", "a tensor of the unsplit model", REBUILD)
        axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else 0) % len(data.dims)
        axes_given = held[1].axes if isinstance(held[1], RankConstant) else ()
        indices = self._of_ranks(present(node.inputs[1]))
        if not pieces.is_whole(data.dims[axis]) or indices[0].ndim != 1:
            raise ContradictionError("a split dimension of which ranks take parts", "a whole dimension", REBUILD)
        size = pieces.global_size(data.dims[axis])
        # Padding repeats element 0, so only the order of the constant's axes distinguishes readings that differ in
        # nothing but padding.
        readings = list(self._readings(size[0], len(indices[0])))
        for dim in sorted(readings, key=lambda reading: pieces.axes_of(reading) != axes_given):
            maps = (np.maximum(pieces.index_map(dim, self._mesh, rank), 0) for rank in range(self._mesh.size))
            if all(np.array_equal(own, found) for own, found in zip(maps, indices, strict=True)):
                dims = (*data.dims[:axis], dim, *data.dims[axis + 1 :])
                check_axes(dims, data.partial)
                padding = dict.fromkeys(pieces.places(dim), Content.FINITE)
                return dataclasses.replace(data, dims=dims, contents={**data.contents, **padding})
        raise ContradictionError(
            f"parts of dimension {axis} of {size[0]} that are no split of it",
            "for each rank its part of one split",
            REBUILD,
        )

    def _readings(self, size: int, count: int) -> Iterator[Dim]:
        """Ways to split `size` indices into parts of `count`."""
        for dim in self._known:
            if pieces.global_size(dim)[0] == size and pieces.local_size(dim)[0] == count:
                yield dim
        for axes in _ordered_subsets(len(self._mesh.shape)):
            parts = self._mesh.parts(axes)
            for outer, inner in itertools.product(_divisors(count), repeat=2):
                rest, remainder = divmod(size, outer * inner)
                if not remainder and -(-rest // parts) * outer * inner == count:
                    leaf = of_layout(Leaf(rest, axes), self._mesh)
                    yield pieces.join(pieces.run((outer, outer)), leaf, pieces.run((inner, inner)))
            if count < size < count * parts:  # in whole blocks, the last of them filled in part
                yield (pieces.Padded(size, axes, count),)

    # -- tables --------------------------------------------------------------------------------------------------

    def _function(self, node: ir.Node, held: Sequence[Held | None]) -> Held:
        """Integers that differ from rank to rank, computed element by element."""
        for value, one in zip(node.inputs, held, strict=True):
            fine = isinstance(one, RankConstant | RankFunction) or (isinstance(one, Placement) and one.is_equal)
            if value is not None and not fine:
                raise ContradictionError(
                    f"a computation with ranks' own numbers and {value.name!r}: {one}",
                    "operands that are the same on all ranks",
                    REBUILD,
                )
        dtype = self._facts.first[node.outputs[0]].dtype
        if not dtype.is_integer() and dtype is not ir.DataType.BOOL:
            raise ContradictionError("ranks' own numbers that are no integers", "integers", REBUILD)
        return RankFunction(dims=whole(self._facts.shape(node.outputs[0])).dims)

    def _looked_up(self, node: ir.Node, held: Sequence[Held | None]) -> Held:
        """`Where(here, rows, 0)`: every row on one rank, zeros on the others."""
        here, _, other = (present(value) for value in node.inputs)
        rows = held[1]
        if not isinstance(rows, Rows) or not isinstance(held[0], RankFunction) or not self._facts.is_zero(other):
            raise ContradictionError("rows of a split table that are not masked", "Where(here, rows, 0)", REBUILD)
        condition = self._without_trailing(here, rows.trailing)
        axes = pieces.axes_of(rows.table)
        problem = "integers that do not come from one tensor"
        for source in _sources(rows.indices):
            problem = self._check_lookup(rows.table, rows.indices, condition, source)
            if not problem:
                partial = frozenset(axes)
                check_axes(rows.dims, partial)
                return Placement(dims=rows.dims, partial=partial, contents=rows.contents)
        raise ContradictionError(f"a lookup in a split table in which {problem}", "each row from one rank", REBUILD)

    def _without_trailing(self, value: ir.Value, count: int) -> ir.Value:
        """The mask before one dimension was appended for each that follows the dimensions of the indices."""
        for _ in range(count):
            producer = value.producer()
            if producer is None or producer.op_type != "Unsqueeze" or self._unsqueezed(producer) != (-1,):
                raise ContradictionError(
                    "a mask of rows that is not aligned with them", f"{count} dimensions of 1 at its end", REBUILD
                )
            value = present(producer.inputs[0])
        return value

    def _unsqueezed(self, node: ir.Node) -> tuple[int, ...]:
        if "axes" in node.attributes:
            found = tuple(node.attributes["axes"].as_ints())
        else:
            values = self._facts.values(node.inputs[1])
            found = tuple(int(v) for v in values[0]) if values is not None else ()
        rank = len(self._facts.shape(node.outputs[0]))
        return tuple(a - rank if a >= 0 else a for a in found)

    def _check_lookup(self, table: Dim, indices: ir.Value, here: ir.Value, source: ir.Value) -> str:
        """What is wrong if `source` holds the wanted rows of the whole table; empty if nothing is."""
        size, count = pieces.global_size(table)[0], pieces.local_size(table)[0]
        wanted = np.arange(-size - 2, size + 2, dtype=np.int64)
        rows = np.where(wanted < 0, wanted + size, wanted)
        valid = (rows >= 0) & (rows < size)
        others = [axis for axis in range(len(self._mesh.shape)) if axis not in pieces.axes_of(table)]
        taken = np.zeros((self._mesh.parts(others), len(wanted)), dtype=np.int64)
        for rank in range(self._mesh.size):
            own = self._evaluate((indices, here), source, wanted, rank)
            if own is None:
                return "positions are not computed from one tensor"
            local, mask = own
            inside = (local >= -count) & (local < count)
            if (inside & ~valid).any():
                return "a row that the table has not is not refused"
            if (valid & ~inside).any():
                return "a row of the table is out of range on some rank"
            found = pieces.index_map(table, self._mesh, rank)[np.where(inside, local, 0)]
            if (valid & mask & (found != rows)).any():
                return f"rank {rank} takes another row for its own"
            taken[self._mesh.position(rank, others)] += mask & valid
        return "" if (taken[:, valid] == 1).all() else "a row comes from no rank, or from several"

    def _evaluate(
        self, wanted: Sequence[ir.Value], source: ir.Value, elements: Array, rank: int
    ) -> tuple[Array, ...] | None:
        """One rank's values as functions of `source`, element by element; None if they depend on more."""
        known: dict[ir.Value, Array] = {source: elements}
        found = [self._evaluate_one(value, known, rank) for value in wanted]
        if any(one is None for one in found):
            return None
        return tuple(np.broadcast_to(one, elements.shape) for one in found if one is not None)

    def _evaluate_one(self, value: ir.Value, known: dict[ir.Value, Array], rank: int) -> Array | None:
        if value in known:
            return known[value]
        result: Array | None = None
        node = value.producer()
        if value.is_initializer():
            result = self._scalar(value, rank)
        elif node is not None and node.op_type in ELEMENTWISE and node.domain == "":
            entry = op_of(node)
            assert entry is not None
            assert entry.value is not None
            operands = [self._evaluate_one(present(v), known, rank) for v in node.inputs]
            if all(one is not None for one in operands):
                attributes: Mapping[str, Any] = {name: a.value for name, a in node.attributes.items()}
                result = np.asarray(entry.value(dict(attributes), operands))
        if result is not None:
            known[value] = result
        return result

    def _scalar(self, value: ir.Value, rank: int) -> Array | None:
        values = self._facts.values(value)
        found = values[0] if values is not None else self._constants(str(value.name), rank)
        return np.asarray(found) if found.size == 1 else None


def restored(node: ir.Node, held: Sequence[Held | None], facts: LocalFacts) -> list[Held]:
    """A step that turns a rank's sizes into the model's: `Where(split, sizes, local)`, or a product with parts."""
    sizes = next(one for one in held if isinstance(one, LocalSizes))
    values = facts.values(node.outputs[0])
    others = [one for one in held if one is not sizes and one is not None]
    if node.op_type not in ("Where", "Mul") or values is None or not all(_is_whole(one) for one in others):
        raise ContradictionError(
            f"sizes of a rank's part where the model has {list(sizes.expected[0])}",
            "global sizes, restored behind Shape",
            REBUILD,
        )
    if all(_are(value.tolist(), expected) for value, expected in zip(values, sizes.expected, strict=True)):
        return [whole(facts.shape(node.outputs[0]))]
    return [sizes]


def _are(found: Sequence[int], expected: Sequence[int]) -> bool:
    pairs = list(zip(found, expected, strict=False))
    return len(found) == len(expected) and all(n == e if e >= 0 else n > 0 and n % -e == 0 for n, e in pairs)


def _is_whole(one: Held) -> bool:
    return isinstance(one, Placement) and one.is_whole


def _sources(value: ir.Value) -> Iterator[ir.Value]:
    """The values that an elementwise computation may start from, the nearest first."""
    queue, seen = [value], {value}
    while queue:
        current = queue.pop(0)
        yield current  # constants may be positions, too
        node = current.producer()
        if node is None or node.op_type not in ELEMENTWISE:
            continue
        for operand in node.inputs:
            if operand is not None and operand not in seen and not operand.is_initializer():
                seen.add(operand)
                queue.append(operand)


def _ordered_subsets(count: int) -> Iterator[Axes]:
    """Every choice of mesh axes in every order."""
    for length in range(1, count + 1):
        yield from itertools.permutations(range(count), length)


def _divisors(size: int) -> list[int]:
    return [n for n in range(1, size + 1) if size % n == 0]


def sub_dimensions(dims: Sequence[Dim]) -> list[Dim]:
    """Every run of pieces of some dimensions that is split, each once."""
    found: dict[Dim, None] = {}
    for dim in dims:
        for start in range(len(dim)):
            for stop in range(start + 1, len(dim) + 1):
                own = dim[start:stop]
                if pieces.axes_of(own):
                    found[own] = None
    return list(found)
