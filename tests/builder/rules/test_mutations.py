"""Rules that are wrong on purpose: the proofs must catch each of them, or they would not catch a real mistake."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from furiosa_llm.builder.errors import ShapeError
from furiosa_llm.builder.rules import OPS
from furiosa_llm.builder.rules.rule import Rule
from tests.builder.plan.test_sweep import PASSES, STOPS
from tests.support.builder.graphs import model
from tests.support.builder.op_cases import CASES
from tests.support.builder.proofs import prove


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A change to the rule of one op, and a model that must show it."""

    op: str
    shown_by: str | Callable[[], onnx.ModelProto]
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the rule."""
    text: tuple[str, str] = ("", "")
    """What to replace in the rule's text, and by what."""

    def apply(self, found: Rule) -> Rule:
        assert self.text[0] in found.text, found.text
        return dataclasses.replace(found, text=found.text.replace(*self.text, 1), **self.changes)

    def model(self) -> onnx.ModelProto:
        if not isinstance(self.shown_by, str):
            return self.shown_by()
        partial = {**PASSES, **STOPS}.get(self.shown_by)
        return partial.model() if partial else next(case for case in CASES if case.name == self.shown_by).model()


def padded_quotient() -> onnx.ModelProto:
    """Three heads, each divided by its norm: padded heads are 0/0 and meet zero weights in the second product."""
    nodes = (
        "h = MatMul(past_x, a) s = Reshape(h, heads) m = ReduceL2(s, last) n = Div(s, m) "
        "f = Reshape(n, flat) y = MatMul(f, b)"
    )
    sizes = {"heads": np.array([4, 3, 2]), "flat": np.array([4, 6]), "last": np.array([-1])}
    return model("float[4, 5] past_x", "float[4, 7] y", nodes, {"a": (5, 6), "b": (6, 7), **sizes})


def square_product() -> onnx.ModelProto:
    return model("float[4, 6] past_x", "float[4, 6] y", "y = MatMul(past_x, w)", {"w": (6, 6)})


def two_products() -> onnx.ModelProto:
    nodes = "p = MatMul(past_x, a) y = MatMul(p, b)"
    return model("float[4, 6] past_x", "float[4, 3] y", nodes, {"a": (6, 5), "b": (5, 3)})


def offset_product() -> onnx.ModelProto:
    """A contraction of 10 over four ranks: the padding's codes of 0 are not zeros, but less than zero by 7."""
    weights = {"w": np.random.default_rng(0).integers(0, 256, (10, 6), dtype=np.uint8), "z": np.array(7, np.uint8)}
    return model("uint8[4, 10] past_x", "int32[4, 6] y", "y = MatMulInteger(past_x, w, z, z)", weights)


def squares_of_a_sum() -> onnx.ModelProto:
    nodes = "p = MatMul(past_x, w) y = ReduceSumSquare(p, one)"
    return model("float[4, 6] past_x", "float[4, 1] y", nodes, {"w": (6, 5), "one": np.array([1])})


