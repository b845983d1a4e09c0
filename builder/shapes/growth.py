"""Which dimension of a state grows, found by following it to the op that appends to it."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from furiosa_llm.builder.shapes.flow import cache_output, grown_output, is_kept

_Dims = tuple[int | None, ...]
"""For each dimension of a value, the dimension of the state that it is; None if it is not known."""


def growing_dim(state: ir.Value) -> int | None:
    """The dimension of the graph input `state` in which an op appends new positions; None if no op is found to."""
    if state.shape is None:
        return None
    queue: list[tuple[ir.Value, _Dims]] = [(state, tuple(range(len(state.shape))))]
    seen = {state}
    while queue:
        current, dims = queue.pop()
        for node, port in current.uses():
            grown = _grown(node, port, dims)
            if grown is not None:
                return grown
            after = _moved(node, dims) if is_kept(node, port) else None
            if after is not None and not seen.issuperset(node.outputs):
                seen.update(node.outputs)
                queue.extend((output, after) for output in node.outputs)
    return None


def is_written(state: ir.Value) -> bool:
    """Whether new positions are written into `state`, so that it does not grow."""
    return any(
        grown_output(node, port) is not None and node.op_type != "Concat" and cache_output(node, port) is None
        for node, port in state.uses()
    )


def _grown(node: ir.Node, port: int, dims: _Dims) -> int | None:
    if node.op_type == "Concat":
        axis = node.attributes["axis"].as_int()
        return dims[axis] if -len(dims) <= axis < len(dims) else None
    if cache_output(node, port) is not None and len(dims) > 1:
        return dims[-2] if len(dims) > 3 else dims[1]
    return None


def _moved(node: ir.Node, dims: _Dims) -> _Dims | None:
    """`dims` after a change of form; None if they are not known then."""
    match node.op_type:
        case "Cast" | "Identity" | "Slice" | "Split":
            return dims
        case "Transpose":
            perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(dims))[::-1]
            return tuple(dims[d] for d in perm)
        case "Gather":
            axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else 0) % len(dims)
            index = node.inputs[1]
            rank = None if index is None or index.shape is None else len(index.shape)
            return None if rank is None else (*dims[:axis], *(None,) * rank, *dims[axis + 1 :])
        case "Squeeze" | "Unsqueeze":
            axes = _axes(node)
            if axes is None:
                return None
            if node.op_type == "Squeeze":
                gone = {axis % len(dims) for axis in axes}
                return tuple(dim for d, dim in enumerate(dims) if d not in gone)
            rank = len(dims) + len(axes)
            new, old = {axis % rank for axis in axes}, iter(dims)
            return tuple(None if d in new else next(old) for d in range(rank))
    return None


def _axes(node: ir.Node) -> Sequence[int] | None:
    """The axes of a Squeeze or Unsqueeze: an attribute before opset 13, an operand since."""
    if "axes" in node.attributes:
        return node.attributes["axes"].as_ints()
    value = node.inputs[1] if len(node.inputs) > 1 else None
    tensor = None if value is None else value.const_value
    return None if tensor is None else [int(axis) for axis in tensor.numpy().reshape(-1)]
