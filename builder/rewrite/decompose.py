"""Decompose fused ops that cannot be split: each becomes ops that compute the same and can be split better."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from furiosa_llm.builder.rewrite.writer import NodeWriter
from furiosa_llm.builder.rules.view import MICROSOFT

_AXES_ARE_INPUT = 13
"""Since this opset, ReduceSum takes its axes as an input."""

_ROLLING = "sliding_window_cache"
"""A cache that holds a window's rows and starts again at its first: kept whole, it gives the same output, since the
op masks what lies before its window."""


class _Emitter(NodeWriter):
    """Writes new nodes for the node that is decomposed, named after it."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        super().__init__(graph, lambda label: f"{node.outputs[0].name}/{label}")
        self.graph, self.node = graph, node

    def input(self, port: int) -> ir.Value | None:
        """Input `port`, or None if it is absent."""
        return self.node.inputs[port] if port < len(self.node.inputs) else None


def decompose(graph: ir.Graph) -> None:
    """Decompose every node whose op is in `DECOMPOSITIONS`, in place."""
    for node in list(graph):
        if node.domain != MICROSOFT:
            continue
        if node.op_type == "MatMulNBits":
            _forget_order(node)
        node.attributes.pop(_ROLLING, None)
        found = DECOMPOSITIONS.get(node.op_type)
        if found is None:
            continue
        emitter = _Emitter(graph, node)
        results = found(emitter)
        emitter.put_before(node)
        for old, new in zip(node.outputs, results, strict=False):
            if new is None:
                continue
            if old.is_graph_output():
                new.name = old.name
                new.type, new.shape = old.type, old.shape
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _forget_order(node: ir.Node) -> None:
    """Remove the g_idx of a MatMulNBits whose rows are in order, as they are without it.

    With zero points it stays, because onnxruntime's kernel for g_idx then gives other numbers than the one without.
    """
    order = node.inputs[4] if len(node.inputs) > 4 else None
    tensor = None if order is None else order.const_value
    if tensor is None or node.inputs[3] is not None:
        return
    block = node.attributes["block_size"].as_int()
    try:
        found = tensor.numpy()
    except FileNotFoundError:  # planning continues without the weights
        return
    if np.array_equal(found, np.arange(found.size) // block):
        node.replace_input_with(4, None)


def _dynamic_quantize_matmul(emitter: _Emitter) -> list[ir.Value | None]:
    """Quantise all activations with one scale, then multiply the codes: the contraction can be split."""
    codes, scale, point = emitter.add_all("DynamicQuantizeLinear", [emitter.input(0)], ["codes", "codes/1", "codes/2"])
    inputs = [codes, emitter.input(1), scale, emitter.input(2), point, emitter.input(3), emitter.input(4)]
    while inputs[-1] is None:
        inputs.pop()
    return list(emitter.add_all("MatMulIntegerToFloat", inputs, ["product"], domain=MICROSOFT))


def _embed_layer_normalization(emitter: _Emitter) -> list[ir.Value | None]:
    """Look up the tables one by one, so that the large one can be split by words."""
    ids, segments, words, positions, segment_table, gamma, beta, mask, places = (emitter.input(p) for p in range(9))
    if places is None:  # 0, 1, ... of every sequence
        zero, one = (emitter.constant(np.array(v, dtype=np.int64), str(v)) for v in (0, 1))
        length = emitter.add("Gather", [emitter.add("Shape", [ids], "sizes"), one], "length")
        places = emitter.add("Range", [zero, length, one], "places")
    rows = [emitter.add("Gather", [words, ids], "words"), emitter.add("Gather", [positions, places], "positions")]
    total = emitter.add("Add", rows, "sum")
    if segments is not None and segment_table is not None:
        total = emitter.add("Add", [total, emitter.add("Gather", [segment_table, segments], "segments")], "all")
    epsilon = _epsilon(emitter.node)
    result = emitter.add("LayerNormalization", [total, gamma, beta], "norm", axis=-1, epsilon=epsilon)
    lengths = _mask_lengths(emitter, ids, mask) if len(emitter.node.outputs) > 1 else None
    return [result, lengths, total]


def _epsilon(node: ir.Node) -> float:
    found = node.attributes.get("epsilon")
    return 1e-12 if found is None else found.as_float()


def _mask_lengths(emitter: _Emitter, ids: ir.Value | None, mask: ir.Value | None) -> ir.Value:
    """The number of ones in the mask of each sequence; 0 without a mask, as the op defines."""
    int32 = int(ir.DataType.INT32)
    if mask is None:
        numbers = emitter.add("Cast", [ids], "numbers", to=int32)
        kept = emitter.add("Sub", [numbers, numbers], "nothing")
    else:
        one = emitter.constant(np.array(1, dtype=np.int32), "counted")
        ones = emitter.add("Equal", [emitter.add("Cast", [mask], "numbers", to=int32), one], "ones")
        kept = emitter.add("Cast", [ones], "kept", to=int32)
    if emitter.graph.opset_imports.get("", 1) < _AXES_ARE_INPUT:
        return emitter.add("ReduceSum", [kept], "lengths", axes=[1], keepdims=0)
    axis = emitter.vector(1, label="axis")
    return emitter.add("ReduceSum", [kept, axis], "lengths", keepdims=0)


DECOMPOSITIONS: dict[str, Callable[[_Emitter], list[ir.Value | None]]] = {
    "DynamicQuantizeMatMul": _dynamic_quantize_matmul,
    "EmbedLayerNormalization": _embed_layer_normalization,
}
"""Op of onnxruntime's own domain -> function that gives the values of its outputs (None: the output is not read)."""
