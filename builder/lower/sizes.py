"""Sizes in a program: global in all shape arithmetic, local where an op takes a size.

`Shape` of a split value is followed by a node that restores the global sizes, so that everything computed from them is
as in the unsplit model. An operand that holds sizes or positions is made local where it is consumed.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from furiosa_llm.builder.factors.analysis import Analysis, NodeInfo
from furiosa_llm.builder.lower.layouts import Layouts
from furiosa_llm.builder.lower.program_builder import ProgramBuilder
from furiosa_llm.builder.rules.facts import present
from furiosa_llm.builder.rules.rule import ShapeOperand
from furiosa_llm.runtime.artifact.layout import Cat, Dim, Mesh, Prod, axes_of, global_size, local_size

_SPLIT_SIZES_ARE_INPUT = 13
"""The first opset in which Split takes its sizes as an input."""


class SizeRewriter:
    """Makes sizes global after Shape, and local before ops that take them."""

    def __init__(self, analysis: Analysis, layouts: Layouts, program: ProgramBuilder) -> None:
        self._analysis = analysis
        self._layouts = layouts
        self._program = program
        self._local: dict[tuple[object, ...], ir.Value] = {}

    def globalise(self, node: ir.Node, emitted: ir.Value) -> ir.Value:
        """Restore the global sizes in the output of a Shape node."""
        value = present(node.inputs[0])
        layout = self._layouts.of(value)
        part = slice(
            node.attributes["start"].as_int() if "start" in node.attributes else 0,
            node.attributes["end"].as_int() if "end" in node.attributes else None,
        )
        dims = list(range(len(layout)))[part]
        split = [(i, d) for i, d in enumerate(dims) if axes_of(layout[d])]
        static = {i: global_size(layout[d]) for i, d in split if not self._analysis.is_dynamic(value, d)}
        scale = {i: self._layouts.parts(layout[d]) for i, d in split if self._analysis.is_dynamic(value, d)}
        name = str(node.outputs[0].name)
        if static:
            emitted = self._replace(emitted, static, len(dims), f"{name}/global")
        if scale:
            factors = self._program.constant(np.array([scale.get(i, 1) for i in range(len(dims))], dtype=np.int64))
            emitted = self._program.one("Mul", [emitted, factors], name=f"{name}/global_product")
        return emitted

    def localise(
        self, info: NodeInfo, operand: ShapeOperand, inputs: list[ir.Value | None], attributes: dict[str, object]
    ) -> None:
        """Make an operand that holds sizes or positions local, in `inputs` and `attributes`."""
        if operand.kind == "dims":
            self._localise_dims(info, operand, inputs)
        elif operand.kind == "repeats":
            self._localise_repeats(info, operand.port, inputs)
        elif operand.kind == "split":
            self._localise_split(info, operand.port, inputs, attributes)
        else:
            self._localise_bounds(info, operand.port, inputs)

    # -- the sizes of an output ----------------------------------------------------------------------------------

    def _localise_dims(self, info: NodeInfo, operand: ShapeOperand, inputs: list[ir.Value | None]) -> None:
        output, target = info.node.outputs[0], present(info.node.inputs[operand.port])
        raw = self._analysis.facts[target].value
        layout = self._layouts.of(output)
        static: dict[int, int] = {}
        divide: dict[int, int] = {}
        for d in self._layouts.split_dims(output):
            assert raw is not None, f"{info.node.op_type} {info.node.name}: the shape of a split value is not known"
            i = d - (len(layout) - len(raw))
            if i < 0 or (0, d) in info.full_outputs or int(raw[i]) in operand.kept:
                continue
            if self._analysis.is_dynamic(output, d):
                divide[i] = self._layouts.parts(layout[d])
            else:
                static[i] = local_size(layout[d], self._layouts.mesh)
        if static or divide:
            key = (target, tuple(static.items()), tuple(divide.items()))
            if key not in self._local:
                self._local[key] = self._local_vector(present(inputs[operand.port]), target, static, divide)
            inputs[operand.port] = self._local[key]

    def _localise_repeats(self, info: NodeInfo, port: int, inputs: list[ir.Value | None]) -> None:
        """Make repeats local: how often this rank's part of the input occurs in its part of the output."""
        data, repeats = present(info.node.inputs[0]), present(info.node.inputs[port])
        raw = self._analysis.facts[repeats].value
        before, after = self._layouts.of(data), self._layouts.of(info.node.outputs[0])
        mesh = self._layouts.mesh
        changed: dict[int, int] = {}
        for d in self._layouts.split_dims(info.node.outputs[0]):
            if (0, d) in info.full_outputs or self._analysis.is_dynamic(data, d):
                continue  # the repeats of a dynamic dimension are 1
            assert raw is not None, f"{info.node.op_type} {info.node.name}: the repeats of a split value are not known"
            local = local_size(after[d], mesh) // local_size(before[d], mesh)
            if local != int(raw[d]):
                changed[d] = local
        if changed:
            inputs[port] = self._local_vector(present(inputs[port]), repeats, changed, {})

    def _local_vector(
        self, vector: ir.Value, original: ir.Value, static: dict[int, int], divide: dict[int, int]
    ) -> ir.Value:
        raw = self._analysis.facts[original].value
        assert raw is not None
        if original.is_initializer():
            values = [static.get(i, int(v) // divide.get(i, 1)) for i, v in enumerate(raw)]
            return self._program.constant(np.array(values, dtype=np.int64))
        name = str(original.name)
        if static:
            vector = self._replace(vector, static, len(raw), f"{name}/local")
        if divide:
            divisors = np.array([divide.get(i, 1) for i in range(len(raw))], dtype=np.int64)
            vector = self._program.one("Div", [vector, self._program.constant(divisors)], name=f"{name}/local_quotient")
        return vector

    def _replace(self, vector: ir.Value, elements: dict[int, int], length: int, name: str) -> ir.Value:
        """A vector of sizes with some elements replaced by constants."""
        mask = np.array([i in elements for i in range(length)])
        values = self._program.constant(np.array([elements.get(i, 0) for i in range(length)], dtype=np.int64))
        if mask.all():
            return values
        return self._program.one("Where", [self._program.constant(mask), values, vector], name=name)

    # -- positions on an axis ------------------------------------------------------------------------------------

    def _localise_split(
        self, info: NodeInfo, port: int, inputs: list[ir.Value | None], attributes: dict[str, object]
    ) -> None:
        axis = info.rule.axis
        assert axis is not None
        if not axes_of(self._layouts.of(present(info.node.inputs[0]))[axis]) or (0, axis) in info.full_inputs:
            return
        sizes = [local_size(self._layouts.of(value)[axis], self._layouts.mesh) for value in info.node.outputs]
        if self._program.opset < _SPLIT_SIZES_ARE_INPUT:
            attributes["split"] = sizes
            return
        attributes.pop("num_outputs", None)
        inputs[port:] = [self._program.constant(np.array(sizes, dtype=np.int64))]

    def _localise_bounds(self, info: NodeInfo, port: int, inputs: list[ir.Value | None]) -> None:
        node = info.node
        data = present(node.inputs[0])
        raw = self._known(node, port)
        if raw is None:
            return
        rank = len(self._layouts.of(data))
        axes_given = self._known(node, 3)
        axes = range(len(raw)) if axes_given is None else [int(a) % rank for a in axes_given]
        changed: dict[int, int] = {}
        for i, axis in enumerate(axes):
            dim = self._layouts.of_dimension(data, axis)
            # Slice keeps all of a split dimension of dynamic size, or the dimension is whole: its bounds stay right.
            if axes_of(dim) and (0, axis) not in info.full_inputs and not self._analysis.is_dynamic(data, axis):
                size = global_size(dim)
                position = min(max(int(raw[i]) + (size if raw[i] < 0 else 0), 0), size)
                changed[i] = local_prefix(dim, position, self._layouts.mesh)
        if changed:
            values = np.array([changed.get(i, int(v)) for i, v in enumerate(raw)], dtype=raw.dtype)
            inputs[port] = self._program.constant(values)

    def _known(self, node: ir.Node, port: int) -> npt.NDArray[np.int64] | None:
        value = node.inputs[port] if port < len(node.inputs) else None
        return None if value is None else self._analysis.facts[value].value


def local_prefix(dim: Dim, position: int, mesh: Mesh) -> int:
    """The local length of the first `position` global indices, which end at a boundary of the layout's segments."""
    if position == 0:
        return 0
    if position == global_size(dim):
        return local_size(dim, mesh)
    if isinstance(dim, Prod):
        inner = math.prod(global_size(part) for part in dim.parts[1:])
        rest = math.prod(local_size(part, mesh) for part in dim.parts[1:])
        assert position % inner == 0, "a bound inside a product"
        return local_prefix(dim.parts[0], position // inner, mesh) * rest
    if isinstance(dim, Cat):
        local = 0
        for part in dim.parts:
            size = min(position, global_size(part))
            local += local_prefix(part, size, mesh)
            position -= size
        return local
    assert not axes_of(dim), "a bound inside a split factor"
    return position
