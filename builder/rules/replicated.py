"""Ops that every rank computes whole on purpose, each with the reason, which the build report shows."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from furiosa_llm.builder.rules.registry import MICROSOFT, RULES, NodeView, RuleFunction, shape_rule, whole
from furiosa_llm.builder.rules.rule import Rule
from furiosa_llm.builder.shapes.interpreter import Fact

_POSITIONS = "integers that every rank computes"
_RECURRENT = "its gates are stacked and every step needs the whole state of the step before"
_SIGNAL = "it transforms a whole signal in front of the model, where there is next to nothing to split"
_IMAGE = "it samples positions of an image, which transformers do next to their weights, not on them"
_SHARED = "its states come out in the buffers they go in by, so no rule for it can be proved"

REASONS: dict[tuple[str, str], str] = {
    **dict.fromkeys((("", op) for op in ("EyeLike", "NonZero", "Range", "Size")), _POSITIONS),
    **dict.fromkeys((("", op) for op in ("GRU", "LSTM", "RNN")), _RECURRENT),
    **dict.fromkeys((("", op) for op in ("DFT", "MelWeightMatrix", "STFT")), _SIGNAL),
    **dict.fromkeys((("", op) for op in ("BlackmanWindow", "HammingWindow", "HannWindow")), _SIGNAL),
    **dict.fromkeys((("", op) for op in ("AffineGrid", "CenterCropPad", "Col2Im", "GridSample", "RoiAlign")), _IMAGE),
    **dict.fromkeys((("", op) for op in ("DeformConv", "MaxRoiPool", "MaxUnpool")), _IMAGE),
    (MICROSOFT, "SparseAttention"): _SHARED,
    (MICROSOFT, "BranchwiseRMSNorm"): "no exporter writes it yet",
}
"""(domain, op type) -> why it is replicated."""


def _replicated(domain: str, op_type: str) -> RuleFunction:
    reason = REASONS[domain, op_type]
    note = None if reason == _POSITIONS else f"{op_type} is replicated: {reason}"

    def replicated(view: NodeView) -> Rule:
        return whole(view, note=note)

    return replicated


RULES.update({key: _replicated(*key) for key in REASONS})


@shape_rule("BranchwiseRMSNorm")
def _as_input(_: ir.Node, inputs: Sequence[Fact | None]) -> list[tuple[ir.DataType, tuple[int, ...]]]:
    data = inputs[0]
    assert data is not None
    return [(data.dtype, data.shape)]


@shape_rule("SparseAttention")
def _sparse_attention_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> list[tuple[ir.DataType, tuple[int, ...]]]:
    query, key, keys, values = inputs[0], inputs[1], inputs[3], inputs[4]
    assert query is not None
    assert keys is not None
    assert values is not None
    heads, kv = node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()
    width = query.shape[2] if key is not None else query.shape[2] // (heads + 2 * kv) * heads
    return [(query.dtype, (*query.shape[:2], width)), (keys.dtype, keys.shape), (values.dtype, values.shape)]
