"""Fused attention: GroupQueryAttention, ONNX Attention, MultiHeadAttention and RotaryEmbedding.

Heads are the product (kv g): g query heads share each of kv key/value heads. The head vector d is used inside the op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from furiosa_llm.builder.rules.registry import MICROSOFT, NodeView, rule, shape_rule, spell, whole
from furiosa_llm.builder.rules.rule import Rule
from furiosa_llm.builder.shapes.interpreter import Fact, SizeMismatchError, attributes_of

_HEADS = "(kv g)"


def _rest(view: NodeView, start: int) -> list[list[str] | None]:
    return [None if v is None else ["*"] * len(view.facts[v].shape) for v in view.node.inputs[start:]]


def _mask(view: NodeView, port: int) -> list[str]:
    """An attention bias or mask, broadcast to batch, heads, query, key."""
    shape = view.shape(port)
    names = ["b", _HEADS, "*", "*"][4 - len(shape) :]
    return [n if s != 1 else "1" for n, s in zip(names, shape, strict=True)]


@rule("GroupQueryAttention", domain=MICROSOFT)
def group_query_attention(view: NodeView) -> Rule:
    """Query, key and value apart or packed in the query; caches are `b kv s d`."""
    heads, kv = int(view.attribute("num_heads")), int(view.attribute("kv_num_heads"))
    packed = not view.has(1)
    width = view.shape(0)[2]
    size = width // (heads + 2 * kv) if packed else width // heads
    query = ["b", "*", "[kv g d|kv d|kv d]" if packed else "(kv g d)"]
    key = None if packed else ["b", "*", "(kv d)"]
    quantised = view.has(12) or view.has(13)
    cache = ["b", "kv", "*", "*" if quantised else "d"]  # codes of four bits lie two in a byte
    operands: list[list[str] | None] = [query, key, key]
    operands += [cache if view.has(port) else None for port in (3, 4)]
    operands += _rest(view, 5)
    if view.has(5):  # lengths, one for each sequence
        operands[5] = ["b", *["*"] * (view.rank(5) - 1)]
    if view.has(9):
        operands[9] = ["1" if view.shape(9)[0] == 1 else "b", "*"]
    if view.has(10):
        operands[10] = _mask(view, 10)
    if view.has(11):
        operands[11] = ["(kv g)"]
    for port in (12, 13):
        if view.has(port):
            scale = _cache_scale(view.shape(port), kv, size)
            if scale is None:
                return whole(view, note="GroupQueryAttention with scales of an unknown form: replicated")
            operands[port] = scale
    outputs = [["b", "*", "(kv g d)"], cache, cache, ["b", _HEADS, "*", "*"]][: len(view.node.outputs)]
    return Rule(
        text=f"{spell(*operands)} -> {spell(*outputs)}; pin d",
        sizes={"kv": kv, "g": heads // kv, "d": size},
        padding="finite",
        attributes={"num_heads": "kv g", "kv_num_heads": "kv"},
    )


def _cache_scale(shape: Sequence[int], kv: int, size: int) -> list[str] | None:
    """Scales of a quantised cache: one for all, or one for each element of each head's vector."""
    if all(dim == 1 for dim in shape):
        return ["*"] * len(shape)
    if tuple(shape) == (kv * size,):
        return ["(kv d)"]
    if math.prod(shape) != kv * size or len(shape) < 2 or shape[-1] != size:
        return None
    return [*("kv" if dim == kv else "1" for dim in shape[:-1]), "d"]


