"""The program as one rank runs it, interpreted on local shapes at two sets of sizes of its dynamic dimensions."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from furiosa_llm.builder.proof.pieces import Size, local_size, of_layout
from furiosa_llm.builder.rules.collectives import collective_shapes
from furiosa_llm.builder.shapes.closures import is_control_flow
from furiosa_llm.builder.shapes.interpreter import Fact, Facts, Interpreter, Shape
from furiosa_llm.runtime.artifact.dimensions import known_sizes, parse_dimension, shape_of
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.manifest import LENGTH_ROLES, InputInfo, Manifest

_SIZES = {"batch": (5, 3), "sequence": (7, 5), "past": (11, 17), "encoder": (13, 29), "encoder_sequence": (13, 29)}
_OTHERS = ((19, 53), (23, 59), (29, 61), (31, 67), (37, 71), (41, 73), (43, 79), (47, 83))
"""Distinct primes, so that a product determines its factors; what differs between the two sets is dynamic."""


def sizes_of(manifest: Manifest, steps: int | None = None) -> tuple[dict[str, int], dict[str, int]]:
    """Two sets of sizes, each with a size for every name of a dynamic dimension of the inputs.

    `steps` is how many new positions each step has, if shapes fix it; the likeliest of `fixed_steps` by default.
    """
    dims = (dim for info in manifest.inputs for dim in info.shape if isinstance(dim, str))
    of_shapes = dict.fromkeys(name for dim in dims for name in parse_dimension(dim).names)
    names = of_shapes | dict.fromkeys(LENGTH_ROLES[info.role] for info in manifest.inputs if info.role in LENGTH_ROLES)
    both: tuple[dict[str, int], dict[str, int]] = ({}, {})
    others = itertools.cycle(_OTHERS)
    steps = next(iter(fixed_steps(manifest)), None) if steps is None else steps
    for name in names:
        if name == "total" and "past" in names and ("sequence" in names or steps is not None):
            continue
        pair = _SIZES.get(name) or next(others)
        for sizes, size in zip(both, pair, strict=True):
            sizes[name] = size
    if steps is not None and "sequence" not in of_shapes:
        both[0]["sequence"] = both[1]["sequence"] = steps
    return known_sizes(both[0]), known_sizes(both[1])


def fixed_steps(manifest: Manifest) -> tuple[int, ...]:
    """How many new positions each step may have, the likeliest first, if tokens, positions or embeddings fix it.

    More than one where nothing tells a fixed batch from fixed positions: then the program's own ops do.
    """
    shapes = {info.name: info.shape for info in manifest.inputs}
    batches = {"batch", *(shapes[s.input][s.batch_dim] for s in manifest.states if s.batch_dim is not None)}
    for role, rank in (("token_ids", 2), ("position_ids", 2), ("position_ids", 1), ("other", 3)):
        for info in manifest.inputs:
            if info.role != role or len(info.shape) != rank:
                continue
            first, *rest = info.shape[:2]
            size = first if not rest or (rest[0] in batches and first not in batches) else rest[0]
            if isinstance(size, int):
                return tuple(dict.fromkeys((size, *(dim for dim in (first, *rest) if isinstance(dim, int)))))
    return ()


class RankInterpreter(Interpreter):
    """Interprets the program node by node, as one rank runs it."""

    def __init__(self, model: ir.Model, mesh: Mesh, fresh: int) -> None:
        """`fresh` is the first of the sizes given to dimensions that depend on elements, as in NonZero."""
        super().__init__(model, collective_shapes(mesh))
        self._fresh = itertools.count(fresh, 10)

    @property
    def constants(self) -> Mapping[ir.Value, Fact]:
        """Facts of the initializers."""
        return self._constants

    def infer(self, node: ir.Node, inputs: Sequence[Fact | None], around: Facts) -> list[Fact]:
        """Facts of a node's outputs; ShapeError or UnsupportedModelError if there are none.

        `around` are the facts of all values that graphs inside the node may read.
        """
        if is_control_flow(node):
            return self._control_flow.infer(node, inputs, around)
        return self._infer_once(node, inputs)


class LocalFacts:
    """What is known about every value on one rank, at both sets of sizes."""

    def __init__(self, model: ir.Model, manifest: Manifest, steps: int | None = None) -> None:
        """`steps`: see `sizes_of`."""
        hide_stored_data(model)
        self._both = tuple(RankInterpreter(model, manifest.mesh, fresh) for fresh in (101, 102))
        self.first: Facts = dict(self._both[0].constants)
        self.second: Facts = dict(self._both[1].constants)
        infos = {info.name: info for info in manifest.inputs}
        for facts, sizes in zip((self.first, self.second), sizes_of(manifest, steps), strict=True):
            for value in model.graph.inputs:
                assert value.dtype is not None
                info = infos[str(value.name)]
                shape = _local(info, manifest.mesh, sizes)
                facts[value] = Fact(dtype=value.dtype, shape=shape, value=_length(info, shape, sizes))

    def visit(self, node: ir.Node) -> None:
        """Infer the node's outputs; ShapeError or UnsupportedModelError if its inputs do not fit."""
        for interpreter, facts in zip(self._both, (self.first, self.second), strict=True):
            inputs = [None if value is None else facts[value] for value in node.inputs]
            for value, fact in zip(node.outputs, interpreter.infer(node, inputs, facts), strict=True):
                facts[value] = fact

    def has(self, node: ir.Node) -> bool:
        """Whether every input is known."""
        return all(value is None or value in self.second for value in node.inputs)

    def shape(self, value: ir.Value) -> tuple[Size, ...]:
        """The local sizes of a value's dimensions."""
        return tuple(zip(self.first[value].shape, self.second[value].shape, strict=True))

    def values(self, value: ir.Value | None) -> tuple[Any, Any] | None:
        """The elements of a small tensor at both sets of sizes; None if they are not known."""
        if value is None or value not in self.second:
            return None
        first, second = self.first[value].value, self.second[value].value
        return None if first is None or second is None else (first, second)

    def is_zero(self, value: ir.Value) -> bool:
        """Whether every element is zero, whatever the sizes."""
        return self.first[value].zero and self.second[value].zero

    def infer_global(
        self, node: ir.Node, inputs: tuple[Sequence[Fact | None], Sequence[Fact | None]]
    ) -> tuple[list[Fact], list[Fact]]:
        """Facts of a node's outputs for the unsplit model's inputs."""
        return self._both[0].infer(node, inputs[0], self.first), self._both[1].infer(node, inputs[1], self.second)


