"""Where values go, and what ops do with a state: append to it, write into it, or only change its form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import onnx_ir as ir

from furiosa_llm.builder.rules import op_of

_PARTS = frozenset(("Gather", "Split"))
"""Ops that choose one of a stack of states, which is a state by itself."""
_WRITES = frozenset(("TensorScatter", "ScatterND", "ScatterElements"))


def cache_output(node: ir.Node, port: int) -> ir.Value | None:
    """The output of an attention op that continues the cache at its input `port`; None if that input is not a cache."""
    entry = op_of(node)
    out = None if entry is None else entry.caches.get(port)
    return node.outputs[out] if out is not None and out < len(node.outputs) else None


def grown_output(node: ir.Node, port: int) -> ir.Value | None:
    """The output of `node` that holds its input `port` with new positions after or in it; None if no output does."""
    if node.op_type == "Concat" or (node.op_type in _WRITES and port == 0):
        return node.outputs[0]
    return cache_output(node, port)


def is_kept(node: ir.Node, port: int) -> bool:
    """Whether `node` gives its input `port` in another form, or a window or a part of it."""
    entry = op_of(node)
    return port == 0 and entry is not None and (entry.moves in ("form", "type", "window") or node.op_type in _PARTS)


def reached(start: Iterable[ir.Value], passes: Callable[[ir.Node, int], bool]) -> Iterator[ir.Value]:
    """`start`, and the outputs of every node that is reached at an input port that `passes`, each value once."""
    queue = list(start)
    seen = set(queue)
    while queue:
        value = queue.pop()
        yield value
        for node, port in value.uses():
            if passes(node, port):
                fresh = [output for output in node.outputs if output not in seen]
                seen.update(fresh)
                queue.extend(fresh)


def as_outputs(value: ir.Value) -> Iterator[ir.Value]:
    """The graph outputs that are `value`, possibly in another form or stacked with others."""
    forms = reached([value], lambda node, port: node.op_type == "Concat" or is_kept(node, port))
    return (form for form in forms if form.is_graph_output())
