"""Which inputs and outputs carry state from step to step, found by following the data."""

from __future__ import annotations

import dataclasses
import re

import onnx_ir as ir

from furiosa_llm.builder.rules import op_of
from furiosa_llm.builder.shapes.interface import role_of
from furiosa_llm.builder.shapes.interpreter import Facts

_STATE_OUTPUT = re.compile(r"present.*")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StatePair:
    """An input and the output that it becomes."""

    input: ir.Value
    output: ir.Value
    sequence_dim: int
    in_place: bool
    """Whether the op writes new positions into the input's buffer if it has room."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """The state of a model."""

    pairs: tuple[StatePair, ...]
    values: frozenset[ir.Value]
    """Every graph input and output that carries state, those without a partner too (a prefill graph has no past)."""


def find_states(graph: ir.Graph, facts: Facts) -> States:
    """The state inputs and outputs of `graph`, and which output becomes which input."""
    inputs = [value for value in graph.inputs if role_of(value) == "state"]
    pairs = [pair for value in inputs if (pair := _pair(value, facts)) is not None]
    outputs = {pair.output for pair in pairs}
    outputs |= {v for v in graph.outputs if _STATE_OUTPUT.fullmatch(str(v.name)) and v.producer() is not None}
    return States(pairs=tuple(pairs), values=frozenset(inputs) | outputs)


def _pair(value: ir.Value, facts: Facts) -> StatePair | None:
    """The output that holds the same positions as `value`, and the new ones behind them."""
    for appended, node in _appended(value):
        output = _as_output(appended)
        if output is None:
            continue
        before, after = facts[value], facts[output]
        sizes = zip(before.shape, after.shape, strict=False)
        grown = [d for d, (a, b) in enumerate(sizes) if a != b]
        alike = before.dtype == after.dtype and len(before.shape) == len(after.shape)
        if alike and len(grown) == 1 and not _is_fixed(value, grown[0]):
            in_place = value in node.inputs and output in node.outputs and _writes_in_place(node)
            return StatePair(input=value, output=output, sequence_dim=grown[0], in_place=in_place)
    return None


def _keeps_positions(node: ir.Node) -> bool:
    """Whether a node may lie around the op that appends: a change of form, or a window of the last positions."""
    entry = op_of(node)
    return entry is not None and entry.moves in ("form", "type", "window")


def _writes_in_place(node: ir.Node) -> bool:
    """Whether `node` has all of its caches in the graph's own inputs and outputs, which nothing else reads.

    What else reads a cache in place would find it as long as its buffer.
    """
    entry = op_of(node)
    if entry is None or not entry.in_place:
        return False
    for port, out in entry.caches.items():
        before, after = node.inputs[port], node.outputs[out]
        if before is None or not before.is_graph_input() or not after.is_graph_output():
            return False
        if after.uses() or any(reader is not node for reader, _ in before.uses()):
            return False
    return True


def _is_fixed(value: ir.Value, d: int) -> bool:
    """Whether a dimension of an input has one size only: then no new positions lie behind it."""
    return value.shape is not None and isinstance(value.shape[d], int)


def _appended(value: ir.Value) -> list[tuple[ir.Value, ir.Node]]:
    """Values that hold `value` with new positions, each with the node that appended them."""
    found: list[tuple[ir.Value, ir.Node]] = []
    queue = [value]
    while queue:
        current = queue.pop()
        for node, port in current.uses():
            if port == 0 and _keeps_positions(node):
                queue.extend(node.outputs)
            elif node.op_type == "Concat" and port == 0:
                found.append((node.outputs[0], node))
            else:
                entry = op_of(node)
                out = None if entry is None else entry.caches.get(port)
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
        queue.extend(o for node, port in current.uses() if port == 0 and _keeps_positions(node) for o in node.outputs)
    return None
