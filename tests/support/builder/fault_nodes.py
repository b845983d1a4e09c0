"""Faults of nodes: attributes, sizes, operations; and of the interface."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx

from furiosa_llm.runtime.artifact.layout import Leaf, axes_of, global_size
from tests.support.builder.fault_subject import Subject, attribute_of, each_leaf, in_front, kind, lookups

# -- attributes and sizes --------------------------------------------------------------------------------------------


@kind("an attribute that is global")
def _(subject: Subject) -> Iterator[Subject]:
    for i, node in enumerate(subject.program.graph.node):
        for name in ("num_heads", "kv_num_heads", "q_num_heads", "N", "K"):
            value = attribute_of(node, name)
            if value and node.op_type != "Softmax":
                found = subject.copy()
                found.set_ints(i, name, value * subject.mesh.shape[0])
                yield found


@kind("a target that is global")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("Reshape", "Expand", "ConstantOfShape"):
        port = 0 if subject.node(i).op_type == "ConstantOfShape" else 1
        before = subject.producer(subject.node(i).input[port])
        if before is None or not subject.node(before).name.endswith(("/local", "/local_quotient")):
            continue  # a Where of the exporter's own may do nothing
        fixed = subject.node(before)
        found = subject.copy()
        found.node(i).input[port] = fixed.input[2 if fixed.op_type == "Where" else 0]
        yield found


@kind("a constant target of another size")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("Reshape"):
        target = subject.inline(subject.node(i).input[1])
        for d in range(len(target) if target is not None else 0):
            assert target is not None
            if target[d] > 1:
                changed = target.copy()
                changed[d] *= 2
                found = subject.copy()
                found.node(i).input[1] = found.constant(changed)
                yield found


@kind("sizes that are not made global")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("Shape"):
        for reader in subject.readers(subject.node(i).output[0]):
            if subject.node(reader).op_type in ("Where", "Mul") and "global" in subject.node(reader).name:
                found = subject.copy()
                found.remove(reader, found.node(i).output[0])
                yield found


@kind("bounds of a slice that are global")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("Slice"):
        starts, ends = (subject.inline(subject.node(i).input[port]) for port in (1, 2))
        steps = subject.inline(subject.node(i).input[4]) if len(subject.node(i).input) > 4 else np.ones(1)
        if starts is None or ends is None or steps is None or (starts < 0).any():
            continue
        limit = 2**31 - 1
        if (ends < limit).all() and (ends > 1).all():
            found = subject.copy()
            found.node(i).input[1] = found.constant(starts * 2)
            found.node(i).input[2] = found.constant(ends * 2)
            yield found


@kind("sizes of a split that are global")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("Split"):
        sizes = subject.inline(subject.node(i).input[1]) if len(subject.node(i).input) > 1 else None
        if sizes is not None:
            found = subject.copy()
            found.node(i).input[1] = found.constant(sizes * subject.mesh.shape[0])
            yield found


@kind("sizes of a split that are other sizes")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("Split"):
        sizes = subject.inline(subject.node(i).input[1]) if len(subject.node(i).input) > 1 else None
        if sizes is not None and sizes[0] > 1:
            changed = sizes.copy()
            changed[0] -= 1
            changed[1] += 1
            found = subject.copy()
            found.node(i).input[1] = found.constant(changed)
            yield found


# -- operations ------------------------------------------------------------------------------------------------------


def contractions(subject: Subject) -> Iterator[int]:
    """Products whose sum over the ranks an AllReduce makes."""
    for i in subject.nodes("AllReduce"):
        producer = subject.producer(subject.node(i).input[0])
        if producer is not None and subject.node(producer).op_type in ("MatMul", "Gemm", "MatMulNBits"):
            yield producer


@kind("a softmax over a split dimension")
def _(subject: Subject) -> Iterator[Subject]:
    for i in contractions(subject):
        yield in_front(subject, i, lambda name: onnx.helper.make_node("Softmax", [name], ["seeded"], axis=-1))


@kind("a norm over a split dimension")
def _(subject: Subject) -> Iterator[Subject]:
    for i in contractions(subject):
        yield in_front(subject, i, lambda name: onnx.helper.make_node("LpNormalization", [name], ["seeded"], axis=-1))


@kind("a maximum over a split dimension")
def _(subject: Subject) -> Iterator[Subject]:
    for i in contractions(subject):
        found = subject.copy()
        axes = found.constant(np.array([-1], dtype=np.int64))
        top = onnx.helper.make_node("ReduceMax", [found.node(i).input[0], axes], ["seeded/top"])
        found.insert(i, top)
        yield in_front(
            found, i + 1, lambda name: onnx.helper.make_node("Sub", [name, "seeded/top"], ["seeded/shifted"])
        )


@kind("a softmax along the heads")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("Softmax"):
        found = subject.copy()
        found.set_ints(i, "axis", 1)
        yield found


@kind("dimensions transposed otherwise")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("Transpose"):
        # Heads in front of the sequence. Two whole dimensions of equal sizes may be meant either way.
        if attribute_of(subject.node(i), "perm") == [0, 2, 1, 3]:
            for perm in ([0, 1, 2, 3], [0, 1, 3, 2], [0, 2, 3, 1]):
                found = subject.copy()
                found.set_ints(i, "perm", perm)
                yield found


@kind("an operand transposed")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("MatMul"):
        tensor = subject.tensor(subject.node(i).input[1])
        if tensor is None or len(tensor.local_shape) != 2:
            continue
        found = subject.copy()
        turned = onnx.helper.make_node("Transpose", [tensor.name], ["seeded/turned"], perm=[1, 0])
        found.node(i).input[1] = "seeded/turned"
        found.insert(i, turned)
        yield found


@kind("a mean of parts not divided by their number")
def _(subject: Subject) -> Iterator[Subject]:
    for i in lookups(subject, "/average"):
        found = subject.copy()
        found.remove(i, found.node(i).input[0])
        yield found


@kind("a mean of parts divided by another number")
def _(subject: Subject) -> Iterator[Subject]:
    for i in lookups(subject, "/average"):
        found = subject.copy()
        found.node(i).input[1] = found.constant(np.array(1 / 3, dtype=np.float32))
        yield found


@kind("zero points that make something of padding")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("MatMulInteger"):
        found = subject.copy()
        point = found.constant(np.array(7, dtype=np.uint8))
        found.node(i).input.extend([point, point])
        yield found


@kind("an op that nobody knows")
def _(subject: Subject) -> Iterator[Subject]:
    for i in contractions(subject):
        yield in_front(subject, i, lambda name: onnx.helper.make_node("Mystery", [name], ["seeded"], domain="else"))


# -- interface -------------------------------------------------------------------------------------------------------


@kind("a state declared whole that comes out split")
def _(subject: Subject) -> Iterator[Subject]:
    for i, info in enumerate(subject.manifest.outputs):
        if any(dim is not None and axes_of(dim) for dim in info.layout):
            layout = tuple(None if dim is None else Leaf(global_size(dim)) for dim in info.layout)
            outputs = list(subject.manifest.outputs)
            outputs[i] = dataclasses.replace(info, layout=layout)
            found = subject.copy()
            found.manifest = dataclasses.replace(found.manifest, outputs=tuple(outputs))
            yield found


@kind("a state declared split over other axes")
def _(subject: Subject) -> Iterator[Subject]:
    count = len(subject.mesh.shape)
    for state in subject.manifest.states:
        changed: dict[str, Any] = {}
        for key in ("inputs", "outputs"):
            infos = list(getattr(subject.manifest, key))
            for i, info in enumerate(infos):
                if info.name in (state.input, state.output) and any(d is not None and axes_of(d) for d in info.layout):
                    layout = tuple(
                        None
                        if dim is None
                        else each_leaf(dim, lambda leaf: Leaf(leaf.size, tuple((a + 1) % count for a in leaf.axes)))
                        for dim in info.layout
                    )
                    infos[i] = dataclasses.replace(info, layout=layout)
            changed[key] = tuple(infos)
        if changed["inputs"] != subject.manifest.inputs:
            found = subject.copy()
            found.manifest = dataclasses.replace(found.manifest, **changed)
            yield found


@kind("a state that goes in whole")
def _(subject: Subject) -> Iterator[Subject]:
    for i, info in enumerate(subject.manifest.inputs):
        if any(dim is not None and axes_of(dim) for dim in info.layout):
            inputs = list(subject.manifest.inputs)
            layout = tuple(None if dim is None else Leaf(global_size(dim)) for dim in info.layout)
            inputs[i] = dataclasses.replace(info, layout=layout)
            found = subject.copy()
            found.manifest = dataclasses.replace(found.manifest, inputs=tuple(inputs))
            yield found


@kind("states of two layers exchanged")
def _(subject: Subject) -> Iterator[Subject]:
    states = list(subject.manifest.states)
    if len(states) > 2:
        first, last = states[0], states[-1]
        states[0] = dataclasses.replace(first, output=last.output)
        states[-1] = dataclasses.replace(last, output=first.output)
        found = subject.copy()
        found.manifest = dataclasses.replace(found.manifest, states=tuple(states))
        yield found


@kind("numbers drawn at random on each rank")
def _(subject: Subject) -> Iterator[Subject]:
    for i in contractions(subject):
        (out,) = subject.node(i).output
        reader = next(r for r in subject.readers(out) if subject.node(r).op_type == "AllReduce")
        after = subject.readers(subject.node(reader).output[0])
        for position in after[:1]:
            yield in_front(
                subject, position, lambda name: onnx.helper.make_node("RandomNormalLike", [name], ["seeded"], dtype=1)
            )


def branched(subject: Subject, position: int, inner: onnx.GraphProto) -> Subject:
    """What an If gives, in place of a node's first operand."""
    found = subject.copy()
    condition = found.constant(np.array(True))
    branch = onnx.helper.make_node("If", [condition], ["seeded"], then_branch=inner, else_branch=inner)
    found.node(position).input[0] = "seeded"
    found.insert(position, branch)
    return found


