"""Files whose fields are damaged, or ask for what cannot be: each is refused, naming the node and what to do.

Each case changes one thing of a model that builds. `make fuzz-loader` looks for what is not written here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from furiosa_llm.builder import ArtifactBuilder, BuildError, ModelLoadError, ShapeError, UnsupportedModelError
from tests.campaigns.fuzz_loader import time_limit
from tests.support.builder.graphs import model

Damage = Callable[[onnx.ModelProto], object]
Row = tuple[type[BuildError], Damage, tuple[str, ...]]

NODES = """
    x = Gather(e, input_ids) t = Transpose<perm = [0, 2, 1]>(x) r = Reshape(t, shape) f = Cast<to = 1>(r)
    m = MatMul(f, w) logits = Softmax<axis = -1>(m)
"""
WEIGHTS = {"e": (32, 8), "w": (8, 32), "shape": np.array([0, -1, 8])}


def good() -> onnx.ModelProto:
    return model("int64[batch, sequence] input_ids", "float[batch, sequence, 32] logits", NODES, WEIGHTS)


def node(proto: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    nodes: list[onnx.NodeProto] = [found for found in proto.graph.node if found.op_type == op_type]
    return nodes[0]


def initializer(proto: onnx.ModelProto, name: str) -> onnx.TensorProto:
    tensors: list[onnx.TensorProto] = [found for found in proto.graph.initializer if found.name == name]
    return tensors[0]


def put(owner: Callable[[onnx.ModelProto], object], field: str, value: object) -> Damage:
    """A damage that sets one field."""
    return lambda proto: setattr(owner(proto), field, value)


def input_type(proto: onnx.ModelProto) -> onnx.TypeProto.Tensor:
    found: onnx.TypeProto.Tensor = proto.graph.input[0].type.tensor_type
    return found


def opset(*entries: tuple[str, int]) -> Damage:
    def change(proto: onnx.ModelProto) -> None:
        del proto.opset_import[:]
        for domain, version in entries:
            proto.opset_import.add(domain=domain, version=version)

    return change


def attribute(op_type: str, name: str, value: object) -> Damage:
    """Set an attribute of the first node of a type, or add it."""

    def change(proto: onnx.ModelProto) -> None:
        found = node(proto, op_type)
        kept = [entry for entry in found.attribute if entry.name != name]
        del found.attribute[:]
        found.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def constant(values: object) -> Damage:
    """Another target for the Reshape."""

    def change(proto: onnx.ModelProto) -> None:
        initializer(proto, "shape").CopyFrom(numpy_helper.from_array(np.array(values), "shape"))

    return change


def tensor(of: str, /, **fields: Any) -> Damage:
    def change(proto: onnx.ModelProto) -> None:
        found = initializer(proto, of)
        for field, value in fields.items():
            if field == "dims":
                del found.dims[:]
                found.dims.extend(value)
            else:
                setattr(found, field, value)

    return change


def extra(op_type: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> Damage:
    """One more node, whose output becomes one of the model."""

    def change(proto: onnx.ModelProto) -> None:
        proto.graph.node.append(helper.make_node(op_type, inputs, outputs, name="extra", domain=domain, **attributes))
        if outputs and outputs[0] not in ("logits", "input_ids", "w"):
            proto.graph.output.append(helper.make_tensor_value_info(outputs[0], TensorProto.FLOAT, None))

    return change


def no_type(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].ClearField("type")


def bytes_for_a_name(proto: onnx.ModelProto) -> bytes:
    data: bytes = proto.SerializeToString()
    return data.replace(b"input_ids", b"input_\xff\xfes")


def untyped_attribute(proto: onnx.ModelProto) -> None:
    node(proto, "Cast").attribute[0].type = AttributeProto.UNDEFINED


def attribute_with_two_values(proto: onnx.ModelProto) -> None:
    node(proto, "Cast").attribute[0].f = 1.0


def graph_attribute_without_a_graph(proto: onnx.ModelProto) -> None:
    extra("If", ["w"], ["i"])(proto)
    proto.graph.node[-1].attribute.add(name="then_branch", type=AttributeProto.GRAPH)
    proto.graph.node[-1].attribute.add(name="else_branch", type=AttributeProto.GRAPH)


def sparse(proto: onnx.ModelProto) -> None:
    proto.graph.sparse_initializer.add().values.name = "s"


def recursive(proto: onnx.ModelProto) -> None:
    proto.opset_import.add(domain="local", version=1)
    for name, callee in (("f", "g"), ("g", "f")):
        function = proto.functions.add(name=name, domain="local", input=["x"], output=["y"])
        function.opset_import.add(domain="local", version=1)
        function.node.add(op_type=callee, domain="local", input=["x"], output=["y"])
    extra("f", ["m"], ["y"], "local")(proto)


def function_without_imports(proto: onnx.ModelProto) -> None:
    proto.opset_import.add(domain="local", version=1)
    function = proto.functions.add(name="f", domain="local", input=["x"], output=["y"])
    function.node.add(op_type="Neg", input=["x"], output=["y"])
    extra("f", ["m"], ["y"], "local")(proto)


def function_with_too_few_inputs(proto: onnx.ModelProto) -> None:
    function_without_imports(proto)
    proto.functions[0].opset_import.add(domain="", version=21)
    proto.graph.node[-1].input.append("m")


def function_with_an_attribute(*given: onnx.AttributeProto) -> Damage:
    """A function whose Cast has its type from the call, which gives an attribute, or none."""

    def change(proto: onnx.ModelProto) -> None:
        function_without_imports(proto)
        function = proto.functions[0]
        function.opset_import.add(domain="", version=21)
        function.attribute.append("kind")
        function.node[0].op_type = "Cast"
        function.node[0].attribute.add(name="to", ref_attr_name="kind", type=AttributeProto.INT)
        proto.graph.node[-1].attribute.extend(given)

    return change


def attribute_of_no_function(proto: onnx.ModelProto) -> None:
    node(proto, "Cast").attribute[0].ref_attr_name = "kind"


def function_named_as_an_operator(proto: onnx.ModelProto) -> None:
    function_without_imports(proto)
    proto.functions[0].opset_import.add(domain="", version=21)
    proto.functions[0].domain, proto.functions[0].name = "", "Softmax"


def argument_left_out(proto: onnx.ModelProto) -> None:
    function_without_imports(proto)
    proto.functions[0].opset_import.add(domain="", version=21)
    del proto.graph.node[-1].input[:]


def functions_of_one_name(proto: onnx.ModelProto) -> None:
    function_without_imports(proto)
    proto.functions.add().CopyFrom(proto.functions[0])


def function_that_reads_nothing(proto: onnx.ModelProto) -> None:
    function_with_too_few_inputs(proto)
    del proto.graph.node[-1].input[1]
    proto.functions[0].node[0].input[0] = "nobody"


def function_without_its_output(proto: onnx.ModelProto) -> None:
    function_with_too_few_inputs(proto)
    del proto.graph.node[-1].input[1]
    proto.functions[0].output[0] = "nobody"


def branch_that_reads_nothing(proto: onnx.ModelProto) -> None:
    result = helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Neg", ["nobody"], ["b"])], "branch", [], [result])
    extra("If", ["flag"], ["i"], then_branch=branch, else_branch=branch)(proto)
    proto.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))


def body_of_another_size(proto: onnx.ModelProto) -> None:
    result = helper.make_tensor_value_info("b", TensorProto.BOOL, [])
    body = helper.make_graph([helper.make_node("Not", ["w"], ["b"])], "body", [], [result])
    extra("Loop", ["", "", "m"], ["i"], body=body)(proto)


def string_weights(proto: onnx.ModelProto) -> None:
    found = initializer(proto, "w")
    found.data_type = TensorProto.STRING
    found.ClearField("raw_data")
    found.string_data.extend([b"x"] * 256)


def listed_twice(kind: str) -> Damage:
    return lambda proto: getattr(proto.graph, kind).append(getattr(proto.graph, kind)[0])


HUGE = 2**62
VERSIONS: dict[str, Row] = {
    "no IR version": (UnsupportedModelError, put(lambda p: p, "ir_version", 0), ("IR version 0", "3 to")),
    "future IR version": (UnsupportedModelError, put(lambda p: p, "ir_version", 999), ("IR version 999",)),
    "huge IR version": (UnsupportedModelError, put(lambda p: p, "ir_version", 2**40), (f"IR version {2**40}", "3 to")),
    "future opset of another domain": (
        UnsupportedModelError, opset(("", 21), ("ai.onnx.ml", 6)), ('version 6 of the ops "ai.onnx.ml"', "at most 5"),
    ),
    "future opset of onnxruntime's ops": (
        UnsupportedModelError, opset(("", 21), ("com.microsoft", 2)), ("version 2", "at most 1", "onnxruntime has"),
    ),
    "no opset": (ModelLoadError, opset(), ("does not say which version of the standard ops",)),
    "future opset": (UnsupportedModelError, opset(("", 99)), ("uses opset 99", "at most")),
    "huge opset": (ModelLoadError, opset(("", HUGE)), (f"version {HUGE}", f"1 to {2**31 - 1}")),
    "negative opset": (ModelLoadError, opset(("", -1)), ("version -1",)),
    "two versions": (ModelLoadError, opset(("", 21), ("ai.onnx", 20)), ("versions 21 and 20", "one version")),
    "domain not imported": (ModelLoadError, put(lambda p: p.graph.node[0], "domain", "other"),
                            ('domain "other"', "opset_import")),
    "our own domain": (ModelLoadError, extra("If", ["w"], ["z"], "furiosa_llm.closure"),
                       ("programs of artifacts use",)),
}  # fmt: skip
NAMES: dict[str, Row] = {
    "input twice": (ModelLoadError, listed_twice("input"), ('the input "input_ids" twice', "remove one")),
    "initializer twice": (ModelLoadError, listed_twice("initializer"), ('the initializer "e" twice',)),
    "initializer without a name": (ModelLoadError, tensor("e", name=""), ("an initializer without a name",)),
    "node output twice": (ModelLoadError, extra("Neg", ["m"], ["logits"]), ('gives "logits"', 'node Softmax ""')),
    "node output is an input": (ModelLoadError, extra("Neg", ["m"], ["input_ids"]), ("which is an input already",)),
    "node output is a weight": (ModelLoadError, extra("Neg", ["m"], ["w"]), ("which is an initializer already",)),
    "one output twice in a node": (ModelLoadError, extra("Split", ["m"], ["a", "a"], num_outputs=2), ('gives "a"',)),
    "self-loop": (ModelLoadError, extra("Neg", ["y"], ["y"]), ("cycle",)),
    "not UTF-8": (ModelLoadError, bytes_for_a_name, ("UTF-8",)),
    "branch reads nothing": (ModelLoadError, branch_that_reads_nothing, ('reads "nobody"', "export it again")),
    "sparse initializers": (UnsupportedModelError, sparse, ("sparse initializers", "convert them")),
}  # fmt: skip
TYPES: dict[str, Row] = {
    "input without a type": (UnsupportedModelError, no_type, ('"input_ids" has type None', "expected a tensor")),
    "input of an undefined type": (ModelLoadError, put(input_type, "elem_type", 0),
                                   ("has no element type",)),
    "input of an unknown type": (UnsupportedModelError, put(input_type, "elem_type", 77),
                                 ("elements of type number 77", "FLOAT, DOUBLE")),
    "strings as input": (UnsupportedModelError, put(input_type, "elem_type", 8),
                         ("of type STRING", "outside of the model")),
    "complex input": (UnsupportedModelError, put(input_type, "elem_type", 14),
                      ("of type COMPLEX64",)),
    "negative dimension": (ModelLoadError, put(lambda p: input_type(p).shape.dim[0], "dim_value", -3),
                           ("a dimension of -3",)),
    "huge dimension": (ModelLoadError, put(lambda p: input_type(p).shape.dim[1], "dim_value", HUGE),
                       (f"{HUGE} elements", "at most")),
    "sequence in the middle": (UnsupportedModelError, extra("SequenceConstruct", ["m"], ["s"]), ("type sequence",)),
    "optional in the middle": (UnsupportedModelError, extra("Optional", ["m"], ["s"]), ("type optional",)),
}  # fmt: skip
TENSORS: dict[str, Row] = {
    "too little data": (ModelLoadError, tensor("w", raw_data=b"abcd"), ("4 bytes for FLOAT [8, 32], expected 1024",)),
    "too much data": (ModelLoadError, tensor("w", dims=[8, 31]), ("1024 bytes for FLOAT [8, 31], expected 992",)),
    "no data": (ModelLoadError, lambda p: initializer(p, "w").ClearField("raw_data"), ("0 entries of float_data",)),
    "negative size": (ModelLoadError, tensor("w", dims=[-8, -32]), ("dimensions [-8, -32]", "none below 0")),
    "huge sizes": (ModelLoadError, tensor("w", dims=[HUGE, HUGE]), (f"[{HUGE}, {HUGE}]", "at most")),
    "undefined type": (UnsupportedModelError, tensor("w", data_type=0), ("elements of type UNDEFINED",)),
    "unknown type": (UnsupportedModelError, tensor("w", data_type=99), ("elements of type number 99",)),
    "external without a file": (ModelLoadError, tensor("w", data_location=1), ("does not say in which file",)),
    "scalar for a matrix": (ShapeError, tensor("w", dims=[], raw_data=b"abcd"), ('node MatMul ""', "FLOAT[]")),
    "string weights": (UnsupportedModelError, string_weights, ("STRING",)),
}  # fmt: skip
ATTRIBUTES: dict[str, Row] = {
    "missing": (ModelLoadError, lambda p: node(p, "Cast").ClearField("attribute"), ("lacks the attributes ['to']",)),
    "unknown": (ModelLoadError, attribute("MatMul", "axis", 1), ("has the attribute axis, expected one of []",)),
    "of another type": (ModelLoadError, attribute("Softmax", "axis", "last"), ("axis of type STRING, expected INT",)),
    "of no type": (ModelLoadError, untyped_attribute, ("of the unknown type 0",)),
    "twice": (ModelLoadError, lambda p: node(p, "Cast").attribute.append(node(p, "Cast").attribute[0]), ("to twice",)),
    "no element type": (ModelLoadError, attribute("Cast", "to", 88), ("has to=88", "number of an element type")),
    "neither yes nor no": (ModelLoadError, attribute("Reshape", "allowzero", 7), ("allowzero=7, expected 0 or 1",)),
    "attribute with two values": (ModelLoadError, attribute_with_two_values, ("to with ['f', 'i']", "a INT only")),
    "graph without a graph": (ModelLoadError, graph_attribute_without_a_graph, ("then_branch without its value",)),
    "of another type in onnxruntime's op": (
        ModelLoadError, extra("MatMulNBits", ["m", "w", "w"], ["s"], "com.microsoft", K=1, N=1, block_size=1, bits="x"),
        ("bits of type STRING, expected INT",)),
    "absurd axis": (ShapeError, attribute("Softmax", "axis", HUGE), ("node Softmax", "does not fit its inputs")),
    "no permutation": (ShapeError, attribute("Transpose", "perm", [0, 0, 1]), ("node Transpose",)),
    "permutation of another rank": (ShapeError, attribute("Transpose", "perm", [1, 0]), ("node Transpose",)),
}  # fmt: skip
NODES_AND_SIZES: dict[str, Row] = {
    "no op type": (ModelLoadError, put(lambda p: p.graph.node[0], "op_type", ""), ("has no op_type",)),
    "too few inputs": (ModelLoadError, lambda p: node(p, "MatMul").input.pop(), ("has 1 inputs, expected 2 to 2",)),
    "too many inputs": (ModelLoadError, lambda p: node(p, "MatMul").input.append("w"), ("has 3 inputs",)),
    "input left out": (ModelLoadError, lambda p: node(p, "MatMul").input.__setitem__(1, ""), ("leaves out input 1",)),
    "too many outputs": (ModelLoadError, lambda p: node(p, "MatMul").output.append("z"), ("has 2 outputs",)),
    "no outputs": (ModelLoadError, extra("Neg", ["m"], []), ("has 0 outputs, expected 1 to 1",)),
    "body of another size": (ModelLoadError, body_of_another_size, ("0 inputs and 1 outputs, expected 3 and 2",)),
    "elements do not fit": (ShapeError, constant([0, 3, 8]), ("node Reshape",)),
    "huge target": (ShapeError, constant([HUGE, 1, 8]), ("node Reshape",)),
    "negative target": (ShapeError, constant([-7, -7, 8]), ("node Reshape",)),
    "target of rank 2": (ShapeError, constant([[0, -1, 8]]), ("node Reshape",)),
    "target that is no integer": (ShapeError, constant([0.0, 1.0, 8.0]), ("node Reshape",)),
    "range without end": (ShapeError, extra("Range", ["zero", "top", "zero"], ["s"]), ("node Range",)),
    "range beyond memory": (ShapeError, extra("Range", ["zero", "top", "one"], ["s"]), ("node Range",)),
    "fill beyond memory": (ShapeError, extra("ConstantOfShape", ["tops"], ["s"]), ("node ConstantOfShape", "extra")),
    "expand beyond memory": (ShapeError, extra("Expand", ["one", "tops"], ["s"]), ("node Expand",)),
    "tile beyond memory": (ShapeError, extra("Tile", ["tops", "tops1"], ["s"]), ("node Tile",)),
    "sum along no axis": (ShapeError, extra("CumSum", ["half", "zero"], ["s"]), ("CumSum", "has no dimension")),
    "sums along many axes": (ShapeError, extra("CumSum", ["w", "tops"], ["s"]), ("the axis is not one element",)),
    "axes of rank 2": (ShapeError, extra("ReduceMean", ["m", "w"], ["s"]), ("input 1 has 2 dimensions",)),
    "range of matrices": (ShapeError, extra("Range", ["w", "w", "w"], ["s"]), ("node Range", "one element each")),
}  # fmt: skip
FUNCTIONS: dict[str, Row] = {
    "mutual recursion": (ModelLoadError, recursive, ("local::", "calls itself", "without recursion")),
    "no imports": (ModelLoadError, function_without_imports, ("uses ops of ['ai.onnx'] without importing them",)),
    "too many arguments": (ModelLoadError, function_with_too_few_inputs, ("has 2 inputs, expected 0 to 1",)),
    "named as an operator": (UnsupportedModelError, function_named_as_an_operator,
                             ("ai.onnx::Softmax", "rename the function")),
    "argument left out": (ModelLoadError, argument_left_out, ("Neg", "leaves out input 0")),
    "attribute left out": (ModelLoadError, function_with_an_attribute(), ("lacks the attributes ['to']",)),
    "attribute of another type": (ModelLoadError, function_with_an_attribute(helper.make_attribute("kind", "x")),
                                  ("to of type STRING, expected INT",)),
    "no element type from a call": (ModelLoadError, function_with_an_attribute(helper.make_attribute("kind", 88)),
                                    ("to=88", "an element type")),
    "attribute of no function": (ModelLoadError, attribute_of_no_function, ("attribute to of a function",)),
    "two of one name": (ModelLoadError, functions_of_one_name, ("local::f twice",)),
    "a value from nowhere": (ModelLoadError, function_that_reads_nothing, ('reads "nobody"',)),
    "an output from nowhere": (ModelLoadError, function_without_its_output, ('no node gives the output "nobody"',)),
}  # fmt: skip
ROWS = {**VERSIONS, **NAMES, **TYPES, **TENSORS, **ATTRIBUTES, **NODES_AND_SIZES, **FUNCTIONS}


def damaged(damage: Damage) -> bytes:
    proto = good()
    for name, value in (
        ("half", 0.5),
        ("zero", 0),
        ("one", 1),
        ("top", 2**60),
        ("tops", [2**40, 2**40]),
        ("tops1", [2**50]),
    ):
        proto.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    result = damage(proto)
    return result if isinstance(result, bytes) else proto.SerializeToString()


def test_the_model_that_is_damaged_builds(tmp_path: Path) -> None:
    (tmp_path / "good.onnx").write_bytes(damaged(lambda _: None))
    assert ArtifactBuilder(tmp_path / "good.onnx").build(tmp_path / "artifact").num_nodes > 0


@pytest.mark.parametrize("name", list(ROWS))
def test_refused(name: str, tmp_path: Path) -> None:
    kind, damage, parts = ROWS[name]
    (tmp_path / "broken.onnx").write_bytes(damaged(damage))
    with pytest.raises(BuildError) as caught, time_limit(5):
        ArtifactBuilder(tmp_path / "broken.onnx").build(tmp_path / "artifact")
    message = str(caught.value)
    assert type(caught.value) is kind, message
    for part in parts:
        assert part in message
    assert "\n" not in message
    assert len(message) < 1000
    assert "export" in message or "--dim" in message or "remove" in message or "convert" in message or "save" in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["broken.onnx"]
