"""Small graphs of one layer in the forms that other exporters and onnxruntime's optimizer give: planned, split, run.

Each is what one family of models comes to: its collectives are those of the plan by hand, and the split model gives
what the unsplit one gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest

from furiosa_llm.builder.plan.mesh import mesh_of
from furiosa_llm.builder.plan.plan import Planning
from furiosa_llm.builder.shapes.interface import SizeSet
from tests.support.builder.graphs import Array, model, random
from tests.support.builder.op_case import codes, ints, number, positive
from tests.support.builder.plans import prepare_proto

PREFILL = SizeSet(batch=2, sequence=5, past=0, encoder=6, others=(7,) * 8)
DECODE = SizeSet(batch=2, sequence=1, past=6, encoder=6, others=(7,) * 8)
X, Y = "float[batch, sequence, 32] x", "float[batch, sequence, 32] y"
CACHE = "float[batch, {kv}, past, 8] past_k, float[batch, {kv}, past, 8] past_v"
PRESENT = "float[batch, {kv}, total, 8] present_k, float[batch, {kv}, total, 8] present_v"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A layer, and the collectives of its plan by hand."""

    inputs: str
    outputs: str
    nodes: str
    weights: Mapping[str, Array | tuple[int, ...]]
    collectives: tuple[int, int]
    """AllReduce and AllGather."""
    opset: int = 21
    sizes: tuple[SizeSet, ...] = (PREFILL, DECODE)
    tolerance: float = 1e-5


def scaled(*shape: int, seed: int = 0) -> Array:
    """A weight that keeps activations about as large as they are."""
    return np.asarray(random(*shape, seed=seed) / np.sqrt(shape[-2]), dtype=np.float32)


MICROSOFT_BERT = Family(
    inputs="int64[batch, sequence] token_ids, int64[batch, sequence] attention_mask",
    outputs=Y,
    nodes="""
        ids64 = Mod(token_ids, vocab) ids = Cast<to=6>(ids64) mask = Cast<to=6>(attention_mask)
        e, n = com.microsoft.EmbedLayerNormalization<epsilon=0.00001>(ids, , words, places, , g, b)
        a = com.microsoft.Attention<num_heads=8>(e, wqkv, bqkv, mask)
        o = MatMul(a, wo)
        r = com.microsoft.SkipLayerNormalization<epsilon=0.00001>(o, e, g, b, bo)
        u = MatMul(r, w1) h = com.microsoft.BiasGelu(u, b1) d = MatMul(h, w2)
        y = com.microsoft.SkipLayerNormalization<epsilon=0.00001>(d, r, g, b, b2)
    """,
    weights={
        "vocab": np.array(50), "words": (50, 32), "places": (16, 32), "g": (32,), "b": (32,), "bo": (32,), "b2": (32,),
        "wqkv": scaled(32, 96), "bqkv": (96,), "wo": scaled(32, 32), "w1": scaled(32, 64), "b1": (64,),
        "w2": scaled(64, 32),
    },
    collectives=(2, 1),
    sizes=(PREFILL,),
)  # fmt: skip
"""The tables are split by columns: gathering the sum of their rows once carries half of what adding it up would."""

QUANTIZED_BERT = Family(
    inputs=X,
    outputs=Y,
    nodes="""
        q, s, z = DynamicQuantizeLinear(x)
        a = com.microsoft.QAttention<num_heads=8>(q, wqkv, bqkv, s, sqkv, , z, zero)
        o = com.microsoft.DynamicQuantizeMatMul(a, wo, so, , bo) r = Add(o, x)
        u = com.microsoft.DynamicQuantizeMatMul(r, w1, s1, , b1) h = com.microsoft.FastGelu(u)
        d = com.microsoft.DynamicQuantizeMatMul(h, w2, s2) y = Add(d, r)
    """,
    weights={
        "wqkv": codes(32, 96).view(np.int8), "bqkv": (96,), "sqkv": number(0.002), "zero": np.array(0, np.int8),
        "wo": codes(32, 32).view(np.int8), "so": number(0.002), "bo": (32,), "s1": positive(64) / 10, "b1": (64,),
        "w1": codes(32, 64).view(np.int8), "w2": codes(64, 32).view(np.int8), "s2": number(0.002),
    },
    collectives=(2, 2),
    sizes=(PREFILL,),
)  # fmt: skip
"""Each sum has a gathering in front of it, for the scale over all activations."""

