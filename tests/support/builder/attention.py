"""One attention with a cache, written out in small ops, and what may be different about it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from furiosa_llm.builder.factors.probe import Probes
from furiosa_llm.builder.rewrite.fusion import Fusion, fuse_attention
from furiosa_llm.builder.rewrite.normalize import normalize
from furiosa_llm.builder.rewrite.passes import rewrite
from furiosa_llm.builder.source.load import load
from furiosa_llm.builder.source.tensors import read_packed, tensor_of
from tests.support.builder.graphs import model

HEADS, KV, SIZE = 4, 2, 8
VOCAB, HIDDEN = 50, 32
LOWEST = np.finfo(np.float32).min

_MASKS = {
    "causal": "shown = LessOrEqual(key_at, query_at)",
    "sees the next": "reach = Add(query_at, one) shown = LessOrEqual(key_at, reach)",
    "sees all": "shown = LessOrEqual(key_at, total)",
    "window of 3": """
        before = LessOrEqual(key_at, query_at) reach = Sub(query_at, three) near = Greater(key_at, reach)
        shown = And(before, near)""",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """The text of each part; the parts are joined in this order."""

    mask: str = "causal"
    query: str = "q1 = MatMul(x, q_weight)"
    caches: str = "present_key = Concat<axis=2>(past_key, k) present_value = Concat<axis=2>(past_value, v)"
    repeat: str = """
        k5 = Unsqueeze(present_key, axis2) k6 = Expand(k5, groups) k7 = Reshape(k6, heads_first)
        v5 = Unsqueeze(present_value, axis2) v6 = Expand(v5, groups) v7 = Reshape(v6, heads_first)"""
    scores: str = "kt = Transpose<perm=[0, 1, 3, 2]>(k7) raw = MatMul(q, kt) scaled = Mul(raw, scale)"
    biased: str = "biased = Add(scaled, bias)"
    softmax: str = "weights = Softmax<axis=-1>(biased)"
    weighed: str = "weighed = MatMul(weights, v7)"
    outputs: str = ""
    """Further graph outputs."""

    def proto(self) -> onnx.ModelProto:
        """A decoder of one layer; its embedding is large enough for the attention to matter."""
        nodes = f"""
            x = Gather(embedding, input_ids)
            {self.query} q2 = Reshape(q1, inside) q = Transpose<perm=[0, 2, 1, 3]>(q2)
            k1 = MatMul(x, k_weight) k2 = Reshape(k1, inside) k = Transpose<perm=[0, 2, 1, 3]>(k2)
            v1 = MatMul(x, v_weight) v2 = Reshape(v1, inside) v = Transpose<perm=[0, 2, 1, 3]>(v2)
            {self.caches}
            ids_shape = Shape(input_ids) sequence = Gather(ids_shape, one)
            past_shape = Shape(past_key) past = Gather(past_shape, two)
            total = Add(past, sequence)
            query_row = Range(past, total, one) query_at = Unsqueeze(query_row, axis1)
            key_at = Range(zero, total, one)
            {_MASKS[self.mask]}
            kept = Cast<to=9>(attention_mask) kept4 = Unsqueeze(kept, axes12)
            visible = And(shown, kept4) bias = Where(visible, nothing, lowest)
            {self.repeat}
            {self.scores}
            {self.biased}
            {self.softmax}
            {self.weighed}
            back = Transpose<perm=[0, 2, 1, 3]>(weighed) packed = Reshape(back, merged)
            logits = MatMul(packed, head)
        """
        further = f", {self.outputs}" if self.outputs else ""
        cache = f"float[batch, {KV}, past, {SIZE}]"
        present = f"float[batch, {KV}, total, {SIZE}]"
        return model(
            "int64[batch, sequence] input_ids, int64[batch, total] attention_mask, "
            f"{cache} past_key, {cache} past_value",
            f"float[batch, sequence, {VOCAB}] logits, {present} present_key, {present} present_value{further}",
            nodes,
            _WEIGHTS,
            opset=23,
        )


def _ints(*numbers: int) -> np.typing.NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)


_WEIGHTS = {
    "embedding": (VOCAB, HIDDEN),
    "q_weight": (HIDDEN, HEADS * SIZE),
    "k_weight": (HIDDEN, KV * SIZE),
    "v_weight": (HIDDEN, KV * SIZE),
    "head": (HEADS * SIZE, VOCAB),
    "inside": _ints(0, 0, -1, SIZE),
    "merged": _ints(0, 0, HEADS * SIZE),
    "groups": _ints(1, 1, HEADS // KV, 1, 1),
    "heads_first": _ints(0, HEADS, -1, SIZE),
    "rounds": _ints(1, HEADS // KV, 1, 1, 1),
    "minus": _ints(-1),
    "axis1": _ints(1),
    "axis2": _ints(2),
    "axes12": _ints(1, 2),
    "zero": np.array(0, dtype=np.int64),
    "one": np.array(1, dtype=np.int64),
    "two": np.array(2, dtype=np.int64),
    "three": np.array(3, dtype=np.int64),
    "scale": np.float32(0.1),
    "root": np.float32(0.1**0.5),
    "ten": np.float32(10),
    "cap": np.float32(5),
    "scale_by_cap": np.float32(0.02),
    "nothing": np.float32(0),
    "half": np.float32(0.5),
    "lowest": LOWEST,
    "hidden": np.float32(-np.inf),
    "scales": np.linspace(0.1, 0.4, HEADS, dtype=np.float32).reshape(1, HEADS, 1, 1),
    "slopes": np.linspace(0.1, 0.4, HEADS, dtype=np.float32).reshape(1, HEADS, 1, 1),
}


def prepared(path: Path) -> tuple[ir.Model, Probes]:
    """The model at `path` as the pass finds it in a build."""
    found = normalize(load(path))
    return found, rewrite(found, {}, {}, fuse=False).probes


def fused(path: Path) -> tuple[ir.Model, Fusion]:
    """The model at `path` after the pass, and what the pass says of it."""
    found, probes = prepared(path)
    fusion = fuse_attention(found, probes)
    for value in found.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):  # so that a session can be made of the model alone
            value.const_value = tensor_of(value.const_value, read_packed(value.const_value).tobytes())
    return found, fusion