def _local(info: InputInfo, mesh: Mesh, sizes: Mapping[str, int]) -> Shape:
    shape = shape_of(info.shape, sizes)
    layouts = zip(info.layout, shape, strict=True)
    return tuple(size if dim is None else local_size(of_layout(dim, mesh))[0] for dim, size in layouts)


def _length(info: InputInfo, shape: Shape, sizes: Mapping[str, int]) -> npt.NDArray[Any] | None:
    """The element of an input that holds a number of positions."""
    name = LENGTH_ROLES.get(info.role, "")
    if name not in sizes or any(size != 1 for size in shape):
        return None
    return np.array(sizes[name], dtype=ir.DataType[info.dtype].numpy()).reshape(shape)


def hide_stored_data(model: ir.Model) -> None:
    """Forget where stored initializers lie: the proof must never take rank 0's data for the data of all ranks."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            shape = ir.Shape(tensor.shape.numpy())
            value.const_value = ir.ExternalTensor("unread", 0, 0, tensor.dtype, shape=shape, name=str(value.name))


def global_fact(fact: Fact, shape: Shape) -> Fact:
    """A fact of the unsplit model; it keeps the elements only if the value is whole."""
    same = fact.shape == shape
    return dataclasses.replace(fact, shape=shape, value=fact.value if same else None)