DYNAMIC_INTEGERS = Family(
    inputs=X,
    outputs=Y,
    nodes="""
        q, s, z = DynamicQuantizeLinear(x) i = MatMulInteger(q, w1, z, zero) f = Cast<to=1>(i)
        t = Mul(s, s1) u = Mul(f, t) h = Relu(u)
        p, a, c = DynamicQuantizeLinear(h) j = MatMulInteger(p, w2, c, zero) g = Cast<to=1>(j)
        v = Mul(a, s2) d = Mul(g, v) y = Add(d, x)
    """,
    weights={
        "w1": codes(32, 64).view(np.int8), "s1": positive(64) / 10, "zero": np.array(0, np.int8),
        "w2": codes(64, 32).view(np.int8), "s2": number(0.002),
    },
    collectives=(1, 1),
    sizes=(PREFILL,),
)  # fmt: skip

WHISPER = Family(
    inputs="float[batch, 8, frames] x, float[batch, past, 32] other",
    outputs="float[batch, length, 32] y",
    nodes="""
        c1 = Conv<pads=[1, 1]>(x, k1, b1) a1 = com.microsoft.Gelu(c1)
        c2 = Conv<pads=[1, 1], strides=[2]>(a1, k2, b2) a2 = com.microsoft.Gelu(c2)
        t = Transpose<perm=[0, 2, 1]>(a2) n = LayerNormalization(t, g, b)
        q = MatMul(n, wq) k = MatMul(n, wk) v = MatMul(n, wv)
        m = com.microsoft.MultiHeadAttention<num_heads=8>(q, k, v, bqkv) o = MatMul(m, wo) r = Add(o, t)
        z = LayerNormalization(r, g, b) u = MatMul(z, w1) h = com.microsoft.Gelu(u) d = MatMul(h, w2) y = Add(d, r)
    """,
    weights={
        "k1": scaled(32, 8, 3), "b1": (32,), "k2": scaled(32, 32, 3), "b2": (32,), "g": (32,), "b": (32,),
        "wq": scaled(32, 32, seed=1), "wk": scaled(32, 32, seed=2), "wv": scaled(32, 32, seed=3), "bqkv": (96,),
        "wo": scaled(32, 32, seed=4), "w1": scaled(32, 128), "w2": scaled(128, 32),
    },
    collectives=(3, 0),
    sizes=(PREFILL,),
)  # fmt: skip
"""The first convolution is split by output channels, the second by input channels: one sum for both."""

CACHED_HEADS = Family(
    inputs=f"{X}, {CACHE.format(kv=8)}, float[1, 8, sequence, total] bias",
    outputs=f"{Y}, {PRESENT.format(kv=8)}",
    nodes="""
        q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
        a, present_k, present_v = com.microsoft.MultiHeadAttention<num_heads=8>(q, k, v, , , , past_k, past_v)
        o = MatMul(a, wo) y = Add(o, x)
    """,
    weights={
        "wq": scaled(32, 64, seed=1), "wk": scaled(32, 64, seed=2), "wv": scaled(32, 64, seed=3), "wo": scaled(64, 32),
    },
    collectives=(1, 0),
)  # fmt: skip

PACKED_CACHE = Family(
    inputs=f"{X}, float[2, batch, 8, past, 4] past_c",
    outputs=f"{Y}, float[2, batch, 8, total, 4] present_c",
    nodes="""
        a, present_c = com.microsoft.Attention<num_heads=8, unidirectional=1>(x, wqkv, bqkv, , past_c)
        o = MatMul(a, wo) y = Add(o, x)
    """,
    weights={"wqkv": scaled(32, 96), "bqkv": (96,), "wo": scaled(32, 32)},
    collectives=(1, 0),
)

LINEAR_ATTENTION = Family(
    inputs=f"{X}, float[batch, 112, 3] past_c, float[batch, 8, 4, 6] past_s",
    outputs=f"{Y}, float[batch, 112, 3] present_c, float[batch, 8, 4, 6] present_s",
    nodes="""
        i = MatMul(x, wi) t = Transpose<perm=[0, 2, 1]>(i)
        c, present_c = com.microsoft.CausalConvWithState<activation="silu">(t, k, kb, past_c)
        j = Transpose<perm=[0, 2, 1]>(c) q, l, v = Split<axis=2>(j, parts)
        da = MatMul(x, wa) ba = MatMul(x, wb) decay, beta = com.microsoft.LinearAttentionGate(da, dt, scale, ba)
        a, present_s = com.microsoft.LinearAttention<q_num_heads=8, kv_num_heads=8>(q, l, v, past_s, decay, beta)
        z = MatMul(x, wz) n = com.microsoft.GatedRMSNorm(a, gn, z) o = MatMul(n, wo) y = Add(o, x)
    """,
    weights={
        "wi": scaled(32, 112), "k": (112, 1, 4), "kb": (112,), "parts": ints(32, 32, 48), "wa": scaled(32, 8, seed=1),
        "wb": scaled(32, 8, seed=2), "dt": (8,), "scale": -positive(8), "wz": scaled(32, 48), "gn": (6,),
        "wo": scaled(48, 32),
    },
    collectives=(1, 0),
)  # fmt: skip
"""One convolution over the channels of queries, keys and values side by side, as Gated DeltaNet has it."""

