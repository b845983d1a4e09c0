"""Faults of collectives, in the program and in the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN
from tests.support.builder.fault_subject import Subject, attribute_of, in_front, kind

# -- collectives -----------------------------------------------------------------------------------------------------


@kind("a collective dropped")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("AllReduce", "AllGather"):
        found = subject.copy()
        found.remove(i, found.node(i).input[0])
        found.relist_collectives()
        yield found


@kind("a sum made twice")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("AllReduce"):
        found = subject.copy()
        again = NodeProto()
        again.CopyFrom(found.node(i))
        again.name, again.output[0] = "seeded/again", "seeded/again"
        found.redirect(found.node(i).output[0], "seeded/again")
        again.input[0] = found.node(i).output[0]
        found.insert(i + 1, again)
        found.relist_collectives()
        yield found


@kind("a sum over fewer axes")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("AllReduce"):
        axes = attribute_of(subject.node(i), "axes")
        for axis in axes if len(axes) > 1 else ():
            found = subject.copy()
            found.set_ints(i, "axes", [a for a in axes if a != axis])
            found.relist_collectives()
            yield found


@kind("a sum over more axes, or others")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("AllReduce"):
        axes = attribute_of(subject.node(i), "axes")
        for axis in set(range(len(subject.mesh.shape))) - set(axes):
            for changed in ([*axes, axis], [axis]):
                found = subject.copy()
                found.set_ints(i, "axes", changed)
                found.relist_collectives()
                yield found


@kind("a sum of what is whole")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("SkipSimplifiedLayerNormalization", "LayerNormalization", "Pow", "Tanh", "Sigmoid", "Add"):
        yield _with_all_reduce(subject, i, [0])


def _with_all_reduce(subject: Subject, position: int, axes: list[int]) -> Subject:
    """An AllReduce of an operand, in front of a node."""
    found = subject.copy()
    node = found.node(position)
    name = f"seeded/AllReduce{position}"
    extra = onnx.helper.make_node("AllReduce", [node.input[0]], [name], name=name, domain=COLLECTIVE_DOMAIN, axes=axes)
    node.input[0] = name
    found.insert(position, extra)
    found.relist_collectives()
    return found


@kind("gathered along another dimension")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("AllGather"):
        dim = attribute_of(subject.node(i), "dim")
        for other in {0, dim - 1} - {dim, -1}:
            found = subject.copy()
            found.set_ints(i, "dim", other)
            found.relist_collectives()
            yield found


@kind("gathered in another order of axes")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("AllGather"):
        axes = attribute_of(subject.node(i), "axes")
        if len(axes) > 1:
            found = subject.copy()
            found.set_ints(i, "axes", axes[::-1])
            found.relist_collectives()
            yield found


@kind("gathered over fewer axes")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("AllGather"):
        axes = attribute_of(subject.node(i), "axes")
        if len(axes) > 1:
            found = subject.copy()
            found.set_ints(i, "axes", axes[1:])
            found.relist_collectives()
            yield found


@kind("gathered instead of summed")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("AllReduce"):
        found = subject.copy()
        found.node(i).op_type = "AllGather"
        found.set_ints(i, "dim", 1)
        found.relist_collectives()
        yield found


@kind("summed instead of gathered")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("AllGather"):
        found = subject.copy()
        node = found.node(i)
        node.op_type = "AllReduce"
        kept = [a for a in node.attribute if a.name != "dim"]
        del node.attribute[:]
        node.attribute.extend(kept)
        found.relist_collectives()
        yield found


@kind("a sum moved behind its reader")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("AllReduce"):
        readers = subject.readers(subject.node(i).output[0])
        reader = subject.node(readers[0]) if readers else None
        if reader is None or len(reader.output) != 1 or reader.op_type in ("Shape", "Identity", "Cast"):
            continue
        if reader.op_type == "Div" and reader.input[0] == subject.node(i).output[0]:
            continue  # behind it is as right: a sum may be divided in parts
        found = subject.copy()
        summed, after = found.node(i), found.node(readers[0])
        after.input[:] = [summed.input[0] if name == summed.output[0] else name for name in after.input]
        moved = NodeProto()
        moved.CopyFrom(summed)
        moved.name, moved.input[0], moved.output[0] = "seeded/moved", after.output[0], "seeded/moved"
        old = after.output[0]
        found.redirect(old, moved.output[0])
        found.insert(readers[0] + 1, moved)
        if len(readers) == 1:
            found.remove(i, summed.input[0])
        found.relist_collectives()
        yield found


@kind("something not linear in front of a sum")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("AllReduce"):
        for op_type in ("Relu", "Tanh", "Abs"):
            yield in_front(subject, i, lambda name, op=op_type: onnx.helper.make_node(op, [name], ["seeded"]))  # type: ignore[misc]


@kind("a constant added on every rank")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("AllReduce"):
        dtype = next(c.dtype for c in subject.manifest.collectives if c.id == subject.node(i).name)
        found = subject.copy()
        constant = found.constant(np.ones((), dtype=DTYPES[dtype].numpy))
        yield in_front(found, i, lambda name, c=constant: onnx.helper.make_node("Add", [name, c], ["seeded"]))  # type: ignore[misc]


@kind("rounded before it is summed")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("AllReduce"):
        yield in_front(
            subject, i, lambda name: onnx.helper.make_node("Cast", [name], ["seeded"], to=TensorProto.BFLOAT16)
        )


@kind("gathered parts in another order")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("Gather"):
        before = subject.producer(subject.node(i).input[0])
        positions = subject.inline(subject.node(i).input[1])
        if before is None or subject.node(before).op_type != "AllGather" or positions is None:
            continue
        for changed in (positions[::-1].copy(), np.arange(len(positions))):
            if not np.array_equal(changed, positions):
                found = subject.copy()
                found.node(i).input[1] = found.constant(changed)
                yield found


# -- the manifest's collectives --------------------------------------------------------------------------------------


@kind("a collective missing from the manifest")
def _(subject: Subject) -> Iterator[Subject]:
    listed = subject.manifest.collectives
    for i in range(len(listed)):
        yield _with_collectives(subject, [*listed[:i], *listed[i + 1 :]])


def _with_collectives(subject: Subject, listed: Sequence[Any]) -> Subject:
    found = subject.copy()
    found.manifest = dataclasses.replace(found.manifest, collectives=tuple(listed))
    return found


@kind("collectives reordered in the manifest")
def _(subject: Subject) -> Iterator[Subject]:
    listed = subject.manifest.collectives
    for i in range(len(listed) - 1):
        yield _with_collectives(subject, [*listed[:i], listed[i + 1], listed[i], *listed[i + 2 :]])


@kind("a collective of another shape in the manifest")
def _(subject: Subject) -> Iterator[Subject]:
    listed = subject.manifest.collectives
    for i, one in enumerate(listed):
        last = one.shape[-1]
        changed = (*one.shape[:-1], last + 1 if isinstance(last, int) else 3)
        yield _with_collectives(subject, [*listed[:i], dataclasses.replace(one, shape=changed), *listed[i + 1 :]])


@kind("a collective of another type in the manifest")
def _(subject: Subject) -> Iterator[Subject]:
    listed = subject.manifest.collectives
    for i, one in enumerate(listed):
        yield _with_collectives(subject, [*listed[:i], dataclasses.replace(one, dtype="DOUBLE"), *listed[i + 1 :]])


@kind("a collective over other axes in the manifest")
def _(subject: Subject) -> Iterator[Subject]:
    listed = subject.manifest.collectives
    for i, one in enumerate(listed):
        changed = one.axes[::-1] if len(one.axes) > 1 else (1 - one.axes[0],)
        yield _with_collectives(subject, [*listed[:i], dataclasses.replace(one, axes=changed), *listed[i + 1 :]])
