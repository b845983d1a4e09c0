"""Reductions, softmax and normalisation."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from furiosa_llm.builder.rules import evaluate
from furiosa_llm.builder.rules.cost import SOFTMAX, Cost, copied, elementwise, reduction
from furiosa_llm.builder.rules.facts import Fact, present
from furiosa_llm.builder.rules.operands import ALONG_AXIS, AXES_INPUT, Operands, Shapes, takes
from furiosa_llm.builder.rules.registry import op, spell, whole, whole_inputs, words
from furiosa_llm.builder.rules.rule import Padding, Rule
from furiosa_llm.builder.rules.view import MICROSOFT, Inferred, NodeView, attributes_of


def _reduced_axes(view: NodeView) -> set[int] | None:
    """The axes of a reduction, counted from the front; None if they are not known."""
    rank = view.rank(0)
    axes = view.axes(1, default=())
    if axes is None:
        return None
    if not axes and view.attribute("noop_with_empty_axes", 0):
        return set()
    return {axis % rank for axis in axes or range(rank)}


def _reduction(
    view: NodeView, *, summed: bool, linear: bool = True, average: bool = False, padding: Padding = "moves"
) -> Rule:
    reduced = _reduced_axes(view)
    if reduced is None:
        return whole(view)
    names = words(view.rank(0))
    dims = [n if summed or d not in reduced else "*" for d, n in enumerate(names)]
    left = [n if size != 1 else "1" for n, size in zip(dims, view.shape(0), strict=True)]
    if view.attribute("keepdims", 1):
        out = ["1" if d in reduced else n for d, n in enumerate(left)]
    else:
        out = [n for d, n in enumerate(left) if d not in reduced]
    contracted = [n for d, n in enumerate(left) if d in reduced and n not in ("1", "*")]
    clause = f"; reduce {' '.join(contracted)}" if contracted else ""
    text = f"{spell(left, *whole_inputs(view))} -> {spell(out)}{clause}"
    return Rule(text=text, linear=(0,) if summed and linear else (), average=average, padding=padding)


def reduce_sum(view: NodeView) -> Rule:
    """Local sums add up."""
    return _reduction(view, summed=True)


def reduce_mean(view: NodeView) -> Rule:
    """Local means, divided by the number of parts, add up; means of integers are rounded, so they do not."""
    exact = view.fact(0).dtype.is_floating_point()
    return _reduction(view, summed=exact, average=exact)


def reduce_magnitude(view: NodeView) -> Rule:
    """Sums of terms that are not linear in the elements: local sums add up, but partial sums do not pass through."""
    return _reduction(view, summed=True, linear=False)


def reduce_other(view: NodeView) -> Rule:
    """Reduced axes must be whole; zeros give zero."""
    return _reduction(view, summed=False)


def reduce_logarithm(view: NodeView) -> Rule:
    """Reduced axes must be whole; zeros may give minus infinity."""
    return _reduction(view, summed=False, padding="lost")


def _along_axis(view: NodeView, axes: Collection[int], padding: Padding = "finite") -> Rule:
    """The axes must be whole; all other dimensions pass."""
    names = ["*" if d in axes else n for d, n in enumerate(words(view.rank(0)))]
    outputs = [names] * len(view.node.outputs)
    return Rule(text=f"{spell(names, *whole_inputs(view))} -> {spell(*outputs)}", padding=padding)


def _axis(view: NodeView, default: int) -> int:
    return int(view.attribute("axis", default)) % view.rank(0)


def softmax(view: NodeView) -> Rule:
    """Everything along the axis is needed; before opset 13, everything from the axis on, which was 1 by default."""
    if view.opset < 13:
        return _along_axis(view, range(_axis(view, 1), view.rank(0)))
    return _along_axis(view, [_axis(view, -1)])


def lp_normalization(view: NodeView) -> Rule:
    """Everything along the axis is needed; zeros are divided by their norm."""
    return _along_axis(view, [_axis(view, -1)], padding="lost")


def top_k(view: NodeView) -> Rule:
    """Values and indices are compared along the axis, which must be whole."""
    return _along_axis(view, [_axis(view, -1)])


def cumulative_sum(view: NodeView) -> Rule:
    """The axis, an input, must be whole; if it is not constant, everything must."""
    axis = view.static_value(1)
    if axis is None:
        return whole(view)
    return dataclasses.replace(_along_axis(view, [int(axis.item()) % view.rank(0)], padding="moves"), linear=(0,))


def cumulative_product(view: NodeView) -> Rule:
    """The axis, an input, must be whole; if it is not constant, everything must."""
    axis = view.static_value(1)
    if axis is None:
        return whole(view)
    return _along_axis(view, [int(axis.item()) % view.rank(0)])


def arg_max(view: NodeView) -> Rule:
    """The axis must be whole and is dropped or kept as 1."""
    axis = _axis(view, 0)
    names = ["*" if d == axis else n for d, n in enumerate(words(view.rank(0)))]
    out = ["1" if d == axis else n for d, n in enumerate(names) if d != axis or view.attribute("keepdims", 1)]
    return Rule(text=f"{spell(names)} -> {spell(out)}", padding="finite")


def one_hot(view: NodeView) -> Rule:
    """The indices' dimensions pass, the new axis is whole."""
    rank = len(view.out())
    axis = int(view.attribute("axis", -1)) % rank
    names = words(rank - 1)
    out = [*names[:axis], "*", *names[axis:]]
    return Rule(text=f"{spell(names, *whole_inputs(view))} -> {spell(out)}", padding="finite")


