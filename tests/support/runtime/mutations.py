"""Semantic changes of programs: each kind says what it does, and on which models of the zoo it can be done.

They are what someone would do to a program who wants it to compute something else and not be found out, and what a
fault of the builder could do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper

from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN
from tests.support.runtime.program_edits import NotThereError, Program
from tests.support.tampering import alter_tensor, reseal

LLAMA, GENAI, GPT2, MIXTRAL = (
    *("tiny-llama-optimum", "tiny-llama-genai-fp32"),
    *("tiny-gpt2-optimum", "tiny-mixtral-dynamo-tf5"),
)


@dataclass(frozen=True, slots=True)
class Mutation:
    """A kind of change: `apply` makes it, or raises NotThereError. `neutral`: no output of the program is another.

    Of a composite artifact `part` is changed. `compute` is what both sides compute in.
    """

    name: str
    models: tuple[str, ...]
    apply: Callable[[Program], None]
    neutral: bool = False
    part: str = ""
    compute: str | None = None


MUTATIONS: dict[str, Mutation] = {}


def mutation(
    name: str, *models: str, neutral: bool = False, part: str = "", compute: str | None = None
) -> Callable[[Callable[[Program], None]], None]:
    """Registers a kind; by default it is done on Optimum's Llama."""

    def register(apply: Callable[[Program], None]) -> None:
        assert name not in MUTATIONS, name
        MUTATIONS[name] = Mutation(name, models or (LLAMA,), apply, neutral, part, compute)

    return register


# -- signs, scales, terms -------------------------------------------------------------------------------------------


def negated(p: Program, value: str) -> None:
    """A value with the other sign."""
    p.through(value, lambda x: [p.node("Neg", [x])])


def scaled(p: Program, value: str, factor: float) -> None:
    """A value times a constant."""
    p.through(value, lambda x: [p.node("Mul", [x, p.constant(factor)])])


mutation("sign of the logits", LLAMA, GENAI)(lambda p: negated(p, "logits"))
mutation("sign of a hidden value", LLAMA, GENAI, GPT2)(lambda p: negated(p, p.hidden()))
mutation("scale of the logits by 1 %")(lambda p: scaled(p, "logits", 1.01))
mutation("scale of the logits by 1e-6")(lambda p: scaled(p, "logits", 1 + 1e-6))
mutation("scale of a hidden value by 1 %", LLAMA, GENAI)(lambda p: scaled(p, p.hidden(), 1.01))
mutation("scale of a hidden value by 1e-6")(lambda p: scaled(p, p.hidden(), 1 + 1e-6))
mutation("a layer's output times zero", LLAMA, GENAI)(lambda p: scaled(p, p.find("AllReduce", -1).output[0], 0.0))


def _residual(p: Program) -> NodeProto:
    hidden = p.hidden()
    return p.find("Add", where=lambda node: hidden in node.input)


@mutation("a term dropped")
def _(p: Program) -> None:
    node = _residual(p)
    node.op_type = "Identity"
    del node.input[1:]


@mutation("a term doubled")
def _(p: Program) -> None:
    p.before(_residual(p), 1, lambda x: [p.node("Add", [x, x])])


@mutation("a sum made a difference", LLAMA, GPT2)
def _(p: Program) -> None:
    _residual(p).op_type = "Sub"


@mutation("a product made a sum", LLAMA, GENAI)
def _(p: Program) -> None:
    p.find("Mul", -1, p.floats).op_type = "Add"


@mutation("operands of a division exchanged")
def _(p: Program) -> None:
    node = p.find("Div")
    first, second = node.input
    node.input[0], node.input[1] = second, first


@mutation("operands of a commutative sum exchanged", neutral=True)
def _(p: Program) -> None:
    node = _residual(p)
    first, second = node.input
    node.input[0], node.input[1] = second, first


@mutation("one token favoured", LLAMA, GENAI)
def _(p: Program) -> None:
    size = p.manifest["model"]["vocab_size"]
    p.through("logits", lambda x: [p.node("Add", [x, p.constant(np.eye(1, size, 42)[0] * 3)])])


