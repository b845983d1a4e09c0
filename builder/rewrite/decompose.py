"""Take fused ops apart that could not be split whole: each becomes ops that give the same and split better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from furiosa_llm.builder.rules.registry import MICROSOFT

_AXES_ARE_INPUT = 13
"""Since this opset, ReduceSum takes its axes as an input."""


class _Emitter:
    """Puts nodes in front of the one that is taken apart, named after it."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node
        self._name = str(node.outputs[0].name)

    def input(self, port: int) -> ir.Value | None:
        """Input `port`, or None if it is absent."""
        return self.node.inputs[port] if port < len(self.node.inputs) else None

    def emit(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        label: str,
        *,
        domain: str = "",
        count: int = 1,
        attributes: Mapping[str, int | float | list[int]] | None = None,
    ) -> list[ir.Value]:
        """A node; its outputs are named after the label."""
        given = [ir.convenience.convert_attribute(name, value) for name, value in (attributes or {}).items()]
        name = f"{self._name}/{label}"
        node = ir.Node(domain, op_type, inputs, given, num_outputs=count, name=name)
        for i, value in enumerate(node.outputs):
            value.name = name if i == 0 else f"{name}/{i}"
        self.graph.insert_before(self.node, node)
        return list(node.outputs)

    def one(
        self, op_type: str, inputs: Sequence[ir.Value | None], label: str, **attributes: int | float | list[int]
    ) -> ir.Value:
        """A node of the standard domain with one output."""
        return self.emit(op_type, inputs, label, attributes=attributes)[0]

    def constant(self, array: npt.NDArray[Any], label: str) -> ir.Value:
        """A small constant."""
        name = f"{self._name}/{label}"
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
        self.graph.register_initializer(value)
        return value


def decompose(graph: ir.Graph) -> None:
    """Take every node apart for which there is a way (see `DECOMPOSITIONS`), in place."""
    for node in list(graph):
        if node.domain != MICROSOFT:
            continue
        if node.op_type == "MatMulNBits":
            _forget_order(node)
        found = DECOMPOSITIONS.get(node.op_type)
        if found is None:
            continue
        results = found(_Emitter(graph, node))
        for old, new in zip(node.outputs, results, strict=False):
            if new is None:
                continue
            if old.is_graph_output():
                new.name = old.name
                new.type, new.shape = old.type, old.shape
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _forget_order(node: ir.Node) -> None:
    """Take away the g_idx of a MatMulNBits whose rows are in order, as they are without it.

    Not beside zero points, of which onnxruntime's kernel for g_idx makes other numbers than the one without.
    """
    order = node.inputs[4] if len(node.inputs) > 4 else None
    tensor = None if order is None else order.const_value
    if tensor is None or node.inputs[3] is not None:
        return
    block = node.attributes["block_size"].as_int()
    try:
        found = tensor.numpy()
    except FileNotFoundError:  # planning goes on without the weights
        return
    if np.array_equal(found, np.arange(found.size) // block):
        node.replace_input_with(4, None)


def _dynamic_quantize_matmul(emitter: _Emitter) -> list[ir.Value | None]:
    """Codes with one scale for all activations, then a product whose contraction can be split."""
    codes, scale, point = emitter.emit("DynamicQuantizeLinear", [emitter.input(0)], "codes", count=3)
    inputs = [codes, emitter.input(1), scale, emitter.input(2), point, emitter.input(3), emitter.input(4)]
    while inputs[-1] is None:
        inputs.pop()
    return list(emitter.emit("MatMulIntegerToFloat", inputs, "product", domain=MICROSOFT))


def _embed_layer_normalization(emitter: _Emitter) -> list[ir.Value | None]:
    """Tables that are looked up one by one, so that the large one can be split by words."""
    ids, segments, words, positions, segment_table, gamma, beta, mask, places = (emitter.input(p) for p in range(9))
    if places is None:  # 0, 1, ... of every sequence
        zero, one = (emitter.constant(np.array(v, dtype=np.int64), str(v)) for v in (0, 1))
        length = emitter.one("Gather", [emitter.one("Shape", [ids], "sizes"), one], "length")
        places = emitter.one("Range", [zero, length, one], "places")
    rows = [emitter.one("Gather", [words, ids], "words"), emitter.one("Gather", [positions, places], "positions")]
    total = emitter.one("Add", rows, "sum")
    if segments is not None and segment_table is not None:
        total = emitter.one("Add", [total, emitter.one("Gather", [segment_table, segments], "segments")], "all")
    attributes = {"axis": -1, "epsilon": _epsilon(emitter.node)}
    (result,) = emitter.emit("LayerNormalization", [total, gamma, beta], "norm", attributes=attributes)
    lengths = _mask_lengths(emitter, ids, mask) if len(emitter.node.outputs) > 1 else None
    return [result, lengths, total]


def _epsilon(node: ir.Node) -> float:
    found = node.attributes.get("epsilon")
    return 1e-12 if found is None else found.as_float()


def _mask_lengths(emitter: _Emitter, ids: ir.Value | None, mask: ir.Value | None) -> ir.Value:
    """How many ones there are in the mask of each sequence; 0 without a mask, as the op says."""
    int32 = int(ir.DataType.INT32)
    if mask is None:
        numbers = emitter.one("Cast", [ids], "numbers", to=int32)
        kept = emitter.one("Sub", [numbers, numbers], "nothing")
    else:
        one = emitter.constant(np.array(1, dtype=np.int32), "counted")
        ones = emitter.one("Equal", [emitter.one("Cast", [mask], "numbers", to=int32), one], "ones")
        kept = emitter.one("Cast", [ones], "kept", to=int32)
    if emitter.graph.opset_imports.get("", 1) < _AXES_ARE_INPUT:
        return emitter.one("ReduceSum", [kept], "lengths", axes=[1], keepdims=0)
    axis = emitter.constant(np.array([1], dtype=np.int64), "axis")
    return emitter.one("ReduceSum", [kept, axis], "lengths", keepdims=0)


DECOMPOSITIONS: dict[str, Callable[[_Emitter], list[ir.Value | None]]] = {
    "DynamicQuantizeMatMul": _dynamic_quantize_matmul,
    "EmbedLayerNormalization": _embed_layer_normalization,
}
"""Op of onnxruntime's own domain -> what gives the values of its outputs (None: the output is not read)."""
