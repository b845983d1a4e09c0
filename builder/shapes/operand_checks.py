"""Check the shapes of a node's operands and results against what its op demands."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from furiosa_llm.builder.rules import op_of
from furiosa_llm.builder.rules.facts import Shape
from furiosa_llm.builder.rules.operands import NOTHING_SPECIAL, Shapes, axis_fault
from furiosa_llm.builder.source.validate_tensors import MAX_ELEMENTS


def operand_fault(node: ir.Node, shapes: Shapes) -> str | None:
    """What is wrong with the shapes of a node's inputs; None if nothing is."""
    entry = op_of(node)
    demands = NOTHING_SPECIAL if entry is None else entry.operands
    for port, ranks in demands.ranks.items():
        shape = shapes[port] if port < len(shapes) else None
        if shape is not None and len(shape) not in ranks:
            return f"input {port} has {len(shape)} dimensions instead of {' or '.join(map(str, ranks))}"
    if demands.along_axis and shapes[0] == ():
        return "input 0 has no dimension"
    if demands.axis is not None and not node.domain:
        reason = axis_fault(node, shapes, *demands.axis)
        if reason is not None:
            return reason
    return None if demands.check is None else demands.check(node, shapes)


def result_fault(node: ir.Node, shapes: Shapes, results: Sequence[Shape]) -> str | None:
    """What is wrong with the shapes that were inferred for a node's outputs; None if nothing is."""
    for shape in results:
        if any(size < 0 for size in shape) or math.prod(shape) > MAX_ELEMENTS:
            return f"an output would have the shape {list(shape)}"
    if node.op_type == "Reshape" and not node.domain and shapes[0] is not None:
        before, after = math.prod(shapes[0]), math.prod(results[0])
        if before != after:
            return f"{before} elements cannot be {list(results[0])}, which are {after}"
    return None
