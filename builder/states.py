"""Which inputs and outputs carry state from step to step, found by following the data."""

from __future__ import annotations

import dataclasses
import re

import onnx_ir as ir

from furiosa_llm.builder.interface import role_of
from furiosa_llm.builder.shapes import Facts

_VIEWS = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_CACHE_PORTS = {
    "GroupQueryAttention": {3: 1, 4: 2},
    "MultiHeadAttention": {6: 1, 7: 2},
    "Attention": {4: 1, 5: 2},
}
"""Attention ops: which input is the cache that comes out, longer, as which output."""
_IN_PLACE = frozenset({"GroupQueryAttention"})
_STATE_OUTPUT = re.compile(r"present.*")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StatePair:
    """An input and the output that it becomes."""

    input: ir.Value
    output: ir.Value
    sequence_dim: int
    in_place: bool
    """Whether the op writes new positions into the input's buffer if it has room."""


def pair_states(graph: ir.Graph, facts: Facts) -> list[StatePair]:
    """Every cache input with the output that holds the same positions and the new ones."""
    pairs: list[StatePair] = []
    for value in graph.inputs:
        if role_of(value) != "state":
            continue
        for appended, node in _appended(value):
            output = _as_output(appended)
            if output is None:
                continue
            before, after = facts[value].shape, facts[output].shape
            grown = [d for d, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
            if len(before) == len(after) and len(grown) == 1:
                in_place = node.op_type in _IN_PLACE and value in node.inputs and output in node.outputs
                pairs.append(StatePair(input=value, output=output, sequence_dim=grown[0], in_place=in_place))
                break
    return pairs


def state_outputs(graph: ir.Graph, pairs: list[StatePair]) -> frozenset[ir.Value]:
    """Outputs that are state: those of pairs, and caches that a graph without past gives."""
    paired = {pair.output for pair in pairs}
    return frozenset(
        value
        for value in graph.outputs
        if value in paired or (_STATE_OUTPUT.fullmatch(str(value.name)) and value.producer() is not None)
    )


def _appended(value: ir.Value) -> list[tuple[ir.Value, ir.Node]]:
    """Values that hold `value` with new positions, each with the node that appended them."""
    found: list[tuple[ir.Value, ir.Node]] = []
    queue = [value]
    while queue:
        current = queue.pop()
        for node, port in current.uses():
            if node.op_type in _VIEWS and port == 0:
                queue.extend(node.outputs)
            elif node.op_type == "Concat":
                found.append((node.outputs[0], node))
            else:
                out = _CACHE_PORTS.get(node.op_type, {}).get(port)
                if out is not None and out < len(node.outputs):
                    found.append((node.outputs[out], node))
    return found


def _as_output(value: ir.Value) -> ir.Value | None:
    """The graph output that `value` is, possibly behind a change of form."""
    queue = [value]
    while queue:
        current = queue.pop()
        if current.is_graph_output():
            return current
        queue.extend(o for node, port in current.uses() if node.op_type in _VIEWS and port == 0 for o in node.outputs)
    return None
