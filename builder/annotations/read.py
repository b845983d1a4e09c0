"""Take a model's own multi-device annotations as constraints on its plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx

from furiosa_llm.builder.annotations.structure import Annotation, annotations_of, declared_ranks
from furiosa_llm.builder.constraints import Constraint
from furiosa_llm.builder.errors import AnnotationError

_Parts = dict[int, int]
"""Dimension -> number of parts; dimensions that are not split have 1."""


def read_constraints(
    model: onnx.ModelProto, tensor_parallel_size: int, ranks: Mapping[str, int] | None = None
) -> tuple[Constraint, ...]:
    """What the annotations of `model` demand of a plan for `tensor_parallel_size` devices, in the order of its nodes.

    A model may be annotated for several configurations: those count whose nodes each use that many devices. The spec
    of the node that computes a value says how it is to lie; that of a reader counts for model inputs, weights and
    values of nodes without a spec for them, where a reader that wants the value whole gives way to one that does not
    (gathering for one node is no contradiction). `ranks` are the numbers of dimensions of values whose shape the model
    does not declare.

    Raises AnnotationError if two nodes want one value split differently, if a spec is malformed, or if the model is
    annotated for other numbers of devices alone.
    """
    known = {**declared_ranks(model), **(ranks or {})}
    annotations = list(annotations_of(model))
    chosen = _chosen(annotations, tensor_parallel_size)
    produced: dict[str, tuple[_Parts, Annotation]] = {}
    read: dict[str, tuple[_Parts, Annotation]] = {}
    for annotation in annotations:
        if annotation.configuration not in chosen:
            continue
        for spec in annotation.specs:
            parts = _parts(spec, annotation, known.get(spec.tensor_name))
            if spec.tensor_name in annotation.node.output:
                produced[spec.tensor_name] = (parts, annotation)
            else:
                _add_reader(read, spec.tensor_name, parts, annotation)
    return tuple(_constraints({**read, **produced}))


def _chosen(annotations: list[Annotation], tensor_parallel_size: int) -> set[str]:
    """The configurations whose nodes each use as many devices as are asked for."""
    sizes: dict[str, set[int]] = {}
    for annotation in annotations:
        found = sizes.setdefault(annotation.configuration, set())
        found.update(len(set(_devices(spec))) for spec in annotation.specs)
    sizes = {name: found for name, found in sizes.items() if found}
    chosen = {name for name, found in sizes.items() if found == {tensor_parallel_size}}
    if sizes and not chosen:
        listed = ", ".join(f'"{name}" ({" or ".join(map(str, sorted(n)))} devices)' for name, n in sizes.items())
        raise AnnotationError(
            f"the model is annotated for {listed}, not for {tensor_parallel_size} devices; use a tensor parallel size "
            "that it is annotated for, or a model without annotations."
        )
    return chosen


def _devices(spec: onnx.ShardingSpecProto) -> Iterator[int]:
    groups = {entry.key: entry.value for entry in spec.index_to_device_group_map}
    for key in spec.device:
        yield from groups.get(key, (key,))


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


def _add_reader(read: dict[str, tuple[_Parts, Annotation]], name: str, parts: _Parts, annotation: Annotation) -> None:
    before = read.get(name)
    if before is None or not _is_split(before[0]):
        read[name] = (parts, annotation)
        return
    if _is_split(parts) and _split_dims(parts) != _split_dims(before[0]):
        raise AnnotationError(
            f'{annotation.label} wants "{name}" {_describe(parts)}, but {before[1].label} wants it '
            f"{_describe(before[0])}; a value lies in one way: give both nodes the same sharding spec, or put an "
            "Identity before one of them."
        )


def _is_split(parts: _Parts) -> bool:
    return bool(_split_dims(parts))


def _split_dims(parts: _Parts) -> dict[int, int]:
    return {dim: count for dim, count in parts.items() if count > 1}


def _describe(parts: _Parts) -> str:
    return " and ".join(f"split by {count} on axis {dim}" for dim, count in sorted(_split_dims(parts).items()))


def _constraints(found: Mapping[str, tuple[_Parts, Annotation]]) -> Iterator[Constraint]:
    for name, (parts, annotation) in found.items():
        for dim, count in sorted(parts.items()):
            yield Constraint(value=name, dim=dim, parts=count, origin=f"annotation of node {annotation.label}")
