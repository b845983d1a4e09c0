"""Cut a part of a graph out as a model: from chosen values back to a boundary and to the graph's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx
import onnx_ir as ir

from furiosa_llm.builder.rewrite.fusion.match import LeftAloneError
from furiosa_llm.builder.shapes.interpreter import Facts

_MAX_CONSTANT_NBYTES = 2**24
"""The most bytes of all constants of a cut: an attention has small ones, so more bytes are a sign of weights."""
_IR_VERSION = 10


def cut(graph: ir.Graph, outputs: Sequence[ir.Value], boundary: Iterable[ir.Value], facts: Facts) -> onnx.ModelProto:
    """The nodes that compute `outputs` from `boundary` and inputs of `graph`, as a model.

    `facts` give the types of its inputs and their numbers of dimensions. Raises LeftAloneError if the nodes need large
    constants, or constants whose data is absent.
    """
    ends = set(boundary)
    nodes, leaves = _ancestors(outputs, ends)
    constants = [value for value in leaves if value.is_initializer() and value not in ends]
    if sum(v.const_value.nbytes for v in constants if v.const_value is not None) > _MAX_CONSTANT_NBYTES:
        raise LeftAloneError("its mask is computed from large weights")
    try:
        initializers = [_tensor(value) for value in constants]
    except FileNotFoundError as error:
        raise LeftAloneError("its mask is computed from constants whose data is absent") from error
    inputs = [_value_info(value, facts) for value in leaves if value in ends or not value.is_initializer()]
    proto = onnx.helper.make_graph(
        [ir.to_proto(node) for node in nodes],
        "cut",
        inputs,
        [onnx.ValueInfoProto(name=str(value.name)) for value in dict.fromkeys(outputs)],
        initializers,
    )
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in graph.opset_imports.items()]
    return onnx.helper.make_model(proto, opset_imports=opsets, ir_version=_IR_VERSION)


def _ancestors(outputs: Sequence[ir.Value], ends: set[ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
    """The nodes that `outputs` depend on, in topological order, and the values that they read but do not give."""
    nodes: dict[ir.Node, None] = {}
    leaves: dict[ir.Value, None] = {}
    stack: list[tuple[ir.Value, bool]] = [(value, False) for value in outputs]
    while stack:
        value, done = stack.pop()
        node = value.producer()
        if value in ends or node is None:
            leaves[value] = None
        elif done:
            nodes[node] = None
        elif node not in nodes:
            stack.append((value, True))
            stack += [(v, False) for v in node.inputs if v is not None]
    return list(nodes), list(leaves)


def _tensor(value: ir.Value) -> onnx.TensorProto:
    tensor = value.const_value
    assert tensor is not None
    if isinstance(tensor, ir.ExternalTensor):
        tensor = ir.Tensor(tensor.numpy(), dtype=tensor.dtype)
    proto: onnx.TensorProto = ir.to_proto(tensor)
    proto.name = str(value.name)
    return proto


def _value_info(value: ir.Value, facts: Facts) -> onnx.ValueInfoProto:
    fact = facts[value]
    return onnx.helper.make_tensor_value_info(str(value.name), int(fact.dtype), [None] * len(fact.shape))
