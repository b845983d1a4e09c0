"""Gather and Scatter in all their forms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from furiosa_llm.builder.errors import ShapeError
from furiosa_llm.builder.rules import evaluate
from furiosa_llm.builder.rules.cost import DEQUANTIZE, Cost, movement, spent, taken
from furiosa_llm.builder.rules.facts import Fact, present
from furiosa_llm.builder.rules.operands import ALONG_AXIS, Operands, takes
from furiosa_llm.builder.rules.registry import is_weight, op, spell, standard_shape, words
from furiosa_llm.builder.rules.rule import Rule
from furiosa_llm.builder.rules.view import MICROSOFT, Inferred, NodeView, attributes_of


def gather(view: NodeView) -> Rule:
    """A table (an initializer) may be split along the axis that is looked up; other data must be whole there.

    This holds for tables of numbers and of codes: one rank has the row, and the other ranks' zeros add nothing to it.
    """
    rank = view.rank(0)
    axis = int(view.attribute("axis", 0)) % rank
    data, indices = words(rank), words(view.rank(1), "i")
    kind = view.fact(0).dtype
    of_numbers = kind.is_floating_point() or kind in (ir.DataType.UINT8, ir.DataType.INT8)
    is_table = is_weight(view, 0) and rank > 1 and view.static_value(1) is None and of_numbers
    out = [*data[:axis], *indices, *data[axis + 1 :]]
    if not is_table:
        data[axis] = "*"
    clause = f"; lookup {data[axis]}" if is_table else ""
    text = f"{spell(data, indices)} -> {spell(out)}{clause}"
    return Rule(text=text, linear=(0,), axis=axis, padding="moves", padding_ports=(0,), indices=1)


def gather_elements(view: NodeView) -> Rule:
    """Dimensions of equal size pass, except the axis."""
    rank = view.rank(0)
    axis = int(view.attribute("axis", 0)) % rank
    names = words(rank)
    passes = [d != axis and a == b for d, (a, b) in enumerate(zip(view.shape(0), view.shape(1), strict=True))]
    data = [n if keep else "*" for n, keep in zip(names, passes, strict=True)]
    indices = [n if keep or d == axis else "*" for d, (n, keep) in enumerate(zip(names, passes, strict=True))]
    text = f"{spell(data, indices)} -> {spell(indices)}"
    return Rule(text=text, linear=(0,), padding="moves", padding_ports=(0,), indices=1)


def scatter_elements(view: NodeView) -> Rule:
    """Dimensions of equal size pass, except the axis; jointly linear in data and updates."""
    rank = view.rank(0)
    axis = int(view.attribute("axis", 0)) % rank
    same = zip(view.shape(0), view.shape(1), strict=True)
    dims = [n if d != axis and a == b else "*" for d, (n, (a, b)) in enumerate(zip(words(rank), same, strict=True))]
    linear = (0, 2) if view.attribute("reduction", "none") in ("none", "add") else ()
    text = f"{spell(dims, dims, dims)} -> {spell(dims)}"
    return Rule(text=text, linear=linear, padding="moves", padding_ports=(0, 2), indices=1)


def gather_nd(view: NodeView) -> Rule:
    """Indexed dimensions must be whole, the slices' dimensions pass."""
    batch = int(view.attribute("batch_dims", 0))
    depth = view.shape(1)[-1]
    data, indices = words(view.rank(0)), words(view.rank(1) - 1, "i")
    data[batch : batch + depth] = ["*"] * depth
    indices[:batch] = data[:batch]
    out = [*indices, *data[batch + depth :]]
    text = f"{spell(data, [*indices, '*'])} -> {spell(out)}"
    return Rule(text=text, linear=(0,), padding="moves", padding_ports=(0,), indices=1)


def scatter_nd(view: NodeView) -> Rule:
    """Indexed dimensions must be whole, the slices' dimensions pass; jointly linear in data and updates."""
    depth = view.shape(1)[-1]
    data = words(view.rank(0))
    data[:depth] = ["*"] * depth
    indices = ["*"] * view.rank(1)
    updates = [*indices[:-1], *data[depth:]]
    linear = (0, 2) if view.attribute("reduction", "none") in ("none", "add") else ()
    text = f"{spell(data, indices, updates)} -> {spell(data)}"
    return Rule(text=text, linear=linear, padding="moves", padding_ports=(0, 2), indices=1)


def tensor_scatter(view: NodeView) -> Rule:
    """New positions are written into a cache on one axis; everything else passes. Jointly linear in both."""
    rank = view.rank(0)
    axis = int(view.attribute("axis", -2)) % rank
    dims = ["*" if d == axis else n for d, n in enumerate(words(rank))]
    operands = [dims, dims, *([[dims[0]]] if view.has(2) else [])]
    text = f"{spell(*operands)} -> {spell(dims)}"
    return Rule(text=text, linear=(0, 1), padding="moves", padding_ports=(0, 1), indices=2)


def compress(view: NodeView) -> Rule:
    """A constant selection along one axis, or without an axis, from all elements."""
    axis = view.attribute("axis")
    kept = None if axis is None else int(axis) % view.rank(0)
    dims = ["*" if kept in (None, d) else n for d, n in enumerate(words(view.rank(0)))]
    out = ["*"] if kept is None else dims
    return Rule(text=f"{spell(dims, ['*'])} -> {spell(out)}", linear=(0,), padding="moves", padding_ports=(0,))


def _compress_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    data, condition = present(inputs[0]), inputs[1]
    if condition is None or condition.value is None:
        raise ShapeError(
            f'Compress "{node.name}" keeps as many elements as its condition says when the model runs, expected a '
            "constant condition; export the model without a selection by data."
        )
    axis, count = attributes_of(node).get("axis"), int(condition.value.sum())
    shape = list(data.shape)
    if axis is None:
        return [(data.dtype, (count,))]
    shape[axis] = count
    return [(data.dtype, tuple(shape))]


