"""onnxruntime's fused mixtures of experts: MoE, QMoE and the router before them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from furiosa_llm.builder.rules.cost import SIGMOID, SOFTMAX, Cost, function_flops, spent
from furiosa_llm.builder.rules.facts import Fact, present
from furiosa_llm.builder.rules.operands import Operands, Shapes, takes
from furiosa_llm.builder.rules.registry import as_input, op, spell, whole, whole_inputs, words
from furiosa_llm.builder.rules.rule import Rule
from furiosa_llm.builder.rules.view import MICROSOFT, Inferred, NodeView

_PAIRED = {1: "(i u)", 2: "[i|i]"}
"""Attribute swiglu_fusion -> how gate and up projections share fc1: interleaved, or one after the other."""


def mixture_of_experts(view: NodeView) -> Rule:
    """The experts' inner dimension i is split; every rank holds a part of every expert."""
    inner = view.shape(4)[2]
    fusion = int(view.attribute("swiglu_fusion", 0))
    width = _PAIRED.get(fusion, "i") if view.shape(2)[1] == 2 * inner else "i"
    rows = words(view.rank(0) - 1)
    router = [f"({' '.join(rows)})", "*"] if view.rank(1) == 2 else [*rows, "*"]
    candidates: list[list[str]] = [
        [*rows, "*"],
        router,
        ["*", width, "*"],
        ["*", width],
        ["*", "*", "i"],
        ["*", "*"],
        ["*", "i", "*"],
        ["*", "i"],
    ]
    operands = [c if view.has(p) else None for p, c in enumerate(candidates[: len(view.node.inputs)])]
    pin = "; pin u" if "u" in width else ""
    return Rule(
        text=f"{spell(*operands)} -> {spell([*rows, '*'])}; reduce i{pin}",
        sizes={"i": inner, "u": 2},
        masked=(5,) if view.has(5) else (),
        padding="finite",
    )


