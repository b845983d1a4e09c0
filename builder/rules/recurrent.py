"""Linear attention and related ops: each head or channel keeps a state of its own from step to step.

Heads are split together with their states; each position depends on the one before, so positions are whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from furiosa_llm.builder.rules.cost import RMS_NORM, SIGMOID, SILU, Cost, elementwise, function_flops, spent
from furiosa_llm.builder.rules.facts import Fact, present
from furiosa_llm.builder.rules.registry import as_input, op, spell, whole
from furiosa_llm.builder.rules.rule import Rule
from furiosa_llm.builder.rules.view import MICROSOFT, Inferred, NodeView, attributes_of


def linear_attention(view: NodeView) -> Rule:
    """Packed heads; g query heads share the state of each key head.

    Onnxruntime's op also allows g value heads, each with a state, for each query head, and a window of states.
    """
    queries, states = int(view.attribute("q_num_heads")), int(view.attribute("kv_num_heads"))
    size, value_size = view.shape(0)[2] // queries, view.shape(2)[2] // states
    shared = queries >= states  # else there are several states for each query head
    kv, outputs = ("kv", "kv g") if shared else ("kv g", "kv g")
    query = "kv g" if shared else "kv"
    key = kv if view.shape(1)[2] == states * size else query
    heads = {"kv": min(queries, states), "g": max(queries, states) // min(queries, states)}
    state = [*["*"] * (1 if view.attribute("state_window", 0) else 0), "b", f"({kv})", "d", "e"]
    operands: list[list[str] | None] = [["b", "*", f"({query} d)"], ["b", "*", f"({key} d)"], ["b", "*", f"({kv} e)"]]
    operands += [state if view.has(p) else None for p in range(3, min(4, len(view.node.inputs)))]
    for port in range(4, len(view.node.inputs)):
        operands.append(["b", "*", _gate(view.shape(port)[2], states, kv)] if view.has(port) else None)
    return Rule(
        text=f"{spell(*operands)} -> {spell(['b', '*', f'({outputs} e)'], state)}; pin d e",
        sizes={**heads, "d": size, "e": value_size},
        attributes={"q_num_heads": query, "kv_num_heads": kv},
        padding="finite",
    )


def _gate(width: int, heads: int, kv: str) -> str:
    """A gate for each head, for each element of its keys, or one for all heads."""
    return "1" if width == 1 and heads > 1 else f"({kv})" if width == heads else f"({kv} d)"


def _linear_attention_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    query, value, past = present(inputs[0]), present(inputs[2]), inputs[3] if len(inputs) > 3 else None
    attributes = attributes_of(node)
    queries, states = attributes["q_num_heads"], attributes["kv_num_heads"]
    size, value_size = query.shape[2] // queries, value.shape[2] // states
    window = attributes.get("state_window", 0)
    state = (*([window] if window else []), query.shape[0], states, size, value_size)
    kind = query.dtype if past is None else past.dtype
    return [(query.dtype, (*query.shape[:2], max(queries, states) * value_size)), (kind, state)]


def linear_attention_gate(view: NodeView) -> Rule:
    """Elementwise, with numbers for each head."""
    dims = ["a", "b", "h"]
    operands = [dims, ["h"], ["h"], dims][: len(view.node.inputs)]
    return Rule(text=f"{spell(*operands)} -> {spell(*[dims] * len(view.node.outputs))}", padding="finite")


def _linear_attention_gate_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    data = present(inputs[0])
    return [(data.dtype, data.shape)] * len(node.outputs)


def gated_delta_net(view: NodeView) -> Rule:
    """Heads apart or packed in the query; each of q query heads has g value heads with a state each."""
    if len(view.node.outputs) > 2:
        return whole(view, note="GatedDeltaNet that records its transitions: replicated")
    packed = not view.has(1)
    if packed and not view.has(6):
        return whole(view, note="GatedDeltaNet on packed heads without a state to count them by: replicated")
    if packed:
        values, value_size, size = view.shape(6)[1:]
        queries = (view.shape(0)[-1] - values * value_size) // (2 * size)
        tokens = ["*"] * (view.rank(0) - 1)
        operands: list[list[str] | None] = [[*tokens, "[q d|q d|q g e]"], None, None]
    else:
        (queries, size), (values, value_size) = view.shape(0)[-2:], view.shape(2)[-2:]
        tokens = ["*"] * (view.rank(0) - 2)
        operands = [[*tokens, "q", "d"], [*tokens, "q", "d"], [*tokens, "(q g)", "e"]]
    state = ["*", "(q g)", "e", "d"]
    heads = [*tokens, "(q g)"]
    per_head = view.has(8) and view.shape(8) == (values,)
    candidates = [
        ["*"],
        [*heads, "d"][: view.rank(4)] if view.has(4) else [],
        heads,
        state,
        ["(q g)"],
        ["(q g)"] if per_head else ["(q g)", "d"] if view.has(8) and view.rank(8) == 2 else ["(q g d)"],
        ["*"],
        ["*"],
    ]
    operands += [c if view.has(p) else None for p, c in enumerate(candidates[: len(view.node.inputs) - 3], start=3)]
    outputs = [[*heads, "e"], state][: len(view.node.outputs)]
    return Rule(
        text=f"{spell(*operands)} -> {spell(*outputs)}; pin d e",
        sizes={"q": queries, "g": values // queries, "d": size, "e": value_size},
        padding="finite",
    )


def _gated_delta_net_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    query, value, lengths = inputs[0], inputs[2], inputs[3] if len(inputs) > 3 else None
    state = inputs[6] if len(inputs) > 6 else None
    assert query is not None
    if value is not None:
        tokens, (values, value_size), size = value.shape[:-2], value.shape[-2:], query.shape[-1]
    else:
        assert state is not None
        tokens, (values, value_size, size) = query.shape[:-1], state.shape[1:]
    batch = lengths.shape[0] - 1 if lengths is not None else state.shape[0] if state is not None else tokens[0]
    kind = query.dtype if state is None else state.dtype
    shapes = [(query.dtype, (*tokens, values, value_size)), (kind, (batch, values, value_size, size))]
    return shapes[: len(node.outputs)]


# -- convolutions with a state -----------------------------------------------------------------------------------


def causal_conv(view: NodeView) -> Rule:
    """Each channel is convolved by itself."""
    return _causal_conv(view)


def causal_conv_microsoft(view: NodeView) -> Rule:
    """Onnxruntime's op also allows channels in the last dimension, and a window of states."""
    if len(view.node.outputs) > 2 or view.attribute("input_channels", 0):
        return whole(view, note="CausalConvWithState that records updates, or takes some channels: replicated")
    return _causal_conv(view)


