"""Damage to ONNX files: of the graph's fields, one at a time and by kind, and of the file's bytes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

Mutator = Callable[[ModelProto, random.Random], None]

INTEGERS = (
    -(2**63),
    -(2**31),
    -129,
    -7,
    -2,
    -1,
    0,
    1,
    2,
    3,
    5,
    7,
    8,
    64,
    255,
    4097,
    2**31 - 1,
    2**31,
    2**62,
    2**63 - 1,
)
FLOATS = (float("nan"), float("inf"), -1.0, 0.0, 1e-30, 1e30)
OP_TYPES = (
    "Abs", "Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Einsum", "Expand", "Flatten", "Gather",
    "Gemm", "Identity", "If", "LayerNormalization", "Loop", "MatMul", "Mod", "Neg", "NonZero", "OneHot", "Optional",
    "Pad", "Range", "ReduceMean", "ReduceSum", "Relu", "Reshape", "Resize", "Scan", "ScatterND", "SequenceConstruct",
    "Shape", "Slice", "Softmax", "Split", "Squeeze", "Sum", "Tile", "TopK", "Transpose", "Trilu", "Unique", "Unsqueeze",
    "Where", "NoSuchOp", "",
)  # fmt: skip
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "furiosa_llm", "nowhere")


def nodes_of(graph: GraphProto) -> list[NodeProto]:
    """Every node, in branches and bodies too."""
    found = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                found += nodes_of(attribute.g)
    return found


def _all_nodes(proto: ModelProto) -> list[NodeProto]:
    return nodes_of(proto.graph) + [node for function in proto.functions for node in function.node]


def _names(proto: ModelProto) -> list[str]:
    nodes = _all_nodes(proto)
    names = [name for node in nodes for name in (*node.input, *node.output)]
    return [*names, *(v.name for v in (*proto.graph.input, *proto.graph.output)), "", "nobody"]


def _tensors(proto: ModelProto) -> list[TensorProto]:
    attributes = [a.t for node in _all_nodes(proto) for a in node.attribute if a.type == AttributeProto.TENSOR]
    return [*proto.graph.initializer, *attributes]


def rename(proto: ModelProto, rng: random.Random) -> None:
    node, name = rng.choice(_all_nodes(proto)), rng.choice(_names(proto))
    names = rng.choice([node.input, node.output])
    if names:
        names[rng.randrange(len(names))] = name


def swap_inputs(proto: ModelProto, rng: random.Random) -> None:
    node = rng.choice([n for n in _all_nodes(proto) if len(n.input) > 1])
    i, j = rng.sample(range(len(node.input)), 2)
    node.input[i], node.input[j] = node.input[j], node.input[i]


def add_or_drop_input(proto: ModelProto, rng: random.Random) -> None:
    node = rng.choice(_all_nodes(proto))
    names = rng.choice([node.input, node.output])
    if names and rng.random() < 0.5:
        del names[rng.randrange(len(names))]
    else:
        names.append(rng.choice(_names(proto)) if names is node.input else f"extra{rng.random()}")


def change_op(proto: ModelProto, rng: random.Random) -> None:
    nodes = _all_nodes(proto)
    node = rng.choice(nodes)
    node.op_type = rng.choice([rng.choice(OP_TYPES), rng.choice(nodes).op_type])


def change_domain(proto: ModelProto, rng: random.Random) -> None:
    rng.choice(_all_nodes(proto)).domain = rng.choice(DOMAINS)


def move_node(proto: ModelProto, rng: random.Random) -> None:
    nodes = list(proto.graph.node)
    node = rng.choice(nodes)
    kind = rng.choice(["drop", "double", "move"])
    if kind != "double":
        nodes.remove(node)
    if kind != "drop":
        nodes.insert(rng.randrange(len(nodes) + 1), node)
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)


def change_attribute(proto: ModelProto, rng: random.Random) -> None:
    node = rng.choice([n for n in _all_nodes(proto) if n.attribute])
    attribute = rng.choice(node.attribute)
    match rng.choice(["number", "number", "type", "drop", "name", "double", "list"]):
        case "number":
            attribute.i, attribute.f = rng.choice(INTEGERS), rng.choice(FLOATS)
            if attribute.ints:
                attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(INTEGERS)
        case "type":
            attribute.type = rng.randrange(0, 16)
        case "drop":
            node.attribute.remove(attribute)
        case "name":
            attribute.name = rng.choice(["", "axis", "axes", "perm", "to", "value", "ref", "start", "shape"])
        case "double":
            node.attribute.add().CopyFrom(attribute)
        case "list":
            attribute.ints.extend(rng.choice(INTEGERS) for _ in range(rng.randrange(4)))


def add_attribute(proto: ModelProto, rng: random.Random) -> None:
    node = rng.choice(_all_nodes(proto))
    name = rng.choice(["axis", "axes", "perm", "to", "start", "end", "keepdims", "num_outputs", "allowzero", "transA"])
    value = rng.choice([rng.choice(INTEGERS), [rng.choice(INTEGERS)], rng.choice(FLOATS), "text"])
    node.attribute.append(onnx.helper.make_attribute(name, value))


def change_dims(proto: ModelProto, rng: random.Random) -> None:
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    shapes = [v.type.tensor_type.shape for v in values if v.type.tensor_type.shape.dim]
    dim = rng.choice(rng.choice(shapes).dim)
    match rng.choice(["size", "name", "nothing"]):
        case "size":
            dim.dim_value = rng.choice(INTEGERS)
        case "name":
            dim.dim_param = rng.choice(["batch_size", "sequence_length", "x", "", "a + b", "past"])
        case "nothing":
            dim.Clear()


def change_type(proto: ModelProto, rng: random.Random) -> None:
    value = rng.choice([*proto.graph.input, *proto.graph.output])
    match rng.choice(["element", "element", "shape", "type", "sequence", "name"]):
        case "element":
            value.type.tensor_type.elem_type = rng.randrange(-1, 30)
        case "shape":
            value.type.tensor_type.ClearField("shape")
        case "type":
            value.ClearField("type")
        case "sequence":
            value.type.sequence_type.elem_type.tensor_type.elem_type = 1
        case "name":
            value.name = rng.choice(_names(proto))


def change_tensor(proto: ModelProto, rng: random.Random) -> None:
    tensor = rng.choice(_tensors(proto))
    match rng.choice(["dims", "dims", "type", "data", "name", "drop", "rank"]):
        case "dims":
            if tensor.dims:
                tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(INTEGERS)
        case "type":
            tensor.data_type = rng.randrange(0, 30)
        case "data":
            tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
        case "name":
            tensor.name = rng.choice(_names(proto))
        case "drop":
            tensor.Clear()
        case "rank":
            tensor.dims.extend(rng.choice([[1], [1, 1], [2]]))


def change_constant(proto: ModelProto, rng: random.Random) -> None:
    """Another number in a small integer tensor: a size, an axis, a bound."""
    kinds = (TensorProto.INT64, TensorProto.INT32)
    small = [t for t in _tensors(proto) if t.data_type in kinds and len(t.raw_data) in range(1, 65)]
    if not small:
        return
    tensor = rng.choice(small)
    width = 8 if tensor.data_type == TensorProto.INT64 else 4
    place = rng.randrange(len(tensor.raw_data) // width) * width
    number = rng.choice(INTEGERS) % 2 ** (8 * width)
    data = tensor.raw_data
    tensor.raw_data = data[:place] + number.to_bytes(width, "little") + data[place + width :]


def change_header(proto: ModelProto, rng: random.Random) -> None:
    match rng.choice(["version", "version", "drop", "double", "ir", "function", "external"]):
        case "version":
            if proto.opset_import:
                rng.choice(proto.opset_import).version = rng.choice(
                    [-1, 0, 1, 6, 7, 9, 11, 12, 13, 17, 18, 21, 99, 2**62]
                )
        case "drop":
            del proto.opset_import[:]
        case "double":
            proto.opset_import.add(domain=rng.choice(DOMAINS), version=rng.randrange(25))
        case "ir":
            proto.ir_version = rng.choice([0, 1, 3, 7, 13, 999, -1, 2**62])
        case "function":
            node = rng.choice(proto.graph.node)
            body = [NodeProto.FromString(node.SerializeToString())]
            function = proto.functions.add(name=node.op_type, domain=node.domain, input=node.input, output=node.output)
            function.node.extend(body if rng.random() < 0.5 else [])
        case "external":
            tensor = rng.choice(_tensors(proto))
            tensor.data_location = TensorProto.EXTERNAL
            key = rng.choice(["location", "offset", "length", "unknown"])
            tensor.external_data.add(key=key, value=rng.choice(["", "x", "-1", "1e9", "..", "9" * 30, "mutant.onnx"]))


def cross(proto: ModelProto, rng: random.Random) -> None:
    """Let a node read what another gives, whatever it is: later ones make cycles."""
    nodes = _all_nodes(proto)
    node = rng.choice([n for n in nodes if n.input])
    other = rng.choice([n for n in nodes if n.output])
    node.input[rng.randrange(len(node.input))] = rng.choice(other.output)


MUTATORS: Sequence[Mutator] = (
    rename, swap_inputs, add_or_drop_input, change_op, change_domain, move_node, change_attribute, change_attribute,
    add_attribute, change_dims, change_type, change_tensor, change_tensor, change_constant, change_constant,
    change_header, cross,
)  # fmt: skip


def mutant(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A damaged copy of a file, and what was done to it."""
    if rng.random() < 0.15:
        return damaged(data, rng)
    proto = ModelProto.FromString(data)
    done = []
    for _ in range(rng.choice([1, 1, 1, 1, 2, 3])):
        mutator = rng.choice(MUTATORS)
        try:
            mutator(proto, rng)
        except (ValueError, IndexError):  # protobuf refuses the value, or there is nothing to change
            continue
        done.append(mutator.__name__)
    return "+".join(done), proto.SerializeToString()


def damaged(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A copy with bytes flipped, cut short, or moved; near the end of small files lies the graph's interface."""
    kind = rng.choice(["flip", "cut", "splice"])
    content = bytearray(data)
    ends = (rng.randrange(min(4096, len(content))), rng.randrange(len(content)), len(content) - 1 - rng.randrange(4096))
    if kind == "flip":
        for _ in range(rng.choice([1, 2, 8, 64])):
            content[rng.choice(ends) - rng.randrange(16)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[max(rng.choice(ends), 0) :]
    else:
        start, length = max(rng.choice(ends), 0), rng.choice([1, 2, 16, 200])
        target = max(rng.choice(ends), 0)
        content[target : target + rng.choice([0, length])] = content[start : start + length]
    return kind, bytes(content)
