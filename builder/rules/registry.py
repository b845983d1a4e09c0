"""The one registry of ops: `(domain, op type) -> Op`, the entry that holds all that is known about the op."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypedDict, Unpack

import onnx
import onnx_ir as ir
from onnx.shape_inference import infer_node_outputs

from furiosa_llm.builder.errors import ShapeError
from furiosa_llm.builder.rules.cost import Cost, CostFunction, ReadFunction, copied
from furiosa_llm.builder.rules.evaluate import Evaluator, ShapeEvaluator, SizeFunction, quiet
from furiosa_llm.builder.rules.facts import Fact, Facts, present
from furiosa_llm.builder.rules.operands import NOTHING_SPECIAL, Definition, Operands
from furiosa_llm.builder.rules.rule import Rule
from furiosa_llm.builder.rules.view import Inferred, NodeView, RuleFunction, ShapeRule

_STANDARD_OPSET = 21
"""The opset of the standard ops that onnxruntime's own ops resemble."""

Movement = Literal["form", "type", "window", "choice", "decode", "sign", "copies"]
"""What an op makes of input 0's elements, if it computes nothing.

`form`: the same elements in another shape or order; `type`: in another type; `window`: a range of them; `choice`: some
of them; `decode`: the numbers that codes stand for; `sign`: their negatives; `copies`: each of them, any number of
times.
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """All that is known about one op."""

    rule: RuleFunction | None = None
    """Which dimensions run over the same indices, and what becomes of partial sums and of padding.

    None: every rank computes the op whole on purpose."""
    replicated: str | None = None
    """Why it has no rule, for the build report; None: there is nothing to report."""
    shape: ShapeRule | None = None
    """The types and shapes of its outputs; None: as ONNX infers them."""
    value: Evaluator | None = None
    """Its outputs' elements, for the small tensors that shapes are computed with; None: they are never evaluated."""
    made: SizeFunction | None = None
    """How many elements `value` makes, where it may make more than it takes."""
    of_shape: ShapeEvaluator | None = None
    """Its output's elements where they follow from input 0's shape alone."""
    total: Literal["always", "floats"] | None = None
    """Whether it fails for no elements, or for no floats, so that it may be computed even if nothing needs it."""
    moves: Movement | None = None
    """What it makes of input 0's elements, if it computes nothing."""
    operands: Operands = NOTHING_SPECIAL
    """What it demands of its operands' shapes."""
    definition: Definition | None = None
    """What it takes and gives, for an op that ONNX does not define."""
    graphs: Callable[[int, int], tuple[int, int]] | None = None
    """The numbers of inputs and outputs of its graphs, given the node's numbers of inputs and outputs."""
    core_dims: int = 0
    """The number of last dimensions of its operands that are not aligned with each other."""
    caches: Mapping[int, int] = dataclasses.field(default_factory=dict)
    """Input -> the output that is this input with new positions."""
    in_place: bool = False
    """Whether it writes new positions into the buffer of such an input, if that has room."""
    random: bool = False
    """Whether it draws random numbers, which every rank would draw anew."""
    remedy: str | None = None
    """What to do instead of an op that onnxruntime has no CPU kernel for; None: it has one."""
    reads: ReadFunction | None = None
    """What it reads of tables that it selects rows of; None: it reads all of every input, or counts as if it did."""
    cost: CostFunction | None = None
    """What one rank computes and moves, at the view's sizes; None for an op that no program has."""

    @property
    def keeps_weights(self) -> bool:
        """Whether what it makes of a weight is a weight, too: elements moved, selected or converted."""
        return self.moves in ("form", "type", "window", "choice", "decode")

    @property
    def keeps_zeros(self) -> bool:
        """Whether it turns zeros into zeros, at any sizes."""
        return self.moves not in (None, "decode")


class _OpFields(TypedDict, total=False):
    """The fields of `Op`, as arguments of `op`."""

    rule: RuleFunction
    replicated: str
    shape: ShapeRule
    value: Evaluator
    made: SizeFunction
    of_shape: ShapeEvaluator
    total: Literal["always", "floats"]
    moves: Movement
    operands: Operands
    definition: Definition
    graphs: Callable[[int, int], tuple[int, int]]
    core_dims: int
    caches: Mapping[int, int]
    in_place: bool
    random: bool
    remedy: str
    reads: ReadFunction
    cost: CostFunction


OPS: dict[tuple[str, str], Op] = {}


def op(*op_types: str, domain: str = "", **facts: Unpack[_OpFields]) -> None:
    """Enter op types of one domain with the same entry: `facts` are fields of `Op`."""
    if value := facts.get("value"):
        facts["value"] = quiet(value)
    entry = Op(**facts)
    for op_type in op_types:
        assert (domain, op_type) not in OPS, f"{domain}::{op_type} has two entries"
        OPS[domain, op_type] = entry


def op_of(node: ir.Node) -> Op | None:
    """The entry of a node's op."""
    return OPS.get((node.domain, node.op_type))


def keeps_weights(node: ir.Node) -> bool:
    """Whether what a node makes of a weight, its input 0, is a weight, too."""
    entry = op_of(node)
    return entry is not None and entry.keeps_weights


