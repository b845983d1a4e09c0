"""Odd graphs of any size: what a build must take in proportion to, each kind large in one respect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

_FLOAT = TensorProto.FLOAT
_SHAPE = ("n", 8)
_ZEROS = np.zeros(8, np.float32)
_WIDTH = 500
"""Inputs of one node: the builder has a limit."""

Shapes = Mapping[str, Sequence[str | int]]


def _node(op_type: str, inputs: Iterable[str], *outputs: str, **attributes: Any) -> NodeProto:
    return helper.make_node(op_type, list(inputs), list(outputs), name=f"{outputs[0]}_node", **attributes)


def _model(
    nodes: Sequence[NodeProto],
    weights: Mapping[str, object] | None = None,
    *,
    inputs: Shapes | None = None,
    outputs: Shapes | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "growing",
        [helper.make_tensor_value_info(n, _FLOAT, s) for n, s in (inputs or {"x": _SHAPE}).items()],
        [helper.make_tensor_value_info(n, _FLOAT, s) for n, s in (outputs or {"y": _SHAPE}).items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("mine", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))


def _chained(count: int, node: Callable[[int, str, str], Sequence[NodeProto]]) -> list[NodeProto]:
    """`count` links from x to y, each made by `node` of its number, its input and its output."""
    names = ["x", *(f"h{i}" for i in range(1, count)), "y"]
    return [n for i in range(count) for n in node(i, names[i], names[i + 1])]


def chain(count: int) -> onnx.ModelProto:
    """A chain of Relu."""
    return _model(_chained(count, lambda _, a, b: [_node("Relu", [a], b)]))


def chain_of_many_ops(count: int) -> onnx.ModelProto:
    """A chain in which no two of some neighbours are alike."""
    ops = ("Relu", "Neg", "Exp", "Tanh", "Sigmoid", "Abs", "Sqrt", "Erf", "Floor", "Ceil", "Sin")
    return _model(_chained(count, lambda i, a, b: [_node(ops[i * i % 11], [a], b)]))


def _merged(op_type: str, names: Sequence[str], **attributes: Any) -> list[NodeProto]:
    """Nodes of at most `_WIDTH` inputs that put all values together as y."""
    nodes: list[NodeProto] = []
    while len(names) > 1 or not nodes:
        groups = [names[i : i + _WIDTH] for i in range(0, len(names), _WIDTH)]
        merged = [f"m{len(nodes) + i}" if len(groups) > 1 else "y" for i in range(len(groups))]
        nodes += [_node(op_type, group, name, **attributes) for group, name in zip(groups, merged, strict=True)]
        names = merged
    return nodes


def wide_sum(count: int) -> onnx.ModelProto:
    """Sums of many inputs, all branches of one value."""
    names = [f"h{i}" for i in range(count)]
    return _model([*(_node("Relu", ["x"], name) for name in names), *_merged("Sum", names)])


def sum_of_one(count: int) -> onnx.ModelProto:
    """Sums of one value, as many times."""
    return _model(_merged("Sum", ["x"] * count))


def wide_concat(count: int) -> onnx.ModelProto:
    """Concats of many inputs."""
    names = [f"h{i}" for i in range(count)]
    nodes = [*(_node("Relu", ["x"], name) for name in names), *_merged("Concat", names, axis=1)]
    return _model(nodes, outputs={"y": ("n", 8 * count)})


def wide_split(count: int) -> onnx.ModelProto:
    """A Split into as many outputs, and their Concats."""
    names = [f"h{i}" for i in range(count)]
    nodes = [_node("Split", ["x"], *names, axis=1, num_outputs=count), *_merged("Concat", names, axis=1)]
    shape = ("n", 4 * count)
    return _model(nodes, inputs={"x": shape}, outputs={"y": shape})


def ladder(count: int) -> onnx.ModelProto:
    """Every node reads the two before it: as many paths as Fibonacci's numbers."""
    names = ["x", "x", *(f"h{i}" for i in range(1, count)), "y"]
    return _model([_node("Add", names[i : i + 2], names[i + 2]) for i in range(count)])


