"""Ops that move data without computing: Reshape, Transpose, Concat, Split, Slice, Expand and their kin."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from furiosa_llm.builder.errors import ShapeError
from furiosa_llm.builder.rules import evaluate
from furiosa_llm.builder.rules.cost import copied, generated, movement, nothing
from furiosa_llm.builder.rules.facts import Fact, present
from furiosa_llm.builder.rules.operands import ALONG_AXIS, AXES_INPUT, Operands, Shapes
from furiosa_llm.builder.rules.registry import op, spell, standard_shape, whole, whole_inputs, words
from furiosa_llm.builder.rules.rule import Rule, ShapeOperand
from furiosa_llm.builder.rules.view import MICROSOFT, Inferred, NodeView

_END = 2**31 - 1
"""The least bound that exporters write for a slice that extends to the end."""


def regroup(before: Sequence[int], after: Sequence[int]) -> tuple[list[str], list[str], dict[str, int]]:
    """The dimensions of a row-major reshape in common symbols: (6, 4) -> (3, 8) is `(a b) c -> a (b c)`.

    Returns the words of both sides and the symbols' sizes. Dimensions without a common refinement become `*`.
    """
    sizes: dict[str, int] = {}
    left, right = ["1"] * len(before), ["1"] * len(after)
    for dims_before, dims_after in _groups(before, after):
        pieces = _common_pieces([before[d] for d in dims_before], [after[d] for d in dims_after])
        symbols = words(len(sizes) + len(pieces))[len(sizes) :]
        sizes |= dict(zip(symbols, pieces, strict=True))
        for side, dims, shape in ((left, dims_before, before), (right, dims_after, after)):
            queue = list(symbols)
            for d in dims:
                own = _take_symbols(queue, shape[d], sizes)
                side[d] = "*" if not own else own[0] if len(own) == 1 else f"({' '.join(own)})"
    return left, right, sizes


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions (dimensions of size 1 left out) that hold equally many elements on both sides."""
    groups: list[tuple[list[int], list[int]]] = []
    rest_before = [d for d, size in enumerate(before) if size != 1]
    rest_after = [d for d, size in enumerate(after) if size != 1]
    while rest_before:
        these, those = [rest_before.pop(0)], [rest_after.pop(0)]
        while (a := math.prod(before[d] for d in these)) != (b := math.prod(after[d] for d in those)):
            if a < b:
                these.append(rest_before.pop(0))
            else:
                those.append(rest_after.pop(0))
        groups.append((these, those))
    return groups


