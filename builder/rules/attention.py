"""Fused attention: GroupQueryAttention, ONNX Attention, MultiHeadAttention and RotaryEmbedding.

Heads are the product (kv g): g query heads share each of kv key/value heads. The head vector d is used inside the op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from furiosa_llm.builder.rules.cost import RMS_NORM, SOFTMAX, Cost, spent, taken
from furiosa_llm.builder.rules.facts import Fact, present
from furiosa_llm.builder.rules.operands import Operands, Shapes, has, of_one_batch, over_all_keys, takes
from furiosa_llm.builder.rules.registry import as_input, op, spell, standard_shape, whole, whole_inputs
from furiosa_llm.builder.rules.rule import Rule
from furiosa_llm.builder.rules.view import MICROSOFT, Inferred, NodeView, SizeMismatchError, attributes_of

_HEADS = "(kv g)"


def _mask(view: NodeView, port: int) -> list[str]:
    """An attention bias or mask, broadcast to batch, heads, query, key."""
    shape = view.shape(port)
    names = ["b", _HEADS, "*", "*"][4 - len(shape) :]
    return [n if s != 1 else "1" for n, s in zip(names, shape, strict=True)]


def group_query_attention(view: NodeView) -> Rule:
    """Query, key and value are separate or packed in the query; caches are `b kv s d`."""
    heads, kv = int(view.attribute("num_heads")), int(view.attribute("kv_num_heads"))
    packed = not view.has(1)
    width = view.shape(0)[2]
    size = width // (heads + 2 * kv) if packed else width // heads
    query = ["b", "*", "[kv g d|kv d|kv d]" if packed else "(kv g d)"]
    key = None if packed else ["b", "*", "(kv d)"]
    quantised = view.has(12) or view.has(13)
    cache = ["b", "kv", "*", "*" if quantised else "d"]  # a byte holds two codes of four bits
    operands: list[list[str] | None] = [query, key, key]
    operands += [cache if view.has(port) else None for port in (3, 4)]
    operands += whole_inputs(view, 5)
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


def _group_query_attention_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    query, past, total = present(inputs[0]), inputs[3], inputs[6]
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
            raise SizeMismatchError(cache_value, 3, past.shape[3], size, node)
        past = inputs[4] if port == 3 else inputs[3]
    length = sequence + (past.shape[2] if past is not None else 0)
    if total is not None and total.value is not None:
        length = max(int(total.value.item()), past.shape[2] if past is not None else 0)
    cache = (past.dtype if past is not None else query.dtype, (batch, kv, length, size))
    output = (query.dtype, (batch, sequence, width))
    return [output, cache, cache, (query.dtype, (batch, heads, sequence, length))][: len(node.outputs)]


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


def _attention_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    """The standard's, which does not tell the present of keys and values without a past: what is new, by heads."""
    if len(node.outputs) == 1 or (len(inputs) > 4 and inputs[4] is not None):
        return _STANDARD_SHAPE(node, inputs)
    query, keys, values = (present(inputs[port]) for port in range(3))
    attributes, flat = attributes_of(node), len(query.shape) == 3
    heads = attributes["q_num_heads"] if flat else query.shape[1]
    kv = attributes["kv_num_heads"] if flat else keys.shape[1]
    batch, total = query.shape[0], keys.shape[-2]
    sizes = [one.shape[-1] // (kv if flat else 1) for one in (keys, values)]
    output = (*query.shape[:2], heads * sizes[1]) if flat else (*query.shape[:3], sizes[1])
    scores = (batch, heads, query.shape[-2], total)
    shapes = [output, *((batch, kv, total, size) for size in sizes), scores]
    return [(query.dtype, shape) for shape in shapes[: len(node.outputs)]]


_STANDARD_SHAPE = standard_shape("Attention", opset=24)


def rotary_embedding(view: NodeView) -> Rule:
    """Heads pass, the head vector is whole; caches are of positions, or of each sequence."""
    rest = whole_inputs(view, 1)
    for operand, port in zip(rest, range(1, 4), strict=False):
        if operand and (port == 3 or len(operand) == 3):
            operand[0] = "1" if view.shape(port)[0] == 1 else "b"
    return _rotary(view, rest)


def rotary_embedding_microsoft(view: NodeView) -> Rule:
    """Onnxruntime's op: the positions (of each sequence, or one first position for all) come before the caches."""
    rest = whole_inputs(view, 1)
    if view.rank(1) == 2:
        rest[0] = ["1" if view.shape(1)[0] == 1 else "b", "*"]
    return _rotary(view, rest)


def multimodal_rotary_embedding(view: NodeView) -> Rule:
    """RotaryEmbedding with three positions for each token."""
    if view.attribute("is_packed_batching", 0):
        return whole(view, note="MRotaryEmbedding of sequences of different lengths: replicated")
    rest = whole_inputs(view, 1)
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


def _group_query_attention_fault(node: ir.Node, shapes: Shapes) -> str | None:
    heads, groups = node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()
    query = shapes[0]
    if heads < 1 or groups < 1 or heads % groups:
        return f"{heads} query heads cannot share {groups} key and value heads"
    if query is None or query[2] % (heads if has(shapes, 1) else heads + 2 * groups):
        return f"the packed heads do not divide by num_heads={heads} and kv_num_heads={groups}"
    if has(shapes, 1) != has(shapes, 2) or has(shapes, 3) != has(shapes, 4):
        return "a key is there without its value, or a value without its key"
    return None


def attention_flops(view: NodeView, queries: int, keys: int, sizes: int, *, biased: bool, window: int = 0) -> int:
    """FLOPs of `queries`, counted over all sequences and heads, that each see `keys`, or the last `window` of them.

    `sizes` is the size of a key's head vector plus the size of a value's.
    """
    seen = min(keys, window) if window > 0 else keys
    per_score = 1 + SOFTMAX + biased + (3 if view.attribute("softcap", 0) else 0)
    return queries * seen * (2 * sizes + per_score)


def cache_reads(view: NodeView, ports: tuple[int, ...], window: int = 0) -> dict[int, int]:
    """The bytes read of the caches at some inputs: all of them, or a window back from the first new position."""
    return taken(view, ports, -2, window - 1) if window > 0 else {}


def cache_writes(view: NodeView, ports: tuple[int, ...], new: int) -> dict[int, int]:
    """The bytes written to the caches at some outputs: the `new` positions."""
    facts = {p: view.facts[view.node.outputs[p]] for p in ports if p < len(view.node.outputs)}
    return {p: fact.nbytes * min(new, n) // n for p, fact in facts.items() if fact.shape and (n := fact.shape[-2])}


def _group_query_attention_cost(view: NodeView) -> Cost:
    batch, new, width = view.shape(0)
    heads, kv = int(view.attribute("num_heads")), int(view.attribute("kv_num_heads"))
    size = width // (heads if view.has(1) else heads + 2 * kv)
    keys = view.out(1)[2] if len(view.node.outputs) > 1 else new + (view.shape(3)[2] if view.has(3) else 0)
    window = int(view.attribute("local_window_size", -1))
    flops = attention_flops(view, batch * heads * new, keys, 2 * size, biased=view.has(10), window=window)
    vectors = batch * new * (heads + kv)
    if view.attribute("do_rotary", 0):
        flops += 3 * vectors * 2 * view.shape(7)[-1]
    if view.has(14):
        flops += RMS_NORM * vectors * size
    reads = {**cache_reads(view, (3, 4), window), **taken(view, (7, 8), 0, batch * new)}
    return spent(view, flops, reads, cache_writes(view, (1, 2), new))


def _attention_cost(view: NodeView) -> Cost:
    flat = view.rank(0) == 3
    heads, kv = (int(view.attribute(n)) if flat else 1 for n in ("q_num_heads", "kv_num_heads"))
    new = view.shape(1)[-2]
    queries = math.prod(view.shape(0)[:-1]) * heads
    sizes = view.shape(0)[-1] // heads + view.shape(2)[-1] // kv
    keys = new + (view.shape(4)[2] if view.has(4) else 0)
    left, right = int(view.attribute("left_window_size", -1)), int(view.attribute("right_window_size", -1))
    right = 0 if view.attribute("is_causal", 0) else right
    window = left + 1 + right if left >= 0 and right >= 0 else 0
    flops = attention_flops(view, queries, keys, sizes, biased=view.has(3), window=window)
    return spent(view, flops, cache_reads(view, (4, 5), window), cache_writes(view, (1, 2), new))


def _rotary_cost(view: NodeView) -> Cost:
    """Four products and two sums for every pair in the rotated part of a head vector; rows of the caches are read."""
    positions, caches = (3, (1, 2)) if not view.node.domain else (1, (2, 3))
    shape, half = view.shape(0), view.shape(caches[0])[-1]
    heads = shape[1] if len(shape) == 4 else int(view.attribute("num_heads", 0)) or shape[2] // (2 * half)
    tokens = shape[0] * shape[-2]
    reads = taken(view, caches, 0, tokens) if view.has(positions) else {}
    return spent(view, 6 * tokens * heads * half, reads)


op(
    "GroupQueryAttention",
    domain=MICROSOFT,
    rule=group_query_attention,
    shape=_group_query_attention_shape,
    definition=takes(range(7, 17), (0, 5, 6), "num_heads", "kv_num_heads", outputs=4),
    operands=Operands(
        ranks={**dict.fromkeys((0, 1, 2), (3,)), 3: (4,), 4: (4,), 10: (4,), 11: (1,)},
        check=of_one_batch({0: 0, 1: 0, 2: 0, 3: 0, 4: 0, 5: 0, 9: 0}, _group_query_attention_fault),
    ),
    caches={3: 1, 4: 2},
    in_place=True,
    cost=_group_query_attention_cost,
)
op(
    "Attention",
    rule=attention,
    shape=_attention_shape,
    operands=Operands(check=of_one_batch({0: 0, 1: 0, 2: 0, 4: 0, 5: 0, 6: 0}, over_all_keys((1,), 4, {3: (2, 3, 4)}))),
    caches={4: 1, 5: 2},
    cost=_attention_cost,
)
op("RotaryEmbedding", rule=rotary_embedding, operands=Operands(check=of_one_batch({0: 0, 3: 0})), cost=_rotary_cost)
op(
    "RotaryEmbedding",
    domain=MICROSOFT,
    rule=rotary_embedding_microsoft,
    shape=as_input,
    definition=takes(range(4, 5), (0, 1, 2, 3)),
    operands=Operands(ranks={0: (3, 4)}, check=of_one_batch({0: 0, 1: 0})),
    cost=_rotary_cost,
)
op(
    "MRotaryEmbedding",
    domain=MICROSOFT,
    rule=multimodal_rotary_embedding,
    shape=as_input,
    operands=Operands(check=of_one_batch({0: 0, 1: 1})),
    cost=_rotary_cost,
)