QUANTIZED_EXPERTS = Family(
    inputs=X,
    outputs=Y,
    nodes="""
        rows = Reshape(x, flat) r = MatMul(rows, wr) e = com.microsoft.QMoE<k=2, activation_type="swiglu",
            swiglu_fusion=1, block_size=16, normalize_routing_weights=1>(x, r, a, s, c, b, t, d)
        y = Add(e, x)
    """,
    weights={
        "flat": ints(-1, 32), "wr": scaled(32, 4), "a": codes(4, 256, 16), "s": positive(4, 256, 2) / 10,
        "c": (4, 256), "b": codes(4, 32, 64), "t": positive(4, 32, 8) / 10, "d": (4, 32),
    },
    collectives=(1, 0),
    sizes=(PREFILL,),
)  # fmt: skip

IMAGE_STEM = Family(
    inputs="float[batch, 3, 16, 16] x",
    outputs="float[batch, 10] y",
    nodes="""
        c = Conv<strides=[2, 2], pads=[1, 1, 1, 1]>(x, k1) n = BatchNormalization(c, s, b, m, v) a = Relu(n)
        w = Conv<group=32, pads=[1, 1, 1, 1]>(a, k2) g = GroupNormalization<num_groups=16>(w, s, b)
        h = HardSwish(g) p = Conv(h, k3) r = Relu(p) l = Conv(r, k4) q = Add(l, c)
        t = GlobalAveragePool(q) f = Flatten(t) y = Gemm(f, wf, bf)
    """,
    weights={
        "k1": scaled(32, 3, 3, 3), "s": (32,), "b": (32,), "m": (32,), "v": positive(32) + 0.1,
        "k2": scaled(32, 1, 3, 3), "k3": scaled(512, 32, 1, 1) / 6, "k4": scaled(32, 512, 1, 1) / 22,
        "wf": scaled(32, 10), "bf": (10,),
    },
    collectives=(1, 0),
    sizes=(PREFILL,),
)  # fmt: skip
"""What is wide is split, as other activations here are larger than their weights."""

EINSUM_ATTENTION = Family(
    inputs=X,
    outputs=Y,
    nodes="""
        q = Einsum<equation="...c,chd->...hd">(x, wq) k = Einsum<equation="bsc,chd->bshd">(x, wk)
        v = Einsum<equation="bsc,chd->bshd">(x, wv) s = Einsum<equation="bqhd,bkhd->bhqk">(q, k) p = Softmax(s)
        a = Einsum<equation="bhqk,bkhd->bqhd">(p, v) o = Einsum<equation="bqhd,hdc->bqc">(a, wo) y = Add(o, x)
    """,
    weights={"wq": (32, 8, 4), "wk": (32, 8, 4), "wv": (32, 8, 4), "wo": (8, 4, 32)},
    collectives=(1, 0),
    sizes=(PREFILL,),
)

LATENT_ATTENTION = Family(
    inputs=f"{X}, float[batch, past, 20] past_c",
    outputs=f"{Y}, float[batch, total, 20] present_c",
    nodes="""
        q = MatMul(x, wq) q4 = Reshape(q, heads) qt = Transpose<perm=[0, 2, 1, 3]>(q4)
        l = MatMul(x, wc) present_c = Concat<axis=1>(past_c, l) latent, rope = Split<axis=2>(present_c, parts)
        n = RMSNormalization(latent, g) u = MatMul(n, wu) u4 = Reshape(u, values)
        ut = Transpose<perm=[0, 2, 1, 3]>(u4) nope, v = Split<axis=3>(ut, halves)
        r4 = Unsqueeze(rope, one) sizes = Shape(nope) three = Slice(sizes, zero, three_)
        all = Concat<axis=0>(three, four) re = Expand(r4, all) k = Concat<axis=3>(nope, re)
        kt = Transpose<perm=[0, 1, 3, 2]>(k)
        s = MatMul(qt, kt) p = Softmax(s) a = MatMul(p, v) at = Transpose<perm=[0, 2, 1, 3]>(a)
        f = Reshape(at, flat) o = MatMul(f, wo) y = Add(o, x)
    """,
    weights={
        "wq": scaled(32, 96), "heads": ints(0, 0, 8, 12), "wc": scaled(32, 20), "parts": ints(16, 4), "g": (16,),
        "wu": scaled(16, 128), "values": ints(0, 0, 8, 16), "halves": ints(8, 8), "one": ints(1), "zero": ints(0),
        "three_": ints(3), "four": ints(4), "flat": ints(0, 0, 64), "wo": scaled(64, 32),
    },
    collectives=(1, 0),
    opset=23,
)  # fmt: skip
"""Keys and values of all heads come from one latent vector, which is the cache and stays whole."""

