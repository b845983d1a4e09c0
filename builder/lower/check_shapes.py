"""Check a lowered program: interpret it on local shapes and compare every value with what the plan says."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from furiosa_llm.builder.lower.emit import Lowered
from furiosa_llm.builder.rules.collectives import collective_shapes
from furiosa_llm.builder.shapes.interpreter import Facts, Interpreter, Shape
from furiosa_llm.runtime.artifact.layout import Dim, Mesh, axes_of, local_size


def interpreter(program: ir.Model, mesh: Mesh) -> Interpreter:
    """An interpreter of the program as one rank runs it."""
    return Interpreter(program, collective_shapes(mesh))


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
