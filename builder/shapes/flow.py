"""What ops do with a state: which append to it, write into it, or only change its form."""

from __future__ import annotations

import onnx_ir as ir

VIEWS = frozenset(("Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))
KEPT = VIEWS | {"Gather", "Slice", "Split"}
"""What may lie around the op that appends: a change of form, one of a stack, or the last positions."""
_CACHE_PORTS = {
    ("com.microsoft", "GroupQueryAttention"): {3: 1, 4: 2},
    ("com.microsoft", "MultiHeadAttention"): {6: 1, 7: 2},
    ("com.microsoft", "Attention"): {4: 1},
    ("com.microsoft", "QAttention"): {8: 1},
    ("", "Attention"): {4: 1, 5: 2},
}
"""Attention ops: which input is the cache that comes out, longer, as which output."""
_WRITES = frozenset(("TensorScatter", "ScatterND", "ScatterElements"))


def cache_output(node: ir.Node, port: int) -> ir.Value | None:
    """What an attention op makes of the cache that is its input `port`; None if that is no cache."""
    out = _CACHE_PORTS.get((node.domain, node.op_type), {}).get(port)
    return node.outputs[out] if out is not None and out < len(node.outputs) else None


def grown_output(node: ir.Node, port: int) -> ir.Value | None:
    """What `node` gives that holds its input `port` and new positions behind or in it; None if nothing does."""
    if node.op_type == "Concat" or (node.op_type in _WRITES and port == 0):
        return node.outputs[0]
    return cache_output(node, port)


def is_kept(node: ir.Node, port: int) -> bool:
    """Whether `node` gives its input `port` in another form, or a part of it."""
    return node.op_type in KEPT and port == 0
