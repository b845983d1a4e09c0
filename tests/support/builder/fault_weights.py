"""Faults of stored weights: layouts, shards and windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from onnx import TensorProto

from furiosa_llm.runtime.artifact.layout import (
    Cat,
    Dim,
    Leaf,
    Mesh,
    Prefix,
    Prod,
    axes_of,
    global_size,
    index_map,
    local_size,
    simplify,
)
from furiosa_llm.runtime.artifact.manifest import StoredTensor
from tests.support.builder.fault_subject import Subject, each_leaf, kind


def split_weights(subject: Subject) -> Iterator[tuple[StoredTensor, tuple[Dim, ...]]]:
    """Stored weights that are split and that some node reads."""
    read = {name for node in subject.program.graph.node for name in node.input}
    for tensor in subject.manifest.tensors:
        if tensor.layout is not None and tensor.shard_axes and tensor.name in read:
            yield tensor, tensor.layout


def relaid(subject: Subject, tensor: StoredTensor, layout: Sequence[Dim]) -> Subject:
    """A weight stored with another layout, which manifest and program agree on."""
    found = subject.copy()
    axes = tuple(dict.fromkeys(axis for dim in layout for axis in axes_of(dim)))
    local = tuple(local_size(dim, subject.mesh) for dim in layout)
    found.set_tensor(dataclasses.replace(tensor, layout=tuple(layout), shard_axes=axes, local_shape=local))
    return found


@kind("a weight split in the other dimension")
def _(subject: Subject) -> Iterator[Subject]:
    for tensor, layout in split_weights(subject):
        shape = [global_size(dim) for dim in layout]
        if len(layout) != 2 or len(set(map(bool, map(axes_of, layout)))) != 2:
            continue
        d = 0 if axes_of(layout[0]) else 1
        if shape[1 - d] % subject.mesh.parts(tensor.shard_axes) == 0:
            changed = [Leaf(shape[0]), Leaf(shape[1])]
            changed[1 - d] = Leaf(shape[1 - d], tensor.shard_axes)
            yield relaid(subject, tensor, changed)


@kind("a weight not split")
def _(subject: Subject) -> Iterator[Subject]:
    for tensor, layout in split_weights(subject):
        yield relaid(subject, tensor, [Leaf(global_size(dim)) for dim in layout])


@kind("a weight split that all ranks need")
def _(subject: Subject) -> Iterator[Subject]:
    read = {name for node in subject.program.graph.node for name in node.input}
    for tensor in subject.manifest.tensors:
        if tensor.layout is None or tensor.shard_axes or tensor.name not in read:
            continue
        for d, dim in enumerate(tensor.layout):
            if global_size(dim) % subject.mesh.shape[0] == 0 and global_size(dim) > 1:
                layout = list(tensor.layout)
                layout[d] = Leaf(global_size(dim), (0,))
                yield relaid(subject, tensor, layout)


@kind("a weight split over the axes in another order")
def _(subject: Subject) -> Iterator[Subject]:
    for tensor, layout in split_weights(subject):
        changed = [each_leaf(dim, lambda leaf: Leaf(leaf.size, leaf.axes[::-1])) for dim in layout]
        if changed != list(layout):
            yield relaid(subject, tensor, changed)


@kind("a weight split over other axes")
def _(subject: Subject) -> Iterator[Subject]:
    count = len(subject.mesh.shape)
    for tensor, layout in split_weights(subject):
        if len(tensor.shard_axes) < count or count > 2:
            changed = [
                each_leaf(dim, lambda leaf: Leaf(leaf.size, tuple((a + 1) % count for a in leaf.axes)))
                for dim in layout
            ]
            yield relaid(subject, tensor, changed)


@kind("a weight split over fewer axes")
def _(subject: Subject) -> Iterator[Subject]:
    for tensor, layout in split_weights(subject):
        last = tensor.shard_axes[-1]
        changed = [
            each_leaf(dim, lambda leaf, gone=last: Leaf(leaf.size, tuple(a for a in leaf.axes if a != gone)))  # type: ignore[misc]
            for dim in layout
        ]
        yield relaid(subject, tensor, changed)


@kind("the leaves of a weight in another order")
def _(subject: Subject) -> Iterator[Subject]:
    for tensor, layout in split_weights(subject):
        for d, dim in enumerate(layout):
            if isinstance(dim, Prod | Cat) and len(dim.parts) > 1:
                changed = list(layout)
                changed[d] = type(dim)((dim.parts[1], dim.parts[0], *dim.parts[2:]))
                if _maps_differ(dim, changed[d], subject.mesh):
                    yield relaid(subject, tensor, changed)


def _maps_differ(a: Dim, b: Dim, mesh: Mesh) -> bool:
    return any(not np.array_equal(index_map(a, mesh, r), index_map(b, mesh, r)) for r in range(mesh.size))


def short_blocks(subject: Subject) -> Iterator[tuple[StoredTensor, tuple[Dim, ...], int, Prefix]]:
    """Stored weights with a dimension of whole blocks, the last one filled in part."""
    for tensor, layout in split_weights(subject):
        for d, dim in enumerate(layout):
            if isinstance(dim, Prefix):
                yield tensor, layout, d, dim


@kind("a short block of another size")
def _(subject: Subject) -> Iterator[Subject]:
    for tensor, layout, d, dim in short_blocks(subject):
        for size in (dim.size - 1, dim.size + 1):
            if size < global_size(dim.part) < 2 * size:
                yield relaid(subject, tensor, [*layout[:d], Prefix(size, dim.part), *layout[d + 1 :]])


@kind("a short block filled up")
def _(subject: Subject) -> Iterator[Subject]:
    for tensor, layout, d, dim in short_blocks(subject):
        yield relaid(subject, tensor, [*layout[:d], dim.part, *layout[d + 1 :]])


@kind("blocks dealt out otherwise")
def _(subject: Subject) -> Iterator[Subject]:
    for tensor, layout, d, dim in short_blocks(subject):
        ways: list[Dim] = [Leaf(dim.size, axes_of(dim))]
        if isinstance(dim.part, Prod):
            ways.append(Prefix(dim.size, Prod(dim.part.parts[::-1])))
        for way in ways:
            if _maps_differ(dim, way, subject.mesh):
                yield relaid(subject, tensor, [*layout[:d], way, *layout[d + 1 :]])


@kind("a fused weight split as one piece")
def _(subject: Subject) -> Iterator[Subject]:
    for tensor, layout in split_weights(subject):
        for d, dim in enumerate(layout):
            if isinstance(simplify(dim), Leaf):
                continue
            changed = list(layout)
            changed[d] = Leaf(global_size(dim), axes_of(dim))
            if local_size(changed[d], subject.mesh) == local_size(dim, subject.mesh) and _maps_differ(
                dim, changed[d], subject.mesh
            ):
                yield relaid(subject, tensor, changed)


@kind("the shards of two ranks exchanged")
def _(subject: Subject) -> Iterator[Subject]:
    for tensor, _ in split_weights(subject):
        if len(tensor.shard_axes) > 1:
            found = subject.copy()
            found.set_tensor(dataclasses.replace(tensor, shard_axes=tensor.shard_axes[::-1]))
            yield found


@kind("a window shifted by a byte, a row or a shard")
def _(subject: Subject) -> Iterator[Subject]:
    for number, initializer in enumerate(subject.program.graph.initializer):
        if initializer.data_location != TensorProto.EXTERNAL or len(subject.manifest.tensors) < 2:
            continue
        place = {entry.key: entry.value for entry in initializer.external_data}
        for step in {1, 64, int(place["length"])}:
            found = subject.copy()
            for entry in found.program.graph.initializer[number].external_data:
                if entry.key == "offset":
                    entry.value = str(int(entry.value) + step)
            yield found


@kind("a window of another length")
def _(subject: Subject) -> Iterator[Subject]:
    for number, initializer in enumerate(subject.program.graph.initializer):
        if initializer.data_location == TensorProto.EXTERNAL:
            found = subject.copy()
            for entry in found.program.graph.initializer[number].external_data:
                if entry.key == "length":
                    entry.value = str(2 * int(entry.value))
            yield found


@kind("a part of an original that begins one index off")
def _(subject: Subject) -> Iterator[Subject]:
    for tensor in subject.manifest.tensors:
        if tensor.part is not None:
            for start, stop in ((1, 1), (0, -1)):
                part = dataclasses.replace(tensor.part, start=tensor.part.start + start, stop=tensor.part.stop + stop)
                found = subject.copy()
                found.set_tensor(dataclasses.replace(tensor, part=part))
                yield found


@kind("parts of an original joined in another order")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("Concat"):
        parts = [subject.tensor(name) for name in subject.node(i).input]
        if all(part is not None and part.part is not None for part in parts):
            found = subject.copy()
            names = list(found.node(i).input)
            found.node(i).input[:] = names[::-1]
            yield found


@kind("a local shape that is not its layout's")
def _(subject: Subject) -> Iterator[Subject]:
    for tensor, _ in split_weights(subject):
        found = subject.copy()
        shape = (tensor.local_shape[0] + 1, *tensor.local_shape[1:])
        found.set_tensor(dataclasses.replace(tensor, local_shape=shape))
        yield found


@kind("quantisation scales split otherwise than their weights")
def _(subject: Subject) -> Iterator[Subject]:
    ports = {"MatMulNBits": 2, "DequantizeLinear": 1, "GatherBlockQuantized": 2}
    for op_type, port in ports.items():
        for i in subject.nodes(op_type):
            tensor = subject.tensor(subject.node(i).input[port])
            if tensor is None or tensor.layout is None or not tensor.shard_axes:
                continue
            for change in (lambda leaf: Leaf(leaf.size, leaf.axes[::-1]), lambda leaf: Leaf(leaf.size)):
                layout = [each_leaf(dim, change) for dim in tensor.layout]
                if layout != list(tensor.layout):
                    yield relaid(subject, tensor, layout)
