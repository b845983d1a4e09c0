"""Replace sequences of tensors by the tensors in them, if their number is known."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from furiosa_llm.builder.errors import UnsupportedModelError
from furiosa_llm.builder.rewrite.writer import NodeWriter

_SIZES_ARE_INPUT = 13
"""Since this opset, Split takes its sizes, and Squeeze and Unsqueeze take their axes, as an input."""


_Attributes = dict[str, int | list[int]]


def replace_sequences(graph: ir.Graph, file_name: str) -> None:
    """Replace every sequence op of `graph`, in place; constants must be initializers.

    Raises UnsupportedModelError for a sequence whose length or order follows from data, or that leaves the graph.
    """
    replacer = _Replacer(graph, file_name)
    for node in list(graph):
        if not node.domain and node.op_type in _OPS:
            replacer.replace(node)
    replaced = [node for node in graph if not node.domain and node.op_type in _OPS]
    for value in (value for node in replaced for value in node.outputs):
        if value.is_graph_output():
            raise UnsupportedModelError(
                f'{file_name}: output "{value.name}" has type sequence, expected a tensor; sequences cannot cross the '
                "boundary of a model that is split: export the model with tensors as outputs."
            )
    graph.remove(replaced, safe=True)


class _Replacer:
    def __init__(self, graph: ir.Graph, file_name: str) -> None:
        self._graph, self._file_name = graph, file_name
        self._elements: dict[ir.Value, list[ir.Value]] = {}
        self._opset = graph.opset_imports.get("", 1)
        self._names = itertools.count(1)
        self._new: NodeWriter

    def replace(self, node: ir.Node) -> None:
        """Record what is in the sequence that `node` makes, or give its readers the value that it takes from one."""
        self._new = NodeWriter(self._graph, lambda label: f"{node.outputs[0].name}/{label}{next(self._names)}")
        _OPS[node.op_type](self, node)
        self._new.put_before(node)

    # -- ops that make sequences ------------------------------------------------------------------------------------

    def construct(self, node: ir.Node) -> None:
        self._elements[node.outputs[0]] = [value for value in node.inputs if value is not None]

    def insert(self, node: ir.Node) -> None:
        elements, tensor = list(self._sequence(node)), node.inputs[1]
        assert tensor is not None
        elements.insert(self._position(node, 2, len(elements), default=len(elements)), tensor)
        self._elements[node.outputs[0]] = elements

    def erase(self, node: ir.Node) -> None:
        elements = list(self._sequence(node))
        del elements[self._position(node, 1, len(elements), default=len(elements) - 1)]
        self._elements[node.outputs[0]] = elements

    def split(self, node: ir.Node) -> None:
        data = node.inputs[0]
        assert data is not None
        axis = _attribute(node, "axis", 0)
        sizes = self._sizes(node, data, axis)
        keep = _attribute(node, "keepdims", 1) or len(node.inputs) > 1
        attributes: _Attributes = {"axis": axis}
        inputs = [data]
        if self._opset < _SIZES_ARE_INPUT:
            attributes["split"] = sizes
        else:
            inputs.append(self._new.vector(*sizes, label="sizes"))
        parts = list(self._new.add_all("Split", inputs, ["part"] * len(sizes), attributes=attributes))
        self._elements[node.outputs[0]] = parts if keep else [self._axes_op("Squeeze", part, axis) for part in parts]

    def _sizes(self, node: ir.Node, data: ir.Value, axis: int) -> list[int]:
        given = self._known(node, 1) if len(node.inputs) > 1 else np.array(1)
        if given is not None and given.ndim:
            return [int(size) for size in given]
        size = data.shape[axis] if data.shape is not None else None
        if given is None or not isinstance(size, int):
            raise self._unknown(node, "the number of its parts is not known")
        step = int(given)
        return [min(step, size - start) for start in range(0, size, step)]

    # -- ops that take from them ------------------------------------------------------------------------------------

    def at(self, node: ir.Node) -> None:
        elements = self._sequence(node)
        self._replace(node, elements[self._position(node, 1, len(elements) - 1)])

    def length(self, node: ir.Node) -> None:
        self._replace(node, self._new.constant(np.array(len(self._sequence(node)), dtype=np.int64), "length"))

    def concatenate(self, node: ir.Node) -> None:
        elements, axis = self._sequence(node), _attribute(node, "axis", 0)
        if _attribute(node, "new_axis", 0):
            elements = [self._axes_op("Unsqueeze", element, axis) for element in elements]
        self._replace(node, self._new.add("Concat", elements, "joined", axis=axis))

    # -- helpers -------------------------------------------------------------------------------------------------

    def _sequence(self, node: ir.Node) -> list[ir.Value]:
        found = self._elements.get(node.inputs[0]) if node.inputs[0] is not None else None
        if found is None:
            raise self._unknown(node, "what is in it is not known")
        return found

    def _position(self, node: ir.Node, port: int, last: int, default: int | None = None) -> int:
        if len(node.inputs) <= port or node.inputs[port] is None:
            assert default is not None
            return default
        given = self._known(node, port)
        if given is None:
            raise self._unknown(node, "a position in it is computed")
        position = int(given) + (last + 1 if int(given) < 0 else 0)
        if not 0 <= position <= last:
            raise self._unknown(node, f"position {int(given)} is out of range")
        return position

    def _known(self, node: ir.Node, port: int) -> npt.NDArray[Any] | None:
        value = node.inputs[port]
        tensor = value.const_value if value is not None and value.is_initializer() else None
        return None if tensor is None else tensor.numpy()

    def _unknown(self, node: ir.Node, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f'{self._file_name}: node {node.op_type} "{node.name}" works on a sequence of tensors, and {reason}; '
            "export the model with split and concatenated tensors (torch: give torch.split constant sizes)."
        )

    def _axes_op(self, op_type: str, value: ir.Value, axis: int) -> ir.Value:
        """The output of a new Squeeze or Unsqueeze."""
        if self._opset < _SIZES_ARE_INPUT:
            return self._new.add(op_type, [value], op_type, axes=[axis])
        return self._new.add(op_type, [value, self._new.vector(axis, label="axis")], op_type)

    def _replace(self, node: ir.Node, value: ir.Value) -> None:
        old = node.outputs[0]
        if old.is_graph_output():  # an output keeps its name, and the value may have a name to keep as well
            alias = ir.Node("", "Identity", [value], name=f"{old.name}/output")
            alias.outputs[0].name, alias.outputs[0].type, alias.outputs[0].shape = old.name, old.type, old.shape
            self._new.put_before(node)
            self._graph.insert_before(node, alias)
            value = alias.outputs[0]
        old.replace_all_uses_with(value, replace_graph_outputs=True)


def _attribute(node: ir.Node, name: str, default: int) -> int:
    found = node.attributes.get(name)
    return default if found is None else found.as_int()


_OPS: dict[str, Callable[[_Replacer, ir.Node], None]] = {
    "ConcatFromSequence": _Replacer.concatenate,
    "SequenceAt": _Replacer.at,
    "SequenceConstruct": _Replacer.construct,
    "SequenceEmpty": _Replacer.construct,
    "SequenceErase": _Replacer.erase,
    "SequenceInsert": _Replacer.insert,
    "SequenceLength": _Replacer.length,
    "SplitToSequence": _Replacer.split,
}
