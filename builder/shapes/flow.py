"""What ops do with a state: which append to it, write into it, or only change its form."""

from __future__ import annotations

import onnx_ir as ir

from furiosa_llm.builder.rules import op_of

_PARTS = frozenset(("Gather", "Split"))
"""One of a stack of states: what these choose is a state by itself."""
_WRITES = frozenset(("TensorScatter", "ScatterND", "ScatterElements"))


def cache_output(node: ir.Node, port: int) -> ir.Value | None:
    """What an attention op makes of the cache that is its input `port`; None if that is no cache."""
    entry = op_of(node)
    out = None if entry is None else entry.caches.get(port)
    return node.outputs[out] if out is not None and out < len(node.outputs) else None


def grown_output(node: ir.Node, port: int) -> ir.Value | None:
    """What `node` gives that holds its input `port` and new positions behind or in it; None if nothing does."""
    if node.op_type == "Concat" or (node.op_type in _WRITES and port == 0):
        return node.outputs[0]
    return cache_output(node, port)


def is_kept(node: ir.Node, port: int) -> bool:
    """Whether `node` gives its input `port` in another form, a window of it, or a part."""
    entry = op_of(node)
    return port == 0 and entry is not None and (entry.moves in ("form", "type", "window") or node.op_type in _PARTS)