def layer_normalization(view: NodeView) -> Rule:
    """Dimensions from the axis on must be whole; the statistics have size 1 there."""
    axis = _axis(view, -1)
    names = words(view.rank(0))
    dims = [n if d < axis else "*" for d, n in enumerate(names)]
    statistics = [n if d < axis else "1" for d, n in enumerate(names)]
    outputs = [dims, *[statistics] * (len(view.node.outputs) - 1)]
    return Rule(text=f"{spell(dims, *whole_inputs(view))} -> {spell(*outputs)}", padding=_padding_of_norm(view))


def _padding_of_norm(view: NodeView) -> Padding:
    """Rows of zeros are divided by the square root of epsilon."""
    return "finite" if view.attribute("epsilon", 1e-5) > 0 else "lost"


def _norm_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    """The shapes of a norm, also in opsets in which onnxruntime has the op and ONNX does not yet."""
    data = present(inputs[0])
    axis = attributes_of(node).get("axis", -1) % len(data.shape)
    statistics = (ir.DataType.FLOAT, (*data.shape[:axis], *[1] * (len(data.shape) - axis)))
    return [(data.dtype, data.shape), *[statistics] * (len(node.outputs) - 1)]


def skip_layer_normalization(view: NodeView) -> Rule:
    """Two inputs are added, then normalised; output 3 is their sum."""
    names = words(view.rank(0))
    dims = [*names[:-1], "*"]
    skip = [n if s != 1 else "1" for n, s in zip(dims[-view.rank(1) :], view.shape(1), strict=True)]
    statistics = [*names[:-1], "1"]
    outputs = [dims if i in (0, 3) else statistics for i in range(len(view.node.outputs))]
    return Rule(
        text=f"{spell(dims, skip, *whole_inputs(view, 2))} -> {spell(*outputs)}", padding=_padding_of_norm(view)
    )


def _skip_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    data = present(inputs[0])
    statistics = (ir.DataType.FLOAT, (*data.shape[:-1], 1))
    shapes = [(data.dtype, data.shape), statistics, statistics, (data.dtype, data.shape)]
    return shapes[: len(node.outputs)]


def _axis_input_fault(_: ir.Node, shapes: Shapes) -> str | None:
    return "the axis is not one element" if shapes[1] not in ((), (1,)) else None


def _skip_fault(_: ir.Node, shapes: Shapes) -> str | None:
    data, skip, scale = shapes[0], shapes[1], shapes[2]
    if data is None or skip is None or scale != data[-1:] or len(skip) > len(data):
        return "the sum, or the scale, does not fit the data"
    fits = all(s in (1, d) for s, d in zip(skip[::-1], data[::-1], strict=False))
    return None if fits else "what is added does not fit the data"


_SKIPPED = Operands(ranks={0: (2, 3), 1: (1, 2, 3), 2: (1,)}, check=_skip_fault)


_REDUCED = {
    "ReduceMean": (1, 1),
    "ReduceL1": (2, 0),
    "ReduceL2": (2, 1),
    "ReduceSumSquare": (2, 0),
    "ReduceLogSum": (1, 1),
    "ReduceLogSumExp": (4, 2),
}
"""FLOPs for each element of the input and of the output, where they are not 1 and 0."""


