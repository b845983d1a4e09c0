"""A model converted to float32 by numpy, as an oracle: it shares nothing with the product's conversion.

All weights are converted here and stored in float32. Float8 and float4 weights are dequantised here, block by block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from furiosa_llm.runtime.artifact.manifest import Manifest

Array = npt.NDArray[Any]

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
QUANTISED = (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2, TensorProto.FLOAT4E2M1)


def float32_model(model: ModelProto) -> ModelProto:
    """A copy of `model`, whose data is in it, that has no narrower numbers than float32."""
    own = ModelProto()
    own.CopyFrom(model)
    _dequantise(own.graph)
    _convert(own.graph)
    return own


def _dequantise(graph: GraphProto) -> None:
    """Replaces DequantizeLinear of float8 and float4 weights by its result, in the order of the nodes."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    known: dict[str, Array] = {}
    kept = []
    for node in graph.node:
        first = stored.get(node.input[0]) if node.input else None
        if node.op_type != "DequantizeLinear" or first is None or first.data_type not in QUANTISED:
            kept.append(node)
            continue
        attributes = {a.name: a.i for a in node.attribute}
        scale = known[node.input[1]] if node.input[1] in known else _wide(stored[node.input[1]])
        known[node.output[0]] = _dequantised(
            _wide(first), scale, attributes.get("axis", 1), attributes.get("block_size", 0)
        )
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in known.items())


def _dequantised(codes: Array, scale: Array, axis: int, block: int) -> Array:
    if scale.size == 1:
        scale = scale.reshape(())
    elif block:
        scale = np.repeat(scale, block, axis=axis)[tuple(slice(n) for n in codes.shape)]
    else:
        scale = scale.reshape([-1 if d == axis % codes.ndim else 1 for d in range(codes.ndim)])
    numbers: Array = codes * scale
    return numbers


def _wide(tensor: TensorProto) -> Array:
    wide: Array = np.array(numpy_helper.to_array(tensor), dtype=np.float32)
    return wide


def _convert(graph: GraphProto) -> None:
    tensors = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in HALVES:
                attribute.i = TensorProto.FLOAT
            if attribute.HasField("t"):
                tensors.append(attribute.t)
            if attribute.HasField("g"):
                _convert(attribute.g)
    for tensor in tensors:
        if tensor.data_type in HALVES:
            tensor.CopyFrom(numpy_helper.from_array(_wide(tensor), tensor.name))
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in HALVES:
            value.type.tensor_type.elem_type = TensorProto.FLOAT


def greedy(model: ModelProto, prompt: Sequence[int], count: int, manifest: Manifest) -> list[int]:
    """`count` tokens of a decoder on plain onnxruntime; `manifest` says which outputs become which inputs."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = [value.name for value in model.graph.output]
    logits = next(info.name for info in manifest.outputs if info.role == "logits")
    sizes = {"batch": 1, "past": 0}
    states = {
        info.name: np.zeros([size if isinstance(size, int) else sizes[size] for size in info.shape], np.float32)
        for info in manifest.inputs
        if info.role == "state"
    }
    new, found, past = list(prompt), list[int](), 0
    while True:
        total = past + len(new)
        given = {
            "token_ids": np.array([new]),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(past, total)[None],
        }
        feeds = {info.name: given[info.role] for info in manifest.inputs if info.role in given}
        results = dict(zip(outputs, session.run(outputs, {**feeds, **states}), strict=True))
        states = {state.input: results[state.output] for state in manifest.states}
        found.append(int(results[logits].reshape(-1, results[logits].shape[-1])[-1].argmax()))
        if len(found) == count:
            return found
        new, past = [found[-1]], total


def narrowed(model: ModelProto, dtype: int = TensorProto.BFLOAT16) -> ModelProto:
    """A copy of a float32 `model`, whose data is in it, in `dtype`: weights, inputs, outputs and all between."""
    own = ModelProto()
    own.CopyFrom(model)
    _narrow(own.graph, dtype)
    for function in own.functions:
        _narrow_nodes(function.node, dtype)
    return own


def _narrow(graph: GraphProto, dtype: int) -> None:
    for tensor in graph.initializer:
        _narrow_tensor(tensor, dtype)
    _narrow_nodes(graph.node, dtype)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = dtype


def _narrow_nodes(nodes: Iterable[NodeProto], dtype: int) -> None:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
                attribute.i = dtype
            if attribute.HasField("t"):
                _narrow_tensor(attribute.t, dtype)
            if attribute.HasField("g"):
                _narrow(attribute.g, dtype)


def _narrow_tensor(tensor: TensorProto, dtype: int) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        kind = helper.tensor_dtype_to_np_dtype(dtype)
        limit = 65504.0 if dtype == TensorProto.FLOAT16 else 3.3e38  # what hides a score stays finite
        array = np.clip(numpy_helper.to_array(tensor), -limit, limit).astype(kind)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
