"""A plan's assignment in the manifest: which leaf of which value's dimension is split over which mesh axes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from furiosa_llm.builder.factors.analysis import Analysis
from furiosa_llm.builder.factors.factor import Factor
from furiosa_llm.builder.plan.outcome import Assignment
from furiosa_llm.runtime.artifact.json_reader import Field
from furiosa_llm.runtime.artifact.layout import Mesh

_KEYS = ("value", "dim", "leaf", "size", "axes")


def assignment_json(analysis: Analysis, assignment: Assignment) -> list[dict[str, Any]]:
    """One entry for each leaf that is split, at the first place where it occurs: its value, dimension and number.

    Raises ValueError if a leaf occurs nowhere.
    """
    rest = {leaf: axes for leaf, axes in assignment.items() if axes}
    found = []
    for value in _values(analysis):
        for d, factor in enumerate(analysis.dims[value]):
            for number, leaf in enumerate(factor.leaves()):
                axes = rest.pop(leaf, None)
                if axes is not None:
                    entry = (str(value.name), d, number, leaf.size, list(axes))
                    found.append(dict(zip(_KEYS, entry, strict=True)))
    if rest:
        raise ValueError(f"{len(rest)} leaves of the assignment are of no value: {list(rest)[:3]}")
    return found


def recorded_assignment(field: Field, analysis: Analysis, mesh: Mesh) -> dict[Factor, tuple[int, ...]]:
    """The assignment that `assignment_json` wrote, for the same graph; ArtifactError if it is not of this graph."""
    values = {str(value.name): value for value in _values(analysis)}
    found: dict[Factor, tuple[int, ...]] = {}
    for entry in field.items(lambda item: item):
        member = entry.members(_KEYS)
        value = values.get(member["value"].name())
        if value is None:
            member["value"].fail("the name of a value of this model")
        dims = analysis.dims[value]
        d, number, size = (member[key].integer() for key in ("dim", "leaf", "size"))
        leaves = list(dims[d].leaves()) if d < len(dims) else []
        if number >= len(leaves) or leaves[number].size != size:
            sizes = [leaf.size for leaf in leaves]
            member["leaf"].fail(
                f"a leaf of the sizes {sizes}, as the model has them", f"number {number} of size {size}"
            )
        axes = member["axes"].items(Field.integer)
        if not axes or len(set(axes)) != len(axes) or any(axis >= len(mesh.shape) for axis in axes):
            member["axes"].fail(f"distinct mesh axes below {len(mesh.shape)}", f"{list(axes)}")
        found[leaves[number]] = axes
    return found


def _values(analysis: Analysis) -> Iterator[ir.Value]:
    """Every value of the graph, weights first, in an order of the graph's own."""
    graph = analysis.graph
    seen = set()
    outputs = (value for node in graph for value in node.outputs)
    for value in (*graph.initializers.values(), *graph.inputs, *outputs):
        if value in analysis.dims and value not in seen:
            seen.add(value)
            yield value
