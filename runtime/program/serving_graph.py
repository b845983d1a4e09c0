"""The program as an engine runs it: logits of wanted positions only, and rows of unequal lengths in one step.

Both are changes to a copy of program.onnx, each made where the graph's structure shows that it is safe:

* The hidden states of wanted positions are gathered before the product that makes the logits, because a prefill needs
  only the last position's logits.
* GroupQueryAttention is given each row's own last position. The graph gives it the longest row's, if a build has
  fused attention, and what the mask adds up to, if the exporter wrote it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from furiosa_llm.runtime.artifact.dimensions import GROWING, parse_dimension
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN, used_names
from furiosa_llm.runtime.artifact.manifest import Manifest

WANTED = "furiosa_llm.wanted"
"""The graph input, INT64 `[wanted]`, of the positions in a step whose logits are wanted, counted through all rows."""
LAST_POSITIONS = "furiosa_llm.last_positions"
"""The graph input, INT32 `[batch]`, of the cache position that each row's last new token goes to."""

_ATTENTION = "GroupQueryAttention"
_SEQLENS, _TOTAL, _BIAS = 5, 6, 10
"""Operands of GroupQueryAttention: last position of each row, length of the longest row, what scores are added to."""
# These are not facts about ops, but the form that the end of a graph must have to be cut.
_PRODUCTS = frozenset({"MatMul", "MatMulNBits", "FusedMatMul", "MatMulBnb4"})
_TWICE = "furiosa_llm.twice"
"""The first part of the names of values that have every row twice."""
_SPLIT_COUNTS = 18
"""The first opset in which Split has the number of equal parts; before, it follows from the number of outputs."""
_ELEMENTWISE = frozenset({"Add", "Mul", "Div", "Sub", "Cast", "Tanh", "Identity", "Neg"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingGraph:
    """A program made for an engine."""

    model: ModelProto
    selects: bool
    """Whether it has the input `WANTED`."""
    ragged: bool
    """Whether it has the input `LAST_POSITIONS`; then rows of a step may have unequal lengths if `biases` allow it."""
    biases: tuple[str, ...]
    """Names of values that must be the same for each row as they would be for the row alone."""


def serving_graph(
    program: ModelProto, manifest: Manifest, *, ragged: bool = True, doubled: Collection[str] = ()
) -> ServingGraph:
    """A copy of `program`, made for an engine.

    `ragged`: rows of unequal lengths are wanted. `doubled` are the types of ops that get every row twice.
    """
    model = ModelProto()
    model.CopyFrom(program)
    logits = [info.name for info in manifest.outputs if info.role == "logits"]
    selects = len(logits) == 1 and _select(model, logits[0])
    ragged = ragged and _is_ragged(model, manifest)
    biases: tuple[str, ...] = ()
    if ragged:
        nodes = [node for node in model.graph.node if node.op_type == _ATTENTION]
        biases = tuple(dict.fromkeys(node.input[_BIAS] for node in nodes if len(node.input) > _BIAS))
        for node in nodes:
            node.input[_SEQLENS] = LAST_POSITIONS
        model.graph.input.append(helper.make_tensor_value_info(LAST_POSITIONS, TensorProto.INT32, ["batch"]))
    _double(model, doubled)
    _remove_dead(model)
    return ServingGraph(model=model, selects=selects, ragged=ragged, biases=tuple(b for b in biases if b))


# -- logits of wanted positions ------------------------------------------------------------------------------------


def _select(model: ModelProto, logits: str) -> bool:
    """Gathers the wanted positions before the last product; returns whether the form of the graph's end allows it."""
    graph = model.graph
    declared = {value.name: value for value in (*graph.value_info, *graph.output)}
    found = _end_of(graph, logits)
    if found is None:
        return False
    product, values = found
    if any(_dims(declared[name]) != ["batch", "sequence"] for name in values if name in declared):
        return False
    flat, chosen, shape = f"{WANTED}/flat", f"{WANTED}/{product.input[0]}", f"{WANTED}/shape"
    graph.initializer.append(helper.make_tensor(shape, TensorProto.INT64, [3], [1, -1, 0]))
    place = next(i for i, other in enumerate(graph.node) if other is product)
    graph.node.insert(place, helper.make_node("Reshape", [product.input[0], shape], [flat], name=flat))
    graph.node.insert(place + 1, helper.make_node("Gather", [flat, WANTED], [chosen], name=WANTED, axis=1))
    product.input[0] = chosen
    graph.input.append(helper.make_tensor_value_info(WANTED, TensorProto.INT64, ["wanted"]))
    for name in values:
        if name in declared:
            declared[name].type.tensor_type.shape.dim[0].dim_value = 1
            declared[name].type.tensor_type.shape.dim[1].dim_param = "wanted"
    return True


def _end_of(graph: GraphProto, logits: str) -> tuple[NodeProto, list[str]] | None:
    """The last product with a matrix on the way to `logits`, and the values from its output on; None if there is none.

    Only nodes that take each position by itself follow it, and nothing else reads the values in between.
    """
    producer = {name: node for node in graph.node for name in node.output if name}
    constants = _constants(graph)
    readers = Counter(name for node in graph.node for name in used_names(node))
    values: list[str] = []
    name = logits
    while (node := producer.get(name)) is not None and readers[name] == bool(values):
        values.append(name)
        moving = [given for given in node.input if given and given not in constants]
        if len(moving) != 1 or len([made for made in node.output if made]) != 1:
            return None
        if node.op_type in _PRODUCTS and node.input[0] == moving[0]:
            return None if _transposes(node) else (node, values)
        if not _is_by_position(node):
            return None
        name = moving[0]
    return None


def _constants(graph: GraphProto) -> set[str]:
    """Initializers, and values that follow from them alone."""
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if constants.issuperset(used_names(node)):
            constants.update(name for name in node.output if name)
    return constants


def _is_by_position(node: NodeProto) -> bool:
    """Whether `node` computes for each position of `[batch, sequence, n]` what it would compute for it alone."""
    if node.domain == COLLECTIVE_DOMAIN:
        dim = next((attribute.i for attribute in node.attribute if attribute.name == "dim"), None)
        return node.op_type == "AllReduce" or dim == 2
    return node.op_type in _ELEMENTWISE


def _transposes(node: NodeProto) -> bool:
    """Whether a product transposes its first operand: positions are then in another dimension than they seem to be."""
    return any(attribute.name in ("transA", "transBatchA") and attribute.i for attribute in node.attribute)


def _dims(value: ValueInfoProto) -> list[str]:
    """The names of the first two of three dimensions, empty for any other value."""
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_param for dim in dims[:2]] if len(dims) == 3 else []


# -- rows of unequal lengths ---------------------------------------------------------------------------------------


def _is_ragged(model: ModelProto, manifest: Manifest) -> bool:
    """Whether the length of the longest row matters nowhere but in an operand of attention, and in its bias.

    What follows from an input whose shape grows from step to step is marked, through every node except nodes that take
    other sizes of it. Attention itself stops the marks, because it reads no more of a row than the length that it gets.
    """
    states = manifest.states
    if not states or any(state.mode != "in_place" for state in states):
        return False
    caches = {state.input for state in states}
    declared = {value.name: value for value in model.graph.input}
    marked = {name for name, value in declared.items() if _grows(value, 0, None)}
    for node in model.graph.node:
        read = set(used_names(node))
        if node.op_type == _ATTENTION and len(node.input) > _TOTAL and caches.issuperset(node.input[3:5]):
            others = {name for i, name in enumerate(node.input) if i not in (3, 4, _SEQLENS, _TOTAL, _BIAS)}
            if marked & others:
                return False
            continue
        if node.op_type == "Shape" and node.input[0] in declared:
            limits = {attribute.name: attribute.i for attribute in node.attribute}
            if not _grows(declared[node.input[0]], limits.get("start", 0), limits.get("end")):
                continue
        if marked & read:
            if node.domain == COLLECTIVE_DOMAIN:
                return False
            marked.update(name for name in node.output if name)
    return not marked.intersection(info.name for info in manifest.outputs)


def _grows(value: ValueInfoProto, start: int, end: int | None) -> bool:
    """Whether one of the dimensions [start, end) of `value` may grow from step to step."""
    for dim in list(value.type.tensor_type.shape.dim)[start:end]:
        if dim.HasField("dim_value"):
            continue
        try:
            names = parse_dimension(dim.dim_param).names
        except ArtifactError:
            return True
        if GROWING.intersection(names):
            return True
    return False


def _double(model: ModelProto, op_types: Collection[str]) -> None:
    """Gives the nodes of `op_types` every row twice, and takes the first half of their outputs."""
    if not op_types:
        return
    graph = model.graph
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    halves: dict[str, Any] = {"num_outputs": 2} if opset >= _SPLIT_COUNTS else {}
    constants = _constants(graph)
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type not in op_types:
            continue
        for index, name in enumerate(node.input):
            if name and name not in constants:
                node.input[index] = f"{_TWICE}/{node.output[0]}/{index}"
                nodes.insert(-1, helper.make_node("Concat", [name, name], [node.input[index]], axis=0))
        for index, name in enumerate(node.output):
            if name:
                node.output[index] = f"{_TWICE}/{name}"
                made = [name, f"{_TWICE}/{name}/companions"]
                nodes.append(helper.make_node("Split", [node.output[index]], made, axis=0, **halves))
    del graph.node[:]
    graph.node.extend(nodes)


def _remove_dead(model: ModelProto) -> None:
    """Removes the nodes whose outputs nothing reads any more."""
    graph = model.graph
    live = {value.name for value in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.node):
        if live.intersection(node.output):
            kept.append(node)
            live.update(used_names(node))
    del graph.node[:]
    graph.node.extend(reversed(kept))