MUTATIONS = {
    "MatMul forgets that it contracts": Mutation("MatMul", "MatMul by a matrix", text=("; reduce k", "")),
    "MatMul takes rows for columns": Mutation("MatMul", square_product, text=("k n", "n k")),
    "MatMul is jointly linear": Mutation("MatMul", two_products, {"linear": (0, 1), "bilinear": False}),
    "Softmax does not need its axis": Mutation("Softmax", "Softmax", text=("a * c -> a * c", "a b c -> a b c")),
    "Softmax passes partial sums on": Mutation("Softmax", "Softmax", {"linear": (0,)}),
    "Relu passes partial sums on": Mutation("Relu", "Relu", {"linear": (0,)}),
    "every rank adds the bias": Mutation("Gemm", "Gemm 00", {"masked": ()}),
    "every rank adds the experts' bias": Mutation("com.microsoft.MoE", "com.microsoft.MoE interleaved", {"masked": ()}),
    "swiglu pairs may be cut": Mutation(
        "com.microsoft.MoE", "com.microsoft.MoE interleaved", text=("(i u) *, * (i u)", "(u i) *, * (u i)")
    ),
    "heads may be cut": Mutation(
        "com.microsoft.GroupQueryAttention", "com.microsoft.GroupQueryAttention apart", text=("; pin d", "")
    ),
    "key heads may be told nothing": Mutation(
        "com.microsoft.GroupQueryAttention", "com.microsoft.GroupQueryAttention apart", {"attributes": {}}
    ),
    "groups come before key heads": Mutation("Attention", "Attention of heads", text=("(kv g)", "(g kv)")),
    "rotary pairs may be cut": Mutation("RotaryEmbedding", "RotaryEmbedding packed", text=("; pin d", "")),
    "Split keeps its sizes": Mutation("Split", "Split", {"shape_operands": ()}),
    "Slice keeps its bounds": Mutation("Slice", "Slice", {"shape_operands": ()}),
    "Reshape keeps its target": Mutation("Reshape", "Reshape ones", {"shape_operands": ()}),
    "Expand keeps its target": Mutation("Expand", "Expand", {"shape_operands": ()}),
    "Concat takes its axis for one dimension": Mutation("Concat", "Concat", text=("[p0|p1]", "p0")),
    "Gather looks up anything": Mutation("Gather", "Gather table", text=("; lookup a", "")),
    "Gather may be cut on its axis": Mutation("Gather", "Gather", text=("a *", "a b")),
    "ReduceSum forgets that it contracts": Mutation("ReduceSum", "ReduceSum", text=("; reduce b", "")),
    "ReduceMean adds up means": Mutation("ReduceMean", "ReduceMean", {"average": False}),
    "LayerNormalization of a part": Mutation("LayerNormalization", "LayerNormalization", text=("a b *", "a b c")),
    "CumSum of a part": Mutation("CumSum", "CumSum", text=("a * c,  -> a * c", "a b c,  -> a b c")),
    "quantised blocks may be cut": Mutation(
        "DequantizeLinear",
        "DequantizeLinear by block",
        text=("a (q w), a q, a q -> a (q w); pin w", "a b, a *, a * -> a b"),
    ),
    "bytes may be cut": Mutation(
        "com.microsoft.MatMulNBits", "com.microsoft.MatMulNBits zero points and bias", text=("pin u w", "pin w")
    ),
    "MatMulNBits keeps K": Mutation(
        "com.microsoft.MatMulNBits", "com.microsoft.MatMulNBits symmetric", {"attributes": {"N": "n"}}
    ),
    "MatMulNBits with a short block is cut anywhere": Mutation(
        "com.microsoft.MatMulNBits",
        "com.microsoft.MatMulNBits short block",
        text=("x<k u w>, n (k u) *, n (k u) -> a b n; reduce x; pin u w", "x, n k *, n k -> a b n; reduce x; pin k"),
    ),
    "MatMulNBits with a short block cuts it": Mutation(
        "com.microsoft.MatMulNBits", "com.microsoft.MatMulNBits short block", text=("pin u w", "pin u")
    ),
    "MatMulNBits with a short block keeps K": Mutation(
        "com.microsoft.MatMulNBits", "com.microsoft.MatMulNBits short block", {"attributes": {"N": "n"}}
    ),
    "half a byte of zero points is cut off": Mutation(
        "com.microsoft.MatMulNBits", "com.microsoft.MatMulNBits half a byte", text=("pin u w", "pin w")
    ),
    "the short block of DequantizeLinear is cut": Mutation(
        "DequantizeLinear",
        "DequantizeLinear short block",
        text=("x<q w>, a q, a q -> a x<q w>; pin w", "b, a *, a * -> a b"),
    ),
    "Mul of two partial sums is one": Mutation("Mul", "Mul of two", {"linear": (0, 1), "bilinear": False}),
    "Add counts constants once on every rank": Mutation("Add", "Add a constant", {"linear": (), "bilinear": True}),
    "Einsum sums whole": Mutation("Einsum", "Einsum scores", text=("; reduce d", "")),
    "Einsum takes a diagonal in parts": Mutation("Einsum", "Einsum diagonal", text=("* * k -> k *", "i j k -> k i")),
    "Tile repeats elements": Mutation("Tile", "Tile", text=("(r1 b)", "(b r1)")),
    "Tile keeps its repeats": Mutation("Tile", "Tile of one", {"shape_operands": ()}),
    "Pad with a number is linear": Mutation("Pad", "Pad with ones", {"linear": (0,)}),
    "TensorScatter writes at places of others": Mutation(
        "TensorScatter", "TensorScatter", text=("a b * d, a ->", "a b * d, * ->")
    ),
    "Conv keeps its groups": Mutation("Conv", "Conv groups", {"attributes": {}}),
    "Conv groups come last": Mutation("Conv", "Conv groups", text=("(g i) *, (g o)", "(i g) *, (o g)")),
    "ConvTranspose adds its bias on every rank": Mutation("ConvTranspose", "ConvTranspose groups", {"masked": ()}),
    "blocks of pixels may be cut": Mutation("DepthToSpace", "DepthToSpace", text=("; pin p q", "")),
    "pixels come in rows": Mutation("DepthToSpace", "DepthToSpace", text=("(p q c)", "(c p q)")),
    "GroupNormalization of part of a group": Mutation("GroupNormalization", "GroupNormalization", text=("; pin c", "")),
    "GroupNormalization keeps its groups": Mutation("GroupNormalization", "GroupNormalization", {"attributes": {}}),
    "codes are scaled by parts": Mutation("DynamicQuantizeLinear", "DynamicQuantizeLinear", text=("; full a b", "")),
    "zero points add nothing": Mutation("MatMulInteger", offset_product, {"offset": (), "padding_ports": (0, 1)}),
    "QLinearMatMul rounds parts": Mutation(
        "QLinearMatMul",
        "QLinearMatMul",
        text=("m *, , , * n, n, n, ,  -> m n", "m k, , , k n, n, n, ,  -> m n; reduce k"),
    ),
    "MatMulBnb4 cuts bytes": Mutation(
        "com.microsoft.MatMulBnb4", "com.microsoft.MatMulBnb4", text=("; pin u w", "; pin w")
    ),
    "Attention contracts in front of its softmax": Mutation(
        "com.microsoft.Attention", "com.microsoft.Attention", text=("b * *, * [h d|h d|h e]", "b * c, c [h d|h d|h e]")
    ),
    "Attention keeps its sizes": Mutation(
        "com.microsoft.Attention", "com.microsoft.Attention other values", {"attributes": {"num_heads": "h"}}
    ),
    "Attention packs values first": Mutation(
        "com.microsoft.Attention",
        "com.microsoft.Attention other values",
        text=("* [h d|h d|h e], [h d|h d|h e]", "* [h e|h d|h d], [h e|h d|h d]"),
    ),
    "MultiHeadAttention keeps its heads": Mutation(
        "com.microsoft.MultiHeadAttention", "com.microsoft.MultiHeadAttention apart", {"attributes": {}}
    ),
    "lengths of all sequences": Mutation(
        "com.microsoft.GroupQueryAttention", "com.microsoft.GroupQueryAttention batch", text=("d, b,  ->", "d, *,  ->")
    ),
    "valid keys of all sequences": Mutation("Attention", "Attention lengths", text=("_, b ->", "_, * ->")),
    "places of all sequences": Mutation(
        "com.microsoft.RotaryEmbedding", "com.microsoft.RotaryEmbedding batch", text=("b *, * *", "* *, * *")
    ),
    "linear attention cuts keys": Mutation(
        "com.microsoft.LinearAttention", "com.microsoft.LinearAttention linear", text=("; pin d e", "; pin e")
    ),
    "linear attention keeps its heads": Mutation(
        "com.microsoft.LinearAttention",
        "com.microsoft.LinearAttention gated delta",
        {"attributes": {"q_num_heads": "kv g"}},
    ),
    "gates of keys are gates of heads": Mutation(
        "com.microsoft.LinearAttention",
        "com.microsoft.LinearAttention decay of keys",
        text=("b * (kv d), b * 1", "b * (d kv), b * 1"),
    ),
    "GatedDeltaNet has its values first": Mutation(
        "com.microsoft.GatedDeltaNet", "com.microsoft.GatedDeltaNet packed", text=("[q d|q d|q g e]", "[q g e|q d|q d]")
    ),
    "channels of a convolution mix": Mutation(
        "com.microsoft.CausalConvWithState",
        "com.microsoft.CausalConvWithState",
        text=("b c *, c * *, c", "b c *, * * *, *"),
    ),
    "GatedRMSNorm of part of a group": Mutation(
        "com.microsoft.GatedRMSNorm", "com.microsoft.GatedRMSNorm", text=("; pin c", "")
    ),
    "every rank adds the quantised experts' bias": Mutation(
        "com.microsoft.QMoE", "com.microsoft.QMoE blocks", {"masked": ()}
    ),
    "quantised experts cut blocks": Mutation(
        "com.microsoft.QMoE", "com.microsoft.QMoE blocks", text=("pin s u v w", "pin s u w")
    ),
    "quantised pairs lie behind each other": Mutation(
        "com.microsoft.QMoE",
        "com.microsoft.QMoE blocks",
        text=("(k u v w s) *, * (k u v w s)", "(s k u v w) *, * (s k u v w)"),
    ),
    "features lie before the streams": Mutation(
        "com.microsoft.HyperConnectionPreMix",
        "com.microsoft.HyperConnectionPreMix side by side",
        text=("(c h)", "(h c)"),
    ),
    "ReduceSumSquare is linear": Mutation("ReduceSumSquare", squares_of_a_sum, {"linear": (0,)}),
    "padding may be divided by": Mutation("Div", padded_quotient, {"divisor": None}),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_wrong_rule_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation = MUTATIONS[name]
    domain, _, op_type = mutation.op.rpartition(".")
    right = OPS[domain, op_type].rule
    assert right is not None
    wrong_rule = dataclasses.replace(OPS[domain, op_type], rule=lambda view: mutation.apply(right(view)))
    monkeypatch.setitem(OPS, (domain, op_type), wrong_rule)
    try:
        wrong = bool(prove(mutation.model(), until_wrong=True).wrong)
    except (AssertionError, ShapeError, Fail, InvalidArgument, RuntimeError, RuntimeException):
        wrong = True
    assert wrong, "every plan gave the right result"


@pytest.mark.parametrize("name", [name for name, mutation in MUTATIONS.items() if callable(mutation.shown_by)])
def test_right_rule_is_not(name: str) -> None:
    """The other mutations are shown by cases that are proved elsewhere with the right rule."""
    assert prove(MUTATIONS[name].model()).wrong == ()