def far_reads(count: int) -> onnx.ModelProto:
    """Every node also reads the first value."""
    return _model(_chained(count, lambda _, a, b: [_node("Add", [a, "x"], b)]))


def pyramid(count: int) -> onnx.ModelProto:
    """As many branches, added two by two."""
    nodes, level = [_node("Relu", ["x"], f"h{i}") for i in range(count)], [f"h{i}" for i in range(count)]
    while len(level) > 1:
        pairs = [level[i : i + 2] for i in range(0, len(level) - 1, 2)]
        nodes += [_node("Add", pair, f"{pair[0]}_") for pair in pairs]
        level = [f"{pair[0]}_" for pair in pairs] + level[len(pairs) * 2 :]
    return _model([*nodes, _node("Relu", level, "y")])


def products(count: int) -> onnx.ModelProto:
    """A residual chain of small products, of a weight each."""
    weights = {f"w{i}": np.zeros((8, 8), np.float32) for i in range(count // 2)}
    link = lambda i, a, b: [_node("MatMul", [a, f"w{i}"], f"p{i}"), _node("Add", [a, f"p{i}"], b)]  # noqa: E731
    return _model(_chained(count // 2, link), weights)


def products_of_one_input(count: int) -> onnx.ModelProto:
    """As many products of one value, and their Sums."""
    weights = {f"w{i}": np.zeros((8, 8), np.float32) for i in range(count)}
    nodes = [_node("MatMul", ["x", f"w{i}"], f"h{i}") for i in range(count)]
    return _model([*nodes, *_merged("Sum", [f"h{i}" for i in range(count)])], weights)


def products_by_one_weight(count: int) -> onnx.ModelProto:
    """A chain of products, all of one weight."""
    nodes = _chained(count, lambda i, a, b: [_node("MatMul", [a, "w"], b)])
    return _model(nodes, {"w": np.zeros((8, 8), np.float32)})


def initializers(count: int) -> onnx.ModelProto:
    """A chain of sums with an initializer each."""
    nodes = _chained(count, lambda i, a, b: [_node("Add", [a, f"w{i}"], b)])
    return _model(nodes, {f"w{i}": _ZEROS for i in range(count)})


def unused_initializers(count: int) -> onnx.ModelProto:
    """Initializers that nobody reads."""
    return _model([_node("Relu", ["x"], "y")], {f"w{i}": _ZEROS for i in range(count)})


def constants(count: int) -> onnx.ModelProto:
    """A chain of sums with a Constant node each."""
    value = numpy_helper.from_array(_ZEROS)
    link = lambda i, a, b: [_node("Constant", [], f"c{i}", value=value), _node("Add", [a, f"c{i}"], b)]  # noqa: E731
    return _model(_chained(count // 2, link))


def constant_arithmetic(count: int) -> onnx.ModelProto:
    """A long chain that weights alone decide."""
    nodes = _chained(count, lambda _, a, b: [_node("Neg", ["w" if a == "x" else a], "v" if b == "y" else b)])
    return _model([*nodes, _node("Add", ["x", "v"], "y")], {"w": _ZEROS})


def size_arithmetic(count: int) -> onnx.ModelProto:
    """A long chain over a size, by which the data is shaped in the end."""
    names = ["s0", *(f"s{i}" for i in range(1, count)), "s"]
    chain = [_node("Add", [names[i], "one"], names[i + 1]) for i in range(count)]
    back = [_node("Sub", ["s", "all"], "t"), _node("Concat", ["t", "eight"], "u", axis=0)]
    nodes = [_node("Shape", ["x"], "s0", start=0, end=1), *chain, *back, _node("Reshape", ["x", "u"], "y")]
    return _model(nodes, {"one": np.array([1]), "all": np.array([count]), "eight": np.array([8])})


def sizes(count: int) -> onnx.ModelProto:
    """Reshapes by sizes that the graph takes from its data each time."""

    def link(i: int, a: str, b: str) -> list[NodeProto]:
        return [_node("Shape", [a], f"s{i}"), _node("Reshape", [a, f"s{i}"], f"r{i}"), _node("Relu", [f"r{i}"], b)]

    return _model(_chained(count // 3, link))


def movements(count: int) -> onnx.ModelProto:
    """A chain of reshapes and transpositions."""

    def link(i: int, a: str, b: str) -> list[NodeProto]:
        return [
            _node("Reshape", [a, "two"], f"r{i}"),
            _node("Transpose", [f"r{i}"], f"t{i}", perm=[0, 2, 1]),
            _node("Reshape", [f"t{i}", "flat"], b),
        ]

    return _model(_chained(count // 3, link), {"two": np.array([0, 2, 4]), "flat": np.array([0, 8])})


def dead_nodes(count: int) -> onnx.ModelProto:
    """A chain that leads nowhere."""
    nodes = _chained(count, lambda _, a, b: [_node("Relu", [a], "end" if b == "y" else b)])
    return _model([*nodes, _node("Relu", ["x"], "y")])


def inputs(count: int) -> onnx.ModelProto:
    """As many inputs, added one after the other."""
    nodes = _chained(count, lambda i, a, b: [_node("Add", [a, f"x{i}"], b)])
    return _model(nodes, inputs={"x": _SHAPE, **{f"x{i}": _SHAPE for i in range(count)}})


def outputs(count: int) -> onnx.ModelProto:
    """As many outputs: every value of a chain."""
    nodes = _chained(count, lambda _, a, b: [_node("Relu", [a], b)])
    return _model(nodes, outputs={node.output[0]: _SHAPE for node in nodes})


def symbols(count: int) -> onnx.ModelProto:
    """As many inputs and outputs, each with a size of its own."""
    nodes = [_node("Relu", [f"x{i}"], f"y{i}") for i in range(count)]
    shape = {f"x{i}": (f"n{i}", 8) for i in range(count)}
    return _model(nodes, inputs=shape, outputs={f"y{i}": (f"n{i}", 8) for i in range(count)})


def states(count: int) -> onnx.ModelProto:
    """As many caches, which the values of a chain are appended to."""

    def link(i: int, a: str, b: str) -> list[NodeProto]:
        return [_node("Concat", [f"past_{i}", a], f"present_{i}", axis=1), _node("Relu", [a], b)]

    new = ("batch", "sequence", 8)
    return _model(
        _chained(count // 2, link),
        inputs={"x": new, **{f"past_{i}": ("batch", "past", 8) for i in range(count // 2)}},
        outputs={"y": new, **{f"present_{i}": ("batch", "total", 8) for i in range(count // 2)}},
    )


def _function(name: str, nodes: Sequence[NodeProto]) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("mine", 1)]
    return helper.make_function("mine", name, ["x"], ["y"], list(nodes), opsets)


def _call(name: str, a: str, b: str) -> NodeProto:
    return _node(name, [a], b, domain="mine")


def functions(count: int) -> onnx.ModelProto:
    """As many functions, each called once."""
    made = [_function(f"f{i}", [_node("Relu", ["x"], "y")]) for i in range(count)]
    return _model(_chained(count, lambda i, a, b: [_call(f"f{i}", a, b)]), functions=made)


def calls(count: int) -> onnx.ModelProto:
    """One function, called as many times."""
    body = _function("f", [_node("Relu", ["x"], "h"), _node("Neg", ["h"], "y")])
    return _model(_chained(count // 2, lambda _, a, b: [_call("f", a, b)]), functions=[body])


def nested_functions(count: int) -> onnx.ModelProto:
    """Functions that call each other, as deep."""
    bodies = [_function(f"f{i}", [_call(f"f{i + 1}", "x", "h"), _node("Relu", ["h"], "y")]) for i in range(count)]
    return _model([_call("f0", "x", "y")], functions=[*bodies, _function(f"f{count}", [_node("Relu", ["x"], "y")])])


def _branch(name: str, node: NodeProto) -> onnx.GraphProto:
    return helper.make_graph([node], name, [], [helper.make_tensor_value_info(node.output[0], _FLOAT, _SHAPE)])


def _if(i: int, a: str, b: str, condition: str) -> NodeProto:
    then = _branch(f"then{i}", _node("Relu", [a], f"then{i}"))
    other = _branch(f"else{i}", _node("Neg", [a], f"else{i}"))
    return _node("If", [condition], b, then_branch=then, else_branch=other)


def decided_branches(count: int) -> onnx.ModelProto:
    """A chain of If, each of a constant condition."""
    return _model(_chained(count, lambda i, a, b: [_if(i, a, b, "yes")]), {"yes": np.array(True)})


def _decided_by_data(nodes: Sequence[NodeProto]) -> onnx.ModelProto:
    """`nodes` behind a condition "yes" that the input decides."""
    head = [_node("ReduceMax", ["x"], "m", keepdims=0), _node("Greater", ["m", "zero"], "yes")]
    return _model([*head, *nodes], {"zero": np.array(0, np.float32)})


def _one_branch(nodes: Sequence[NodeProto]) -> onnx.ModelProto:
    """One such If with `nodes`, from x to end, in a branch."""
    then = helper.make_graph(nodes, "then", [], [helper.make_tensor_value_info("end", _FLOAT, _SHAPE)])
    other = _branch("else", _node("Neg", ["x"], "z"))
    return _decided_by_data([_node("If", ["yes"], "y", then_branch=then, else_branch=other)])


def open_branches(count: int) -> onnx.ModelProto:
    """A chain of If, each of a condition that the data decides."""
    return _decided_by_data(_chained(count, lambda i, a, b: [_if(i, a, b, "yes")]))


def loops(count: int) -> onnx.ModelProto:
    """A chain of loops of two rounds."""

    def link(i: int, a: str, b: str) -> list[NodeProto]:
        body = helper.make_graph(
            [_node("Identity", [f"c{i}"], f"d{i}"), _node("Relu", [f"a{i}"], f"b{i}")],
            f"body{i}",
            [
                helper.make_tensor_value_info(f"i{i}", TensorProto.INT64, []),
                helper.make_tensor_value_info(f"c{i}", TensorProto.BOOL, []),
                helper.make_tensor_value_info(f"a{i}", _FLOAT, _SHAPE),
            ],
            [
                helper.make_tensor_value_info(f"d{i}", TensorProto.BOOL, []),
                helper.make_tensor_value_info(f"b{i}", _FLOAT, _SHAPE),
            ],
        )
        return [_node("Loop", ["two", "", a], b, body=body)]

    return _model(_chained(count, link), {"two": np.array(2)})


def tree_of_branches(count: int) -> onnx.ModelProto:
    """An If whose branches are Ifs, whose branches are Ifs."""

    def tree(i: int) -> NodeProto:
        if 2 * i >= count:
            return _node("Relu" if i % 2 else "Neg", ["x"], f"h{i}")
        then, other = (_branch(f"branch{inner}", tree(inner)) for inner in (2 * i, 2 * i + 1))
        return _node("If", ["yes"], f"h{i}" if i > 1 else "y", then_branch=then, else_branch=other)

    return _decided_by_data([tree(1)])


def branches_in_a_branch(count: int) -> onnx.ModelProto:
    """One If whose branch is a long chain of Ifs."""
    return _one_branch(_chained(count // 4, lambda i, a, b: [_if(i, a, "end" if b == "y" else b, "yes")]))


def large_subgraph(count: int) -> onnx.ModelProto:
    """One If whose branch is a long chain."""
    return _one_branch(_chained(count, lambda _, a, b: [_node("Relu", [a], "end" if b == "y" else b)]))


def long_names(count: int) -> onnx.ModelProto:
    """Names that begin alike, of a thousand letters."""
    prefix = "a" * 1000
    return _model(_chained(count, lambda _, a, b: [_node("Relu", [_long(a, prefix)], _long(b, prefix))]))


def _long(name: str, prefix: str) -> str:
    return name if name in ("x", "y") else prefix + name


def one_name(count: int) -> onnx.ModelProto:
    """Nodes that all have one name."""
    proto = chain(count)
    for node in proto.graph.node:
        node.name = "node"
    return proto


def numbered_names(count: int) -> onnx.ModelProto:
    """Names that are those which the builder itself would choose next."""
    nodes = _chained(count, lambda i, a, b: [_node("MatMul", [a, f"w{'_1' * (i % 7)}{i}"], b)])
    weights = {f"w{'_1' * (i % 7)}{i}": np.zeros((8, 8), np.float32) for i in range(count)}
    return _model(nodes, weights)


def backwards(count: int) -> onnx.ModelProto:
    """A chain whose nodes stand in the file from last to first."""
    proto = chain(count)
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def value_infos(count: int) -> onnx.ModelProto:
    """A chain whose values all have their types and shapes said."""
    proto = chain(count)
    names = [node.output[0] for node in proto.graph.node[:-1]]
    proto.graph.value_info.extend(helper.make_tensor_value_info(name, _FLOAT, _SHAPE) for name in names)
    return proto


def metadata(count: int) -> onnx.ModelProto:
    """As many metadata properties of the model."""
    proto = chain(1)
    helper.set_model_props(proto, {f"key{i}": "value" for i in range(count)})
    return proto


def domains(count: int) -> onnx.ModelProto:
    """As many imported operator sets."""
    proto = chain(1)
    proto.opset_import.extend(helper.make_opsetid(f"domain{i}", 1) for i in range(count))
    return proto


def quantized(count: int) -> onnx.ModelProto:
    """A chain of products whose weights are dequantized each."""

    def link(i: int, a: str, b: str) -> list[NodeProto]:
        return [_node("DequantizeLinear", [f"q{i}", "s"], f"w{i}"), _node("MatMul", [a, f"w{i}"], b)]

    weights = {f"q{i}": np.zeros((8, 8), np.int8) for i in range(count // 2)}
    return _model(_chained(count // 2, link), {**weights, "s": np.array(1, np.float32)})


def equal_branches(count: int) -> onnx.ModelProto:
    """Pairs of nodes that compute the same, added."""

    def link(i: int, a: str, b: str) -> list[NodeProto]:
        return [_node("Relu", [a], f"p{i}"), _node("Relu", [a], f"q{i}"), _node("Add", [f"p{i}", f"q{i}"], b)]

    return _model(_chained(count // 3, link))


def sequences(count: int) -> onnx.ModelProto:
    """Sequences of two values each, put together again."""

    def link(i: int, a: str, b: str) -> list[NodeProto]:
        parts = [_node("Relu", [a], f"r{i}"), _node("SequenceConstruct", [f"r{i}", a], f"s{i}")]
        joined = [_node("ConcatFromSequence", [f"s{i}"], f"c{i}", axis=1)]
        return [*parts, *joined, _node("Slice", [f"c{i}", "begin", "end", "one"], b)]

    weights = {"begin": np.array([0]), "end": np.array([8]), "one": np.array([1])}
    return _model(_chained(count // 4, link), weights)


def slices(count: int) -> onnx.ModelProto:
    """Slices by constants, a different one each."""
    nodes = [_node("Slice", ["x", f"b{i}", f"e{i}", "one"], f"h{i}") for i in range(count)]
    weights = {f"b{i}": np.array([i]) for i in range(count)} | {f"e{i}": np.array([i + 1]) for i in range(count)}
    nodes += _merged("Concat", [f"h{i}" for i in range(count)], axis=1)
    shape = ("n", count)
    return _model(nodes, {**weights, "one": np.array([1])}, inputs={"x": shape}, outputs={"y": shape})


KINDS: Mapping[str, Callable[[int], onnx.ModelProto]] = {
    kind.__name__: kind
    for kind in (
        chain, chain_of_many_ops, wide_sum, sum_of_one, wide_concat, wide_split, ladder, far_reads, pyramid, products,
        products_of_one_input, products_by_one_weight, initializers, unused_initializers, constants,
        constant_arithmetic, size_arithmetic, sizes, movements, dead_nodes, inputs, outputs, symbols, states,
        functions, calls, nested_functions, decided_branches, open_branches, loops, tree_of_branches,
        branches_in_a_branch, large_subgraph,
        long_names, one_name, numbered_names, backwards, value_infos, metadata, domains, quantized, equal_branches,
        sequences, slices,
    )
}  # fmt: skip
"""Name -> makes a model of about so many nodes, or whatever it has many of."""
