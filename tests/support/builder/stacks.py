"""Stacks of small layers, with one layer that is not like the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx
from onnx import TensorProto, helper

from tests.support.builder.graphs import model

Shapes = dict[str, tuple[int, ...]]


def stack(layers: int, *, odd: Mapping[int, int] | None = None, outputs: Sequence[str] = ()) -> onnx.ModelProto:
    """`layers` residual feed-forward layers behind an embedding; `odd` gives some of them another inner size.

    `outputs` are values in the middle that the model gives, too: `h3` is what layer 3 is given.
    """
    weights: Shapes = {"embedding": (40, 16), "head": (16, 40)}
    nodes = ["h0 = Gather(embedding, input_ids)"]
    for i in range(layers):
        inner = (odd or {}).get(i, 64)
        weights |= {f"up{i}": (16, inner), f"down{i}": (inner, 16)}
        nodes += [f"a{i} = MatMul(h{i}, up{i}) b{i} = Relu(a{i}) c{i} = MatMul(b{i}, down{i})"]
        nodes += [f"h{i + 1} = Add(h{i}, c{i})"]
    nodes.append(f"y = MatMul(h{layers}, head)")
    given = ", ".join(("float[batch, sequence, 40] y", *(f"float[batch, sequence, 16] {o}" for o in outputs)))
    return model("int64[batch, sequence] input_ids", given, " ".join(nodes), weights)


def change(proto: onnx.ModelProto, node: str, edit: Callable[[onnx.NodeProto], None]) -> onnx.ModelProto:
    """`proto` with the node that gives `node` edited."""
    (found,) = (n for n in proto.graph.node if node in n.output)
    edit(found)
    return proto


def reader_at_the_end(proto: onnx.ModelProto, *values: str) -> onnx.ModelProto:
    """`proto` with one more output, the sum of values from the middle of it."""
    proto.graph.node.append(helper.make_node("Sum", list(values), ["collected"], name="collected"))
    shape: list[str | int | None] = ["batch", "sequence", 16]
    proto.graph.output.append(helper.make_tensor_value_info("collected", TensorProto.FLOAT, shape))
    return proto
