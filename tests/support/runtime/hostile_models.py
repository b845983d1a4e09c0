"""Hostile programs: a program.onnx that is not what the manifest says, or no model at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from tests.support.runtime.hostile import PROGRAM, SOURCE, Copy, Hostile, model_kind
from tests.support.runtime.spmd import WEIGHTS

Change = Callable[[ModelProto], object]
_REDUCE = 3
"""Where the AllReduce of `mlp` stands: MatMul, Relu, MatMul, AllReduce, Identity."""


def _place(key: str, value: str) -> Change:
    """Another place of the first initializer, A."""

    def change(model: ModelProto) -> None:
        for entry in model.graph.initializer[0].external_data:
            if entry.key == key:
                entry.value = value

    return change


def _swap_windows(model: ModelProto) -> None:
    """The first two external initializers of one type and shape read each other's data."""
    seen: dict[object, TensorProto] = {}
    for tensor in model.graph.initializer:
        key = (tensor.data_type, tuple(tensor.dims), tensor.data_location)
        if tensor.data_location == TensorProto.EXTERNAL and key in seen:
            other = seen[key]
            mine = [(entry.key, entry.value) for entry in tensor.external_data]
            for entry, (name, value), place in zip(other.external_data, mine, tensor.external_data, strict=True):
                place.value = entry.value
                entry.key, entry.value = name, value
            return
        seen[key] = tensor


def _next_shard(model: ModelProto) -> None:
    """The first initializer reads shard 1 on rank 0."""
    place = {entry.key: entry for entry in model.graph.initializer[0].external_data}
    place["offset"].value = str(int(place["offset"].value) + int(place["length"].value))


def _collective(name: str, value: object) -> Change:
    def change(model: ModelProto) -> None:
        del model.graph.node[_REDUCE].attribute[:]
        model.graph.node[_REDUCE].attribute.append(helper.make_attribute(name, value))

    return change


def node(
    *, output: str = "z", op: str = "Constant", inputs: tuple[str, ...] = (), domain: str = "", **attributes: Any
) -> Change:
    """A node more."""
    return lambda model: model.graph.node.append(
        helper.make_node(op, list(inputs), [output], name="added", domain=domain, **attributes)
    )


def external(name: str = "t") -> TensorProto:
    """A tensor whose data is said to be in the weights file."""
    tensor = TensorProto(name=name, data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=WEIGHTS)
    return tensor


def _branch(*nodes: NodeProto, initializer: TensorProto | None = None, output: str = "inner") -> GraphProto:
    info = helper.make_tensor_value_info(output, 1, None)
    return helper.make_graph(
        list(nodes), "branch", [], [info], initializer=[] if initializer is None else [initializer]
    )


def _if(branch: GraphProto) -> Change:
    return node(op="If", inputs=("partial",), then_branch=branch, else_branch=branch)


def _identity(name: str, domain: str = "") -> NodeProto:
    return helper.make_node("Identity", [name], ["inner"], domain=domain)


def _sparse_attribute(model: ModelProto) -> None:
    node = model.graph.node.add(op_type="Constant", name="added", output=["z"])
    sparse = node.attribute.add(name="sparse_value", type=AttributeProto.SPARSE_TENSOR).sparse_tensor
    sparse.values.CopyFrom(external())


def _hidden_in_another_field(model: ModelProto) -> None:
    attribute = model.graph.node[0].attribute.add(name="hidden", type=AttributeProto.INT, i=1)
    attribute.t.CopyFrom(external())


def _attribute_twice(model: ModelProto) -> None:
    attribute = model.graph.node[_REDUCE].attribute[0]
    model.graph.node[_REDUCE].attribute.append(attribute)


def _function_with_a_collective(model: ModelProto) -> None:
    reduce = helper.make_node("AllReduce", ["a"], ["b"], domain="furiosa_llm", axes=[0])
    model.functions.append(helper.make_function("local", "f", ["a"], ["b"], [reduce], list(model.opset_import)))


def function_with_external_data(model: ModelProto) -> None:
    """A function with a constant whose data is elsewhere."""
    constant = helper.make_node("Constant", [], ["b"], value=external())
    model.functions.append(helper.make_function("local", "f", [], ["b"], [constant], list(model.opset_import)))


def nested_functions(model: ModelProto) -> None:
    """Thirty functions, each of which calls the next one twice."""
    for number in range(30):
        calls = [helper.make_node(f"f{number + 1}", [f"v{i}"], [f"v{i + 1}"], domain="local") for i in range(2)]
        body = calls if number < 29 else [helper.make_node("Neg", ["v0"], ["v2"])]
        model.functions.append(helper.make_function("local", f"f{number}", ["v0"], ["v2"], body, _LOCAL))
    _call(model, "f0")


