"""Ops that every rank computes whole on purpose, each with the reason, which the build report shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from furiosa_llm.builder.rules import evaluate
from furiosa_llm.builder.rules.attention import attention_flops, cache_writes
from furiosa_llm.builder.rules.cost import (
    RMS_NORM,
    SIGMOID,
    Cost,
    copied,
    elementwise,
    generated,
    movement,
    product,
    reduction,
    spent,
)
from furiosa_llm.builder.rules.facts import Fact, present
from furiosa_llm.builder.rules.operands import Operands, Shapes
from furiosa_llm.builder.rules.registry import as_input, op
from furiosa_llm.builder.rules.view import MICROSOFT, Inferred, NodeView

_RECURRENT = "its gates are stacked and every step needs the whole state of the step before"
_SIGNAL = "it transforms a whole signal in front of the model, where there is next to nothing to split"
_IMAGE = "it samples positions of an image, which transformers do next to their weights, not on them"
_SHARED = "its states come out in the buffers they go in by, so no rule for it can be proved"


def _sparse_attention_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    query, key, keys, values = present(inputs[0]), inputs[1], present(inputs[3]), present(inputs[4])
    heads, kv = node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()
    width = query.shape[2] if key is not None else query.shape[2] // (heads + 2 * kv) * heads
    return [(query.dtype, (*query.shape[:2], width)), (keys.dtype, keys.shape), (values.dtype, values.shape)]


def _one_element_each(_: ir.Node, shapes: Shapes) -> str | None:
    single = all(shape is not None and math.prod(shape) == 1 for shape in shapes)
    return None if single else "start, limit and delta are not one element each"


_GATES = {
    "LSTM": (4, 3 * SIGMOID + 6),
    "GRU": (3, 2 * SIGMOID + 6),
    "RNN": (1, 1),
}
"""Op -> the number of gates, and the FLOPs that compute a new state from them."""


def _recurrent_cost(view: NodeView) -> Cost:
    """At every step each gate is a sum of products with input and state and a bias; then comes the new state."""
    rows = math.prod(view.shape(0)[:2])
    gates, after = _GATES[view.node.op_type]
    directions, _, hidden = view.shape(2)
    per_state = gates * (1 + view.has(3)) + after + (6 if view.node.op_type == "LSTM" and view.has(7) else 0)
    weights = math.prod(view.shape(1)) + math.prod(view.shape(2))
    return spent(view, rows * (2 * weights + directions * hidden * per_state))


def _fourier_cost(view: NodeView) -> Cost:
    """Fast transforms: 5 n log2 n FLOPs for n points, which STFT first multiplies by a window."""
    if view.node.op_type == "DFT":
        axis = view.static_value(2) if view.has(2) else view.attribute("axis", -2 if view.opset >= 20 else 1)
        points, length = math.prod(view.shape(0)[:-1]), view.shape(0)[int(axis)] if axis is not None else 1
    else:
        given = view.static_value(3)
        length = view.shape(2)[0] if view.has(2) else 1 if given is None else int(given)
        points = math.prod(view.out()[:2]) * length
    weighed = points if view.node.op_type == "STFT" and view.has(2) else 0
    return spent(view, weighed + 5 * points * math.ceil(math.log2(max(length, 2))))


def _sampled_cost(view: NodeView) -> Cost:
    """Weighted neighbours of each sampled position."""
    neighbours = {"bilinear": 2, "linear": 2, "avg": 2, "max": 2, "cubic": 4, "bicubic": 4}
    each = neighbours.get(view.attribute("mode", "linear"), 0) ** (view.rank(0) - 2)
    samples = max(int(view.attribute("sampling_ratio", 1)), 1) ** 2
    return elementwise(2 * each * samples)(view)


def _deformed_conv_cost(view: NodeView) -> Cost:
    """Conv over values that are each interpolated from four weighted neighbours."""
    taps, channels = math.prod(view.shape(1)[2:]), view.shape(0)[1]
    sampled = 8 * math.prod(view.out()) // view.out()[1] * channels * taps
    return product(view, math.prod(view.shape(1)[1:]), bias=3) + Cost(flops=sampled)


def _affine_grid_cost(view: NodeView) -> Cost:
    return product(view, view.shape(0)[-1])


def _sparse_attention_cost(view: NodeView) -> Cost:
    """All blocks count, including blocks that the mask leaves out."""
    batch, new, width = view.shape(0)
    heads, kv = int(view.attribute("num_heads")), int(view.attribute("kv_num_heads"))
    size, keys = width // (heads if view.has(1) else heads + 2 * kv), view.shape(3)[2]
    flops = attention_flops(view, batch * heads * new, keys, 2 * size, biased=False)
    return spent(view, flops, writes=cache_writes(view, (1, 2), new))


# Integers that every rank computes: nothing to report.


# Integers that every rank computes: nothing to report.
op("EyeLike", value=evaluate.eye_like, cost=generated)
op("NonZero", value=evaluate.nonzero, cost=reduction(1))
op(
    "Range",
    value=evaluate.arange,
    made=evaluate.made_by_range,
    operands=Operands(check=_one_element_each),
    cost=elementwise(2),
)
op("Size", of_shape=evaluate.size, cost=generated)

op("GRU", "LSTM", "RNN", replicated=_RECURRENT, cost=_recurrent_cost)
op("DFT", "STFT", replicated=_SIGNAL, cost=_fourier_cost)
op("MelWeightMatrix", replicated=_SIGNAL, cost=elementwise(6))
op("BlackmanWindow", replicated=_SIGNAL, cost=elementwise(9))
op("HammingWindow", "HannWindow", replicated=_SIGNAL, cost=elementwise(5))
op("AffineGrid", replicated=_IMAGE, cost=_affine_grid_cost)
op("CenterCropPad", replicated=_IMAGE, cost=movement)
op("Col2Im", replicated=_IMAGE, cost=reduction(1))
op("GridSample", "RoiAlign", replicated=_IMAGE, cost=_sampled_cost)
op("DeformConv", replicated=_IMAGE, cost=_deformed_conv_cost)
op("MaxRoiPool", replicated=_IMAGE, cost=reduction(1))
op("MaxUnpool", replicated=_IMAGE, cost=copied)
op("SparseAttention", domain=MICROSOFT, shape=_sparse_attention_shape, replicated=_SHARED, cost=_sparse_attention_cost)
op(
    "BranchwiseRMSNorm",
    domain=MICROSOFT,
    shape=as_input,
    replicated="no exporter writes it yet",
    cost=elementwise(RMS_NORM),
)