def quantized_mixture_of_experts(view: NodeView) -> Rule:
    """MoE with integer codes: blocks of the inner dimension are contracted, and neither a block nor a byte is cut."""
    bits, block = int(view.attribute("expert_weight_bits", 4)), int(view.attribute("block_size", 0))
    fused = int(view.attribute("swiglu_fusion", 0))
    same_bits = all(view.attribute(f"fc{i}_expert_weight_bits", bits) == bits for i in (1, 2, 3))
    if view.attribute("quant_type", "int") != "int" or view.attribute("weights_prepacked", 0) > 0 or not same_bits:
        return whole(view, note="QMoE with floating point codes, prepacked weights or several widths: replicated")
    if 8 % bits or any(view.has(port) and view.rank(port) == 2 and bits < 8 for port in (11, 13)):
        return whole(view, note="QMoE whose zero points share bytes with those of other rows: replicated")
    per_byte = 8 // bits
    inner = view.shape(5)[2] * per_byte
    group = block or per_byte
    points = per_byte if view.has(12) and view.rank(12) == 3 else 1
    if inner % group or (inner // group) % points:
        return whole(view, note="QMoE whose inner dimension does not end with a block: replicated")
    sizes = {"k": inner // group // points, "u": points, "v": group // per_byte, "w": per_byte, "s": 2}
    rows = words(view.rank(0) - 1)
    operands = _quantized_experts(view, rows, _PAIRED_BLOCKS.get(fused, "(k u v w)"))
    pins = {word for dims in operands if dims for dim in dims for word in dim.strip("()[]").replace("|", " ").split()}
    pin = " ".join(sorted(pins & {"u", "v", "w", "s"}))
    return Rule(
        text=f"{spell(*operands)} -> {spell([*rows, '*'])}; reduce k; pin {pin}",
        sizes=sizes,
        masked=(7,) if view.has(7) else (),
        padding="finite",
    )


def _quantized_experts(view: NodeView, rows: list[str], width: str) -> list[list[str] | None]:
    """The operands of QMoE; `width` is the outer dimension of the first product."""
    flat = [f"({' '.join(rows)})", "*"]
    inner = "(k u v w)"
    candidates: list[list[str]] = [
        [*rows, "*"],
        flat if view.rank(1) == 2 else [*rows, "*"],
        ["*", width, "*"],
        ["*", width, "*"],
        ["*", width],
        ["*", "*", "(k u v)"],
        ["*", "*", "(k u)"],
        ["*", "*"],
        ["*", inner, "*"],
        ["*", inner, "*"],
        ["*", inner],
        ["*", width, "*"],
        ["*", "*", "k"],
        ["*", inner, "*"],
        flat,
    ]
    found: list[list[str] | None] = []
    for port in range(len(view.node.inputs)):
        dims = candidates[port] if port < len(candidates) else ["*"] * (view.rank(port) if view.has(port) else 0)
        found.append(dims[: view.rank(port)] if view.has(port) else None)
    return found


_PAIRED_BLOCKS = {1: "(k u v w s)", 2: "[k u v w|k u v w]"}
"""Attribute swiglu_fusion -> how gate and up projections share the first product."""


def group_router(view: NodeView) -> Rule:
    """Scores of all experts are compared for each token."""
    rows = words(view.rank(0) - 1)
    out = [f"({' '.join(rows)})", "*"]
    outputs = [out if len(view.out(port)) else [] for port in range(len(view.node.outputs))]
    return Rule(text=f"{spell([*rows, '*'], *whole_inputs(view))} -> {spell(*outputs)}", padding="finite")


def _group_router_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    data, bias = present(inputs[0]), present(inputs[1])
    shape = (math.prod(data.shape[:-1]), bias.shape[0])
    kinds = (data.dtype, ir.DataType.FLOAT, ir.DataType.FLOAT)
    return [(kind, shape if value.name else ()) for kind, value in zip(kinds, node.outputs, strict=False)]


def _mixture_fault(_: ir.Node, shapes: Shapes) -> str | None:
    first, second = shapes[2], shapes[4]
    if first is None or second is None or first[0] != second[0] or first[1] not in (second[2], 2 * second[2]):
        return "the experts' two weights do not fit together"
    return None


def _experts_reads(view: NodeView) -> dict[int, int]:
    """Only weights of experts that tokens are expected to touch."""
    weights = range(2, min(14 if view.node.op_type == "QMoE" else 8, len(view.node.inputs)))
    experts, per_token = view.shape(2)[0], _experts_per_token(view)
    touched = experts * (1 - (1 - per_token / experts) ** math.prod(view.shape(0)[:-1]))
    return {p: round(view.fact(p).nbytes * touched / experts) for p in weights if view.has(p)}


def _experts_per_token(view: NodeView) -> int:
    return min(int(view.attribute("k", 1)), view.shape(2)[0])


def _experts_cost(view: NodeView) -> Cost:
    """Each token goes through `k` experts."""
    quantized = view.node.op_type == "QMoE"
    first, last, gate = (2, 5, 8) if quantized else (2, 4, 6)
    hidden, tokens = view.shape(0)[-1], math.prod(view.shape(0)[:-1])
    experts, width = view.shape(first)[:2]
    per_token = _experts_per_token(view)
    inner = view.shape(last)[2] * (8 // int(view.attribute("expert_weight_bits", 4)) if quantized else 1)
    products = 2 * hidden * (width + inner + (inner if view.has(gate) else 0))
    biases = sum(view.shape(p)[1] for p in ((4, 7, 10) if quantized else (3, 5, 7)) if view.has(p))
    activated = inner * function_flops(view.attribute("activation_type", "relu"))
    routed = tokens * experts * SOFTMAX + 2 * tokens * per_token * hidden
    flops = tokens * per_token * (products + biases + activated) + routed
    return spent(view, flops, reads=_experts_reads(view))


def _group_router_cost(view: NodeView) -> Cost:
    """A sigmoid, a bias and a comparison for each score, after a product if the router projects."""
    scores = math.prod(view.out(0) or view.out(1))
    projected = 2 * view.shape(2)[1] if view.has(2) else 0
    return spent(view, scores * (projected + SIGMOID + 2))


op(
    "MoE",
    domain=MICROSOFT,
    rule=mixture_of_experts,
    shape=as_input,
    definition=takes(range(5, 12), (0, 1, 2, 4)),
    operands=Operands(
        ranks={0: (2, 3), 1: (2, 3), 2: (3,), 3: (2,), 4: (3,), 5: (2,), 6: (3,), 7: (2,)}, check=_mixture_fault
    ),
    reads=_experts_reads,
    cost=_experts_cost,
)
op(
    "QMoE",
    domain=MICROSOFT,
    rule=quantized_mixture_of_experts,
    shape=as_input,
    reads=_experts_reads,
    cost=_experts_cost,
)
op("MoEGroupRouter", domain=MICROSOFT, rule=group_router, shape=_group_router_shape, cost=_group_router_cost)
