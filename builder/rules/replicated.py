"""Ops that every rank computes whole on purpose, each with the reason, which the build report shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from furiosa_llm.builder.rules import evaluate
from furiosa_llm.builder.rules.facts import Fact, present
from furiosa_llm.builder.rules.operands import Operands, Shapes
from furiosa_llm.builder.rules.registry import as_input, op
from furiosa_llm.builder.rules.view import MICROSOFT, Inferred

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


# Integers that every rank computes: nothing to report.
op("EyeLike", value=evaluate.eye_like)
op("NonZero", value=evaluate.nonzero)
op("Range", value=evaluate.arange, made=evaluate.made_by_range, operands=Operands(check=_one_element_each))
op("Size", of_shape=evaluate.size)

op("GRU", "LSTM", "RNN", replicated=_RECURRENT)
op("DFT", "MelWeightMatrix", "STFT", "BlackmanWindow", "HammingWindow", "HannWindow", replicated=_SIGNAL)
op("AffineGrid", "CenterCropPad", "Col2Im", "GridSample", "RoiAlign", replicated=_IMAGE)
op("DeformConv", "MaxRoiPool", "MaxUnpool", replicated=_IMAGE)
op("SparseAttention", domain=MICROSOFT, shape=_sparse_attention_shape, replicated=_SHARED)
op("BranchwiseRMSNorm", domain=MICROSOFT, shape=as_input, replicated="no exporter writes it yet")