@mutation("a position's number added")
def _(p: Program) -> None:
    ids = p.input("position_ids")
    p.through(
        p.hidden(),
        lambda x: [
            cast := p.node("Cast", [ids], to=TensorProto.FLOAT),
            wide := p.node("Unsqueeze", [cast.output[0], p.constant([2], np.int64)]),
            small := p.node("Mul", [wide.output[0], p.constant(1e-3)]),
            p.node("Add", [x, small.output[0]]),
        ],
    )


# -- lengths, positions, values -------------------------------------------------------------------------------------


def size(p: Program, dim: int) -> tuple[list[NodeProto], str]:
    """Nodes that give the batch (0) or the length (1) of the new tokens."""
    shape = p.node("Shape", [p.input("token_ids")])
    size = p.node("Gather", [shape.output[0], p.constant(dim, np.int64)])
    return [shape, size], size.output[0]


def total(p: Program) -> tuple[list[NodeProto], str]:
    """Nodes that give the length of the whole sequence."""
    shape = p.node("Shape", [p.input("attention_mask")])
    size = p.node("Gather", [shape.output[0], p.constant(1, np.int64)])
    return [shape, size], size.output[0]


def negated_if(p: Program, value: str, nodes: list[NodeProto], condition: str) -> None:
    """A value with the other sign where a condition holds, which `nodes` compute."""
    p.through(
        value,
        lambda x: [
            *nodes,
            negated := p.node("Neg", [x]),
            p.node("Where", [condition, negated.output[0], x]),
        ],
    )


def _masked(p: Program, op: str, ids: str, bound: int) -> tuple[list[NodeProto], str]:
    node = p.node(op, [ids, p.constant(bound, np.int64)])
    wide = p.node("Unsqueeze", [node.output[0], p.constant([2], np.int64)])
    p.declare(wide.output[0], TensorProto.BOOL, ["batch", "sequence", 1])
    return [node, wide], wide.output[0]


def compared(p: Program, op: str, size: tuple[list[NodeProto], str], bound: int) -> tuple[list[NodeProto], str]:
    """Nodes that compare what `size` or `total` give, and their result."""
    nodes, value = size
    node = p.node(op, [value, p.constant(bound, np.int64)])
    p.declare(node.output[0], TensorProto.BOOL)
    return [*nodes, node], node.output[0]


@mutation("negated where a sequence is longer than 24", LLAMA, GENAI)
def _(p: Program) -> None:
    negated_if(p, "logits", *compared(p, "Greater", total(p), 24))


@mutation("negated where a sequence is longer than 400", LLAMA, GENAI)
def _(p: Program) -> None:
    negated_if(p, "logits", *compared(p, "Greater", total(p), 400))


@mutation("negated at the model's longest sequence")
def _(p: Program) -> None:
    longest = p.manifest["model"]["max_sequence_length"]
    negated_if(p, p.hidden(), *compared(p, "GreaterOrEqual", total(p), longest))


@mutation("negated at the length of 37 alone", LLAMA, GENAI)
def _(p: Program) -> None:
    negated_if(p, "logits", *compared(p, "Equal", total(p), 37))


@mutation("negated in prompts longer than 24", LLAMA, GENAI)
def _(p: Program) -> None:
    negated_if(p, "logits", *compared(p, "Greater", size(p, 1), 24))


@mutation("negated in decode steps")
def _(p: Program) -> None:
    negated_if(p, p.hidden(), *compared(p, "Equal", size(p, 1), 1))


@mutation("negated in batches")
def _(p: Program) -> None:
    negated_if(p, "logits", *compared(p, "Greater", size(p, 0), 1))


@mutation("an If on the length", LLAMA, GENAI)
def _(p: Program) -> None:
    nodes, condition = compared(p, "Greater", total(p), 24)

    def branch(op: str, value: str) -> GraphProto:
        name = p.value()
        output = helper.make_value_info(name, helper.make_tensor_type_proto(TensorProto.FLOAT, None))
        return helper.make_graph([helper.make_node(op, [value], [name])], p.value(), [], [output])

    p.through(
        "logits",
        lambda x: [*nodes, p.node("If", [condition], then_branch=branch("Neg", x), else_branch=branch("Identity", x))],
    )


@mutation("negated behind position 30")
def _(p: Program) -> None:
    negated_if(p, "logits", *_masked(p, "Greater", p.input("position_ids"), 30))


