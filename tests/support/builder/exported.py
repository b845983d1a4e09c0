"""Exports of kinds that people report: graphs without weights in fixtures/exports, filled with random numbers here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, TensorProto, numpy_helper

EXPORTS = Path(__file__).parents[3] / "fixtures" / "exports"
Change = Callable[[ModelProto], None]


def exported(name: str, folder: Path, change: Change | None = None) -> Path:
    """The export `name` with weights, as model.onnx in `folder`, after `change`."""
    path = folder / "model.onnx"
    model = onnx.load(EXPORTS / f"{name}.onnx", load_external_data=False)
    if change is not None:
        change(model)
    _fill(model)
    onnx.save(model, path)
    return path


def _fill(model: ModelProto) -> None:
    """Give every tensor that has its data elsewhere small numbers (float8: scales), or any codes."""
    random = np.random.default_rng(0)
    for tensor in _tensors(model.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        shape = tuple(tensor.dims)
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.BFLOAT16):
            array = (random.standard_normal(shape) / np.sqrt(shape[0])).astype(kind)
        elif tensor.data_type == TensorProto.FLOAT8E4M3FN:
            array = random.uniform(0.5, 2, shape).astype(kind)
        elif tensor.data_type == TensorProto.FLOAT4E2M1:
            array = (2 * random.standard_normal(shape)).astype(kind)
        else:
            array = random.integers(0, 256, shape).astype(kind)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from _tensors(attribute.g)


def renamed(model: ModelProto) -> None:
    """Give inputs and outputs names that say nothing, and take the names of all dynamic dimensions away."""
    constants = {tensor.name for tensor in model.graph.initializer}
    names = {value.name: f"x{i}" for i, value in enumerate(model.graph.input) if value.name not in constants}
    names |= {value.name: f"y{i}" for i, value in enumerate(model.graph.output)}
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
        for dim in value.type.tensor_type.shape.dim:
            dim.ClearField("dim_param")
    for node in model.graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(name, name) for name in values]