CACHE_IN_PLACE = Family(
    inputs=f"{X}, int64[batch] lengths, float[batch, 8, 16, 8] past_k, float[batch, 8, 16, 8] past_v",
    outputs=f"{Y}, float[batch, 8, 16, 8] present_k, float[batch, 8, 16, 8] present_v",
    nodes="""
        q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
        q4 = Reshape(q, heads) qt = Transpose<perm=[0, 2, 1, 3]>(q4)
        k4 = Reshape(k, heads) kt = Transpose<perm=[0, 2, 1, 3]>(k4)
        v4 = Reshape(v, heads) vt = Transpose<perm=[0, 2, 1, 3]>(v4)
        at = Abs(lengths) ends = Add(at, four)
        present_k = TensorScatter<axis=2>(past_k, kt, at) present_v = TensorScatter<axis=2>(past_v, vt, at)
        a = Attention(qt, present_k, present_v, , , , ends) b = Transpose<perm=[0, 2, 1, 3]>(a)
        f = Reshape(b, flat) o = MatMul(f, wo) y = Add(o, x)
    """,
    weights={
        "wq": scaled(32, 64, seed=1), "wk": scaled(32, 64, seed=2), "wv": scaled(32, 64, seed=3), "wo": scaled(64, 32),
        "heads": ints(0, 0, 8, 8), "flat": ints(0, 0, 64), "four": np.array(4),
    },
    collectives=(1, 0),
    opset=24,
)  # fmt: skip

TILED_QUERIES = Family(
    inputs=X,
    outputs=Y,
    nodes="""
        q = MatMul(x, wq) q4 = Reshape(q, heads) qt = Transpose<perm=[0, 2, 1, 3]>(q4)
        k = MatMul(x, wk) k5 = Reshape(k, pairs) kp = Transpose<perm=[0, 2, 3, 4, 1]>(k5) kr = Tile(kp, four)
        kt = Reshape(kr, keys) s = MatMul(qt, kt) p = Softmax(s)
        v = MatMul(x, wv) v5 = Reshape(v, pairs) vp = Transpose<perm=[0, 2, 3, 1, 4]>(v5) vr = Tile(vp, four)
        vt = Reshape(vr, values) a = MatMul(p, vt) at = Transpose<perm=[0, 2, 1, 3]>(a) f = Reshape(at, flat)
        o = MatMul(f, wo) y = Add(o, x)
    """,
    weights={
        "wq": scaled(32, 64, seed=1), "wk": scaled(32, 16, seed=2), "wv": scaled(32, 16, seed=3), "wo": scaled(64, 32),
        "heads": ints(0, 0, 8, 8), "pairs": ints(0, 0, 2, 1, 8), "four": ints(1, 1, 4, 1, 1), "flat": ints(0, 0, 64),
        "keys": ints(0, 8, 8, -1), "values": ints(0, 8, -1, 8),
    },
    collectives=(1, 0),
    sizes=(PREFILL,),
)  # fmt: skip
"""Two key heads are repeated by Tile for four query heads each: the repeats are split where ranks are more than two."""

FAMILIES = {
    "BERT as onnxruntime fuses it": MICROSOFT_BERT,
    "BERT as onnxruntime quantises it": QUANTIZED_BERT,
    "dynamic integers": DYNAMIC_INTEGERS,
    "Whisper's encoder": WHISPER,
    "MultiHeadAttention with a cache": CACHED_HEADS,
    "Attention with a cache": PACKED_CACHE,
    "linear attention behind a convolution": LINEAR_ATTENTION,
    "quantised experts": QUANTIZED_EXPERTS,
    "an image's stem": IMAGE_STEM,
    "attention by Einsum": EINSUM_ATTENTION,
    "latent attention": LATENT_ATTENTION,
    "a cache in place": CACHE_IN_PLACE,
    "queries that share keys by Tile": TILED_QUERIES,
}


@pytest.mark.parametrize("tp", [4, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_planned_model_is_right_and_its_collectives_are_those_by_hand(name: str, tp: int) -> None:
    family = FAMILIES[name]
    proto = model(family.inputs, family.outputs, family.nodes, family.weights, opset=family.opset)
    prepared = prepare_proto(proto, simplified=True)
    mesh = mesh_of(tp)
    plan = Planning(prepared.analysis, prepared.states, prepared.probes).plan(mesh)
    kinds = [collective.kind for collective in plan.outcome.collectives]
    split = prepared.split(mesh, plan.assignment, plan.outcome)
    for sizes in family.sizes:
        assert prepared.greatest_error(split, sizes) < family.tolerance
    assert (kinds.count("AllReduce"), kinds.count("AllGather")) == family.collectives
