"""Ops that take sizes or positions as operands: a rank must get the sizes that its part of the tensor needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from furiosa_llm.builder.proof import pieces
from furiosa_llm.builder.proof.by_rule import check_axes
from furiosa_llm.builder.proof.interpretation import LocalFacts
from furiosa_llm.builder.proof.pieces import ONE, Copies, Dim, Size
from furiosa_llm.builder.proof.placement import REBUILD, ContradictionError, Held, LocalSizes, Placement, whole
from furiosa_llm.builder.proof.regroup import candidates
from furiosa_llm.builder.rules.facts import present

Choose = Callable[[ir.Node, object, Mapping[tuple[Dim, ...], float]], tuple[Dim, ...]]
"""Picks one of several readings of a node, given with their unlikelihoods; the second argument is equal in situations
that must be read alike."""


class Movers:
    """Transfers of ops that take sizes or positions as operands."""

    def __init__(self, facts: LocalFacts, choose: Choose) -> None:
        self._facts = facts
        self._choose = choose
        self.table: dict[str, Callable[[ir.Node, Sequence[Placement]], list[Held]]] = {
            "Reshape": self._reshape,
            "Flatten": self._reshape,
            "Squeeze": self._squeeze,
            "Unsqueeze": self._unsqueeze,
            "Expand": self._expand,
            "ConstantOfShape": self._constant,
            "Tile": self._tile,
            "Split": self._split,
            "Slice": self._slice,
            "Shape": self._shape,
        }

    def outputs(self, node: ir.Node, held: Sequence[Held | None]) -> list[Held]:
        """The outputs' placements; ContradictionError if no unsplit node explains them."""
        placements = [one for one in held if isinstance(one, Placement)]
        if len(placements) != sum(value is not None for value in node.inputs):
            raise ContradictionError("an operand that differs between ranks", "a tensor of the unsplit model", REBUILD)
        if not all(_is_on_all_ranks(one) for one in placements[1:]):
            raise ContradictionError("sizes that are split or partial", "the same sizes on all ranks", REBUILD)
        if placements[0].scale != 1 and node.op_type != "Shape":
            raise ContradictionError("a mean of parts that is not divided by their number", "a product first", REBUILD)
        return self.table[node.op_type](node, placements)

    def _moved(self, node: ir.Node, data: Placement, dims: Sequence[tuple[Dim, ...]]) -> list[Held]:
        """Outputs that hold the input's elements in other places."""
        found: list[Held] = []
        for value, own in zip(node.outputs, dims, strict=True):
            expected = self._facts.shape(value)
            local = tuple(pieces.local_size(dim) for dim in own)
            if local != expected:
                raise ContradictionError(
                    f"an output {value.name!r} of local shape {[s[0] for s in expected]}",
                    f"{[s[0] for s in local]}, as the input is split",
                    REBUILD,
                )
            check_axes(own, data.partial)
            kept = {place for dim in own for place in pieces.places(dim)}
            contents = {place: content for place, content in data.contents.items() if place in kept}
            found.append(dataclasses.replace(data, dims=own, contents=contents))
        return found

    # -- the same elements in another shape ----------------------------------------------------------------------

    def _reshape(self, node: ir.Node, operands: Sequence[Placement]) -> list[Held]:
        sizes = self._facts.shape(node.outputs[0])
        dims = operands[0].dims
        ways = candidates(dims, sizes)
        if not ways:
            raise ContradictionError(
                f"a target {[s[0] for s in sizes]} for a tensor split as {operands[0]}",
                "local sizes that keep split pieces in one piece",
                REBUILD,
            )
        alike = (*map(pieces.text, dims), *(size[0] if size[0] == size[1] else "?" for size in sizes), len(ways))
        return self._moved(node, operands[0], [self._choose(node, alike, ways)])

    def _squeeze(self, node: ir.Node, operands: Sequence[Placement]) -> list[Held]:
        dims = operands[0].dims
        axes = self._axes(node)
        drop = (
            {a % len(dims) for a in axes}
            if axes is not None
            else {d for d, size in enumerate(self._facts.shape(present(node.inputs[0]))) if size == ONE}
        )
        if any(pieces.axes_of(dims[d]) for d in drop):
            raise ContradictionError("a split dimension that is squeezed", "one of size 1", REBUILD)
        return self._moved(node, operands[0], [tuple(dim for d, dim in enumerate(dims) if d not in drop)])

    def _unsqueeze(self, node: ir.Node, operands: Sequence[Placement]) -> list[Held]:
        axes = self._axes(node)
        rank = len(self._facts.shape(node.outputs[0]))
        rest = iter(operands[0].dims)
        new = {a % rank for a in axes or ()}
        return self._moved(node, operands[0], [tuple(() if d in new else next(rest) for d in range(rank))])

    def _axes(self, node: ir.Node) -> tuple[int, ...] | None:
        if "axes" in node.attributes:
            return tuple(node.attributes["axes"].as_ints())
        values = self._facts.values(node.inputs[1]) if len(node.inputs) > 1 else None
        return None if values is None else tuple(int(v) for v in np.atleast_1d(values[0]))

    # -- the same elements many times ----------------------------------------------------------------------------

    def _expand(self, node: ir.Node, operands: Sequence[Placement]) -> list[Held]:
        sizes = self._facts.shape(node.outputs[0])
        before = operands[0].dims
        dims: list[Dim] = []
        for back, size in enumerate(reversed(sizes), start=1):
            dim = before[-back] if back <= len(before) else ()
            dims.insert(0, (Copies(size),) if dim in ((), (Copies(ONE),)) else dim)
        return self._moved(node, operands[0], [tuple(dims)])

    def _constant(self, node: ir.Node, _: Sequence[Placement]) -> list[Held]:
        sizes = self._facts.shape(node.outputs[0])
        return [Placement(dims=tuple((Copies(size),) for size in sizes))]

    def _tile(self, node: ir.Node, operands: Sequence[Placement]) -> list[Held]:
        data, out = self._facts.shape(present(node.inputs[0])), self._facts.shape(node.outputs[0])
        dims: list[Dim] = []
        for dim, before, after in zip(operands[0].dims, data, out, strict=True):
            count = pieces.over(after, before)
            if count is None:
                raise ContradictionError(f"{after[0]} elements of {before[0]} repeated", "a multiple", REBUILD)
            dims.append(pieces.join((Copies(count),), dim))  # one copy on a rank may be one of several in the model
        return self._moved(node, operands[0], [tuple(dims)])

    # -- some of the elements ------------------------------------------------------------------------------------

    def _split(self, node: ir.Node, operands: Sequence[Placement]) -> list[Held]:
        dims = operands[0].dims
        axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else 0) % len(dims)
        sizes = [self._facts.shape(value)[axis] for value in node.outputs]
        parts = self._cut(dims[axis], sizes)
        return self._moved(node, operands[0], [(*dims[:axis], part, *dims[axis + 1 :]) for part in parts])

    def _slice(self, node: ir.Node, operands: Sequence[Placement]) -> list[Held]:
        dims = list(operands[0].dims)
        data, out = self._facts.shape(present(node.inputs[0])), self._facts.shape(node.outputs[0])
        axes = self._slice_axes(node, len(dims))
        for i, d in enumerate(axes if axes is not None else range(len(dims))):
            if pieces.is_whole(dims[d]):
                copied = pieces.has_copies(dims[d]) and len(dims[d]) == 1
                dims[d] = (Copies(out[d]),) if copied else pieces.run(out[d])
                continue
            bounds = self._bounds(node, i, data[d]) if axes is not None else None
            if bounds is None:
                raise ContradictionError(
                    f"a split dimension {d} that is cut at places which are not known", "constant bounds", REBUILD
                )
            dims[d] = self._cut(dims[d], bounds)[1]
        return self._moved(node, operands[0], [tuple(dims)])

    def _slice_axes(self, node: ir.Node, rank: int) -> list[int] | None:
        """The axes that Slice cuts; None if they are not known."""
        if "starts" in node.attributes:
            count = len(node.attributes["starts"].as_ints())
            given = node.attributes["axes"].as_ints() if "axes" in node.attributes else range(count)
            return [a % rank for a in given]
        if len(node.inputs) <= 3 or node.inputs[3] is None:
            return list(range(self._facts.shape(present(node.inputs[1]))[0][0]))
        values = self._facts.values(node.inputs[3])
        return None if values is None else [int(a) % rank for a in values[0]]

    def _bounds(self, node: ir.Node, i: int, size: Size) -> list[Size] | None:
        """The sizes before, inside and after the i-th cut of a dimension; None if not known or not a run."""
        if "starts" in node.attributes:
            start, end = node.attributes["starts"].as_ints()[i], node.attributes["ends"].as_ints()[i]
            runs = [slice(start, end).indices(n) for n in size]
        else:
            starts, ends = self._facts.values(node.inputs[1]), self._facts.values(node.inputs[2])
            steps = self._facts.values(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else None
            if (
                starts is None
                or ends is None
                or (len(node.inputs) > 4 and node.inputs[4] is not None and steps is None)
            ):
                return None
            if steps is not None and int(steps[0][i]) != 1:
                return None
            runs = [slice(int(starts[s][i]), int(ends[s][i])).indices(size[s]) for s in (0, 1)]
        (a, b, _), (c, d, _) = runs
        return [(a, c), (max(b - a, 0), max(d - c, 0)), (size[0] - max(a, b), size[1] - max(c, d))]

    def _cut(self, dim: Dim, sizes: Sequence[Size]) -> list[Dim]:
        parts = pieces.segments(dim, sizes, pieces.local_size)
        if parts is None and pieces.is_whole(dim):  # a cut inside what was copied: there are as many copies as it shows
            parts = pieces.segments(pieces.run(pieces.local_size(dim)), sizes, pieces.local_size)
        if parts is None:
            raise ContradictionError(
                f"cuts into {[s[0] for s in sizes]} of a dimension that is split as ({pieces.text(dim)})",
                "cuts between its segments, at local places",
                REBUILD,
            )
        return parts

    # -- sizes ---------------------------------------------------------------------------------------------------

    def _shape(self, node: ir.Node, operands: Sequence[Placement]) -> list[Held]:
        """The sizes of a rank's part, which are not the model's: the program must restore the model's sizes."""
        dims = operands[0].dims
        start = node.attributes["start"].as_int() if "start" in node.attributes else 0
        end = node.attributes["end"].as_int() if "end" in node.attributes else None
        asked = dims[start:end]
        out = self._facts.shape(node.outputs[0])
        if all(pieces.local_size(dim) == pieces.global_size(dim) for dim in asked):
            return [whole(out)]
        signs = [-1 if pieces.has_copies(dim) else 1 for dim in asked]
        sizes = [pieces.global_size(dim) for dim in asked]
        expected = (
            tuple(sign * size[0] for sign, size in zip(signs, sizes, strict=True)),
            tuple(sign * size[1] for sign, size in zip(signs, sizes, strict=True)),
        )
        return [LocalSizes(dims=whole(out).dims, expected=expected)]


def _is_on_all_ranks(one: Placement) -> bool:
    """Whether every rank has the same sizes; a constant vector counts as copies of one size."""
    return not one.partial and all(pieces.is_whole(dim) for dim in one.dims)
