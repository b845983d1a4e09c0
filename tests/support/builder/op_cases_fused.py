"""Cases of fused ops: attention of all kinds, linear attention, mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.support.builder.op_case import OpCase, case, codes, ints, number, positive


def attentions() -> Iterator[OpCase]:
    """Fused attention, with 6 query heads over 3 key heads of size 16."""
    heads, state = "num_heads=6, kv_num_heads=3", "float[1, 3, 4, 16] past_k, float[1, 3, 4, 16] past_v"
    presents = "float[1, 3, 6, 16] present_k, float[1, 3, 6, 16] present_v"
    lengths = {"last": np.array([5], dtype=np.int32), "total": np.array(6, dtype=np.int32)}
    rotary = {"cos": (16, 8), "sin": (16, 8)}
    op = "com.microsoft.GroupQueryAttention"
    cache, out = "b kv * d, b kv * d", "b * (kv g d), b kv * d, b kv * d; pin d"
    x = f"float[1, 2, 96] past_q, float[1, 2, 48] past_x, float[1, 2, 48] past_z, {state}"
    nodes = f"present_y, present_k, present_v = {op}<{heads}>(past_q, past_x, past_z, past_k, past_v, last, total)"
    text = f"b * (kv g d), b * (kv d), b * (kv d), {cache}, b,  -> {out}"
    yield case(op, text, x, f"float[1, 2, 96] present_y, {presents}", nodes, "apart", **lengths)
    x = f"float[1, 2, 192] past_x, {state}"
    arguments = 'past_x, "", "", past_k, past_v, last, total, cos, sin'.replace('""', "")
    nodes = f"present_y, present_k, present_v = {op}<{heads}, do_rotary=1>({arguments})"
    text = f"b * [kv g d|kv d|kv d], _, _, {cache}, b, , * *, * * -> {out}"
    yield case(op, text, x, f"float[1, 2, 96] present_y, {presents}", nodes, "packed", **lengths, **rotary)
    arguments += ", , , sink"
    nodes = f"present_y, present_k, present_v = {op}<{heads}, do_rotary=1, softcap=5.0>({arguments})"
    text = f"b * [kv g d|kv d|kv d], _, _, {cache}, b, , * *, * *, _, _, (kv g) -> {out}"
    yield case(op, text, x, f"float[1, 2, 96] present_y, {presents}", nodes, "sinks", **lengths, **rotary, sink=(6,))

    x = "float[1, 6, 2, 8] past_q, float[1, 3, 5, 8] past_k, float[1, 3, 5, 4] past_v"
    text = "b (kv g) * d, b kv * d, b kv * e -> b (kv g) * e; pin d e"
    y, nodes = "float[1, 6, 2, 4] present_y", "present_y = Attention(past_q, past_k, past_v)"
    yield case("Attention", text, x, y, nodes, "of heads", opset=23)
    text = "b (kv g) * d, b kv * d, b kv * e, 1 (kv g) * * -> b (kv g) * e; pin d e"
    nodes = "present_y = Attention(past_q, past_k, past_v, past_m)"
    x += ", float[1, 6, 2, 5] past_m"
    yield case("Attention", text, x, y, nodes, "with a mask", opset=23)
    x = f"float[1, 2, 96] past_q, float[1, 2, 48] past_x, float[1, 2, 48] past_z, {state}"
    arguments = "past_q, past_x, past_z, , past_k, past_v"
    nodes = f"present_y, present_k, present_v = Attention<q_num_heads=6, kv_num_heads=3>({arguments})"
    text = "b * (kv g d), b * (kv d), b * (kv e), _, b kv * d, b kv * e -> b * (kv g e), b kv * d, b kv * e; pin d e"
    y = f"float[1, 2, 96] present_y, {presents}"
    yield case("Attention", text, x, y, nodes, "packed", opset=23)
    x = "float[1, 2, 96] past_q, float[1, 2, 48] past_x, float[1, 2, 48] past_z"
    nodes = "present_y, present_k, present_v = Attention<q_num_heads=6, kv_num_heads=3>(past_q, past_x, past_z)"
    text = "b * (kv g d), b * (kv d), b * (kv e) -> b * (kv g e), b kv * d, b kv * e; pin d e"
    y = "float[1, 2, 96] present_y, float[1, 3, 2, 16] present_k, float[1, 3, 2, 16] present_v"
    yield case("Attention", text, x, y, nodes, "without a past", opset=23)

    cos = {"cos": (1, 2, 8), "sin": (1, 2, 8)}
    x, y = "float[1, 6, 2, 16] past_x", "float[1, 6, 2, 16] present_y"
    nodes = "present_y = RotaryEmbedding(past_x, cos, sin)"
    yield case("RotaryEmbedding", "b h * *, 1 * *, 1 * * -> b h * *", x, y, nodes, opset=23, **cos)
    x, y = "float[1, 2, 96] past_x", "float[1, 2, 96] present_y"
    nodes = "present_y = RotaryEmbedding<num_heads=6>(past_x, cos, sin)"
    text = "b * (h d), 1 * *, 1 * * -> b * (h d); pin d"
    yield case("RotaryEmbedding", text, x, y, nodes, "packed", opset=23, **cos)
    op = "com.microsoft.RotaryEmbedding"
    nodes, text = f"present_y = {op}<num_heads=6>(past_x, p, cos, sin)", "b * (h d), 1 *, * *, * * -> b * (h d); pin d"
    yield case(op, text, x, y, nodes, p=np.array([[0, 1]]), **rotary)
    nodes, text = f"present_y = {op}(past_x, p, cos, sin)", "* * *, * *, * *, * * -> * * *"
    yield case(
        op, text, x.replace("96", "16"), y.replace("96", "16"), nodes, "one head", p=np.array([[0, 1]]), **rotary
    )


def experts() -> Iterator[OpCase]:
    """The fused mixture of experts: 4 experts, 2 of them used, of inner size 6."""
    op = "com.microsoft.MoE"
    x, y = "float[3, 8] past_x, float[3, 4] past_r", "float[3, 8] y"
    nodes = f'y = {op}<k=2, activation_type="silu">(past_x, past_r, a, , b)'
    yield case(op, "a *, (a) *, * i *, _, * * i -> a *; reduce i", x, y, nodes, a=(4, 6, 8), b=(4, 8, 6))
    nodes = f'y = {op}<k=2, activation_type="swiglu", swiglu_fusion=1>(past_x, past_r, a, c, b, d)'
    weights = {"a": (4, 12, 8), "c": (4, 12), "b": (4, 8, 6), "d": (4, 8)}
    text = "a *, (a) *, * (i u) *, * (i u), * * i, * * -> a *; reduce i; pin u"
    yield case(op, text, x, y, nodes, "interleaved", **weights)
    nodes = nodes.replace("swiglu_fusion=1", "swiglu_fusion=2")
    text = "a *, (a) *, * [i|i] *, * [i|i], * * i, * * -> a *; reduce i"
    yield case(op, text, x, y, nodes, "one after the other", runs=False, **weights)


def packed_attentions() -> Iterator[OpCase]:
    """Attention with its projections inside: 6 heads of size 8, hidden 10."""
    op, weights = "com.microsoft.Attention", {"w": (10, 144), "c": (144,)}
    x, y = "float[2, 4, 10] past_x", "float[2, 4, 48] present_y"
    text = "b * *, * [h d|h d|h e], [h d|h d|h e] -> b * (h e); pin d e"
    yield case(op, text, x, y, f"present_y = {op}<num_heads=6>(past_x, w, c)", **weights)
    mask, bias = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], np.int32), (1, 6, 4, 4)
    nodes = f"present_y = {op}<num_heads=6, unidirectional=1>(past_x, w, c, mask, , bias)"
    text = "b * *, * [h d|h d|h e], [h d|h d|h e], b *, _, 1 h * * -> b * (h e); pin d e"
    yield case(op, text, x, y, nodes, "mask and bias", mask=mask, bias=bias, **weights)
    nodes = f"present_y = {op}<num_heads=6>(past_x, w, c, lengths)"
    text = "* * *, * [h d|h d|h e], [h d|h d|h e], * -> * * (h e); pin d e"
    yield case(op, text, x, y, nodes, "lengths", lengths=np.array([3, 4], np.int32), **weights)
    nodes = f"present_y = {op}<num_heads=6, qkv_hidden_sizes=[48, 48, 24]>(past_x, w, c)"
    text = "b * *, * [h d|h d|h e], [h d|h d|h e] -> b * (h e); pin d e"
    y = "float[2, 4, 24] present_y"
    yield case(op, text, x, y, nodes, "other values", w=(10, 120), c=(120,))
    x, y = f"{x}, float[2, 2, 6, 5, 8] past_c", "float[2, 4, 48] present_y, float[2, 2, 6, 9, 8] present_c"
    nodes = f"present_y, present_c = {op}<num_heads=6, qkv_hidden_sizes=[48, 48, 48]>(past_x, w, c, , past_c)"
    text = "b * *, * [h d|h d|h d], [h d|h d|h d], _, * b h * d -> b * (h d), * b h * d; pin d"
    yield case(op, text, x, y, nodes, "cache", **weights)
    in_place, whole = "past_present_share_buffer=1", "* * *, * *, *, _, * * * * *, _, * -> * * *, * * * * *"
    arguments = "past_x, w, c, , past_c, , n"
    nodes = f"present_y, present_c = {op}<num_heads=6, {in_place}>({arguments})"
    y = "float[2, 4, 48] present_y, float[2, 2, 6, 5, 8] present_c"
    yield case(op, whole, x, y, nodes, "in place", n=np.array([1], np.int32), runs=False, **weights)
    y = "float[2, 4, 48] present_y, float[2, 2, 6, 9, 8] present_c"
    op, parts = "com.microsoft.QAttention", {"s": number(0.1), "t": positive(144) + 0.01, "c": (144,)}
    parts |= {"w": codes(10, 144), "z": np.array(7, np.uint8), "p": np.full(144, 128, np.uint8)}
    nodes = f"present_y = {op}<num_heads=6>(past_x, w, c, s, t, , z, p)"
    text = "b * *, * [h d|h d|h d], [h d|h d|h d], , [h d|h d|h d], _, , [h d|h d|h d] -> b * (h d); pin d"
    yield case(op, text, "uint8[2, 4, 10] past_x", "float[2, 4, 48] present_y", nodes, **parts)
    nodes = f"present_y, present_c = {op}<num_heads=6>(past_x, w, c, s, u, , z, o, past_c)"
    text = "b * *, * [h d|h d|h d], [h d|h d|h d], , , _, , , * b h * d -> b * (h d), * b h * d; pin d"
    parts = {**{k: parts[k] for k in "swzc"}, "u": number(0.02), "o": np.array(128, np.uint8)}
    yield case(op, text, x.replace("float", "uint8", 1), y, nodes, "cache", **parts)


def heads_attentions() -> Iterator[OpCase]:
    """MultiHeadAttention in all its forms: 6 heads of size 8."""
    op = "com.microsoft.MultiHeadAttention"
    x, y = "float[2, 4, 48] past_q, float[2, 5, 48] past_x, float[2, 5, 24] past_z", "float[2, 4, 24] present_y"
    nodes = f"present_y = {op}<num_heads=6>(past_q, past_x, past_z)"
    text = "b * (h d), b * (h d), b * (h e) -> b * (h e); pin d e"
    yield case(op, text, x, y, nodes, "apart")
    mask, weights = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], np.int32), {"c": (144,), "bias": (2, 1, 4, 5)}
    nodes = f"present_y = {op}<num_heads=6>(past_q, past_x, past_z, c, mask, bias)"
    x, y = x.replace("24", "48"), y.replace("24", "48")
    text = "b * (h d), b * (h d), b * (h e), [h d|h d|h e], b *, b 1 * * -> b * (h e); pin d e"
    yield case(op, text, x, y, nodes, "bias and masks", mask=mask, **weights)
    nodes = f"present_y = {op}<num_heads=6>(past_q, past_x, past_z, , lengths)"
    text = "* * (h d), * * (h d), * * (h e), _, * -> * * (h e); pin d e"
    yield case(op, text, x, y, nodes, "lengths", lengths=np.array([3, 5], np.int32))
    text = "b * (h d), b * h * d -> b * (h d); pin d"
    x = "float[2, 4, 48] past_q, float[2, 5, 6, 2, 8] past_x"
    nodes = f"present_y = {op}<num_heads=6>(past_q, past_x)"
    text = "b * (h d), b * h * d, _ -> b * (h e); pin d e"
    yield case(op, text.replace(", _", ""), x, y, nodes, "packed keys and values", runs=False)
    nodes, x = f"present_y = {op}<num_heads=6>(past_x)", "float[2, 4, 6, 3, 8] past_x"
    yield case(op, "b * h * d -> b * (h e); pin d e", x, y, nodes, "packed", runs=False)
    x = "float[2, 4, 48] past_q, float[2, 6, 5, 8] past_k, float[2, 6, 5, 8] past_v"
    nodes = f"present_y = {op}<num_heads=6>(past_q, past_k, past_v)"
    text = "b * (h d), b h * d, b h * e -> b * (h e); pin d e"
    yield case(op, text, x, y, nodes, "of a cache")
    state = "float[2, 6, 5, 8] past_k, float[2, 6, 5, 8] past_v"
    x = f"float[2, 4, 48] past_q, float[2, 4, 48] past_x, float[2, 4, 48] past_z, {state}"
    y = "float[2, 4, 48] present_y, float[2, 6, 9, 8] present_k, float[2, 6, 9, 8] present_v"
    arguments = "past_q, past_x, past_z, , , , past_k, past_v"
    nodes = f"present_y, present_k, present_v = {op}<num_heads=6, unidirectional=1>({arguments})"
    text = "b * (h d), b * (h d), b * (h e), _, _, _, b h * d, b h * e -> b * (h e), b h * d, b h * e; pin d e"
    yield case(op, text, x, y, nodes, "cache")
    nodes = nodes.replace("past_k, past_v)", "past_k, past_v, n)")
    text = "* * *, * * *, * * *, _, _, _, * * * *, * * * *, * -> * * *, * * * *, * * * *"
    yield case(op, text, x, y, nodes, "in place", n=np.array([1], np.int32), runs=False)
    op = "com.microsoft.DecoderMaskedMultiHeadAttention"
    x = "float[2, 1, 48] past_q, float[2, 6, 5, 8] past_k, float[2, 6, 5, 8] past_v"
    nodes, y = f"present_y = {op}<num_heads=6>(past_q, past_k, past_v, mask)", "float[2, 1, 48] present_y"
    text = "b * (h d), b h * d, b h * e, b * -> b * (h e); pin d e"
    yield case(op, text, x, y, nodes, "of a cache", mask=mask)
    y = "float[2, 1, 48] present_y, float[2, 6, 5, 8] present_k, float[2, 6, 5, 8] present_v"
    x = f"float[2, 1, 48] past_q, float[2, 1, 48] past_x, float[2, 1, 48] past_z, {state}"
    arguments = "past_q, past_x, past_z, , , past_k, past_v, n"
    nodes = f"present_y, present_k, present_v = {op}<num_heads=6, past_present_share_buffer=1>({arguments})"
    text = "* * *, * * *, * * *, _, _, * * * *, * * * *, * -> * * *, * * * *, * * * *"
    yield case(op, text, x, y, nodes, "in place", n=np.array([4], np.int32), runs=False)


def standard_attentions() -> Iterator[OpCase]:
    """ONNX Attention of opset 24, GroupQueryAttention of a batch, and rotary embeddings of each sequence."""
    x = "float[2, 6, 2, 8] past_q, float[2, 3, 5, 8] past_k, float[2, 3, 5, 4] past_v"
    text = "b (kv g) * d, b kv * d, b kv * e, _, _, _, b -> b (kv g) * e; pin d e"
    y, nodes = "float[2, 6, 2, 4] present_y", "present_y = Attention(past_q, past_k, past_v, , , , lengths)"
    yield case("Attention", text, x, y, nodes, "lengths", lengths=ints(3, 5), opset=24)
    text = "b (kv g) * d, b kv * d, b kv * e, * * -> b (kv g) * e; pin d e"
    nodes = "present_y = Attention<is_causal=1, softcap=5.0>(past_q, past_k, past_v, mask)"
    yield case("Attention", text, x, y, nodes, "causal", mask=(2, 5), opset=24)
    op, heads = "com.microsoft.GroupQueryAttention", "num_heads=6, kv_num_heads=3"
    x = "float[2, 1, 96] past_q, float[2, 1, 48] past_x, float[2, 1, 48] past_z"
    x += ", float[2, 3, 5, 16] past_k, float[2, 3, 5, 16] past_v"
    y = "float[2, 1, 96] present_y, float[2, 3, 6, 16] present_k, float[2, 3, 6, 16] present_v"
    nodes = f"present_y, present_k, present_v = {op}<{heads}>(past_q, past_x, past_z, past_k, past_v, last, total)"
    text = "b * (kv g d), b * (kv d), b * (kv d), b kv * d, b kv * d, b,  -> b * (kv g d), b kv * d, b kv * d; pin d"
    lengths = {"last": np.array([5, 3], dtype=np.int32), "total": np.array(6, dtype=np.int32)}
    yield case(op, text, x, y, nodes, "batch", **lengths)
    x, y = "float[2, 6, 3, 16] past_x", "float[2, 6, 3, 16] present_y"
    nodes = "present_y = RotaryEmbedding(past_x, cos, sin, p)"
    tables, p = {"cos": (9, 8), "sin": (9, 8)}, np.array([[0, 1, 2], [4, 5, 6]])
    text = "b h * *, * *, * *, b * -> b h * *"
    yield case("RotaryEmbedding", text, x, y, nodes, "places", p=p, opset=23, **tables)
    nodes, angles = "present_y = RotaryEmbedding(past_x, cos, sin)", {"cos": (2, 3, 8), "sin": (2, 3, 8)}
    yield case("RotaryEmbedding", "b h * *, b * *, b * * -> b h * *", x, y, nodes, "batch", opset=23, **angles)
    op, nodes = "com.microsoft.RotaryEmbedding", "present_y = com.microsoft.RotaryEmbedding(past_x, p, cos, sin)"
    tables = {"cos": (9, 8), "sin": (9, 8)}
    yield case(op, "b h * *, b *, * *, * * -> b h * *", x, y, nodes, "batch", p=p, **tables)
    op = "com.microsoft.MRotaryEmbedding"
    x, y = "float[2, 3, 96] past_x", "float[2, 3, 96] present_y"
    nodes = f"present_y = {op}<num_heads=6, mrope_section=[2, 3, 3]>(past_x, p, cos, sin)"
    text = "b * (h d), * b *, * *, * * -> b * (h d); pin d"
    yield case(op, text, x, y, nodes, p=np.stack([p, p + 1, p + 2]), **tables)


def recurrences() -> Iterator[OpCase]:
    """Linear attention: 6 heads with keys of size 8 and values of size 4, and what goes with it."""
    for op, opset in (("LinearAttention", 27), ("com.microsoft.LinearAttention", 21)):
        x = "float[2, 3, 48] past_q, float[2, 3, 48] past_x, float[2, 3, 24] past_z, float[2, 6, 8, 4] past_s"
        y = "float[2, 3, 24] present_y, float[2, 6, 8, 4] present_s"
        nodes = f'present_y, present_s = {op}<q_num_heads=6, kv_num_heads=6, update_rule="linear">'
        text = "b * (kv g d), b * (kv d), b * (kv e), b (kv) d e -> b * (kv g e), b (kv) d e; pin d e"
        arguments = "(past_q, past_x, past_z, past_s)"
        yield case(op, text, x, y, nodes + arguments, "linear", opset=opset, runs=opset == 21)
        x = x.replace("24] past_z", "12] past_z").replace("48] past_x", "24] past_x").replace("6, 8, 4", "3, 8, 4")
        y = y.replace("6, 8, 4", "3, 8, 4")
        nodes = f"d = Neg(r) g = Exp(d) b = Sigmoid(past_b) present_y, present_s = {op}<q_num_heads=6, kv_num_heads=3>"
        x += ", float[2, 3, 3] past_b"
        text = (
            "b * (kv g d), b * (kv d), b * (kv e), b (kv) d e, b * (kv{}), b * {} -> b * (kv g e), b (kv) d e; pin d e"
        )
        arguments, r = "(past_q, past_x, past_z, past_s, d, b)", positive(2, 3, 3)
        found = text.format("", "(kv)").replace("(kv)}", "(kv)")
        yield case(op, found, x, y, nodes + arguments, "gated delta", r=r, opset=opset, runs=opset == 21)
        x, r = x.replace("3] past_b", "1] past_b"), positive(2, 3, 24)
        found = text.format(" d", "1")
        yield case(op, found, x, y, nodes + arguments, "decay of keys", r=r, opset=opset, runs=opset == 21)
    x = "float[2, 3, 24] past_q, float[2, 3, 24] past_x, float[2, 3, 24] past_z, float[2, 6, 8, 4] past_s"
    y = "float[2, 3, 24] present_y, float[2, 6, 8, 4] present_s"
    nodes = f'present_y, present_s = {op}<q_num_heads=3, kv_num_heads=6, update_rule="linear">'
    text = "b * (kv d), b * (kv d), b * (kv g e), b (kv g) d e -> b * (kv g e), b (kv g) d e; pin d e"
    yield case(op, text, x, y, nodes + "(past_q, past_x, past_z, past_s)", "more values than queries")
    op = "com.microsoft.LinearAttentionGate"
    x, y = "float[2, 3, 6] past_a, float[2, 3, 6] past_b", "float[2, 3, 6] present_d, float[2, 3, 6] present_b"
    nodes = f"present_d, present_b = {op}(past_a, c, s, past_b)"
    yield case(op, "a b h, h, h, a b h -> a b h, a b h", x, y, nodes, c=(6,), s=(6,))
    op = "com.microsoft.GatedRMSNorm"
    x, y = "float[2, 3, 24] past_x, float[2, 3, 24] past_z", "float[2, 3, 24] present_y"
    nodes, text = f"present_y = {op}(past_x, s, past_z)", "r0 r1 (h c), c, r0 r1 (h c) -> r0 r1 (h c); pin c"
    yield case(op, text, x, y, nodes, s=(4,))


def gated_delta_nets() -> Iterator[OpCase]:
    """Onnxruntime's GatedDeltaNet: 3 query heads of size 8, 6 value heads of size 4, in tokens."""
    op = "com.microsoft.GatedDeltaNet"
    x = "float[6, 3, 8] past_q, float[6, 3, 8] past_x, float[6, 6, 4] past_z, float[2, 6, 4, 8] past_s"
    y = "float[6, 6, 4] present_y, float[2, 6, 4, 8] present_s"
    nodes = f"d = Neg(r) b = Sigmoid(past_b) present_y, present_s = {op}(past_q, past_x, past_z, , d, b, past_s)"
    text = "* q d, * q d, * (q g) e, _, * (q g), * (q g), * (q g) e d -> * (q g) e, * (q g) e d; pin d e"
    x += ", float[6, 6] past_b"
    yield case(op, text, x, y, nodes, "apart", r=positive(6, 6))
    x = "float[6, 72] past_q, float[2, 6, 4, 8] past_s, float[6, 6] past_b, float[6, 6] past_d"
    activations = 'gate_activation="softplus", beta_activation="sigmoid", qk_l2_norm=1'
    nodes = f"present_y, present_s = {op}<{activations}>(past_q, , , , past_d, past_b, past_s, a, t)"
    text = "* [q d|q d|q g e], _, _, _, * (q g), * (q g), * (q g) e d, (q g), (q g) -> * (q g) e, * (q g) e d; pin d e"
    yield case(op, text, x, y, nodes, "packed", a=(6,), t=(6,))


