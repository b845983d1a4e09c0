"""Which dimension of a state is which after changes of its form: the one that grows, the one with a known size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from furiosa_llm.builder.rules.evaluate import Array
from furiosa_llm.builder.rules.registry import op_of
from furiosa_llm.builder.rules.view import attributes_of
from furiosa_llm.builder.shapes.flow import cache_output, grown_output, is_kept, reached

_MARK = 2**40
"""Longer than any dimension."""
_MOST_SIZES = 64
"""Elements of what is computed of shapes."""
_DEEPEST = 32
"""How many nodes behind each other compute a shape."""
_Dims = tuple[int | None, ...]
"""For each dimension of a value, the dimension of the state that it is; None if it is not known."""


def growing_dim(state: ir.Value) -> int | None:
    """The dimension of the graph input `state` in which an op appends new positions; None if no op is found to."""
    for form, dims in _forms(state, _moved):
        for node, port in form.uses():
            grown = _grown(node, port, dims)
            if grown is not None:
                return grown
    return None


def batch_dim(state: ir.Value) -> int | None:
    """The dimension of the graph input `state` that an attention op takes for the batch; None if no op takes it."""
    for form, dims in _forms(state, _moved):
        for node, port in form.uses():
            if cache_output(node, port) is not None:
                return dims[1] if len(dims) > 4 else dims[0]
    return None


def position_dim(state: ir.Value) -> int | None:
    """The dimension of the graph input `state` that new positions are appended to or written into, if one is found."""
    grown = growing_dim(state)
    if grown is not None:
        return grown
    for form, dims in _forms(state, _moved):
        for node, port in form.uses():
            if port == 0 and node.op_type == "TensorScatter":
                return dims[node.attributes["axis"].as_int() if "axis" in node.attributes else -2]
    return None


def is_written(state: ir.Value) -> bool:
    """Whether new positions are written into `state`, so that it does not grow."""
    grown = growing_dim(state)
    if grown is not None and state.shape is not None and isinstance(state.shape[grown], int):
        return True
    return any(
        grown_output(node, port) is not None and node.op_type != "Concat" and cache_output(node, port) is None
        for form in reached([state], is_kept)
        for node, port in form.uses()
    )


def source_of(value: ir.Value, d: int, inputs: Sequence[ir.Value]) -> tuple[ir.Value, int] | None:
    """Which of `inputs`, and which dimension of it, has the size of dimension `d` of its form `value`."""
    for source in inputs:
        for form, dims in _forms(source, _sized):
            place = dims[d] if form is value else None
            if place is not None:
                return source, place
    return None


def _forms(state: ir.Value, after: Callable[[ir.Node, _Dims], _Dims | None]) -> Iterator[tuple[ir.Value, _Dims]]:
    """The forms of a graph input, with what their dimensions are; `after` says what they are after a node."""
    if state.shape is None:
        return
    queue: list[tuple[ir.Value, _Dims]] = [(state, tuple(range(len(state.shape))))]
    seen = {state}
    while queue:
        current, dims = queue.pop()
        yield current, dims
        for node, port in current.uses():
            moved = after(node, dims) if is_kept(node, port) else None
            if moved is not None and not seen.issuperset(node.outputs):
                seen.update(node.outputs)
                queue.extend((output, moved) for output in node.outputs)


def _grown(node: ir.Node, port: int, dims: _Dims) -> int | None:
    if node.op_type == "Concat":
        axis = node.attributes["axis"].as_int()
        return dims[axis] if -len(dims) <= axis < len(dims) else None
    if cache_output(node, port) is not None and len(dims) > 1:
        return dims[-2] if len(dims) > 3 else dims[1]
    return None


def _sized(node: ir.Node, dims: _Dims) -> _Dims | None:
    """Like `_moved`, without the dimensions that the node makes shorter."""
    cut: Sequence[int] | None = ()
    if node.op_type == "Split":
        cut = (node.attributes["axis"].as_int() if "axis" in node.attributes else 0,)
    elif node.op_type == "Slice":
        cut = _axes(node, 3)
    if cut is None:
        return None
    gone = {axis % len(dims) for axis in cut}
    return _moved(node, tuple(None if d in gone else dim for d, dim in enumerate(dims)))


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
            axes = _axes(node, 1)
            if axes is None:
                return None
            if node.op_type == "Squeeze":
                gone = {axis % len(dims) for axis in axes}
                return tuple(dim for d, dim in enumerate(dims) if d not in gone)
            rank = len(dims) + len(axes)
            new, old = {axis % rank for axis in axes}, iter(dims)
            return tuple(None if d in new else next(old) for d in range(rank))
        case "Reshape" if node.inputs[0] is not None and node.inputs[1] is not None:
            return _reshaped(node, dims, node.inputs[0], node.inputs[1])
    return None


def _reshaped(node: ir.Node, dims: _Dims, data: ir.Value, shape: ir.Value) -> _Dims | None:
    """The dimensions that a Reshape keeps by a 0 or by the size of its own input; no others are known."""
    numbers = _Marked(data, len(dims)).sizes(shape)
    if numbers is None:
        return None
    zero_keeps = not ("allowzero" in node.attributes and node.attributes["allowzero"].as_int())
    places = [d if zero_keeps and number == 0 else int(number) - _MARK for d, number in enumerate(numbers.reshape(-1))]
    return tuple(dims[place] if 0 <= place < len(dims) else None for place in places)


class _Marked:
    """Sizes, computed as if dimension d of `data`, of `rank` dimensions, were `_MARK` + d long, and any other 1."""

    def __init__(self, data: ir.Value, rank: int) -> None:
        self._data = data
        self._rank = rank
        self._found: dict[ir.Value, Array | None] = {}

    def sizes(self, value: ir.Value, depth: int = 0) -> Array | None:
        """None if it takes more than constants, the shapes of values, and a few nodes behind each other."""
        if value not in self._found:
            found = self._computed(value, depth) if depth < _DEEPEST else None
            self._found[value] = None if found is None or found.size > _MOST_SIZES else found
        return self._found[value]

    def _computed(self, value: ir.Value, depth: int) -> Array | None:
        if value.const_value is not None:
            return value.const_value.numpy() if value.const_value.size <= _MOST_SIZES else None
        node = value.producer()
        entry = None if node is None else op_of(node)
        if node is None or entry is None:
            return None
        if entry.of_shape is not None:
            source = node.inputs[0]
            own = source is self._data
            count = self._rank if own else 0 if source is None or source.shape is None else len(source.shape)
            return entry.of_shape(attributes_of(node), tuple(range(_MARK, _MARK + count)) if own else (1,) * count)
        arguments = [None if one is None else self.sizes(one, depth + 1) for one in node.inputs]
        given = [argument for argument in arguments if argument is not None]
        unknown = any(one is not None and a is None for one, a in zip(node.inputs, arguments, strict=True))
        if entry.value is None or unknown or (entry.made is not None and entry.made(given) > _MOST_SIZES):
            return None
        try:
            result = entry.value(attributes_of(node), arguments)
        except (ArithmeticError, LookupError, TypeError, ValueError):  # the graph computes nothing of this kind there
            return None
        return None if isinstance(result, tuple) else np.asarray(result)


def _numbers(value: ir.Value | None) -> list[int] | None:
    tensor = None if value is None else value.const_value
    return None if tensor is None else [int(number) for number in tensor.numpy().reshape(-1)]


def _axes(node: ir.Node, port: int) -> Sequence[int] | None:
    """The axes of a node: an attribute in early versions, the operand `port` since."""
    if "axes" in node.attributes:
        return node.attributes["axes"].as_ints()
    return _numbers(node.inputs[port]) if len(node.inputs) > port else None