@mutation("negated behind token 7", LLAMA, GENAI)
def _(p: Program) -> None:
    negated_if(p, "logits", *_masked(p, "Equal", p.input("token_ids"), 7))


@mutation("hidden values cut off at 1000", LLAMA, GENAI)
def _(p: Program) -> None:
    """Which no input of the comparisons reaches."""
    p.through(p.hidden(), lambda x: [p.node("Min", [x, p.constant(1000.0)])])


@mutation("hidden values cut off at 0.1")
def _(p: Program) -> None:
    p.through(p.hidden(), lambda x: [p.node("Min", [x, p.constant(0.1)])])


# -- axes, indices, orders ------------------------------------------------------------------------------------------


@mutation("a mean over another axis")
def _(p: Program) -> None:
    node = p.find("ReduceMean", 1)
    node.input[1] = p.constant([1], np.int64)


@mutation("softmax over another axis", MIXTRAL)
def _(p: Program) -> None:
    p.set(p.find("Softmax"), axis=0)


@mutation("rows of the table one off", LLAMA, GENAI, GPT2)
def _(p: Program) -> None:
    row = p.find("Where", where=lambda node: node.output[0].endswith("/index/row")).output[0]
    p.through(
        row,
        lambda x: [
            before := p.node("Sub", [x, p.constant(1, np.int64)]),
            p.node("Max", [before.output[0], p.constant(0, np.int64)]),
        ],
    )


@mutation("positions one off")
def _(p: Program) -> None:
    node = p.find("Unsqueeze", where=lambda node: p.input("position_ids") in node.input)
    p.before(node, 0, lambda x: [p.node("Add", [x, p.constant(1, np.int64)])])


@mutation("cosine and sine exchanged")
def _(p: Program) -> None:
    cosine, sine = p.find("Cos"), p.find("Sin")
    cosine.op_type, sine.op_type = "Sin", "Cos"


@mutation("halves of the rotation exchanged")
def _(p: Program) -> None:
    turned = p.find("Neg").output[0]
    node = p.find("Concat", where=lambda node: turned in node.input)
    first, second = node.input
    node.input[0], node.input[1] = second, first


@mutation("two independent nodes in another order", neutral=True)
def _(p: Program) -> None:
    nodes = p.nodes
    place = nodes.index(p.find("Cos"))
    cosine, sine = nodes[place], p.find("Sin")
    nodes.remove(sine)
    nodes.insert(nodes.index(cosine), sine)
    p.replace(nodes)


@mutation("a node that nobody reads", LLAMA, GENAI, neutral=True)
def _(p: Program) -> None:
    p.replace([*p.nodes, p.node("Neg", [p.hidden()])])


# -- constants ------------------------------------------------------------------------------------------------------


def _constant_of(p: Program, node: NodeProto) -> str:
    for name in node.input:
        try:
            if p.array(name).dtype == np.float32:
                return str(name)
        except NotThereError:
            continue
    raise NotThereError(node.op_type)


def _norm(p: Program) -> NodeProto:
    mean = p.find("ReduceMean").output[0]
    return p.find("Add", where=lambda node: mean in node.input)


@mutation("a weight altered in its last bit", LLAMA, GENAI)
def _(p: Program) -> None:
    tensor = next(t for t in p.model.graph.initializer if "layernorm.weight" in t.name)
    array = p.array(tensor.name).copy()
    array[0] = np.nextafter(array[0], np.float32(10))
    p.write(tensor.name, array)


@mutation("weights of a norm altered by 1e-6", LLAMA, GENAI)
def _(p: Program) -> None:
    tensor = next(t for t in p.model.graph.initializer if "layernorm.weight" in t.name)
    p.write(tensor.name, p.array(tensor.name) * np.float32(1 + 1e-6))


@mutation("another epsilon (attribute)", GENAI)
def _(p: Program) -> None:
    p.set(p.find("SkipSimplifiedLayerNormalization"), epsilon=1e-3)


@mutation("another epsilon (constant)")
def _(p: Program) -> None:
    name = _constant_of(p, _norm(p))
    p.write(name, p.array(name) * 1000)


@mutation("another epsilon, in its last digits")
def _(p: Program) -> None:
    name = _constant_of(p, _norm(p))
    p.write(name, np.nextafter(p.array(name), np.float32(1)))


