"""onnxruntime's own attention ops: Attention, QAttention, MultiHeadAttention and DecoderMaskedMultiHeadAttention.

Heads h are split. What the ops project inside (Attention's hidden dimension) must be whole, because a softmax follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from furiosa_llm.builder.rules.attention import attention_flops, cache_writes
from furiosa_llm.builder.rules.cost import Cost, spent
from furiosa_llm.builder.rules.facts import Fact, present
from furiosa_llm.builder.rules.integers import per_channel
from furiosa_llm.builder.rules.operands import Operands, of_one_batch, over_all_keys
from furiosa_llm.builder.rules.registry import op, spell, whole, whole_inputs
from furiosa_llm.builder.rules.rule import Rule
from furiosa_llm.builder.rules.view import MICROSOFT, Inferred, NodeView, attributes_of

_Operand = list[str] | None
_PACKED = "[h d|h d|h e]"
_PAST = ["*", "b", "h", "*", "d"]


def _batch(view: NodeView, mask: int) -> str:
    """Whether the batch may be split: a mask of one dimension may hold several numbers for each sequence."""
    return "*" if view.has(mask) and view.rank(mask) == 1 else "b"


def _mask(view: NodeView, port: int) -> _Operand:
    """A mask for each sequence, or numbers of positions."""
    if not view.has(port):
        return None
    rest = ["*"] * (view.rank(port) - 1)
    return ["*"] if not rest else ["1" if view.shape(port)[0] == 1 else "b", *rest]


def _bias(view: NodeView, port: int, batch: str) -> _Operand:
    """What is added to the scores: batch and heads, or 1 for all of them."""
    if not view.has(port):
        return None
    return ["1" if size == 1 else name for name, size in zip((batch, "h", "*", "*"), view.shape(port), strict=True)]


# -- Attention ---------------------------------------------------------------------------------------------------


def _hidden_sizes(heads: int, width: int, given: Sequence[int] | None) -> tuple[int, int]:
    """The sizes of a query's and of a value's head vector."""
    sizes = given or [width // 3] * 3
    return sizes[0] // heads, sizes[2] // heads


def attention_microsoft(view: NodeView) -> Rule:
    """The projections of query, key and value lie side by side in one weight."""
    if view.attribute("past_present_share_buffer", 0):
        return whole(view, note="Attention with its cache in place: replicated")
    heads, given = int(view.attribute("num_heads")), view.attribute("qkv_hidden_sizes")
    size, value_size = _hidden_sizes(heads, view.shape(1)[1], given)
    b = _batch(view, 3)
    past = [b if word == "b" else word for word in _PAST]
    packed = _PACKED
    if view.has(4) or len(view.node.outputs) > 1:  # keys and values lie in one cache, so their heads are of one size
        packed = "[h d|h d|h d]"
    value = "e" if packed == _PACKED else "d"
    operands: list[_Operand] = [[b, "*", "*"], ["*", packed], [packed] if view.has(2) else None]
    operands += [_mask(view, 3), past if view.has(4) else None, _bias(view, 5, b), *whole_inputs(view, 6)]
    outputs = [[b, "*", f"(h {value})"], past][: len(view.node.outputs)]
    attributes = {"num_heads": "h"}
    if given:
        attributes["qkv_hidden_sizes"] = f"h d, h d, h {value}"
    return Rule(
        text=f"{spell(*operands[: len(view.node.inputs)])} -> {spell(*outputs)}; pin d"
        + (" e" if value == "e" else ""),
        sizes={"h": heads, "d": size, "e": value_size},
        attributes=attributes,
        padding="finite",
    )


def _attention_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    data, weights, past = inputs[0], present(inputs[1]), inputs[4] if len(inputs) > 4 else None
    return _self_attention_shape(node, data, weights.shape[1], past)


def _self_attention_shape(node: ir.Node, data: Fact | None, width: int, past: Fact | None) -> Inferred:
    assert data is not None
    attributes = attributes_of(node)
    heads = attributes["num_heads"]
    size, value_size = _hidden_sizes(heads, width, attributes.get("qkv_hidden_sizes"))
    batch, sequence = data.shape[:2]
    kind = ir.DataType.FLOAT if data.dtype.is_integer() else data.dtype
    length = sequence + (past.shape[3] if past is not None else 0)
    if attributes.get("past_present_share_buffer") and past is not None:
        length = past.shape[3]
    shapes = [(kind, (batch, sequence, heads * value_size)), (kind, (2, batch, heads, length, size))]
    return shapes[: len(node.outputs)]


def quantized_attention(view: NodeView) -> Rule:
    """Attention on codes, with one scale for the input and one scale, or one for each column, for the weight."""
    if view.attribute("past_present_share_buffer", 0):
        return whole(view, note="QAttention with its cache in place: replicated")
    heads = int(view.attribute("num_heads"))
    b = _batch(view, 5)
    packed, past = "[h d|h d|h d]", [b if word == "b" else word for word in _PAST]
    operands: list[_Operand] = [[b, "*", "*"], ["*", packed], [packed], per_channel(view, 3, "*")]
    operands += [per_channel(view, 4, packed), _mask(view, 5), per_channel(view, 6, "*"), per_channel(view, 7, packed)]
    operands += [past if view.has(8) else None]
    outputs = [[b, "*", "(h d)"], past][: len(view.node.outputs)]
    return Rule(
        text=f"{spell(*operands[: len(view.node.inputs)])} -> {spell(*outputs)}; pin d",
        sizes={"h": heads, "d": view.shape(1)[1] // 3 // heads},
        attributes={"num_heads": "h"},
        padding="finite",
    )


def _quantized_attention_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    data, weights, past = inputs[0], present(inputs[1]), inputs[8] if len(inputs) > 8 else None
    return _self_attention_shape(node, data, weights.shape[1], past)


# -- MultiHeadAttention ------------------------------------------------------------------------------------------


def _query_key_value(view: NodeView, b: str, heads: int) -> tuple[list[_Operand], int, int]:
    """Query, key and value in the forms that the op knows, and the sizes of their head vectors."""
    cache = view.has(1) and view.rank(1) == 4  # the cache of a cross attention has a dimension of heads
    if view.rank(0) == 5:
        size = view.shape(0)[4]
        return [[b, "*", "h", "*", "d"], None, None], size, size
    size = view.shape(0)[2] // heads
    if not view.has(1):
        return [[b, "*", _PACKED], None, None], size // 3, size // 3
    if view.rank(1) == 5:
        return [[b, "*", "(h d)"], [b, "*", "h", "*", "d"], None], size, size
    if cache:
        return [[b, "*", "(h d)"], [b, "h", "*", "d"], [b, "h", "*", "e"]], size, view.shape(2)[3]
    return [[b, "*", "(h d)"], [b, "*", "(h d)"], [b, "*", "(h e)"]], size, view.shape(2)[2] // heads


def multi_head_attention(view: NodeView) -> Rule:
    """Query, key and value apart or packed; the projections' biases lie side by side in one vector."""
    if view.has(8) or view.has(9):
        return whole(view, note="MultiHeadAttention with its cache in place, or with beams: replicated")
    heads = int(view.attribute("num_heads"))
    b = _batch(view, 4)
    operands, size, value_size = _query_key_value(view, b, heads)
    operands += [[_PACKED] if view.has(3) else None, _mask(view, 4), _bias(view, 5, b)]
    caches = [[b, "h", "*", "d"], [b, "h", "*", "e"]]
    operands += [cache if view.has(port) else None for port, cache in zip((6, 7), caches, strict=True)]
    operands = operands[: len(view.node.inputs)]
    return _heads_rule(view, b, operands, {"h": heads, "d": size, "e": value_size})