@kind("a branch that reads what is split")
def _(subject: Subject) -> Iterator[Subject]:
    for i in contractions(subject):
        name = subject.node(i).input[0]
        taken = onnx.helper.make_node("Identity", [name], ["seeded/taken"])
        result = onnx.ValueInfoProto(name="seeded/taken")
        yield branched(subject, i, onnx.helper.make_graph([taken], "branch", [], [result]))
        yield branched(subject, i, onnx.helper.make_graph([], "branch", [], [onnx.ValueInfoProto(name=name)]))


@kind("a branch that draws numbers at random")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("AllReduce"):
        for reader in subject.readers(subject.node(i).output[0])[:1]:
            name = subject.node(reader).input[0]
            drawn = onnx.helper.make_node("RandomNormalLike", [name], ["seeded/drawn"], dtype=1)
            result = onnx.ValueInfoProto(name="seeded/drawn")
            yield branched(subject, reader, onnx.helper.make_graph([drawn], "branch", [], [result]))


@kind("an input or output that the manifest does not name")
def _(subject: Subject) -> Iterator[Subject]:
    for key in ("inputs", "outputs"):
        infos = list(getattr(subject.manifest, key))
        infos[0] = dataclasses.replace(infos[0], name="another")
        changed: dict[str, Any] = {key: tuple(infos)}
        found = subject.copy()
        found.manifest = dataclasses.replace(found.manifest, **changed)
        yield found


@kind("sizes that are made global wrongly")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("Where", "Mul"):
        constant = subject.inline(subject.node(i).input[1])
        before = [subject.producer(name) for name in subject.node(i).input]
        if "global" not in subject.node(i).name:
            continue  # a Where of the exporter's own may not take what is changed
        if constant is not None and any(b is not None and subject.node(b).op_type == "Shape" for b in before):
            found = subject.copy()
            found.node(i).input[1] = found.constant(constant * 2)
            yield found
