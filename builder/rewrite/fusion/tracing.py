"""Follow an attention's wiring: its anchors, the cache that a value comes from, and the numbers that scale it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from furiosa_llm.builder.rewrite.fusion.match import LeftAloneError

Hop = tuple[ir.Node, int]
"""A node, and the number of the input at which the data came in."""

VIEWS = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Ops that change no element, only the form or the type of a value."""
MOVES = VIEWS | {"Transpose"}
REPEATS = MOVES | {"Expand"}
FACTORS = frozenset({"Div", "Mul"})
_BEHIND_SOFTMAX = VIEWS | {"Add", "Div", "Mul", "Slice", "Where"}
"""Ops that may lie between softmax and product; a later check whether they are harmless adds a line to the report."""
MAX_STEPS = 16
"""The most nodes of a path: more than any exporter puts between two ends of an attention."""


def anchors(graph: ir.Graph) -> list[ir.Node]:
    """Every product of softmax and values, and every Attention that keeps no cache itself."""
    found = []
    for node in graph:
        if node.domain:
            continue
        if node.op_type == "Attention" and all(v is None for v in node.inputs[4:]):
            found.append(node)
        elif node.op_type == "Softmax":
            found += _weighings(node.outputs[0])
    return found


def _weighings(softmax: ir.Value) -> list[ir.Node]:
    """The products that read a softmax, possibly through a change of form or a guard against NaN."""
    found: list[ir.Node] = []
    queue, seen = [softmax], {softmax}
    while queue and len(seen) < MAX_STEPS:
        for node, port in queue.pop().uses():
            if node.op_type == "MatMul" and port == 0:
                found.append(node)
            elif node.op_type in _BEHIND_SOFTMAX:
                queue += [o for o in node.outputs if o not in seen]
                seen.update(node.outputs)
    return list(dict.fromkeys(found))


def scalar(value: ir.Value, depth: int = 0) -> float | None:
    """The number that `value` holds at any sizes and inputs; None if it is not one constant number."""
    tensor = value.const_value if value.is_initializer() else None
    if tensor is not None:
        return _number(tensor)
    node = value.producer()
    if node is None or node.domain or depth > MAX_STEPS or not node.inputs:
        return None
    numbers = [None if v is None else scalar(v, depth + 1) for v in node.inputs]
    if any(n is None for n in numbers):
        return None
    known = [n for n in numbers if n is not None]
    match node.op_type, known:
        case (("Cast" | "Identity" | "Reshape" | "Squeeze" | "Unsqueeze"), [first, *_]):
            return first
        case "Sqrt", [first]:
            return float(np.sqrt(first))
        case "Mul", [first, second]:
            return first * second
        case "Div", [first, second] if second:
            return first / second
    return None


def _number(tensor: ir.TensorProtocol) -> float | None:
    if tensor.size != 1 or tensor.dtype is ir.DataType.STRING or isinstance(tensor, ir.ExternalTensor):
        return None
    return float(tensor.numpy().item())


def cache_source(value: ir.Value, through: frozenset[str] | set[str]) -> tuple[ir.Node, list[Hop]] | None:
    """The Concat of the cache that `value` comes from, and the nodes on the way to it with the port of the data."""
    path: list[Hop] = []
    current = value
    for _ in range(MAX_STEPS):
        node = current.producer()
        if node is None or node.domain:
            return None
        if node.op_type == "Concat":
            return (node, path) if len(node.inputs) == 2 and _is_past(operand(node, 0)) else None
        port = factor_port(node) if node.op_type in FACTORS else 0
        if node.op_type not in through or port is None:
            return None
        path.append((node, port))
        current = operand(node, port)
    return None


def _is_past(value: ir.Value) -> bool:
    """Whether `value` is a graph input, or the last positions of one."""
    node = value.producer()
    while node is not None and node.op_type in ("Slice", "Identity"):
        value = operand(node, 0)
        node = value.producer()
    return value.is_graph_input()


def factor_port(node: ir.Node) -> int | None:
    """Which input of a Mul or Div is the data if the other is a number."""
    for port in (0, 1) if node.op_type == "Mul" else (0,):
        if scalar(operand(node, 1 - port)) is not None:
            return port
    return None


def is_guard(node: ir.Node) -> bool:
    """Whether `node` is Where(IsNaN(x), 0, x)."""
    condition, zero, kept = (operand(node, port) for port in range(3))
    test = condition.producer()
    return test is not None and test.op_type == "IsNaN" and test.inputs[0] is kept and scalar(zero) == 0


def operand(node: ir.Node, port: int) -> ir.Value:
    """Input `port` of `node`, which must be there."""
    value = node.inputs[port]
    if value is None:
        raise LeftAloneError(f'{node.op_type} "{node.name}" has no input {port}')
    return value