def decoder_attention(view: NodeView) -> Rule:
    """MultiHeadAttention of one new position, with its biases after all other inputs.

    Only its cross attention is split: a self attention's states come out in the buffers of its inputs, so no rule for
    it could be proved.
    """
    if view.has(5) or view.has(8) or view.has(9) or not view.has(1) or view.rank(1) != 4:
        return whole(view, note="DecoderMaskedMultiHeadAttention in place, or with beams: replicated")
    heads = int(view.attribute("num_heads"))
    b = _batch(view, 3)
    operands, size, value_size = _query_key_value(view, b, heads)
    operands += [_mask(view, 3), _bias(view, 4, b), *whole_inputs(view, 5)]
    if view.has(10):
        operands[10] = [_PACKED]
    operands = operands[: len(view.node.inputs)]
    return _heads_rule(view, b, operands, {"h": heads, "d": size, "e": value_size})


def _heads_rule(view: NodeView, b: str, operands: list[_Operand], sizes: dict[str, int]) -> Rule:
    caches = [[b, "h", "*", "d"], [b, "h", "*", "e"]]
    outputs = [[b, "*", "(h e)"], *caches, [b, "h", "*", "*"]]
    present = [o if len(view.out(i)) else [] for i, o in enumerate(outputs[: len(view.node.outputs)])]
    text = f"{spell(*operands)} -> {spell(*present)}"
    pins = [s for s in ("d", "e") if f" {s}" in text]
    return Rule(text=f"{text}; pin {' '.join(pins)}", sizes=sizes, attributes={"num_heads": "h"}, padding="finite")


