"""Reductions, softmax and normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from furiosa_llm.builder.rule import Rule
from furiosa_llm.builder.rules.registry import MICROSOFT, NodeView, rule, shape_rule, spell, whole, words
from furiosa_llm.builder.shapes import Fact


def _tail(view: NodeView) -> list[list[str] | None]:
    return [None if v is None else ["*"] * len(view.facts[v].shape) for v in view.node.inputs[1:]]


def _reduction(view: NodeView, *, summed: bool, average: bool = False) -> Rule:
    rank = view.rank(0)
    axes = view.axes(1, default=tuple(range(rank)))
    if axes is None:
        return whole(view)
    if not axes and view.attribute("noop_with_empty_axes", 0):
        axes = ()
    elif not axes:
        axes = tuple(range(rank))
    reduced = {a % rank for a in axes}
    names = words(rank)
    dims = [n if summed or d not in reduced else "*" for d, n in enumerate(names)]
    left = [n if size != 1 else "1" for n, size in zip(dims, view.shape(0), strict=True)]
    if view.attribute("keepdims", 1):
        out = ["1" if d in reduced else n for d, n in enumerate(left)]
    else:
        out = [n for d, n in enumerate(left) if d not in reduced]
    contracted = [n for d, n in enumerate(left) if d in reduced and n not in ("1", "*")]
    clause = f"; reduce {' '.join(contracted)}" if contracted else ""
    return Rule(
        text=f"{spell(left, *_tail(view))} -> {spell(out)}{clause}", linear=(0,) if summed else (), average=average
    )


@rule("ReduceSum")
def reduce_sum(view: NodeView) -> Rule:
    """Local sums add up."""
    return _reduction(view, summed=True)


@rule("ReduceMean")
def reduce_mean(view: NodeView) -> Rule:
    """Local means, divided by the number of parts, add up."""
    return _reduction(view, summed=True, average=True)


@rule(
    "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare"
)
def reduce_other(view: NodeView) -> Rule:
    """Reduced axes must be whole."""
    return _reduction(view, summed=False)


def _along_axis(view: NodeView, default: int, outputs: int | None = None) -> Rule:
    """The axis must be whole, the rest passes."""
    rank = view.rank(0)
    axis = int(view.attribute("axis", default)) % rank
    names = ["*" if d == axis else n for d, n in enumerate(words(rank))]
    count = len(view.node.outputs) if outputs is None else outputs
    return Rule(text=f"{spell(names, *_tail(view))} -> {spell(*[names] * count)}")


@rule("Softmax", "LogSoftmax", "Hardmax", "LpNormalization")
def softmax(view: NodeView) -> Rule:
    """Everything along the axis is needed."""
    return _along_axis(view, -1)


@rule("TopK")
def top_k(view: NodeView) -> Rule:
    """Values and indices along the axis."""
    return _along_axis(view, -1)


@rule("CumSum")
def cumulative_sum(view: NodeView) -> Rule:
    """The axis, an input, must be whole; if it is not constant, everything must."""
    axis = view.static_value(1)
    if axis is None:
        return whole(view)
    names = ["*" if d == int(axis.item()) % view.rank(0) else n for d, n in enumerate(words(view.rank(0)))]
    return Rule(text=f"{spell(names, *_tail(view))} -> {spell(names)}", linear=(0,))


@rule("ArgMax", "ArgMin")
def arg_max(view: NodeView) -> Rule:
    """The axis must be whole and is dropped or kept as 1."""
    rank = view.rank(0)
    axis = int(view.attribute("axis", 0)) % rank
    names = ["*" if d == axis else n for d, n in enumerate(words(rank))]
    out = ["1" if d == axis else n for d, n in enumerate(names) if d != axis or view.attribute("keepdims", 1)]
    return Rule(text=f"{spell(names)} -> {spell(out)}")


@rule("OneHot")
def one_hot(view: NodeView) -> Rule:
    """The indices' dimensions pass, the new axis is whole."""
    rank = len(view.out())
    axis = int(view.attribute("axis", -1)) % rank
    names = words(rank - 1)
    out = [*names[:axis], "*", *names[axis:]]
    return Rule(text=f"{spell(names, *_tail(view))} -> {spell(out)}")


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def layer_normalization(view: NodeView) -> Rule:
    """Dimensions from the axis on must be whole."""
    rank = view.rank(0)
    axis = int(view.attribute("axis", -1)) % rank
    names = words(rank)
    dims = [n if d < axis else "*" for d, n in enumerate(names)]
    outputs = [
        dims if len(view.out(i)) == rank and i == 0 else ["."] * len(view.out(i)) for i in range(len(view.node.outputs))
    ]
    return Rule(text=f"{spell(dims, *_tail(view))} -> {spell(*outputs)}")


@shape_rule("SimplifiedLayerNormalization", domain="")
def _simplified_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> list[tuple[ir.DataType, tuple[int, ...]]]:
    data = inputs[0]
    assert data is not None
    statistics = (ir.DataType.FLOAT, (*data.shape[:-1], 1))
    return [(data.dtype, data.shape), *[statistics] * (len(node.outputs) - 1)]


@rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_layer_normalization(view: NodeView) -> Rule:
    """Two inputs are added, then normalised; output 3 is their sum."""
    names = words(view.rank(0))
    dims = [*names[:-1], "*"]
    skip = [n if s != 1 else "1" for n, s in zip(dims[-view.rank(1) :], view.shape(1), strict=True)]
    rest = [None if v is None else ["*"] * len(view.facts[v].shape) for v in view.node.inputs[2:]]
    outputs = [dims if i in (0, 3) else ["."] * len(view.out(i)) for i in range(len(view.node.outputs))]
    return Rule(text=f"{spell(dims, skip, *rest)} -> {spell(*outputs)}")


@shape_rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
def _skip_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> list[tuple[ir.DataType, tuple[int, ...]]]:
    data = inputs[0]
    assert data is not None
    statistics = (ir.DataType.FLOAT, (*data.shape[:-1], 1))
    shapes = [(data.dtype, data.shape), statistics, statistics, (data.dtype, data.shape)]
    return shapes[: len(node.outputs)]


@shape_rule("Gelu", "QuickGelu", "FastGelu", "BiasGelu")
def _activation_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> list[tuple[ir.DataType, tuple[int, ...]]]:
    data = inputs[0]
    assert data is not None
    return [(data.dtype, data.shape)]