def reverse_sequence(view: NodeView) -> Rule:
    """The first positions of each sequence, as many as its length, are put into reverse order."""
    time = int(view.attribute("time_axis", 0)) % view.rank(0)
    names = words(view.rank(0))
    lengths = names[int(view.attribute("batch_axis", 1)) % view.rank(0)]
    dims = ["*" if d == time else n for d, n in enumerate(names)]
    text = f"{spell(dims, [lengths])} -> {spell(dims)}"
    return Rule(text=text, linear=(0,), padding="moves", padding_ports=(0,), indices=1)


def gather_block_quantized(view: NodeView) -> Rule:
    """A quantised table, split along the axis that is looked up."""
    indices = words(view.rank(1), "i")
    table = ["v", *["*"] * (view.rank(0) - 1)]
    operands: list[list[str] | None] = [table, indices, ["v", *["*"] * (view.rank(2) - 1)]]
    if view.has(3):
        operands.append(["v", *["*"] * (view.rank(3) - 1)])
    out = [*indices, *["*"] * (view.rank(0) - 1)]
    if view.attribute("gather_axis", 0) != 0 or view.attribute("quantize_axis", 1) == 0 or not is_weight(view, 0):
        operands[0] = ["*"] * view.rank(0)
        operands[2:] = [["*"] * view.rank(p) for p in range(2, len(operands))]
        return Rule(text=f"{spell(*operands)} -> {spell(out)}", padding="finite", indices=1)
    return Rule(text=f"{spell(*operands)} -> {spell(out)}; lookup v", axis=0, padding="finite", indices=1)


def _gather_block_quantized_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    data, indices, scales = present(inputs[0]), present(inputs[1]), present(inputs[2])
    attributes = attributes_of(node)
    axis = attributes.get("gather_axis", 0) % len(data.shape)
    packed = 8 // attributes.get("bits", 4) if data.dtype is ir.DataType.UINT8 else 1
    rest = (*data.shape[axis + 1 : -1], data.shape[-1] * packed)
    return [(scales.dtype, (*data.shape[:axis], *indices.shape, *rest))]


def _gather_reads(view: NodeView) -> dict[int, int]:
    """Rows of the table, as many as there are indices."""
    axis = int(view.attribute("axis", 0)) % view.rank(0)
    return taken(view, (0,), axis, math.prod(view.shape(1)))


def _gather_cost(view: NodeView) -> Cost:
    return spent(view, 0, reads=_gather_reads(view))


def _gather_block_quantized_reads(view: NodeView) -> dict[int, int]:
    """Rows of codes, scales and zero points, as many as there are indices."""
    axis = int(view.attribute("gather_axis", 0)) % view.rank(0)
    return taken(view, (0, 2, 3), axis, math.prod(view.shape(1)))


def _gather_block_quantized_cost(view: NodeView) -> Cost:
    return spent(view, DEQUANTIZE * math.prod(view.out()), reads=_gather_block_quantized_reads(view))


def _gather_nd_reads(view: NodeView) -> dict[int, int]:
    """Slices of the data, as many as there are indices."""
    *rows, depth = view.shape(1)
    start = int(view.attribute("batch_dims", 0))
    slices = math.prod(view.shape(0)[: start + depth])
    return {0: view.fact(0).nbytes * min(math.prod(rows), slices) // max(slices, 1)}


def _gather_nd_cost(view: NodeView) -> Cost:
    return spent(view, 0, reads=_gather_nd_reads(view))


def _scatter_cost(view: NodeView) -> Cost:
    """The data is copied, and an update is written over it or reduced with it."""
    reduced = view.attribute("reduction", "none") != "none"
    return spent(view, math.prod(view.shape(2)) if reduced else 0)


def _tensor_scatter_cost(view: NodeView) -> Cost:
    """New positions are written into the cache."""
    return spent(view, 0, reads={0: 0}, writes={0: view.fact(1).nbytes})


op(
    "Gather",
    rule=gather,
    value=evaluate.gather,
    moves="choice",
    operands=ALONG_AXIS,
    reads=_gather_reads,
    cost=_gather_cost,
)
op("GatherElements", rule=gather_elements, value=evaluate.gather_elements, operands=ALONG_AXIS, cost=movement)
op("ScatterElements", rule=scatter_elements, value=evaluate.scatter_elements, operands=ALONG_AXIS, cost=_scatter_cost)
op("Scatter", rule=scatter_elements, cost=_scatter_cost)
op(
    "GatherND",
    rule=gather_nd,
    value=evaluate.gather_nd,
    moves="choice",
    reads=_gather_nd_reads,
    cost=_gather_nd_cost,
)
op(
    "GatherND",
    domain=MICROSOFT,
    rule=gather_nd,
    shape=standard_shape("GatherND"),
    moves="choice",
    reads=_gather_nd_reads,
    cost=_gather_nd_cost,
)
op("ScatterND", rule=scatter_nd, value=evaluate.scatter_nd, cost=_scatter_cost)
op("TensorScatter", rule=tensor_scatter, cost=_tensor_scatter_cost)
op("Compress", rule=compress, shape=_compress_shape, value=evaluate.compress, cost=movement)
op("ReverseSequence", rule=reverse_sequence, cost=movement)
op(
    "GatherBlockQuantized",
    domain=MICROSOFT,
    rule=gather_block_quantized,
    shape=_gather_block_quantized_shape,
    definition=takes(range(3, 5), (0, 1, 2)),
    operands=Operands(ranks={0: (2, 3)}),
    reads=_gather_block_quantized_reads,
    cost=_gather_block_quantized_cost,
)