def _two_functions_in_a_circle(model: ModelProto) -> None:
    for name, other in (("f0", "f1"), ("f1", "f0")):
        body = [helper.make_node(other, ["v0"], ["v2"], domain="local")]
        model.functions.append(helper.make_function("local", name, ["v0"], ["v2"], body, _LOCAL))
    _call(model, "f0")


def _function_like_an_operator(model: ModelProto) -> None:
    model.functions.append(
        helper.make_function("", "Relu", ["v0"], ["v2"], [helper.make_node("Neg", ["v0"], ["v2"])], _LOCAL)
    )


def _call(model: ModelProto, function: str) -> None:
    model.opset_import.add(domain="local", version=1)
    model.graph.node.append(helper.make_node(function, ["x"], ["called"], domain="local"))


_LOCAL = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]


def inline_of(**fields: Any) -> Change:
    """An initializer more."""
    return lambda model: model.graph.initializer.append(TensorProto(name="added", **fields))


def _deep(copy: Copy, name: str) -> None:
    """Graphs within graphs, deeper than any model and than protobuf reads."""
    # Each level is a node with an attribute with a graph; lengths grow from the inside out.
    body = b""
    for _ in range(2000):
        attribute = _field(6, body)
        body = _field(1, _field(5, attribute))
    copy.write(name, _field(7, body))


def _field(number: int, content: bytes) -> bytes:
    """A protobuf field of bytes."""
    length, size = b"", len(content)
    while size >= 128:
        length, size = length + bytes([size % 128 + 128]), size // 128
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def _no_collective(model: ModelProto) -> None:
    model.graph.node[_REDUCE].CopyFrom(helper.make_node("Identity", ["partial"], ["sum"], name="collective0"))


def _not_text(copy: Copy) -> None:
    content = (copy.folder / PROGRAM).read_bytes()
    copy.write(PROGRAM, content.replace(b"Relu", b"Re\xffu"))