def _reduction_cost(view: NodeView) -> Cost:
    return reduction(*_REDUCED.get(view.node.op_type, (1, 0)))(view)


def _norm_cost(view: NodeView) -> Cost:
    """Deviations from the mean (or not: RMS), their squares, sum and quotient; then what is added and multiplied."""
    simple = "Simplified" in view.node.op_type or "RMS" in view.node.op_type
    operands = sum(view.has(port) for port in range(1, len(view.node.inputs)))
    return elementwise((3 if simple else 5) + operands)(view)


op("ReduceSum", rule=reduce_sum, value=evaluate.reduce(np.sum), operands=AXES_INPUT, cost=_reduction_cost)
op("ReduceMean", rule=reduce_mean, value=evaluate.reduce(np.mean), operands=AXES_INPUT, cost=_reduction_cost)
op("ReduceL1", "ReduceSumSquare", rule=reduce_magnitude, operands=AXES_INPUT, cost=_reduction_cost)
op("ReduceMax", rule=reduce_other, value=evaluate.reduce(np.max), operands=AXES_INPUT, cost=_reduction_cost)
op("ReduceMin", rule=reduce_other, value=evaluate.reduce(np.min), operands=AXES_INPUT, cost=_reduction_cost)
op("ReduceProd", rule=reduce_other, value=evaluate.reduce(np.prod), operands=AXES_INPUT, cost=_reduction_cost)
op("ReduceL2", rule=reduce_other, operands=AXES_INPUT, cost=_reduction_cost)
op("ReduceLogSum", "ReduceLogSumExp", rule=reduce_logarithm, operands=AXES_INPUT, cost=_reduction_cost)
op("Softmax", rule=softmax, operands=ALONG_AXIS, total="always", cost=elementwise(SOFTMAX))
op("LogSoftmax", rule=softmax, operands=ALONG_AXIS, total="always", cost=elementwise(SOFTMAX + 1))
op("Hardmax", rule=softmax, operands=ALONG_AXIS, cost=_reduction_cost)
op("LpNormalization", rule=lp_normalization, cost=elementwise(3))
op("TopK", rule=top_k, operands=ALONG_AXIS, cost=_reduction_cost)
op(
    "CumSum",
    rule=cumulative_sum,
    value=evaluate.cumulative_sum,
    operands=Operands(along_axis=True, check=_axis_input_fault),
    cost=_reduction_cost,
)
op("CumProd", rule=cumulative_product, cost=_reduction_cost)
op("ArgMax", rule=arg_max, value=evaluate.arg(np.argmax), operands=ALONG_AXIS, cost=_reduction_cost)
op("ArgMin", rule=arg_max, value=evaluate.arg(np.argmin), operands=ALONG_AXIS, cost=_reduction_cost)
op(
    "OneHot",
    rule=one_hot,
    value=evaluate.one_hot,
    made=evaluate.made_by_one_hot,
    operands=Operands(axis=(-1, 0)),
    cost=copied,
)
op(
    "LayerNormalization",
    rule=layer_normalization,
    shape=_norm_shape,
    operands=ALONG_AXIS,
    total="always",
    cost=_norm_cost,
)
op(
    "SimplifiedLayerNormalization",
    rule=layer_normalization,
    shape=_norm_shape,
    definition=takes(range(2, 3), (0, 1), outputs=2),
    operands=Operands(ranks={0: tuple(range(1, 9)), 1: (1,)}),
    cost=_norm_cost,
)
op("RMSNormalization", rule=layer_normalization, operands=ALONG_AXIS, total="always", cost=_norm_cost)
op(
    "SkipLayerNormalization",
    domain=MICROSOFT,
    rule=skip_layer_normalization,
    shape=_skip_shape,
    definition=takes(range(3, 6), (0, 1, 2), outputs=4),
    operands=_SKIPPED,
    cost=_norm_cost,
)
op(
    "SkipSimplifiedLayerNormalization",
    domain=MICROSOFT,
    rule=skip_layer_normalization,
    shape=_skip_shape,
    definition=takes(range(3, 5), (0, 1, 2), outputs=4),
    operands=_SKIPPED,
    cost=_norm_cost,
)
