"""How long a sequence may be: as long as the shortest table that the graph indexes by position.

What a value's greatest element is follows for integers from those of the inputs, as the sequence's length plus a
constant. Only what is sure counts: an element that is bounded otherwise, as by Min, indexes no table by position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from furiosa_llm.builder.factors.analysis import Analysis, find_weight_derived
from furiosa_llm.builder.factors.probe import Probes
from furiosa_llm.builder.rules import op_of
from furiosa_llm.builder.shapes.flow import is_kept, reached
from furiosa_llm.builder.shapes.interface import fixed_sequence, role_of, total_name
from furiosa_llm.builder.shapes.interpreter import Facts
from furiosa_llm.builder.shapes.roles import LENGTHS

_ROTARY_PORTS = {
    ("", "RotaryEmbedding"): (3, 1),
    ("com.microsoft", "MRotaryEmbedding"): (1, 2),
    ("com.microsoft", "RotaryEmbedding"): (1, 2),
}
"""Ops -> their inputs with positions, and with a table whose rows these choose."""
_LAST_POSITION = -1
"""The greatest position, beyond the length."""


def longest_sequence(analysis: Analysis, probes: Probes) -> int | None:
    """The most positions of a sequence, with its past; None if the graph sets no limit."""
    return min(_Positions(analysis, probes).limits(), default=None)


class _Positions:
    """The greatest elements of a graph's integers."""

    def __init__(self, analysis: Analysis, probes: Probes) -> None:
        self._graph = analysis.graph
        self._tables = set(reached(find_weight_derived(analysis), lambda node, port: not port and _moves(node)))
        states = [value for value in self._graph.inputs if role_of(value) == "state"]
        self._states = set(reached(states, is_kept))
        self._runs = [(facts, length) for facts in probes.all_facts if (length := _length(self._graph, probes, facts))]
        self._flags = {value for value in self._graph.inputs if role_of(value) == "attention_mask"}
        """What is 0 or 1 in every element, added up along the positions."""
        self._ends: dict[ir.Value, int | None] = {
            value: _LAST_POSITION for value in self._graph.inputs if role_of(value) == "position_ids"
        }

    def limits(self) -> Iterator[int]:
        """The lengths at which a table ends, or a cache of a fixed size."""
        if len({length for _, length in self._runs}) < 2:
            return
        for node in self._graph:
            self._follow(node)
            yield from (limit for limit in self._limits(node) if limit > 0)

    # -- greatest elements ---------------------------------------------------------------------------------------

    def _end(self, value: ir.Value | None) -> int | None:
        """By how much the greatest element of `value` exceeds the length; None if that is not known."""
        if value is None:
            return None
        if value not in self._ends:
            self._ends[value] = self._excess(value)
        return self._ends[value]

    def _excess(self, value: ir.Value, place: int | None = None) -> int | None:
        """By how much an element of a known value, or its greatest one, exceeds the length in all runs alike."""
        arrays = [facts[value].value for facts, _ in self._runs]
        if any(a is None or a.dtype.kind not in "iu" or not a.size for a in arrays):
            return None
        elements = (a.max() if place is None else a[place] for a in arrays if a is not None)
        found = {int(element) - length for element, (_, length) in zip(elements, self._runs, strict=True)}
        return found.pop() if len(found) == 1 else None

    def _constant(self, value: ir.Value | None) -> npt.NDArray[Any] | None:
        arrays = [] if value is None else [facts[value].value for facts, _ in self._runs]
        first = arrays[0] if arrays else None
        same = first is not None and all(a is not None and np.array_equal(a, first) for a in arrays)
        return first if same else None

    def _follow(self, node: ir.Node) -> None:
        """Note what is known of the output of `node`."""
        if not node.outputs or not node.inputs or self._facts[node.outputs[0]].value is not None:
            return
        output, first, moved = node.outputs[0], node.inputs[0], _moves(node)
        if self._facts[output].dtype is ir.DataType.BOOL or (moved and first in self._flags):
            self._flags.update(node.outputs)
            return
        end = self._end(first) if moved else self._computed(node)
        if end is not None:
            self._ends.update(dict.fromkeys(node.outputs, end))

    def _computed(self, node: ir.Node) -> int | None:
        """The end of what `node` computes of ends, flags and constants."""
        match node.op_type:
            case "CumSum" | "ReduceSum":
                return 0 if node.inputs[0] in self._flags and self._is_whole(node) else None
            case "Concat" | "Max":
                return max((end for v in node.inputs if (end := self._end(v)) is not None), default=None)
            case "Clip":
                return self._end(node.inputs[0]) if len(node.inputs) < 3 or node.inputs[2] is None else None
            case "Where":
                return self._chosen(node.inputs[1:])
            case "Add" | "Sub" | "Mul":
                return self._calculated(node)
        return None

    def _is_whole(self, node: ir.Node) -> bool:
        """Whether `node` adds up along a dimension that is as long as the sequence."""
        axis = self._constant(node.inputs[1]) if len(node.inputs) > 1 else None
        value = node.inputs[0]
        if axis is None or axis.size != 1 or value is None:
            return False
        return all(facts[value].shape[int(axis.item())] == length for facts, length in self._runs)

    def _chosen(self, values: Sequence[ir.Value | None]) -> int | None:
        ends = [self._end(value) for value in values if self._constant(value) is None]
        known = [end for end in ends if end is not None]
        return min(known) if known and len(known) == len(ends) else None

    def _calculated(self, node: ir.Node) -> int | None:
        for value, other in (node.inputs, node.inputs[::-1]):
            end = self._end(value)
            if end is None:
                continue
            if node.op_type == "Mul":
                return end if other in self._flags else None
            number = self._constant(other)
            if number is None or not number.size or number.dtype.kind not in "iu":
                return None
            if node.op_type == "Add":
                return end + int(number.max())
            return end - int(number.min()) if value is node.inputs[0] else None
        return None

    # -- tables --------------------------------------------------------------------------------------------------

    def _limits(self, node: ir.Node) -> Iterator[int]:
        """The lengths at which `node` reads a table to its end."""
        inputs = [*node.inputs, *(None,) * 9]
        rotary = _ROTARY_PORTS.get((node.domain, node.op_type))
        if rotary is not None:
            yield from self._rows(inputs[rotary[1]], 0, self._end(inputs[rotary[0]]))
        match node.op_type:
            case "Gather" | "GatherElements":
                axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
                yield from self._rows(inputs[0], axis, self._end(inputs[1]))
            case "GatherND" if inputs[1] is not None and self._facts[inputs[1]].shape[-1:] == (1,):
                yield from self._rows(inputs[0], 0, self._end(inputs[1]))
            case "Slice":
                yield from self._slices(node)
            case "GroupQueryAttention":
                yield from self._rows(inputs[7], 0, _LAST_POSITION)
            case "EmbedLayerNormalization":
                yield from self._rows(inputs[3], 0, _LAST_POSITION if inputs[8] is None else self._end(inputs[8]))
            case "TensorScatter" if "mode" not in node.attributes or node.attributes["mode"].as_string() == "linear":
                axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -2
                yield from self._rows(inputs[0], axis, _LAST_POSITION)

    @property
    def _facts(self) -> Facts:
        return self._runs[0][0]

    def _rows(self, table: ir.Value | None, axis: int, end: int | None) -> Iterator[int]:
        """The length at which a table ends of which a row is read that is `end` beyond the length."""
        if end is not None and table is not None and (table in self._tables or table in self._states):
            sizes = {facts[table].shape[axis] for facts, _ in self._runs}
            if len(sizes) == 1:
                yield sizes.pop() - 1 - end

    def _slices(self, node: ir.Node) -> Iterator[int]:
        """The lengths that the starts and ends of a Slice allow."""
        axes = self._constant(node.inputs[3]) if len(node.inputs) > 3 else None
        for bounds in (v for v in node.inputs[1:3] if v is not None):
            for place in range(self._facts[bounds].shape[0]):
                axis = place if axes is None else int(axes[place])
                excess = self._excess(bounds, place)
                yield from self._rows(node.inputs[0], axis, None if excess is None else excess + _LAST_POSITION)


def _moves(node: ir.Node) -> bool:
    """Whether `node` makes of its first input's elements nothing but others of their forms and types."""
    entry = op_of(node)
    return entry is not None and entry.moves in ("form", "type", "window", "choice", "copies")


def _length(graph: ir.Graph, probes: Probes, facts: Facts) -> int | None:
    """The length of the sequences, with their past, that a graph was probed with."""
    found: dict[str, int] = {}
    for value in graph.inputs:
        for kind, size in zip(probes.kinds[str(value.name)], facts[value].shape, strict=True):
            if isinstance(kind, str):
                found.setdefault(total_name(kind), size)
        number, role = facts[value].value, LENGTHS.get(role_of(value))
        if role is not None and number is not None:
            found.setdefault(role, int(number.item()))
    steps = found.get("sequence", fixed_sequence(graph))
    return found["total"] if "total" in found else None if steps is None else steps + found.get("past", 0)