_PROGRAM: list[tuple[str, str, Change, str]] = [
    ("mlp", "no graph", lambda m: m.ClearField("graph"), "found no graph, expected a graph with outputs"),
    (
        "mlp",
        "no input",
        lambda m: m.graph.input.pop(),
        r"found the inputs \[\], expected \['x'\], as manifest\.json says",
    ),
    (
        "mlp",
        "an input of INT64",
        lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 7),
        "input 'x' is INT64, expected FLOAT",
    ),
    (
        "mlp",
        "an input of no type",
        lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 99),
        "is of the unknown type 99",
    ),
    (
        "mlp",
        "an output of one dimension",
        lambda m: m.graph.output[0].type.tensor_type.shape.dim.pop(),
        r"output 'y' has the local shape \['batch'\]",
    ),
    (
        "mlp",
        "a giant dimension",
        lambda m: setattr(m.graph.value_info[0].type.tensor_type.shape.dim[1], "dim_value", 2**60),
        "has a dimension of 1152921504606846976, expected 0 to",
    ),
    (
        "mlp",
        "a negative dimension",
        lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", -1),
        "value 'x' has a dimension of -1",
    ),
    (
        "mlp",
        "weights outside of the folder",
        _place("location", "../weights"),
        "initializer 'A' lies at .*'location': '../weights'",
    ),
    (
        "mlp",
        "weights at an absolute path",
        _place("location", "/etc/passwd"),
        "initializer 'A' lies at .*'location': '/etc/passwd'",
    ),
    ("mlp", "weights at the start of the file", _place("offset", "0"), "initializer 'A' lies at .*'offset': '0'"),
    ("mlp", "weights at a negative offset", _place("offset", "-1"), "initializer 'A' lies at .*'offset': '-1'"),
    ("mlp", "weights of another length", _place("length", "1"), "initializer 'A' lies at"),
    (
        "mlp",
        "weights with a key twice",
        lambda m: m.graph.initializer[0].external_data.add(key="length", value="192"),
        "initializer 'A' lies at",
    ),
    (
        "mlp",
        "weights with data of their own",
        lambda m: setattr(m.graph.initializer[0], "raw_data", b"x"),
        "initializer 'A' has data of its own",
    ),
    ("mlp", "the next rank's shard", _next_shard, "initializer 'A' lies at .*'offset': '360'|initializer 'A' lies at"),
    ("int4", "the windows of two weights swapped", _swap_windows, "initializer '.*' lies at .*, expected"),
    ("padded", "the windows of two weights swapped", _swap_windows, "initializer '.*' lies at .*, expected"),
    (
        "mlp",
        "weights of fewer dimensions",
        lambda m: m.graph.initializer[0].dims.pop(),
        r"initializer 'A' is FLOAT \[8\], expected FLOAT \[8, 6\]",
    ),
    (
        "mlp",
        "weights under another name",
        lambda m: setattr(m.graph.initializer[0], "name", "Z"),
        r"initializer 'Z' is external, expected an entry",
    ),
    (
        "mlp",
        "weights twice",
        lambda m: m.graph.initializer.append(m.graph.initializer[0]),
        "found the initializer 'A' twice",
    ),
    ("mlp", "no weights", lambda m: m.graph.initializer.pop(), "found no external initializer 'B'"),
    (
        "mlp",
        "inline data that is short",
        inline_of(data_type=1, dims=[2], raw_data=b"1234"),
        r"initializer 'added' has 4 bytes, expected 8 for FLOAT \[2\]",
    ),
    (
        "mlp",
        "inline entries that are short",
        inline_of(data_type=7, dims=[2], int64_data=[1]),
        "initializer 'added' has 1 entries of int64_data, expected 2",
    ),
    (
        "mlp",
        "inline data of no type",
        inline_of(data_type=99, dims=[2], raw_data=b"12"),
        "initializer 'added' is of the unknown type 99, expected one of",
    ),
    (
        "mlp",
        "inline data of a giant shape",
        inline_of(data_type=1, dims=[2**62, 2**62]),
        "initializer 'added' has the dimensions",
    ),
    (
        "mlp",
        "inline data of a negative shape",
        inline_of(data_type=1, dims=[-1, -1], raw_data=b"1234"),
        "has the dimensions .*, expected at most 64 from 0",
    ),
    (
        "mlp",
        "inline data of many dimensions",
        inline_of(data_type=1, dims=[1] * 100, raw_data=b"1234"),
        "has the dimensions .*, expected at most 64 from 0",
    ),
    ("mlp", "sparse weights", lambda m: m.graph.sparse_initializer.add(), "found sparse initializers"),
    (
        "mlp",
        "external data in an attribute",
        node(value=external()),
        "node 'added' has an attribute with external data, expected inline data",
    ),
    (
        "mlp",
        "external data in a branch",
        _if(_branch(_identity("t"), initializer=external())),
        "initializer 't' of a graph in a node has external data",
    ),
    (
        "mlp",
        "external data in a node of a branch",
        _if(_branch(helper.make_node("Constant", [], ["inner"], value=external()))),
        "with external data",
    ),
    (
        "mlp",
        "external data in a sparse attribute",
        _sparse_attribute,
        "node 'added' has an attribute with external data",
    ),
    (
        "mlp",
        "external data in a field that is not the attribute's",
        _hidden_in_another_field,
        r"'hidden' with \['i', 't'\], expected only what its type says",
    ),
    ("mlp", "external data in a function", function_with_external_data, "has an attribute with external data"),
    ("mlp", "an attribute twice", _attribute_twice, "has an attribute 'axes' twice, expected it once"),
    (
        "mlp",
        "nodes in another order",
        lambda m: m.graph.node.reverse(),
        "reads 'sum', expected a value known before it",
    ),
    (
        "mlp",
        "a cycle",
        lambda m: m.graph.node[0].input.__setitem__(0, "y"),
        r"node 0 \(MatMul 'n0'\) reads 'y', expected a value known before it",
    ),
    (
        "mlp",
        "a value written twice",
        lambda m: m.graph.node.append(m.graph.node[0]),
        "writes 'h' again, expected a new value",
    ),
    ("mlp", "a weight written", node(output="A"), "writes 'A' again, expected a new value"),
    ("mlp", "an output that nothing writes", lambda m: m.graph.node.pop(), "no node writes the output 'y'"),
    (
        "mlp",
        "a branch that reads what comes later",
        lambda m: (_if(_branch(_identity("later")))(m), node(output="later")(m)),
        "reads 'later', expected a value known",
    ),
    (
        "mlp",
        "a branch that reads nothing known",
        _if(_branch(_identity("nobody"))),
        "reads 'nobody', expected a value known before it",
    ),
    (
        "mlp",
        "a collective renamed",
        lambda m: setattr(m.graph.node[_REDUCE], "name", "other"),
        "found 1 collective nodes, first 'other' for 'collective0'",
    ),
    (
        "mlp",
        "a collective taken out",
        _no_collective,
        "found 0 collective nodes, expected the 1",
    ),
    (
        "mlp",
        "a collective more",
        node(op="AllReduce", inputs=("h",), domain="furiosa_llm", axes=[0]),
        "found 2 collective nodes, expected the 1",
    ),
    (
        "mlp",
        "a collective of another kind",
        lambda m: setattr(m.graph.node[_REDUCE], "op_type", "AllGather"),
        "collective 'collective0' is AllGather",
    ),
    (
        "mlp",
        "a collective over fewer axes",
        _collective("axes", [0]),
        r"'axes': \[0\]\}, expected AllReduce \{'axes': \[0, 1\]\}",
    ),
    (
        "mlp",
        "a collective over axes in another order",
        _collective("axes", [1, 0]),
        r"'axes': \[1, 0\]\}, expected AllReduce",
    ),
    ("mlp", "a collective whose axes are text", _collective("axes", "0"), r"'axes': None\}, expected AllReduce"),
    (
        "mlp",
        "a collective with two inputs",
        lambda m: m.graph.node[_REDUCE].input.append("h"),
        "has 2 inputs, 1 outputs, expected one each",
    ),
    (
        "mlp",
        "a collective of another type",
        lambda m: setattr(m.graph.value_info[2].type.tensor_type, "elem_type", 10),
        "is FLOAT16, expected FLOAT",
    ),
    (
        "mlp",
        "a collective of another shape",
        lambda m: setattr(m.graph.value_info[2].type.tensor_type.shape.dim[1], "dim_value", 9),
        r"is \['batch', 9\], expected \['batch', 8\]",
    ),
    (
        "mlp",
        "a collective in a branch",
        _if(_branch(helper.make_node("AllReduce", ["partial"], ["inner"], domain="furiosa_llm", axes=[0]))),
        "has a collective, expected collectives at the top level only",
    ),
    (
        "mlp",
        "a collective in a function",
        _function_with_a_collective,
        "function 'f' has a collective, expected collectives at the top level only",
    ),
    (
        "llama",
        "two collectives swapped",
        lambda m: _swap_names([n for n in m.graph.node if n.domain == "furiosa_llm"]),
        "found 3 collective nodes, first 'collective1' for 'collective0'",
    ),
    (
        "mlp",
        "2^30 nodes by functions",
        nested_functions,
        "functions stand for 1610612734 nodes, expected at most 100000",
    ),
    (
        "mlp",
        "functions in a circle",
        _two_functions_in_a_circle,
        "calls itself, expected functions that come to an end",
    ),
    (
        "mlp",
        "a function like an operator",
        _function_like_an_operator,
        "function 'Relu' of the domain '' is an operator, expected another name",
    ),
    (
        "mlp",
        "an opset from the far future",
        lambda m: setattr(m.opset_import[0], "version", 2**62),
        "found version 4611686018427387904 of the opset '', expected 1 to",
    ),
    (
        "mlp",
        "an IR from the far future",
        lambda m: setattr(m, "ir_version", 2**40),
        "found the ir_version 1099511627776, expected 3 to",
    ),
    (
        "mlp",
        "no opsets",
        lambda m: m.ClearField("opset_import"),
        "node 'n0' is of the domain '', expected one that opset_import has",
    ),
    (
        "mlp",
        "no opset of the collectives",
        lambda m: m.opset_import.pop(),
        "node 'collective0' is of the domain 'furiosa_llm', expected one that",
    ),
    (
        "mlp",
        "an opset of the collectives to come",
        lambda m: setattr(m.opset_import[2], "version", 2),
        "found version 2 of the opset 'furiosa_llm', expected",
    ),
    (
        "mlp",
        "two opsets for one domain",
        lambda m: m.opset_import.add(domain="ai.onnx", version=7),
        "found two opsets for the domain 'ai.onnx', expected one",
    ),
    (
        "mlp",
        "a domain in a branch only",
        _if(_branch(_identity("partial", "nowhere"))),
        "is of the domain 'nowhere', expected one that opset_import has",
    ),
]


def _swap_names(nodes: list[NodeProto]) -> None:
    nodes[0].name, nodes[1].name = nodes[1].name, nodes[0].name


KINDS: list[Hostile] = [
    *(
        model_kind(base, PROGRAM, name, change, rf"program\.onnx: .*{message}")
        for base, name, change, message in _PROGRAM
    ),
    *(
        Hostile(
            name=f"{name} that is {what}",
            base="mlp",
            apply=lambda copy, name=name, data=data: copy.write(name, data),  # type: ignore[misc]
            message=rf"{name} is not an ONNX model",
        )
        for name in (PROGRAM, SOURCE)
        for what, data in (("no protobuf", b"\xff" * 64), ("cut short", b"\x3a\x7f"))
    ),
    *(
        Hostile(
            name=f"{name} that is deep",
            base="mlp",
            apply=lambda copy, name=name: _deep(copy, name),  # type: ignore[misc]
            message=rf"{name} is not an ONNX model",
        )
        for name in (PROGRAM, SOURCE)
    ),
    Hostile(
        name="an op in bytes that are no text",
        base="mlp",
        apply=_not_text,
        message=r"name b'Re\\xffu', expected names in UTF-8",
    ),
]