def _common_pieces(a: Sequence[int], b: Sequence[int]) -> list[int]:
    """Sizes whose runs make up both `a` and `b`; empty if there are none."""
    cuts = sorted({*itertools.accumulate(a, operator.mul), *itertools.accumulate(b, operator.mul)})
    pairs = list(itertools.pairwise([1, *cuts]))
    return [] if any(high % low for low, high in pairs) else [high // low for low, high in pairs]


def _take_symbols(queue: list[str], size: int, sizes: dict[str, int]) -> list[str]:
    taken: list[str] = []
    while queue and math.prod(sizes[s] for s in taken) < size:
        taken.append(queue.pop(0))
    return taken


def _reshape(view: NodeView, operands: tuple[ShapeOperand, ...]) -> Rule:
    before, after = view.shape(0), view.out()
    if math.prod(before) == 0 or (operands and not view.has(1)):  # nothing to split, or the target is an attribute
        return whole(view)
    left, right, sizes = regroup(before, after)
    if operands and any(left[d] != right[d] for d in _copied_dims(view)):
        return whole(view, note="Reshape that copies the size of another dimension: replicated")
    text = f"{spell(left, *whole_inputs(view))} -> {spell(right)}"
    return Rule(text=text, sizes=sizes, linear=(0,), shape_operands=operands, padding="moves")


def _copied_dims(view: NodeView) -> list[int]:
    """The dimensions that a target of 0 copies from the input."""
    target = view.fact(1).value if view.has(1) and not view.attribute("allowzero", 0) else None
    return [] if target is None else [d for d, size in enumerate(target) if size == 0]


def reshape(view: NodeView) -> Rule:
    """Groups of dimensions with equal products."""
    return _reshape(view, (ShapeOperand(1, "dims", kept=(-1, 0)),))


def flatten(view: NodeView) -> Rule:
    """Reshapes whose target follows from the input."""
    return _reshape(view, ())


def transpose(view: NodeView) -> Rule:
    """A permutation."""
    names = words(view.rank(0))
    order = view.attribute("perm") or tuple(reversed(range(view.rank(0))))
    return Rule(text=f"{spell(names)} -> {spell([names[i] for i in order])}", linear=(0,), padding="moves")


def expand(view: NodeView) -> Rule:
    """Equal dimensions pass; broadcast dimensions may be split on the output side."""
    before, after = view.shape(0), view.out()
    names = words(len(after))
    tail = names[len(names) - len(before) :]
    offset = len(after) - len(before)
    left = [name if size != 1 else "1" for name, size in zip(tail, before, strict=True)]
    right = [name if i >= offset and before[i - offset] == after[i] != 1 else "." for i, name in enumerate(names)]
    text = f"{spell(left, *whole_inputs(view))} -> {spell(right)}"
    return Rule(text=text, linear=(0,), shape_operands=(ShapeOperand(1, "dims", kept=(1,)),), padding="moves")


def constant_of_shape(view: NodeView) -> Rule:
    """Any dimension of the output may be split."""
    text = f"* -> {spell(['.'] * len(view.out()))}"
    return Rule(text=text, shape_operands=(ShapeOperand(0, "dims"),), padding="finite")


def shape(view: NodeView) -> Rule:
    """Sizes are global everywhere in the program: the value of Shape is restored where the input is split."""
    return Rule(text=f"{spell(['.'] * view.rank(0))} -> *", ignores_values=True)


def _axis(view: NodeView, default: int = 0) -> int:
    return int(view.attribute("axis", default)) % len(view.out())


def concat(view: NodeView) -> Rule:
    """The axis is the concatenation of the inputs' axes."""
    axis, count = _axis(view), len(view.node.inputs)
    names = words(len(view.out()))
    parts = [f"p{i}" for i in range(count)]
    operands = [[part if d == axis else name for d, name in enumerate(names)] for part in parts]
    joined = "[" + "|".join(parts) + "]"
    out = [joined if d == axis else name for d, name in enumerate(names)]
    return Rule(text=f"{spell(*operands)} -> {spell(out)}", linear=tuple(range(count)), axis=axis, padding="moves")


def split(view: NodeView) -> Rule:
    """The axis is the concatenation of the outputs' axes."""
    axis = int(view.attribute("axis", 0)) % view.rank(0)
    names = words(view.rank(0))
    parts = [f"p{i}" for i in range(len(view.node.outputs))]
    left = ["[" + "|".join(parts) + "]" if d == axis else name for d, name in enumerate(names)]
    outputs = [[part if d == axis else name for d, name in enumerate(names)] for part in parts]
    text = f"{spell(left, *whole_inputs(view))} -> {spell(*outputs)}"
    operands = (ShapeOperand(1, "split"),)
    return Rule(text=text, linear=(0,), axis=axis, shape_operands=operands, padding="moves")


def slice_(view: NodeView) -> Rule:
    """An axis cut at constant bounds with step 1 is a concatenation; any other cut needs the axis whole."""
    rank = view.rank(0)
    bounds = _slice_bounds(view)
    left, right = words(rank), words(rank)
    sizes: dict[str, int] = {}
    for d in range(rank):
        size, found = view.shape(0)[d], bounds.get(d) if bounds is not None else None
        if bounds is None or found == "unknown":
            left[d] = right[d] = "*"
        elif isinstance(found, tuple) and found != (0, size):
            start, stop = found
            kept = [(f"x{d}", start), (f"y{d}", stop - start), (f"z{d}", size - stop)]
            sizes |= {name: n for name, n in kept if n}
            left[d] = "[" + "|".join(name for name, n in kept if n) + "]"
            right[d] = f"y{d}"
        elif size == 1:
            left[d] = right[d] = "1"
    text = f"{spell(left, *whole_inputs(view))} -> {spell(right)}"
    operands = (ShapeOperand(1, "starts"), ShapeOperand(2, "ends")) if view.has(1) else ()
    return Rule(text=text, sizes=sizes, linear=(0,), shape_operands=operands, padding="moves")


def _slice_bounds(view: NodeView) -> dict[int, tuple[int, int] | str] | None:
    """[start, stop) for each sliced axis, or "unknown"; None if not even the axes are known."""
    if not view.has(1):
        return None
    axes_value = view.static_value(3)
    if view.has(3) and axes_value is None:
        return None
    count = view.shape(1)[0]
    axes = list(range(count)) if axes_value is None else [int(a) % view.rank(0) for a in axes_value]
    starts, ends, steps = view.static_value(1), view.static_value(2), view.static_value(4)
    bounds: dict[int, tuple[int, int] | str] = {}
    for i, axis in enumerate(axes):
        size = view.shape(0)[axis]
        step = 1 if not view.has(4) else (None if steps is None else int(steps[i]))
        if starts is None or ends is None or step != 1:
            bounds[axis] = "unknown"
            continue
        start, stop, _ = slice(int(starts[i]), int(ends[i])).indices(size)
        # A slice that takes all of a dynamic dimension at these sizes need not do so at larger sizes.
        all_of_it = int(starts[i]) == 0 and int(ends[i]) >= _END
        if stop <= start or (view.is_dynamic(0, axis) and not all_of_it):
            bounds[axis] = "unknown"
        else:
            bounds[axis] = (start, stop)
    return bounds


def tile(view: NodeView) -> Rule:
    """An axis a that is repeated r times becomes (r a); an axis of 1 may be split freely in the output."""
    shape, known = view.shape(0), view.static_value(1)
    repeats = view.fact(1).value if known is None else known
    left, right = words(view.rank(0)), words(view.rank(0))
    sizes: dict[str, int] = {}
    for d, size in enumerate(shape):
        count = None if repeats is None else int(repeats[d])
        if count == 1:
            continue
        if known is None or not count or view.is_dynamic(0, d):
            left[d] = right[d] = "*"
        elif size == 1:
            left[d], right[d] = "1", "."
        else:
            right[d] = f"(r{d} {left[d]})"
            sizes |= {f"r{d}": count, left[d]: size}
    text = f"{spell(left, *whole_inputs(view))} -> {spell(right)}"
    return Rule(text=text, sizes=sizes, linear=(0,), shape_operands=(ShapeOperand(1, "repeats"),), padding="moves")


def trilu(view: NodeView) -> Rule:
    """Positions in the last two dimensions are compared with each other, so both are whole."""
    names = [*words(view.rank(0))[:-2], "*", "*"]
    return Rule(text=f"{spell(names, *whole_inputs(view))} -> {spell(names)}", linear=(0,), padding="moves")


def expand_dims(view: NodeView) -> Rule:
    """Unsqueeze by one axis."""
    left, right, sizes = regroup(view.shape(0), view.out())
    return Rule(text=f"{spell(left, [])} -> {spell(right)}", sizes=sizes, linear=(0,), padding="moves")


def pad(view: NodeView) -> Rule:
    """Axes that are not padded pass; linear if the padding is zeros or elements of the input."""
    pads = view.static_value(1) if view.has(1) else np.asarray(view.attribute("pads", ()), dtype=np.int64)
    axes = view.static_value(3)
    if pads is None or not pads.size or (view.has(3) and axes is None):
        return whole(view, note="Pad by sizes that are not constant: replicated")
    places = range(view.rank(0)) if axes is None else [int(axis) % view.rank(0) for axis in axes]
    padded = {d for d, ends in zip(places, np.asarray(pads).reshape(2, -1).T, strict=True) if ends.any()}
    dims = ["*" if d in padded else name for d, name in enumerate(words(view.rank(0)))]
    zeros = not float(view.attribute("value", 0.0)) and (not view.has(2) or view.fact(2).zero)
    linear = zeros or view.attribute("mode", "constant") != "constant"
    return Rule(
        text=f"{spell(dims, *whole_inputs(view))} -> {spell(dims)}",
        linear=(0,) if linear else (),
        padding="moves" if linear else "finite",
        padding_ports=(0,),
    )


def _expand_dims_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    data, axis = present(inputs[0]), inputs[1]
    if axis is None or axis.value is None:
        raise ShapeError(f'ExpandDims "{node.name}" needs a constant axis; export the model with Unsqueeze.')
    place = int(axis.value.item()) % (len(data.shape) + 1)
    return [(data.dtype, (*data.shape[:place], 1, *data.shape[place:]))]


def _transpose_fault(node: ir.Node, shapes: Shapes) -> str | None:
    order = node.attributes.get("perm")
    if order is None or shapes[0] is None or sorted(order.as_ints()) == list(range(len(shapes[0]))):
        return None
    return f"{list(order.as_ints())} is no order of {len(shapes[0])} dimensions"


def _slice_fault(_: ir.Node, shapes: Shapes) -> str | None:
    lengths = {shape for shape in shapes[1:] if shape is not None}
    return "starts, ends, axes and steps are not equally many" if len(lengths) > 1 else None


op("Reshape", rule=reshape, value=evaluate.reshape, moves="form", operands=Operands(ranks={1: (1,)}), cost=nothing)
op("Flatten", rule=flatten, value=evaluate.flatten, moves="form", operands=Operands(axis=(0, 0)), cost=nothing)
op("Squeeze", rule=flatten, value=evaluate.squeeze, moves="form", operands=AXES_INPUT, cost=nothing)
op("Unsqueeze", rule=flatten, value=evaluate.unsqueeze, moves="form", operands=AXES_INPUT, cost=nothing)
op(
    "Transpose",
    rule=transpose,
    value=evaluate.transpose,
    moves="form",
    operands=Operands(check=_transpose_fault),
    total="always",
    cost=movement,
)
op(
    "Expand",
    rule=expand,
    value=evaluate.expand,
    moves="copies",
    made=evaluate.made_of_target,
    operands=Operands(ranks={1: (1,)}),
    cost=movement,
)
op(
    "ConstantOfShape",
    rule=constant_of_shape,
    value=evaluate.constant_of_shape,
    moves="copies",
    made=evaluate.made_of_target,
    operands=Operands(ranks={0: (1,)}),
    cost=generated,
)
op("Shape", rule=shape, of_shape=evaluate.shape, cost=generated)
op("Concat", rule=concat, value=evaluate.concat, operands=ALONG_AXIS, cost=copied)
op(
    "Split",
    rule=split,
    value=evaluate.split,
    moves="choice",
    operands=Operands(ranks={1: (1,)}, along_axis=True),
    cost=movement,
)
op(
    "Slice",
    rule=slice_,
    value=evaluate.slice_,
    moves="window",
    operands=Operands(ranks=dict.fromkeys(range(1, 5), (1,)), along_axis=True, check=_slice_fault),
    cost=movement,
)
op(
    "Tile",
    rule=tile,
    value=evaluate.tile,
    moves="copies",
    made=evaluate.made_by_tile,
    operands=Operands(ranks={1: (1,)}),
    cost=movement,
)
op("Trilu", rule=trilu, value=evaluate.trilu, cost=movement)
op("Trilu", domain=MICROSOFT, rule=trilu, shape=standard_shape("Trilu"), cost=movement)
op("ExpandDims", domain=MICROSOFT, rule=expand_dims, shape=_expand_dims_shape, moves="form", cost=nothing)
op("Pad", rule=pad, value=evaluate.pad, made=evaluate.made_by_pad, cost=movement)
op("Pad", domain=MICROSOFT, rule=pad, shape=standard_shape("Pad"), cost=movement)
