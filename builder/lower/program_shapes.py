"""The local types and shapes in a program, with the names of dynamic dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from furiosa_llm.builder.lower.blocks import find_blocks, levels
from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.check_shapes import check_shapes, interpreter, local_shape
from furiosa_llm.builder.shapes.dimension_names import dimension, names_of_sizes
from furiosa_llm.builder.shapes.interface import PROBE, SECOND_PROBE, SizeSet, concrete, lengths
from furiosa_llm.builder.shapes.interpreter import Facts
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN

ValueShape = tuple[ir.DataType, tuple[int | str | None, ...]]
"""A type, and for each dimension its size, its expression, or None where no expression is known."""


def global_shapes(build: Build, values: Sequence[ir.Value]) -> list[tuple[int | str, ...]]:
    """The shapes of inputs or outputs of the source; a dimension without an expression is named after its place.

    So is one that is bounded: a window of the cache is as long as the cache as long as that is shorter.
    """
    names, bounded = names_of_sizes(build.probes.kinds), _bounded(build, values)
    return [_global_shape(build, value, names, bounded[value]) for value in values]


def _global_shape(
    build: Build, value: ir.Value, names: dict[tuple[int, int], str], bounded: set[int]
) -> tuple[int | str, ...]:
    pairs = zip(build.probes.facts[value].shape, build.probes.others[value].shape, strict=True)
    dims = [None if d in bounded else dimension(sizes, names) for d, sizes in enumerate(pairs)]
    return tuple(f"{value.name}.{d}" if dim is None else dim for d, dim in enumerate(dims))


def _bounded(build: Build, values: Sequence[ir.Value]) -> dict[ir.Value, set[int]]:
    """The dimensions of each whose size is constant at usual sizes alone; a state that is written in place has none."""
    probes = build.probes
    before = {pair.output: probes.kinds[str(pair.input.name)] for pair in build.states.pairs}
    found: dict[ir.Value, set[int]] = {}
    for value in values:
        shapes = [facts[value].shape for facts in (probes.facts, probes.others, *probes.extremes)]
        fixed = {d for d, kind in enumerate(before.get(value, ())) if isinstance(kind, int)}
        pairs = enumerate(zip(*shapes, strict=True))
        found[value] = {d for d, sizes in pairs if sizes[0] == sizes[1] and len(set(sizes)) > 1} - fixed
    return found


def program_shapes(build: Build) -> dict[str, ValueShape]:
    """Local shapes of inputs, outputs and all values that a collective touches or that cross one, or blocks.

    This interprets the program, and compares the shape of every value with the plan's.
    """
    interpret = interpreter(ir.Model(build.lowered.graph, ir_version=build.ir_version), build.plan.mesh).run
    graph = build.model.graph
    first, second = (interpret(local_inputs(build, s), lengths(graph, s)) for s in (PROBE, SECOND_PROBE))
    check_shapes(build.lowered, first)
    names = names_of_sizes(build.probes.kinds)
    found = {str(v.name): (first[v].dtype, _named(v, first, second, names)) for v in _values_to_describe(build)}
    for value, dims in _bounded(build, graph.outputs).items():
        dtype, shape = found[str(value.name)]
        found[str(value.name)] = dtype, tuple(None if d in dims else dim for d, dim in enumerate(shape))
    return found


def local_inputs(build: Build, sizes: SizeSet) -> dict[str, tuple[int, ...]]:
    """Input -> its shape on one rank, at `sizes`."""
    layouts = build.lowered.input_layouts
    shapes = concrete(build.probes.kinds, sizes)
    return {name: local_shape(layouts[name], shape, build.plan.mesh) for name, shape in shapes.items()}


def _named(
    value: ir.Value, first: Facts, second: Facts, names: dict[tuple[int, int], str]
) -> tuple[int | str | None, ...]:
    if _is_chosen(value):
        return (None,) * len(first[value].shape)
    return tuple(dimension(sizes, names) for sizes in zip(first[value].shape, second[value].shape, strict=True))


def _is_chosen(value: ir.Value) -> bool:
    """Whether an If chooses `value` among constants of perhaps different sizes: tables for short and long contexts."""
    node = value.producer()
    if node is None or node.op_type != "If":
        return False
    captured = [one for one in node.inputs[1:] if one is not None]
    return all(one.producer() is None and not one.is_graph_input() for one in captured)


def _values_to_describe(build: Build) -> dict[ir.Value, None]:
    graph = build.lowered.graph
    level = levels(list(graph))
    wanted = dict.fromkeys((*graph.inputs, *graph.outputs))
    for node in graph:
        collective = node.domain == COLLECTIVE_DOMAIN
        for value in node.inputs:
            if value is None or value.is_initializer():
                continue
            made = level.get(value, 0)
            if collective or (made >= 0 and made != level[node.outputs[0]]):
                wanted[value] = None
        if collective:
            wanted.update(dict.fromkeys(node.outputs))
    crossing = {name for span in find_blocks(build) for name in span.crossing}
    return wanted | {value: None for node in graph for value in node.outputs if value.name in crossing}
