"""Take a model's own multi-device annotations as constraints on its plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import onnx
import onnx_ir as ir

from furiosa_llm.builder.errors import AnnotationError
from furiosa_llm.builder.factors.analysis import Analysis
from furiosa_llm.builder.plan.annotations.correspondence import Correspondence
from furiosa_llm.builder.plan.annotations.nodes import Annotation, annotations_of, declared_ranks, devices_of
from furiosa_llm.builder.plan.constraints import Constraint
from furiosa_llm.builder.source.load import Source

_Parts = dict[int, int]
"""Dimension -> number of parts; dimensions that are not split have 1."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Demand:
    """How a node wants a value to lie."""

    parts: _Parts
    annotation: Annotation


def read_constraints(
    model: onnx.ModelProto, tensor_parallel_size: int, ranks: Mapping[str, int] | None = None
) -> tuple[Constraint, ...]:
    """What the annotations of `model` demand of a plan for `tensor_parallel_size` devices, in the order of its nodes.

    A model may be annotated for several configurations; the configuration whose nodes each use that many devices is
    taken. The spec of the node that computes a value says how it is to lie. For model inputs, weights and values of
    nodes without a spec for them, the reader's spec counts; a reader that wants the value whole then gives way to one
    that does not (gathering for one node is no contradiction). `ranks` are the numbers of dimensions of values whose
    shape the model does not declare.

    Raises AnnotationError if two nodes want one value split differently, if a spec is malformed, or if none or several
    of the configurations fit.
    """
    known = {**declared_ranks(model), **(ranks or {})}
    annotations = [annotation for annotation in annotations_of(model) if not annotation.is_inner]
    chosen = _chosen(annotations, tensor_parallel_size)
    produced: dict[str, _Demand] = {}
    read: dict[str, _Demand] = {}
    for annotation in annotations:
        if annotation.configuration != chosen:
            continue
        for spec in annotation.specs:
            demand = _Demand(_parts(spec, annotation, known.get(spec.tensor_name)), annotation)
            if spec.tensor_name in annotation.node.output:
                produced[spec.tensor_name] = demand
            else:
                _add_reader(read, spec.tensor_name, demand)
    for name in produced.keys() & read.keys():
        _check_same(name, produced[name], read[name])
    return tuple(_constraints({**read, **produced}))


def constraints_of(
    source: Source, analysis: Analysis, tensor_parallel_size: int
) -> tuple[tuple[Constraint, ir.Value], ...]:
    """What the annotations of `source`, if it has any, demand of values of the graph that was made of it.

    Values that the graph no longer has, for instance sizes that were folded, are left out. Raises AnnotationError as
    `read_constraints` does.
    """
    if not any(node.device_configurations for node in source.model.graph):
        return ()
    model = source.proto
    correspondence = Correspondence(model.graph, analysis.graph)
    values = {
        name: value
        for node in model.graph.node
        for name in (*node.input, *node.output)
        if (value := correspondence.value(name)) is not None and value in analysis.dims
    }
    ranks = {name: len(analysis.dims[value]) for name, value in values.items()}
    found = read_constraints(model, tensor_parallel_size, ranks)
    return tuple((constraint, values[constraint.value]) for constraint in found if constraint.value in values)


def _chosen(annotations: Sequence[Annotation], tensor_parallel_size: int) -> str | None:
    """The configuration whose nodes each use as many devices as are asked for; None if nothing is sharded."""
    sizes: dict[str, set[int]] = {}
    for annotation in annotations:
        found = sizes.setdefault(annotation.configuration, set())
        found.update(len({d for group in devices_of(spec) for d in group}) for spec in annotation.specs)
    sizes = {name: found for name, found in sizes.items() if found}
    chosen = [name for name, found in sizes.items() if found == {tensor_parallel_size}]
    if len(chosen) > 1:
        listed = " and ".join(f'"{name}"' for name in chosen)
        raise AnnotationError(
            f"the model has several configurations for {tensor_parallel_size} devices, {listed}, and it does not say "
            "which one to follow; remove all but one of them."
        )
    if sizes and not chosen:
        listed = ", ".join(f'"{name}" ({" or ".join(map(str, sorted(n)))} devices)' for name, n in sizes.items())
        raise AnnotationError(
            f"the model is annotated for {listed}, not for {tensor_parallel_size} devices; use a tensor parallel size "
            "that it is annotated for, or a model without annotations."
        )
    return chosen[0] if chosen else None


def _parts(spec: onnx.ShardingSpecProto, annotation: Annotation, rank: int | None) -> _Parts:
    parts: _Parts = dict.fromkeys(range(rank or 0), 1)
    for dim in spec.sharded_dim:
        axis = dim.axis
        if axis < 0:
            if rank is None:
                raise AnnotationError(
                    f'{annotation.label}: the spec of "{spec.tensor_name}" counts axis {axis} from the back, but the '
                    "tensor's number of dimensions is not known; count it from the front."
                )
            axis += rank
        if not 0 <= axis < (rank if rank is not None else axis + 1):
            raise AnnotationError(
                f'{annotation.label}: the spec of "{spec.tensor_name}" has axis {dim.axis}, but the tensor has {rank} '
                "dimensions; run `furiosa-llm check-sharding` on the model for all that is wrong with its annotations."
            )
        parts.setdefault(axis, 1)
        for simple in dim.simple_sharding:
            if simple.num_shards < 1:
                raise AnnotationError(
                    f'{annotation.label}: axis {dim.axis} of "{spec.tensor_name}" has num_shards {simple.num_shards}, '
                    "expected at least 1; run `furiosa-llm check-sharding` on the model."
                )
            parts[axis] *= simple.num_shards
    return parts


def _add_reader(found: dict[str, _Demand], name: str, demand: _Demand) -> None:
    before = found.get(name)
    if before is None or not _split_dims(before.parts):
        found[name] = demand
    else:
        _check_same(name, before, demand)


def _check_same(name: str, before: _Demand, after: _Demand) -> None:
    """All nodes that want a value split must want the same split; wanting it whole contradicts none of them."""
    first, second = _split_dims(before.parts), _split_dims(after.parts)
    if first and second and first != second:
        raise AnnotationError(
            f'{after.annotation.label} has "{name}" {_describe(second)}, but {before.annotation.label} has it '
            f"{_describe(first)}; a value lies in one way: give both nodes the same sharding spec."
        )


def _split_dims(parts: _Parts) -> dict[int, int]:
    return {dim: count for dim, count in parts.items() if count > 1}


def _describe(split: _Parts) -> str:
    return " and ".join(f"split by {count} on axis {dim}" for dim, count in sorted(split.items()))


def _constraints(found: Mapping[str, _Demand]) -> Iterator[Constraint]:
    for name, demand in found.items():
        for dim, count in sorted(demand.parts.items()):
            yield Constraint(value=name, dim=dim, parts=count, origin=f"annotation of node {demand.annotation.label}")