def is_weight(view: NodeView, port: int) -> bool:
    """Whether input `port` is an initializer, or one that was merely moved."""
    value = view.node.inputs[port] if view.has(port) else None
    while value is not None and not value.is_initializer():
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and keeps_weights(producer) else None
    return value is not None


def as_input(_: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    """The shape rule of an op whose one output has the type and shape of input 0."""
    data = present(inputs[0])
    return [(data.dtype, data.shape)]


def standard_shape(op_type: str, *, drop_inputs_from: int | None = None, opset: int = _STANDARD_OPSET) -> ShapeRule:
    """The shape rule of an op that has the shapes of a standard op, as `opset` defines it."""

    def infer(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
        proto = ir.to_proto(node)
        proto.op_type, proto.domain = op_type, ""
        del proto.input[drop_inputs_from if drop_inputs_from is not None else len(proto.input) :]
        schema = onnx.defs.get_schema(op_type, opset, "")
        for attribute in [a for a in proto.attribute if a.name not in schema.attributes]:
            proto.attribute.remove(attribute)
        facts = {name: fact for name, fact in zip(proto.input, inputs, strict=False) if fact is not None}
        types = {name: onnx.helper.make_tensor_type_proto(int(f.dtype), f.shape) for name, f in facts.items()}
        data = {n: onnx.numpy_helper.from_array(f.value, n) for n, f in facts.items() if f.value is not None}
        try:
            outputs = infer_node_outputs(schema, proto, types, data)
        except onnx.shape_inference.InferenceError as error:
            raise ShapeError(f'{node.op_type} "{node.name}" does not fit its inputs: {str(error).strip()}.') from error
        found = [outputs[name].tensor_type for name in proto.output]
        if not all(dim.HasField("dim_value") for t in found for dim in t.shape.dim):
            raise ShapeError(
                f'{node.op_type} "{node.name}" has an output whose size follows from what the inputs hold, expected '
                "sizes that follow from sizes; export the model with constants there."
            )
        return [(ir.DataType(t.elem_type), tuple(d.dim_value for d in t.shape.dim)) for t in found]

    return infer


def words(count: int, prefix: str = "") -> list[str]:
    """`count` distinct symbols: a, b, c, ... (with a prefix: xa, xb, ...)."""
    return [prefix + (chr(ord("a") + i) if i < 26 else f"z{i}") for i in range(count)]


def spell(*operands: list[str] | None) -> str:
    """The operands as they are written in a rule's text."""
    return ", ".join("_" if dims is None else " ".join(dims) for dims in operands)


def whole_inputs(view: NodeView, start: int = 1) -> list[list[str] | None]:
    """The inputs from `start` on, as operands that must be whole."""
    return [None if v is None else ["*"] * len(view.facts[v].shape) for v in view.node.inputs[start:]]


def whole(view: NodeView, note: str | None = None) -> Rule:
    """The rule of an op that needs everything whole and computes everything whole."""
    outputs = [["*"] * len(view.facts[v].shape) for v in view.node.outputs]
    return Rule(text=f"{spell(*whole_inputs(view, 0))} -> {spell(*outputs)}", note=note)


def rule_of(view: NodeView) -> Rule:
    """The rule of a node; an op without one is replicated, with a note.

    A rule may compare sizes only where the op's meaning makes equal sizes the same dimension. Where its text differs at
    other sizes, two dimensions were equal by chance, and the op is replicated. Raises ShapeError for a node that the
    rule of its op does not fit.
    """
    name = f"{view.node.domain or 'ai.onnx'}::{view.node.op_type}"
    entry = op_of(view.node)
    if entry is None:
        return whole(view, note=f"no rule for {name}: replicated")
    if entry.rule is None:
        reason = entry.replicated
        return whole(view, note=None if reason is None else f"{view.node.op_type} is replicated: {reason}")
    try:
        found, other = entry.rule(view), entry.rule(view.swapped())
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ShapeError(
            f'node {view.node.op_type} "{view.node.name}" has attributes or operands that {name} does not take '
            f"({type(error).__name__}: {error}); the model is damaged, export it again."
        ) from error
    if other.text != found.text:
        return whole(view, note=f"{name} relates its dimensions differently at different sizes: replicated")
    return found


def cost_of(view: NodeView) -> Cost:
    """The cost of a node; an op without an entry reads all inputs and writes all outputs, and its FLOPs are unknown."""
    entry = op_of(view.node)
    return copied(view) if entry is None or entry.cost is None else entry.cost(view)


def nbytes_read(view: NodeView) -> dict[int, int]:
    """Input -> the bytes read of it, for every input."""
    entry = op_of(view.node)
    whole = {port: view.fact(port).nbytes for port in range(len(view.node.inputs)) if view.has(port)}
    return whole | (entry.reads(view) if entry is not None and entry.reads is not None else {})


def costs_of(graph: ir.Graph, facts: Facts, opset: int) -> dict[ir.Node, Cost]:
    """The cost of each node of a graph; `facts` has the facts of all its values, also inside bodies and branches."""
    return {node: cost_of(NodeView(node, facts, facts, opset)) for node in graph}