def _causal_conv(view: NodeView) -> Rule:
    last = bool(view.attribute("channels_last", 0))
    if last and view.rank(0) != 3:
        return whole(view, note="CausalConvWithState with channels of several dimensions: replicated")
    data = ["b", "*", "c"] if last else ["b", "c", *["*"] * (view.rank(0) - 2)]
    state = [*["*"] * (1 if view.attribute("state_window", 0) else 0), *data]
    operands: list[list[str] | None] = [data, ["c", *["*"] * (view.rank(1) - 1)]]
    operands += [c if view.has(p) else None for p, c in ((2, ["c"]), (3, state)) if p < len(view.node.inputs)]
    return Rule(text=f"{spell(*operands)} -> {spell(data, state)}", padding="finite")


def _causal_conv_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    data, weight, past = present(inputs[0]), present(inputs[1]), inputs[3] if len(inputs) > 3 else None
    if past is not None:
        return [(data.dtype, data.shape), (past.dtype, past.shape)]
    attributes = attributes_of(node)
    length = (weight.shape[-1] - 1) * attributes.get("dilation", 1)
    batch, *rest = data.shape
    state = (batch, length, *rest[1:]) if attributes.get("channels_last") else (batch, *rest[:-1], length)
    window = attributes.get("state_window", 0)
    return [(data.dtype, data.shape), (data.dtype, (window, *state) if window else state)]


# -- norms with a gate -------------------------------------------------------------------------------------------