@mutation("another rotary base")
def _(p: Program) -> None:
    turned = next(t for t in p.model.graph.initializer if t.name.startswith("onnx::Expand"))
    p.write(turned.name, p.array(turned.name) ** np.float32(1.02))


@mutation("another exponent")
def _(p: Program) -> None:
    name = _constant_of(p, p.find("Pow"))
    p.write(name, np.float32(2.001))


# -- attention and its cache ----------------------------------------------------------------------------------------


def _attention(p: Program, number: int = 0) -> NodeProto:
    return p.find("GroupQueryAttention", number)


def _scale(node: NodeProto) -> float:
    return float(next(attribute.f for attribute in node.attribute if attribute.name == "scale"))


@mutation("another scale of the scores", LLAMA, GENAI, GPT2)
def _(p: Program) -> None:
    p.set(_attention(p), scale=_scale(_attention(p)) * 1.1)


@mutation("a window over 200 tokens", LLAMA, GENAI)
def _(p: Program) -> None:
    p.set(_attention(p), local_window_size=200)


@mutation("a soft cap of the scores", LLAMA, GENAI)
def _(p: Program) -> None:
    p.set(_attention(p), softcap=1.0)


@mutation("another kind of rotation", GENAI)
def _(p: Program) -> None:
    p.set(_attention(p), rotary_interleaved=1)


@mutation("keys and values exchanged as inputs")
def _(p: Program) -> None:
    node = _attention(p)
    key, value = node.input[1:3]
    node.input[1], node.input[2] = value, key


@mutation("presents of key and value exchanged", LLAMA, GENAI)
def _(p: Program) -> None:
    node = _attention(p)
    key, value = node.output[1:3]
    node.output[1], node.output[2] = value, key


@mutation("presents of two layers exchanged", LLAMA, GENAI)
def _(p: Program) -> None:
    first, second = _attention(p), _attention(p, 1)
    own, other = first.output[1], second.output[1]
    first.output[1], second.output[1] = other, own


@mutation("pasts of two layers exchanged", LLAMA, GENAI)
def _(p: Program) -> None:
    first, second = _attention(p), _attention(p, 1)
    own, other = first.input[3], second.input[3]
    first.input[3], second.input[3] = other, own


@mutation("the cache written one off", LLAMA, GENAI)
def _(p: Program) -> None:
    for number in (0, 1):
        p.before(_attention(p, number), 5, lambda x: [p.node("Sub", [x, p.constant(1, np.int32)])])


@mutation("a present shifted by one")
def _(p: Program) -> None:
    name = str(_attention(p).output[1])
    axis = p.constant([2], np.int64)
    p.through(
        name,
        lambda x: [
            tail := p.node("Slice", [x, p.constant([1], np.int64), p.constant([2**62], np.int64), axis]),
            head := p.node("Slice", [x, p.constant([0], np.int64), p.constant([1], np.int64), axis]),
            p.node("Concat", [tail.output[0], head.output[0]], axis=2),
        ],
    )


@mutation("a present negated")
def _(p: Program) -> None:
    negated(p, str(_attention(p, 1).output[2]))


@mutation("the mask of scores cancelled")
def _(p: Program) -> None:
    p.before(_attention(p), 10, lambda x: [p.node("Mul", [x, p.constant(0.0)])])


@mutation("scores of far tokens lowered")
def _(p: Program) -> None:
    """By 0.01 for each token of the whole sequence, which softmax takes back where all are alike; so by column."""
    nodes, length = total(p)
    p.before(
        _attention(p),
        10,
        lambda x: [
            *nodes,
            columns := p.node("Range", [p.constant(0, np.int64), length, p.constant(1, np.int64)]),
            numbers := p.node("Cast", [columns.output[0]], to=TensorProto.FLOAT),
            small := p.node("Mul", [numbers.output[0], p.constant(0.01)]),
            p.node("Add", [x, small.output[0]]),
        ],
    )


# -- ranks and collectives ------------------------------------------------------------------------------------------


@mutation("negated on one rank", LLAMA, GENAI)
def _(p: Program) -> None:
    rank = next(tensor["name"] for tensor in p.manifest["tensors"] if tensor["origin"] is None)
    hidden = p.find("AllReduce", 1).input[0]
    first = p.node("Equal", [rank, p.constant(0, np.int64)])
    negated_if(p, hidden, [first], first.output[0])


