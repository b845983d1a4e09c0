"""The nodes of an attention between its boundary and its output, and a key to compare two attentions by."""

from __future__ import annotations

import onnx_ir as ir

from furiosa_llm.builder.rewrite.fusion.match import LeftAloneError, Match
from furiosa_llm.builder.shapes.interpreter import Facts, attributes_of

_SMALL_NBYTES = 1024


def interior_of(found: Match) -> dict[ir.Node, None]:
    """Nodes that the output depends on and that depend on query, keys or values, in the order of the computation.

    Raises LeftAloneError if a value between them is read elsewhere, or if the mask is computed from one.
    """
    starts = {found.query.value, found.key.present, found.value.present}
    inside = _nodes_between(starts, found.output.value)
    for node in inside:
        for value in node.outputs:
            if value is found.output.value:
                continue
            outside = [reader for reader, _ in value.uses() if reader not in inside]
            if value.is_graph_output() or outside:
                raise LeftAloneError(f'"{value.name}" inside it is read elsewhere')
    given = {value for node in inside for value in node.outputs} | starts
    for term in found.terms:
        if term.value in given or term.condition in given:
            raise LeftAloneError("its mask is made from its scores")
    return inside


def _nodes_between(starts: set[ir.Value], end: ir.Value) -> dict[ir.Node, None]:
    inside: dict[ir.Node, None] = {}
    leads: dict[ir.Value, bool] = dict.fromkeys(starts, True)
    stack = [end]
    while stack:
        value = stack[-1]
        node = value.producer()
        if value in leads or node is None:
            leads.setdefault(value, False)
            stack.pop()
            continue
        unknown = [v for v in node.inputs if v is not None and v not in leads]
        if unknown:
            stack += unknown
            continue
        led = any(v is not None and leads[v] for v in node.inputs)
        leads.update(dict.fromkeys(node.outputs, led))
        if led:
            inside[node] = None
        stack.pop()
    return inside


def structure_of(found: Match, interior: dict[ir.Node, None], facts: Facts) -> object:
    """A key, equal for two attentions of one graph if they compute the same from boundaries of the same form.

    Values that the attention does not compute itself (its mask) must be identical.
    """
    numbers: dict[ir.Value, object] = {}
    heads = (found.query, found.key.new, found.value.new)
    for position, one in enumerate(heads):
        numbers[one.value] = (position, one.form, one.num_heads, one.size)
    for position, cache in enumerate((found.key, found.value)):
        numbers[cache.past] = ("past", position, cache.past.is_graph_input(), facts[cache.past].dtype)
        numbers[cache.present] = ("present", position)  # computed from the past and the new heads, whose form is known
    rows = []
    for row, node in enumerate(interior):
        inputs = tuple(None if v is None else numbers.get(v, _leaf(v)) for v in node.inputs)
        attributes = tuple(sorted((name, str(value)) for name, value in attributes_of(node).items()))
        rows.append((node.domain, node.op_type, inputs, attributes))
        numbers.update({v: (row, port, facts[v].dtype) for port, v in enumerate(node.outputs)})
    return tuple(rows), found.output.form, numbers[found.output.value], found.scale, found.softcap


def _leaf(value: ir.Value) -> object:
    """What identifies a value from outside: the elements of a small constant, or the value itself."""
    tensor = value.const_value if value.is_initializer() else None
    if tensor is None or tensor.nbytes > _SMALL_NBYTES:
        return id(value)
    return tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()
