"""Rewrites of a decoder's graph that leave its interface: where weights lie, functions, branches, versions.

Each returns whether it applies.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from tests.support.builder.parity import Case
from tests.support.exports import Arrays, Export

_NEWEST = 24
_RAISED = 18
"""Since this version what decoders have means the same in every later one."""


def constant_nodes(x: Export, rng: random.Random) -> bool:
    """Constant nodes in the place of initializers, some or all."""
    share = rng.choice((0.3, 1.0))
    for value in list(x.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or value.is_graph_input() or rng.random() > share:
            continue
        x.graph.initializers.pop(str(value.name))
        made = x.op("Constant", [], value=tensor)
        value.replace_all_uses_with(made)
    return True


def transposed_weights(x: Export, rng: random.Random) -> bool:
    """Weights stored the other way round, and a Transpose of each."""
    done = False
    for node in list(x.graph):
        value = node.inputs[1] if node.op_type == "MatMul" and len(node.inputs) == 2 else None
        if value is None or value.const_value is None or len(value.const_value.shape) != 2 or rng.random() < 0.3:
            continue
        turned = x.constant(value.const_value.numpy().T, value.const_value.dtype.numpy())
        node.replace_input_with(1, x.op("Transpose", [turned], perm=[1, 0]))
        done = True
    return done


def products_as_einsum(x: Export, rng: random.Random) -> bool:
    """Products of three dimensions with a weight, written as Einsum."""
    done = False
    for node in list(x.graph):
        if node.op_type != "MatMul" or node.domain or rng.random() < 0.5:
            continue
        left, right = node.inputs
        weight = right is not None and right.is_initializer() and right.shape is not None and len(right.shape) == 2
        if left is None or not weight:
            continue
        product = x.op("Einsum", [left, right], equation="...k,kn->...n")
        _replace(x, node, product)
        done = True
    return done


def products_as_gemm(x: Export, rng: random.Random) -> bool:
    """Products with a weight, as a Gemm of two dimensions between Reshapes, its weight stored the other way round."""
    if any(node.op_type == "Attention" and not node.domain for node in x.graph):
        return False  # onnxruntime infers wrong shapes from operands of unknown shape
    done = False
    for node in list(x.graph):
        right = node.inputs[1] if node.op_type == "MatMul" and not node.domain else None
        if right is None or right.const_value is None or len(right.const_value.shape) != 2 or rng.random() < 0.5:
            continue
        rows, columns = right.const_value.shape.numpy()
        left, turned = node.inputs[0], rng.random() < 0.5
        weight = x.constant(right.const_value.numpy().T, right.const_value.dtype.numpy()) if turned else right
        flat = x.op("Reshape", [left, x.constant([-1, rows])])
        product = x.op("Gemm", [flat, weight], transB=int(turned))
        front = x.op("Slice", [x.op("Shape", [left]), x.constant([0]), x.constant([-1])])
        shape = x.op("Concat", [front, x.constant([columns])], axis=0)
        _replace(x, node, x.op("Reshape", [product, shape]))
        done = True
    return done


def idle_nodes(x: Export, rng: random.Random) -> bool:
    """Nodes that do nothing: Identity, Dropout, Casts to the same type."""
    for node in rng.sample(list(x.graph), min(len(x.graph), rng.choice((1, 5, 20)))):
        value = node.outputs[0] if node.outputs else None
        if value is None or value.is_graph_output() or not value.name or not value.uses():
            continue
        uses = list(value.uses())
        dtype = value.dtype
        op_type = rng.choice(("Identity", "Dropout", "Cast"))
        if (op_type == "Dropout" and dtype is not ir.DataType.FLOAT) or (op_type == "Cast" and dtype is None):
            op_type = "Identity"
        attributes: dict[str, Any] = {"to": int(dtype)} if op_type == "Cast" and dtype is not None else {}
        idle = x.op(op_type, [value], **attributes)
        for user, port in uses:
            user.replace_input_with(port, idle)
    return True


def newer_opset(x: Export, rng: random.Random) -> bool:
    """A later version of the operators, in which these mean the same."""
    version = x.graph.opset_imports[""]
    if not _RAISED <= version < _NEWEST:
        return False
    newer = rng.randint(version + 1, _NEWEST)
    for graph in (x.graph, *(function.graph for function in x.model.functions.values())):
        graph.opset_imports[""] = newer
    return True


def functions(x: Export, rng: random.Random) -> bool:
    """Runs of nodes as functions of the model."""
    x.graph.sort()
    for _ in range(rng.choice((1, 2, 4))):
        nodes = list(x.graph)
        length = rng.choice((2, 10, len(nodes) // 4, len(nodes) // 2))
        start = rng.randrange(max(1, len(nodes) - length))
        _as_function(x, nodes[start : start + length])
    return True


def _as_function(x: Export, nodes: list[ir.Node]) -> None:
    """Make a run of nodes one call."""
    inside = set(nodes)
    made = {value for node in nodes for value in node.outputs}
    if any(
        attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for n in nodes for attr in n.attributes.values()
    ):
        return
    taken = list(dict.fromkeys(v for n in nodes for v in n.inputs if v is not None and v not in made))
    given = [v for v in made if v.is_graph_output() or any(user not in inside for user, _ in v.uses())]
    given.sort(key=lambda v: str(v.name))
    if not given:
        return
    name = x.fresh("Part")
    inner = [ir.Value(name=f"in_{i}") for i in range(len(taken))]
    call = ir.node(name, taken, domain="odd.functions", num_outputs=len(given), name=x.fresh("call"))
    for value, outer in zip(given, call.outputs, strict=True):
        outer.type, outer.shape = value.type, value.shape
        uses = [(user, port) for user, port in value.uses() if user not in inside]
        for user, port in uses:
            user.replace_input_with(port, outer)
        if value.is_graph_output():
            shown = str(value.name)
            x.graph.outputs[x.graph.outputs.index(value)] = outer
            for cache in x.caches:
                cache.present = outer if cache.present is value else cache.present
            x.logits = outer if x.logits is value else x.logits
            value.name, outer.name = x.fresh("inner"), shown
        else:
            outer.name = x.fresh("out")
    for node in nodes:
        for port, operand in enumerate(node.inputs):
            if operand is not None and operand not in made:
                node.replace_input_with(port, inner[taken.index(operand)])
    x.graph.insert_before(nodes[0], call)
    x.graph.remove(nodes)
    graph = ir.Graph(inner, given, nodes=nodes, opset_imports=dict(x.graph.opset_imports), name=name)
    function = ir.Function("odd.functions", name, graph=graph, attributes=[])
    x.model.functions[function.identifier()] = function
    x.graph.opset_imports["odd.functions"] = 1


def listed_initializers(x: Export, _: random.Random) -> bool:
    """Initializers among the inputs, as the first versions of ONNX had them."""

    def change(proto: onnx.ModelProto) -> None:
        if proto.graph.node[0].op_type == "If":
            return
        for tensor in proto.graph.initializer:
            proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))

    x.finish.insert(0, change)
    return True


def branches(x: Export, rng: random.Random) -> bool:
    """The whole graph in both branches of an If on an input, `use_cache_branch`."""
    if x.fixed:
        return False
    name, shape = x.fresh("use_cache_branch"), rng.choice(((), (1,)))
    x.fixed[name] = 1
    x.dims[name] = shape

    def change(proto: onnx.ModelProto) -> None:
        graph = proto.graph
        bodies = []
        for prefix in ("then", "else"):
            body = onnx.GraphProto(name=f"{prefix}_branch")
            made = {output: f"{prefix}/{output}" for node in graph.node for output in node.output if output}
            for node in graph.node:
                copy = body.node.add()
                copy.CopyFrom(node)
                _rename(copy, made)
            for value in graph.output:
                body.output.add().CopyFrom(value)
                body.output[-1].name = made[value.name]
            bodies.append(body)
        node = helper.make_node(
            "If", [name], [v.name for v in graph.output], then_branch=bodies[0], else_branch=bodies[1]
        )
        del graph.node[:]
        graph.node.append(node)
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.BOOL, shape))

    x.finish.append(change)
    x.translate(lambda arrays, _: _given(arrays, _, name, shape))
    return True


def _rename(node: onnx.NodeProto, names: dict[str, str]) -> None:
    node.input[:] = [names.get(value, value) for value in node.input]
    node.output[:] = [names.get(value, value) for value in node.output]
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                _rename(inner, names)
            for value in graph.output:
                value.name = names.get(value.name, value.name)


def _given(arrays: Arrays, _: Case, name: str, shape: tuple[int, ...]) -> None:
    arrays[name] = np.full(shape, True)


def _replace(x: Export, node: ir.Node, value: ir.Value) -> None:
    """Let `value` take the place of a node's output."""
    old = node.outputs[0]
    value.type, value.shape = old.type, old.shape
    if old.is_graph_output():
        name = str(old.name)
        x.graph.outputs[x.graph.outputs.index(old)] = value
        old.name, value.name = x.fresh("inner"), name
        x.logits = value if x.logits is old else x.logits
    old.replace_all_uses_with(value)
    x.graph.remove(node, safe=True)