def causal_convolutions() -> Iterator[OpCase]:
    """Convolutions that carry the last positions along."""
    for op, opset in (("CausalConvWithState", 27), ("com.microsoft.CausalConvWithState", 21)):
        x, y = "float[2, 6, 5] past_x, float[2, 6, 3] past_s", "float[2, 6, 5] present_y, float[2, 6, 3] present_s"
        nodes = f'present_y, present_s = {op}<activation="silu">(past_x, w, c, past_s)'
        text, weights = "b c *, c * *, c, b c * -> b c *, b c *", {"w": (6, 1, 4), "c": (6,)}
        yield case(op, text, x, y, nodes, opset=opset, runs=opset == 21, **weights)
    nodes, text = f"present_y, present_s = {op}(past_x, w)", "b c *, c * * -> b c *, b c *"
    yield case(op, text, x.partition(", float")[0], y, nodes, "from the start", w=(6, 1, 4))
    x, y = "float[2, 5, 6] past_x, float[2, 3, 6] past_s", "float[2, 5, 6] present_y, float[2, 3, 6] present_s"
    nodes, text = (
        f"present_y, present_s = {op}<channels_last=1>(past_x, w, , past_s)",
        "b * c, c * *, _, b * c -> b * c, b * c",
    )
    yield case(op, text, x, y, nodes, "channels last", w=(6, 1, 4))


