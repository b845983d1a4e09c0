"""Check a lowered program: interpret it on local shapes and compare every value with what the plan says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from furiosa_llm.builder.lower.emit import Lowered
from furiosa_llm.builder.shapes.interpreter import Fact, Facts, Interpreter, Shape, ShapeRule
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN
from furiosa_llm.runtime.artifact.layout import Dim, Mesh, axes_of, local_size


def interpreter(program: ir.Model, mesh: Mesh) -> Interpreter:
    """An interpreter of the program as one rank runs it."""

    def all_reduce(_: ir.Node, inputs: Sequence[Fact | None]) -> list[tuple[ir.DataType, Shape]]:
        data = inputs[0]
        assert data is not None
        return [(data.dtype, data.shape)]

    def all_gather(node: ir.Node, inputs: Sequence[Fact | None]) -> list[tuple[ir.DataType, Shape]]:
        data = inputs[0]
        assert data is not None
        dim = node.attributes["dim"].as_int()
        parts = mesh.parts(node.attributes["axes"].as_ints())
        return [(data.dtype, tuple(n * parts if d == dim else n for d, n in enumerate(data.shape)))]

    rules: Mapping[tuple[str, str], ShapeRule] = {
        (COLLECTIVE_DOMAIN, "AllReduce"): all_reduce,
        (COLLECTIVE_DOMAIN, "AllGather"): all_gather,
    }
    return Interpreter(program, rules)


def local_shape(layout: Sequence[Dim], shape: Shape, mesh: Mesh) -> Shape:
    """The local shape of a value of global `shape`."""
    return tuple(local_size(dim, mesh) if axes_of(dim) else size for dim, size in zip(layout, shape, strict=True))


def check_shapes(lowered: Lowered, facts: Facts) -> None:
    """Every value of the program must have the local shape that the plan gives it (our own mistake if not)."""
    by_name = {str(value.name): fact for value, fact in facts.items()}
    for name, expected in lowered.expected_shapes.items():
        found = by_name.get(name)
        if found is not None:
            assert found.shape == expected, f'"{name}" has local shape {found.shape}, the plan says {expected}'