def gated_rms_norm(view: NodeView) -> Rule:
    """Each group of as many elements as there are scales is normalised by itself."""
    rows, size = [f"r{i}" for i in range(view.rank(0) - 1)], math.prod(view.shape(1))
    dims = [*rows, "(h c)"]
    return Rule(
        text=f"{spell(dims, ['c'], dims)} -> {spell(dims)}; pin c",
        sizes={"h": view.shape(0)[-1] // size, "c": size},
        padding="finite" if view.attribute("epsilon", 1e-5) > 0 else "lost",
    )


def recurrence_flops(view: NodeView, tokens: int, queries: int, states: int, key_size: int, size: int) -> int:
    """FLOPs of `tokens` that update `states` of `key_size * size`, read them with `queries`, and scale the results.

    An update adds an outer product. A gate multiplies the state first; the delta rule subtracts what the state holds
    for the key.
    """
    kind = view.attribute("update_rule", "gated_delta")
    update = 2 * key_size * size
    gated = key_size * size if "gated" in kind else 0
    delta = 2 * key_size * size + 2 * size if "delta" in kind else 0
    return tokens * (states * (update + gated + delta) + max(queries, states) * (2 * key_size * size + size))


def _linear_attention_cost(view: NodeView) -> Cost:
    """The recurrence, and an exponential for each gate; of a window of states only the last is read."""
    queries, states = int(view.attribute("q_num_heads")), int(view.attribute("kv_num_heads"))
    tokens, size = math.prod(view.shape(0)[:2]), view.shape(2)[2] // states
    flops = recurrence_flops(view, tokens, queries, states, view.shape(0)[2] // queries, size)
    window = int(view.attribute("state_window", 0))
    reads = {3: view.fact(3).nbytes // window} if window and view.has(3) else {}
    return spent(view, flops + (math.prod(view.shape(4)) if view.has(4) else 0), reads)


def _linear_attention_gate_cost(view: NodeView) -> Cost:
    """`scale * softplus(a + bias)`, and a sigmoid."""
    return elementwise(2 + function_flops("softplus") + (SIGMOID if view.has(3) else 0))(view)


def _gated_delta_net_cost(view: NodeView) -> Cost:
    """LinearAttention, with activations of the gates and normalisation of keys and queries inside."""
    *tokens, states, size = view.out()
    key_size = view.shape(0)[-1] if view.has(1) else view.shape(6)[3]
    packed = view.shape(0)[-1] - states * size
    queries = view.shape(0)[-2] if view.has(1) else packed // (2 * key_size)
    count = math.prod(tokens)
    flops = recurrence_flops(view, count, queries, states, key_size, size)
    gate = {"none": 1, "softplus": 4 + function_flops("softplus")}.get(view.attribute("gate_activation", "none"), 8)
    flops += gate * math.prod(view.shape(4)) if view.has(4) else 0
    flops += SIGMOID * math.prod(view.shape(5)) if view.attribute("beta_activation", "none") != "none" else 0
    flops += 3 * count * 2 * queries * key_size if view.attribute("qk_l2_norm", 0) else 0
    return spent(view, flops)


def _causal_conv_cost(view: NodeView) -> Cost:
    """Every output is a product over the window; of a window of states only the last is read."""
    activated = function_flops(view.attribute("activation", "none"))
    window = int(view.attribute("state_window", 0))
    reads = {3: view.fact(3).nbytes // window} if window and view.has(3) else {}
    return spent(view, math.prod(view.out()) * (2 * view.shape(1)[-1] + view.has(2) + activated), reads)


op("LinearAttention", rule=linear_attention, cost=_linear_attention_cost)
op(
    "LinearAttention",
    domain=MICROSOFT,
    rule=linear_attention,
    shape=_linear_attention_shape,
    cost=_linear_attention_cost,
)
op(
    "LinearAttentionGate",
    domain=MICROSOFT,
    rule=linear_attention_gate,
    shape=_linear_attention_gate_shape,
    cost=_linear_attention_gate_cost,
)
op("GatedDeltaNet", domain=MICROSOFT, rule=gated_delta_net, shape=_gated_delta_net_shape, cost=_gated_delta_net_cost)
op("CausalConvWithState", rule=causal_conv, cost=_causal_conv_cost)
op(
    "CausalConvWithState",
    domain=MICROSOFT,
    rule=causal_conv_microsoft,
    shape=_causal_conv_shape,
    cost=_causal_conv_cost,
)
op("GatedRMSNorm", domain=MICROSOFT, rule=gated_rms_norm, shape=as_input, cost=elementwise(RMS_NORM + SILU + 1))