def quantized_experts() -> Iterator[OpCase]:
    """QMoE: 4 experts, 2 of them used, of inner size 96 and hidden size 32."""
    op, x = "com.microsoft.QMoE", "float[3, 32] past_x, float[3, 4] past_r"
    y = "float[3, 32] y"
    weights = {"a": codes(4, 96, 16), "s": positive(4, 96), "b": codes(4, 32, 48), "t": positive(4, 32), "c": (4, 32)}
    nodes = f'y = {op}<k=2, activation_type="silu">(past_x, past_r, a, s, , b, t, c)'
    text = "a *, (a) *, * (k u v w) *, * (k u v w), _, * * (k u v), * *, * * -> a *; reduce k; pin u v w"
    yield case(op, text, x, y, nodes, "rows", **weights)
    weights = {"a": codes(4, 192, 16), "s": positive(4, 192, 2), "b": codes(4, 32, 48), "t": positive(4, 32, 6)}
    nodes = f'y = {op}<k=2, activation_type="swiglu", swiglu_fusion=1, block_size=16>(past_x, past_r, a, s, d, b, t, c)'
    text = "a *, (a) *, * (k u v w s) *, * (k u v w s) *, * (k u v w s), * * (k u v), * * (k u), * * -> a *"
    text += "; reduce k; pin s u v w"
    yield case(op, text, x, y, nodes, "blocks", c=(4, 32), d=(4, 192), **weights)
    points = {"z": codes(4, 192, 1), "p": codes(4, 32, 3)}
    nodes = nodes.replace("s, d, b, t, c)", "s, , b, t, , , , , z, p)")
    text = "a *, (a) *, * (k u v w s) *, * (k u v w s) *, _, * * (k u v), * * (k u), _, _, _, _, * (k u v w s) *, * * k"
    yield case(op, text + " -> a *; reduce k; pin s u v w", x, y, nodes, "zero points", **weights, **points)
    op, x = "com.microsoft.MoEGroupRouter", "float[6, 8] past_x"
    nodes, text = f"present_y = {op}<top_k=2, n_group=4, topk_group=2, group_topk=1>(past_x, b)", "a *, * -> (a) *"
    yield case(op, text, x, "float[6, 8] present_y", nodes, b=(8,))