@shape_rule("GroupQueryAttention")
def _group_query_attention_shape(
    node: ir.Node, inputs: Sequence[Fact | None]
) -> list[tuple[ir.DataType, tuple[int, ...]]]:
    query, past, total = inputs[0], inputs[3], inputs[6]
    assert query is not None
    attributes = attributes_of(node)
    heads, kv = attributes["num_heads"], attributes["kv_num_heads"]
    packed = inputs[1] is None
    size = query.shape[2] // (heads + 2 * kv if packed else heads)
    width = heads * size
    batch, sequence = query.shape[:2]
    if attributes.get("kv_cache_bit_width") == 4:  # two codes in a byte
        size = -(-size // 2)
    for port in (3, 4):
        cache_value = node.inputs[port]
        if past is not None and cache_value is not None and past.shape[3] != size:
            raise SizeMismatchError(cache_value, 3, size, node)
        past = inputs[4] if port == 3 else inputs[3]
    length = sequence + (past.shape[2] if past is not None else 0)
    if total is not None and total.value is not None:
        length = max(int(total.value.item()), past.shape[2] if past is not None else 0)
    cache = (past.dtype if past is not None else query.dtype, (batch, kv, length, size))
    output = (query.dtype, (batch, sequence, width))
    return [output, cache, cache, (query.dtype, (batch, heads, sequence, length))][: len(node.outputs)]


@rule("Attention")
def attention(view: NodeView) -> Rule:
    """ONNX Attention (opset 23 and later), on 4-D heads or on 3-D packed ones."""
    flat = view.rank(0) == 3
    heads = int(view.attribute("q_num_heads")) if flat else view.shape(0)[1]
    kv = int(view.attribute("kv_num_heads")) if flat else view.shape(1)[1]
    if flat:
        size, value_size = view.shape(0)[2] // heads, view.shape(2)[2] // kv
        query, key, value = ["b", "*", "(kv g d)"], ["b", "*", "(kv d)"], ["b", "*", "(kv e)"]
        output = ["b", "*", "(kv g e)"]
    else:
        size, value_size = view.shape(0)[3], view.shape(2)[3]
        query, key, value = ["b", _HEADS, "*", "d"], ["b", "kv", "*", "d"], ["b", "kv", "*", "e"]
        output = ["b", _HEADS, "*", "e"]
    key_cache, value_cache = ["b", "kv", "*", "d"], ["b", "kv", "*", "e"]
    operands: list[list[str] | None] = [query, key, value]
    if view.has(3):
        operands.append(_mask(view, 3))
    elif len(view.node.inputs) > 3:
        operands.append(None)
    operands += [
        (key_cache, value_cache)[p - 4] if view.has(p) else None for p in range(4, min(6, len(view.node.inputs)))
    ]
    operands += [["b"] if view.has(p) else None for p in range(6, len(view.node.inputs))]
    outputs = [output, key_cache, value_cache, ["b", _HEADS, "*", "*"]]
    present = [o if len(view.out(i)) else [] for i, o in enumerate(outputs[: len(view.node.outputs)])]
    return Rule(
        text=f"{spell(*operands)} -> {spell(*present)}; pin d e",
        sizes={"kv": kv, "g": heads // kv, "d": size, "e": value_size},
        padding="finite",
        attributes={"q_num_heads": "kv g", "kv_num_heads": "kv"} if flat else {},
    )


@rule("RotaryEmbedding")
def rotary_embedding(view: NodeView) -> Rule:
    """Heads pass, the head vector is whole; caches are of positions, or of each sequence."""
    rest = _rest(view, 1)
    for operand, port in zip(rest, range(1, 4), strict=False):
        if operand and (port == 3 or len(operand) == 3):
            operand[0] = "1" if view.shape(port)[0] == 1 else "b"
    return _rotary(view, rest)


@rule("RotaryEmbedding", domain=MICROSOFT)
def rotary_embedding_microsoft(view: NodeView) -> Rule:
    """Onnxruntime's op: positions (of each sequence, or the first of all) before the caches."""
    rest = _rest(view, 1)
    if view.rank(1) == 2:
        rest[0] = ["1" if view.shape(1)[0] == 1 else "b", "*"]
    return _rotary(view, rest)


@rule("MRotaryEmbedding", domain=MICROSOFT)
def multimodal_rotary_embedding(view: NodeView) -> Rule:
    """RotaryEmbedding with three positions for each token."""
    if view.attribute("is_packed_batching", 0):
        return whole(view, note="MRotaryEmbedding of sequences of different lengths: replicated")
    rest = _rest(view, 1)
    rest[0] = ["*", "b", "*"]
    return _rotary(view, rest)


def _rotary(view: NodeView, rest: list[list[str] | None]) -> Rule:
    if view.rank(0) == 4:
        dims = ["b", "h", "*", "*"]
        return Rule(text=f"{spell(dims, *rest)} -> {spell(dims)}", padding="moves")
    heads = int(view.attribute("num_heads", 0))
    if not heads:
        return whole(view, note="RotaryEmbedding on packed heads without num_heads: replicated")
    dims = ["b", "*", "(h d)"]
    sizes = {"h": heads, "d": view.shape(0)[2] // heads}
    text = f"{spell(dims, *rest)} -> {spell(dims)}; pin d"
    return Rule(text=text, sizes=sizes, attributes={"num_heads": "h"}, padding="moves")


@shape_rule("RotaryEmbedding", "MRotaryEmbedding")
def _rotary_shape(_: ir.Node, inputs: Sequence[Fact | None]) -> list[tuple[ir.DataType, tuple[int, ...]]]:
    data = inputs[0]
    assert data is not None
    return [(data.dtype, data.shape)]