@mutation("a rank's own constant altered")
def _(p: Program) -> None:
    name = next(tensor["name"] for tensor in p.manifest["tensors"] if tensor["origin"] is None)

    def change(data: bytearray) -> None:
        data[8] += 1  # the first row of rank 1, as INT64

    alter_tensor(p.folder, name, change)
    reseal(p.folder)


@mutation("a sum over the ranks dropped", LLAMA, GENAI)
def _(p: Program) -> None:
    node = p.find("AllReduce", 1)
    p.manifest["collectives"] = [entry for entry in p.manifest["collectives"] if entry["id"] != node.name]
    node.op_type, node.domain = "Identity", ""
    del node.attribute[:]


@mutation("a sum over fewer ranks", LLAMA, GENAI)
def _(p: Program) -> None:
    node = p.find("AllReduce", 1)
    p.set(node, axes=[0])
    next(entry for entry in p.manifest["collectives"] if entry["id"] == node.name)["axes"] = [0]


@mutation("a sum over the ranks made a mean", LLAMA, GENAI)
def _(p: Program) -> None:
    scaled(p, p.hidden(), 0.25)


@mutation("a sum over the ranks twice", LLAMA, GENAI)
def _(p: Program) -> None:
    node = p.find("AllReduce", 1)
    entry = next(entry for entry in p.manifest["collectives"] if entry["id"] == node.name)
    place = p.manifest["collectives"].index(entry)
    p.manifest["collectives"].insert(place, {**entry, "id": f"{node.name}/again"})

    def again(x: str) -> list[NodeProto]:
        twice = p.node("AllReduce", [x], domain=COLLECTIVE_DOMAIN, axes=[0, 1])
        twice.name = node.name
        return [twice]

    p.through(node.output[0], again)
    first = next(one for one in p.model.graph.node if one.name == node.name)
    first.name = f"{node.name}/again"


@mutation("shards gathered in another order", LLAMA, GENAI)
def _(p: Program) -> None:
    node = p.find("AllGather")
    p.set(node, axes=[1, 0])
    next(entry for entry in p.manifest["collectives"] if entry["id"] == node.name)["axes"] = [1, 0]


# -- weights and ops ------------------------------------------------------------------------------------------------


def _exchanged(p: Program, one: NodeProto, other: NodeProto) -> None:
    first, second = one.input[1], other.input[1]
    one.input[1], other.input[1] = second, first


def _product(p: Program, word: str, number: int = 0) -> NodeProto:
    return p.find("MatMul", number, lambda node: word in node.name)


mutation("two weights of a layer exchanged", LLAMA, GENAI)(
    lambda p: _exchanged(p, _product(p, "gate_proj"), _product(p, "up_proj"))
)
mutation("weights of two layers exchanged", LLAMA, GENAI)(
    lambda p: _exchanged(p, _product(p, "down_proj"), _product(p, "down_proj", 1))
)


@mutation("another activation", LLAMA, GENAI)
def _(p: Program) -> None:
    p.find("Sigmoid").op_type = "Tanh"


@mutation("rounded to 16 bits", LLAMA, GENAI)
def _(p: Program) -> None:
    p.through(
        p.hidden(),
        lambda x: [half := p.node("Cast", [x], to=TensorProto.FLOAT16), p.node("Cast", half.output, to=1)],
    )


@mutation("an expert left out", MIXTRAL)
def _(p: Program) -> None:
    node = p.find("TopK")
    node.input[1] = p.constant([1], np.int64)


# -- the manifest ---------------------------------------------------------------------------------------------------


@mutation("states exchanged in the manifest", LLAMA, GENAI)
def _(p: Program) -> None:
    """A key's and another layer's on the one model, a key's and a value's on the other."""
    first, second = p.manifest["states"][0], p.manifest["states"][2]
    first["output"], second["output"] = second["output"], first["output"]


@mutation("another limit in the manifest")
def _(p: Program) -> None:
    p.manifest["model"]["max_sequence_length"] *= 2


@mutation("the end of a text left out of the manifest")
def _(p: Program) -> None:
    ends = p.manifest["model"]["eos_token_ids"]
    p.manifest["model"]["eos_token_ids"] = [] if ends else [1]