def _multi_head_attention_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    return _heads_shape(node, inputs, inputs[6] if len(inputs) > 6 else None)


def _decoder_attention_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    return _heads_shape(node, inputs, inputs[5] if len(inputs) > 5 else None)


def _heads_shape(node: ir.Node, inputs: Sequence[Fact | None], past: Fact | None) -> Inferred:
    query = present(inputs[0])
    key, value = (inputs[port] if len(inputs) > port else None for port in (1, 2))
    attributes = attributes_of(node)
    heads = attributes["num_heads"]
    batch, sequence = query.shape[:2]
    if key is None:
        size = value_size = query.shape[4] if len(query.shape) == 5 else query.shape[2] // heads // 3
        length = sequence
    elif len(key.shape) == 5:
        size = value_size = key.shape[4]
        length = key.shape[1]
    else:
        assert value is not None
        cross = len(key.shape) == 4
        size = query.shape[2] // heads
        value_size = value.shape[3] if cross else value.shape[2] // heads
        length = key.shape[2] if cross else key.shape[1]
    if past is not None:
        length = past.shape[2] + (0 if attributes.get("past_present_share_buffer") else length)
    kind = query.dtype
    shapes = [
        (kind, (batch, sequence, heads * value_size)),
        (kind, (batch, heads, length, size)),
        (kind, (batch, heads, length, value_size)),
        (kind, (batch, heads, sequence, length)),
    ]
    return shapes[: len(node.outputs)]


def _projected_attention_cost(view: NodeView) -> Cost:
    """Attention and QAttention: a product with a bias, then the attention."""
    quantized = view.node.op_type == "QAttention"
    past, bias = (8, None) if quantized else (4, 5)
    (batch, new, inner), width = view.shape(0), view.shape(1)[1]
    heads = int(view.attribute("num_heads"))
    sizes = _hidden_sizes(heads, width, view.attribute("qkv_hidden_sizes"))
    before = view.shape(past)[3] if view.has(past) else 0
    keys = before if before and view.attribute("past_present_share_buffer", 0) else before + new
    biased = bias is not None and view.has(bias)
    flops = batch * new * width * (2 * inner + view.has(2) + quantized)
    flops += attention_flops(view, batch * heads * new, keys, sum(sizes), biased=biased)
    return spent(view, flops, writes=cache_writes(view, (1,), new))


def _heads_cost(view: NodeView) -> Cost:
    """MultiHeadAttention, and the form of it for one new position."""
    decoder = view.node.op_type != "MultiHeadAttention"
    past, bias, projection = (5, 4, 10) if decoder else (6, 5, 3)
    heads = int(view.attribute("num_heads"))
    _, size, value_size = _query_key_value(view, "b", heads)
    batch, queries = view.shape(0)[:2]
    new = queries if not view.has(1) else view.shape(1)[2 if view.rank(1) == 4 else 1]
    before = view.shape(past)[2] if view.has(past) else 0
    keys = before if before and view.attribute("past_present_share_buffer", 0) else before + new
    flops = attention_flops(view, batch * heads * queries, keys, size + value_size, biased=view.has(bias))
    if view.has(projection):
        flops += batch * heads * (queries * size + new * (size + value_size))
    return spent(view, flops, writes=cache_writes(view, (1, 2), new))


op(
    "Attention",
    domain=MICROSOFT,
    rule=attention_microsoft,
    shape=_attention_shape,
    operands=Operands(check=of_one_batch({0: 0, 4: 1}, over_all_keys((0,), 4, {3: (2, 3), 5: (4,)}))),
    caches={4: 1},
    cost=_projected_attention_cost,
)
op(
    "QAttention",
    domain=MICROSOFT,
    rule=quantized_attention,
    shape=_quantized_attention_shape,
    operands=Operands(check=of_one_batch({0: 0, 8: 1}, over_all_keys((0,), 8, {5: (2, 3)}))),
    caches={8: 1},
    cost=_projected_attention_cost,
)
op(
    "MultiHeadAttention",
    domain=MICROSOFT,
    rule=multi_head_attention,
    shape=_multi_head_attention_shape,
    operands=Operands(check=of_one_batch({0: 0, 6: 0, 7: 0}, over_all_keys((1, 0), 6, {4: (2, 3), 5: (4,)}))),
    caches={6: 1, 7: 2},
    cost=_heads_cost,
)
op(
    "DecoderMaskedMultiHeadAttention",
    domain=MICROSOFT,
    rule=decoder_attention,
    shape=_decoder_attention_shape,
    cost=_heads_cost,
)