def hyper_connections() -> Iterator[OpCase]:
    """3 or 4 streams of 5 features, for 6 tokens."""
    op, y = "com.microsoft.HyperConnectionPreMix", "float[6, 5] present_y"
    yield case(
        op, "ra c h, ra c -> ra h; reduce c", "float[6, 3, 5] past_x", y, f"present_y = {op}(past_x, g)", g=(6, 3)
    )
    nodes = f"present_y = {op}<num_branches=4>(past_x, past_g)"
    x = "float[6, 20] past_x, float[6, 4] past_g"
    yield case(op, "ra (c h), ra c -> ra h; reduce c", x, y, nodes, "side by side")
    x = "float[6, 20] past_x, float[6, 20] past_g"
    yield case(op, "ra (c h), ra (c h) -> ra h; pin c", x, y, nodes, "side by side, and their gates")
    op, y = "com.microsoft.HyperConnectionPostMix", "float[6, 3, 5] present_y"
    x = "float[6, 3, 5] past_x, float[6, 5] past_z, float[6, 3, 1] past_g"
    yield case(op, "ra c h, ra h, ra c 1 -> ra c h", x, y, f"present_y = {op}(past_x, past_z, past_g)")
    x, y = "float[6, 15] past_x, float[6, 5] past_z, float[6, 3] past_g", "float[6, 15] present_y"
    nodes = f"present_y = {op}<num_branches=3>(past_x, past_z, past_g)"
    yield case(op, "ra (c h), ra h, ra c -> ra (c h)", x, y, nodes, "side by side")
    nodes = f"present_y = {op}<num_branches=3>(past_x, past_z, past_g, past_m)"
    text = "ra (c h), ra h, ra c, ra c c -> ra (c h); pin c"
    yield case(op, text, f"{x}, float[6, 3, 3] past_m", y, nodes, "with a matrix")
    op, y = "com.microsoft.EngramGate", "float[2, 3, 6, 5] present_y, float[2, 3, 6, 5] present_z"
    x = "float[2, 3, 6, 5] past_k, float[2, 3, 6, 5] past_x, float[2, 3, 5] past_v"
    nodes, scales = f"present_y, present_z = {op}(past_k, past_x, past_v, k, q, s)", dict.fromkeys("kqs", (6, 5))
    text = "b s c *, b s c *, b s *, c *, c *, c * -> b s c *, b s c *"
    yield case(op, text, x, y, nodes, **scales)


GROUPS = (
    attentions,
    standard_attentions,
    packed_attentions,
    heads_attentions,
    recurrences,
    gated_delta_nets,
    causal_convolutions,
    experts,
    quantized_experts,
    hyper_connections,
)
