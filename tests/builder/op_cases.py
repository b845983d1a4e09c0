"""For every op with a rule: small models with that op in them, and the rule's text there.

Inputs named `past...` and outputs named `present...` are states and may be split. Sizes are such that most of them need
padding on two or four ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from tests.builder.graphs import Weights, model, random

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpCase:
    """A model with one node of interest."""

    op: str
    label: str
    text: str
    """The rule's text at the last node with this op."""
    inputs: str
    outputs: str
    nodes: str
    weights: Weights
    opset: int
    runs: bool
    """Whether onnxruntime has a kernel for it."""

    @property
    def name(self) -> str:
        return f"{self.op} {self.label}".strip()

    def model(self) -> onnx.ModelProto:
        return model(self.inputs, self.outputs, self.nodes, self.weights, opset=self.opset)


def case(
    op: str,
    text: str,
    inputs: str,
    outputs: str,
    nodes: str,
    label: str = "",
    /,
    *,
    opset: Any = 21,
    runs: Any = True,
    **weights: Any,
) -> OpCase:
    """A row of the table. `opset` is an int and `runs` a bool; weights are arrays or shapes, by name."""
    return OpCase(
        op=op,
        label=label,
        text=text,
        inputs=inputs,
        outputs=outputs,
        nodes=nodes,
        weights=weights,
        opset=opset,
        runs=runs,
    )


X = "float[6, 5] past_x"
Y = "float[6, 5] present_y"


def number(value: float) -> Array:
    return np.array(value, dtype=np.float32)


def ints(*values: int) -> Array:
    return np.array(values, dtype=np.int64)


def positive(*shape: int) -> Array:
    return np.abs(random(*shape)) / 10


def codes(*shape: int) -> Array:
    """Bytes of packed weights."""
    return np.random.default_rng(list(shape)).integers(0, 256, shape, dtype=np.uint8)


def unary() -> Iterator[OpCase]:
    """Elementwise ops of one input."""
    names = (
        "Abs Atan Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu Mish Neg Relu "
        "Round Selu Sigmoid Sign Sin Sinh Softplus Softsign Tan Tanh ThresholdedRelu"
    )
    for op in names.split():
        yield case(op, "a b -> a b", X, Y, f"present_y = {op}(past_x)")
    yield case("Swish", "a b -> a b", X, Y, "present_y = Swish(past_x)", opset=24)
    for op in ("Acos", "Asin", "Log", "Reciprocal", "Sqrt"):
        yield case(op, "a b -> a b", X, Y, f"s = Sigmoid(past_x) present_y = {op}(s)")
    for op in ("IsInf", "IsNaN"):
        yield case(op, "a b -> a b", X, Y, f"c = {op}(past_x) present_y = Cast<to=1>(c)")
    yield case("Not", "a b -> a b", X, Y, "b = Cast<to=9>(past_x) c = Not(b) present_y = Cast<to=1>(c)")
    yield case("BitwiseNot", "a b -> a b", X, Y, "b = Cast<to=6>(past_x) c = BitwiseNot(b) present_y = Cast<to=1>(c)")
    yield case("Cast", "a b -> a b", X, "double[6, 5] present_y", "present_y = Cast<to=11>(past_x)")
    for op in ("Gelu", "QuickGelu", "FastGelu"):
        yield case(f"com.microsoft.{op}", "a b -> a b", X, Y, f"present_y = com.microsoft.{op}(past_x)")
    nodes = "present_y = com.microsoft.BiasGelu(past_x, b)"
    yield case("com.microsoft.BiasGelu", "a b, b -> a b", X, Y, nodes, b=(5,))


def binary() -> Iterator[OpCase]:
    """Elementwise ops of several inputs, broadcast."""
    both, out = "float[3, 1, 5] past_a, float[6, 5] past_b", "float[3, 6, 5] present_y"
    text = "a 1 c, b c -> a b c"
    for op in ("Add", "Sub", "Mul", "Max", "Mean", "Min", "Sum"):
        yield case(op, text, both, out, f"present_y = {op}(past_a, past_b)")
    yield case("Div", text, both, out, "d = Exp(past_b) present_y = Div(past_a, d)")
    yield case("Mod", text, both, out, "d = Exp(past_b) present_y = Mod<fmod=1>(past_a, d)")
    yield case("PRelu", "a b, b -> a b", X, Y, "present_y = PRelu(past_x, s)", s=(5,))
    yield case("Pow", "a b,  -> a b", X, Y, "present_y = Pow(past_x, two)", two=number(2))
    nodes = "present_y = Clip(past_x, low, high)"
    yield case("Clip", "a b, ,  -> a b", X, Y, nodes, low=number(-0.5), high=number(0.5))
    for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
        yield case(op, text, both, out, f"c = {op}(past_a, past_b) present_y = Cast<to=1>(c)")
    for op in ("And", "Or", "Xor"):
        nodes = f"a = Cast<to=9>(past_a) b = Cast<to=9>(past_b) c = {op}(a, b) present_y = Cast<to=1>(c)"
        yield case(op, text, both, out, nodes)
    for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor"):
        nodes = f"a = Cast<to=6>(past_a) b = Cast<to=6>(past_b) c = {op}(a, b) present_y = Cast<to=1>(c)"
        yield case(op, text, both, out, nodes)
    nodes = "p = Abs(past_a) q = Abs(past_b) a = Cast<to=12>(p) b = Cast<to=12>(q) "
    nodes += 'c = BitShift<direction="LEFT">(a, b) present_y = Cast<to=1>(c)'
    yield case("BitShift", text, both, out, nodes)
    nodes = "c = Greater(past_b, zero) present_y = Where(c, past_a, past_b)"
    yield case("Where", "b c, a 1 c, b c -> a b c", both, out, nodes, zero=number(0))


def contractions() -> Iterator[OpCase]:
    """MatMul and its kin."""
    text = "ba m k, k n -> ba m n; reduce k"
    x, y = "float[6, 3, 5] past_x", "float[6, 3, 7] y"
    yield case("MatMul", text, x, y, "y = MatMul(past_x, w)", "by a matrix", w=(5, 7))
    text = "ba bb m k, bb k n -> ba bb m n; reduce k"
    x, y = "float[2, 3, 4, 6] past_x, float[3, 6, 5] past_z", "float[2, 3, 4, 5] y"
    yield case("MatMul", text, x, y, "y = MatMul(past_x, past_z)", "of activations")
    text = "k, k n -> n; reduce k"
    yield case("MatMul", text, "float[6] past_x", "float[5] y", "y = MatMul(past_x, w)", "of a vector", w=(6, 5))
    for ta, tb in ((0, 0), (1, 0), (0, 1), (1, 1)):
        text = f"{'k m' if ta else 'm k'}, {'n k' if tb else 'k n'}, n -> m n; reduce k"
        x = f"float[{'5, 6' if ta else '6, 5'}] past_x"
        nodes = f"y = Gemm<transA={ta}, transB={tb}, alpha=0.5, beta=2.0>(past_x, w, b)"
        yield case("Gemm", text, x, "float[6, 7] y", nodes, f"{ta}{tb}", w=(7, 5) if tb else (5, 7), b=(7,))
    text = "m k, k n, m 1 -> m n; reduce k"
    yield case("Gemm", text, X, "float[6, 7] y", "y = Gemm(past_x, w, b)", "column bias", w=(5, 7), b=(6, 1))
    text = "ba k m, ba n k -> ba m n; reduce k"
    nodes = "y = com.microsoft.FusedMatMul<transA=1, transB=1, alpha=0.5>(past_x, w)"
    x, y = "float[3, 5, 6] past_x", "float[3, 6, 7] y"
    yield case("com.microsoft.FusedMatMul", text, x, y, nodes, w=(3, 7, 5))
    text = "b c * *, o c * *, o -> b o * *; reduce c"
    nodes = "y = Conv<kernel_shape=[2, 2], strides=[3, 3]>(past_x, w, b)"
    yield case("Conv", text, "float[2, 3, 8, 8] past_x", "float[2, 5, 3, 3] y", nodes, w=(5, 3, 2, 2), b=(5,))
    text = "* * * *, * * * * -> * * * *"
    nodes = "present_y = Conv<kernel_shape=[2, 2], group=4>(past_x, w)"
    x, y = "float[2, 4, 8, 8] past_x", "float[2, 4, 7, 7] present_y"
    yield case("Conv", text, x, y, nodes, "groups", w=(4, 1, 2, 2))


def quantized() -> Iterator[OpCase]:
    """Block-quantised products and tables."""

    def product(
        label: str, text: str, arguments: str, k: int, bits: int = 4, **weights: Array | tuple[int, ...]
    ) -> OpCase:
        nodes = f"y = com.microsoft.MatMulNBits<K={k}, N=6, bits={bits}, block_size=16>(past_x, {arguments})"
        x, y = f"float[2, 3, {k}] past_x", "float[2, 3, 6] y"
        return case("com.microsoft.MatMulNBits", text, x, y, nodes, label, **weights)

    q, s, clause = codes(6, 4, 8), positive(6, 4), "reduce k u; pin u w"
    yield product("symmetric", f"a b (k u w), n (k u) *, n (k u) -> a b n; {clause}", "q, s", 64, q=q, s=s)
    text = f"a b (k u w), n (k u) *, (n k u), (n k) -> a b n; {clause}"
    yield product("flat", text, "q, s, z", 64, q=q, s=s.reshape(-1), z=codes(12))
    text = f"a b (k u w), n (k u) *, n (k u), n (k), _, n -> a b n; {clause}"
    yield product("zero points and bias", text, "q, s, z, , b", 64, q=q, s=s, z=codes(6, 2), b=(6,))
    text = f"a b (k u w), n (k u) *, n (k u), n (k u) -> a b n; {clause}"
    yield product("eight bits", text, "q, s, z", 64, 8, q=codes(6, 4, 16), s=s, z=codes(6, 4))
    yield product("short block", "a b *, n (r) *, n (r) -> a b n; pin r", "q, s", 56, q=q, s=s)
    text = "a b *, n (r) *, (n r), n (t) -> a b n; pin r t"
    flat = s[:, :3].reshape(-1)
    yield product("half a byte", text, "q, s, z", 48, q=codes(6, 3, 8), s=flat, z=codes(6, 2))

    x, y, product_ = "float[6, 10] past_x", "float[6, 10] present_y", "present_y = Mul(past_x, w)"
    signed = codes(6, 10).view(np.int8)
    nodes = f"w = DequantizeLinear(q, s) {product_}"
    yield case("DequantizeLinear", "a b,  -> a b", x, y, nodes, "by one scale", q=signed, s=number(0.1))
    nodes = f"w = DequantizeLinear<axis=0>(q, s, z) {product_}"
    weights = {"q": signed, "s": positive(6), "z": signed[:, 0].copy()}
    yield case("DequantizeLinear", "a b, a, a -> a b", x, y, nodes, "by row", **weights)
    text = "a (q w), a q, a q -> a (q w); pin w"
    nodes = "w = DequantizeLinear<axis=1, block_size=2>(q, s, z) t = Transpose(w) y = MatMul(past_x, t)"
    weights = {"q": signed, "s": positive(6, 5), "z": signed[:, :5].copy()}
    yield case("DequantizeLinear", text, x, "float[6, 6] y", nodes, "by block", **weights)
    nodes = "w = DequantizeLinear<axis=1, block_size=4>(q, s) t = Transpose(w) y = MatMul(past_x, t)"
    yield case(
        "DequantizeLinear", "a *, a * -> a *", x, "float[6, 6] y", nodes, "short block", q=signed, s=positive(6, 3)
    )
    text = "v *, ia ib, v * -> ia ib *; lookup v"
    nodes = "y = com.microsoft.GatherBlockQuantized<block_size=16, bits=4>(q, index, s)"
    x, y = "int64[2, 3] index", "float[2, 3, 32] y"
    yield case("com.microsoft.GatherBlockQuantized", text, x, y, nodes, q=codes(10, 16), s=positive(10, 2))


def moves() -> Iterator[OpCase]:
    """Ops that move data."""
    nodes = "present_y = Reshape(past_x, t)"
    x, y = "float[6, 15] past_x", "float[18, 5] present_y"
    yield case("Reshape", "a (b c), * -> (a b) c", x, y, nodes, t=ints(-1, 5))
    yield case("Reshape", "a b, * -> 1 a 1 b", X, "float[1, 6, 1, 5] present_y", nodes, "ones", t=ints(1, 6, 1, -1))
    x, y = "float[4, 6, 6] past_x", "float[2, 6, 12] present_y"
    text = "* * *, * -> * * *"
    yield case("Reshape", text, x, y, nodes, "copied size", t=ints(2, 0, -1))
    x, y = "float[6, 4] past_x", "float[8, 3] present_y"
    yield case("Reshape", "* *, * -> * *", x, y, nodes, "nothing in common", t=ints(8, 3))
    x, y = "float[6, 3, 5] past_x", "float[6, 15] present_y"
    yield case("Flatten", "a b c -> a (b c)", x, y, "present_y = Flatten(past_x)")
    x = "float[6, 1, 5] past_x"
    yield case("Squeeze", "a 1 b, * -> a b", x, Y, "present_y = Squeeze(past_x, t)", t=ints(1))
    yield case("Squeeze", "a 1 b -> a b", x, Y, "present_y = Squeeze<axes=[1]>(past_x)", "opset 11", opset=11)
    y = "float[6, 1, 5] present_y"
    yield case("Unsqueeze", "a b, * -> a 1 b", X, y, "present_y = Unsqueeze(past_x, t)", t=ints(1))
    yield case("Unsqueeze", "a b -> a 1 b", X, y, "present_y = Unsqueeze<axes=[1]>(past_x)", "opset 11", opset=11)
    x, y = "float[6, 3, 5] past_x", "float[5, 6, 3] present_y"
    yield case("Transpose", "a b c -> c a b", x, y, "present_y = Transpose<perm=[2, 0, 1]>(past_x)")
    x, y = "float[1, 5] past_x", "float[3, 6, 5] present_y"
    yield case("Expand", "1 c, * -> . . c", x, y, "present_y = Expand(past_x, t)", t=ints(3, 6, 1))
    nodes = "c = ConstantOfShape<value=float[1] {2.5}>(t) present_y = Add(past_x, c)"
    yield case("ConstantOfShape", "* -> . .", X, Y, nodes, t=ints(6, 5))
    y = "float[6, 5] present_y, int64[2] s"
    yield case("Shape", ". . -> *", X, y, "s = Shape(past_x) present_y = Exp(past_x)")
    nodes = "s = Shape<start=-1>(past_x) present_y = Exp(past_x)"
    yield case("Shape", ". . -> *", X, "float[6, 5] present_y, int64[1] s", nodes, "part")
    y = "float[6, 5] present_y, int64 s"
    yield case("Size", "* * -> ", X, y, "s = Size(past_x) present_y = Exp(past_x)")
    x, y = "float[6, 5] past_x, float[6, 3] past_z", "float[6, 8] present_y"
    yield case("Concat", "a p0, a p1 -> a [p0|p1]", x, y, "present_y = Concat<axis=-1>(past_x, past_z)")
    x, y = "float[9, 5] past_x", "float[6, 5] present_y, float[3, 5] present_z"
    text = "[p0|p1] b -> p0 b, p1 b"
    nodes = "present_y, present_z = Split<axis=0>(past_x, t)"
    yield case("Split", "[p0|p1] b, * -> p0 b, p1 b", x, y, nodes, t=ints(6, 3))
    nodes = "present_y, present_z = Split<axis=0, split=[6, 3]>(past_x)"
    yield case("Split", text, x, y, nodes, "opset 11", opset=11)
    y = "float[5, 5] present_y, float[4, 5] present_z"
    yield case("Split", text, x, y, "present_y, present_z = Split<axis=0, num_outputs=2>(past_x)", "uneven")
    x = "float[10, 5] past_x"
    nodes = "present_y = Slice(past_x, s, e, a)"
    text = "[x0|y0|z0] b, *, *, * -> y0 b"
    yield case("Slice", text, x, "float[6, 5] present_y", nodes, s=ints(1), e=ints(-3), a=ints(0))
    text, bounds = "[y0|z0] [x1|y1], *, *, * -> y0 y1", {"s": ints(2, 0), "e": ints(2**40, 6), "a": ints(-1, 0)}
    yield case("Slice", text, x, "float[6, 3] present_y", nodes, "two axes", **bounds)
    text, bounds = "* b, *, *, *, * -> * b", {"s": ints(-1), "e": ints(-100), "a": ints(0), "p": ints(-2)}
    y = "float[5, 5] present_y"
    yield case("Slice", text, x, y, "present_y = Slice(past_x, s, e, a, p)", "backwards", **bounds)
    nodes = "present_y = Slice<starts=[2], ends=[8], axes=[0]>(past_x)"
    yield case("Slice", "* * -> * *", x, "float[6, 5] present_y", nodes, "opset 9", opset=9)
    y = "float[6, 10] present_y"
    yield case("Tile", "a *, * -> a *", X, y, "present_y = Tile(past_x, t)", t=ints(1, 2))
    x = y = "float[6, 5, 5] "
    nodes = "present_y = Trilu<upper=0>(past_x, k)"
    yield case("Trilu", "a * *,  -> a * *", x + "past_x", y + "present_y", nodes, k=np.array(1, dtype=np.int64))
    y = "float[6, 8] present_y"
    yield case("Pad", "a *, * -> a *", X, y, "present_y = Pad(past_x, t)", t=ints(0, 1, 0, 2))
    nodes = "r = Range(zero, five, one) present_y = Add(past_x, r)"
    yield case("Range", ", ,  -> *", X, Y, nodes, zero=number(0), five=number(5), one=number(1))
    yield case("NonZero", "* * -> * *", X, "int64[2, n] y", "y = NonZero(past_x)")
    yield from _control_flow()


def _control_flow() -> Iterator[OpCase]:
    """The ops as they are once they are closed: what they capture is among their inputs."""
    flag = f"{X}, bool flag"
    branches = """
        present_y = If(flag) <then_branch = t () => (float[6, 5] a) { a = CumSum(past_x, one) },
                              else_branch = e () => (float[6, 5] b) { b = Neg(past_x) }>
    """
    yield case("furiosa_llm.closure.If", ", * *,  -> * *", flag, Y, branches, one=np.array(1))
    loop = """
        present_y = Loop(three, , past_x) <body = l (int64 i, bool c, float[6, 5] s) => (bool d, float[6, 5] t)
            { d = Identity(c) t = Mul(s, past_x) }>
    """
    yield case("furiosa_llm.closure.Loop", ", _, * *, * * -> * *", X, Y, loop, three=np.array(3))
    scan = """
        last, present_y = Scan<num_scan_inputs = 1, body = l (float[5] s, float[5] r) => (float[5] t, float[5] o)
            { t = Add(s, r) o = Mul(t, r) }>(zeros, past_x)
    """
    zeros = np.zeros(5, np.float32)
    outputs = f"float[5] last, {Y}"
    yield case("furiosa_llm.closure.Scan", "*, * * -> *, * *", X, outputs, scan, zeros=zeros)


def indexing() -> Iterator[OpCase]:
    """Gather and Scatter."""
    x, y = "int64[2, 3] index", "float[2, 3, 5] y"
    yield case("Gather", "a b, ia ib -> ia ib b; lookup a", x, y, "y = Gather(w, index)", "table", w=(9, 5))
    y = "float[5, 2, 3] y"
    yield case("Gather", "a b, ia ib -> a ia ib; lookup b", x, y, "y = Gather<axis=-1>(w, index)", "columns", w=(5, 9))
    y = "float[6, 2] present_y"
    yield case("Gather", "a *, ia -> a ia", X, y, "present_y = Gather<axis=1>(past_x, i)", i=ints(-1, 2))
    x, y = "float[6, 5] past_x, int64[6, 2] index", "float[6, 2] present_y"
    yield case("GatherElements", "a *, a b -> a b", x, y, "present_y = GatherElements<axis=1>(past_x, index)")
    x, y = "float[6, 5, 7] past_x, int64[6, 2, 1] index", "float[6, 2, 7] present_y"
    text = "a * c, a ib * -> a ib c"
    yield case("GatherND", text, x, y, "present_y = GatherND<batch_dims=1>(past_x, index)")
    x = "float[6, 5] past_x, float[6, 2] past_u"
    text, i = "a *, a *, a * -> a *", np.tile(ints(3, 1), (6, 1))
    nodes = "present_y = ScatterElements<axis=1>(past_x, i, past_u)"
    yield case("ScatterElements", text, x, Y, nodes, i=i)
    nodes = 'present_y = ScatterElements<axis=1, reduction="max">(past_x, i, past_u)'
    yield case("ScatterElements", text, x, Y, nodes, "max", i=i)
    x, text = "float[6, 5] past_x, float[2, 5] past_u", "* b, * *, * b -> * b"
    yield case("ScatterND", text, x, Y, "present_y = ScatterND(past_x, i, past_u)", i=np.array([[4], [1]]))


def reductions() -> Iterator[OpCase]:
    """Sums, norms and what else looks along an axis."""
    x, kept, dropped = "float[6, 5, 3] past_x", "float[6, 1, 3] present_y", "float[6, 3] present_y"
    for op in ("ReduceSum", "ReduceMean"):
        yield case(op, "a b c, * -> a 1 c; reduce b", x, kept, f"present_y = {op}(past_x, t)", t=ints(-2))
        nodes = f"present_y = {op}<keepdims=0, axes=[1]>(past_x)"
        yield case(op, "a b c -> a c; reduce b", x, dropped, nodes, "opset 11", opset=11)
    y = "float[6, 5, 3] present_y"
    nodes = "present_y = ReduceSum<noop_with_empty_axes=1>(past_x)"
    yield case("ReduceSum", "a b c -> a b c", x, y, nodes, "of no axes")
    y = "float[1, 1, 1] y"
    yield case("ReduceSum", "a b c -> 1 1 1; reduce a b c", x, y, "y = ReduceSum(past_x)", "of all axes")
    weights = {"w": (6, 8), "t": ints(0)}
    nodes = "s = ReduceMean<keepdims=0>(w, t) y = Mul(past_x, s)"
    text, x8 = "a b, * -> b; reduce a", "float[3, 8] past_x"
    yield case("ReduceMean", text, x8, "float[3, 8] y", nodes, "of a weight", **weights)
    for op in ("Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSumExp"):
        nodes = f"present_y = Reduce{op}(past_x, t)"
        yield case(f"Reduce{op}", "a * c, * -> a 1 c", x, kept, nodes, t=ints(1))
    nodes = "e = Exp(past_x) present_y = ReduceLogSum(e, t)"
    yield case("ReduceLogSum", "a * c, * -> a 1 c", x, kept, nodes, t=ints(1))
    y = "float[6, 5, 3] present_y"
    for op in ("Softmax", "LogSoftmax", "Hardmax"):
        yield case(op, "a * c -> a * c", x, y, f"present_y = {op}<axis=1>(past_x)")
        yield case(op, "a * * -> a * *", x, y, f"present_y = {op}(past_x)", "opset 11", opset=11)
    yield case("LpNormalization", "a * c -> a * c", x, y, "present_y = LpNormalization<axis=1>(past_x)")
    nodes = "present_y = CumSum(past_x, t)"
    yield case("CumSum", "a * c,  -> a * c", x, y, nodes, t=np.array(1, dtype=np.int64))
    outputs, text = "float[6, 2, 3] present_y, int64[6, 2, 3] present_i", "a * c, * -> a * c, a * c"
    yield case("TopK", text, x, outputs, "present_y, present_i = TopK<axis=1>(past_x, k)", k=ints(2))
    for op in ("ArgMax", "ArgMin"):
        outputs, text = "int64[6, 3] present_y", "a * c -> a c"
        yield case(op, text, x, outputs, f"present_y = {op}<axis=1, keepdims=0>(past_x)")
    nodes = "i = Cast<to=7>(past_x) present_y = OneHot<axis=1>(i, depth, values)"
    weights = {"depth": np.array(4, dtype=np.int64), "values": np.array([0, 1], dtype=np.float32)}
    yield case("OneHot", "a b, , * -> a * b", X, "float[6, 4, 5] present_y", nodes, **weights)


def norms() -> Iterator[OpCase]:
    """Fused normalisations."""
    x, y = "float[2, 6, 8] past_x", "float[2, 6, 8] present_y"
    weights = {"g": (8,), "b": (8,)}
    text = "a b *, *, * -> a b *"
    yield case("LayerNormalization", text, x, y, "present_y = LayerNormalization(past_x, g, b)", **weights)
    outputs = f"{y}, float[2, 6, 1] present_m, float[2, 6, 1] present_s"
    nodes = "present_y, present_m, present_s = LayerNormalization(past_x, g, b)"
    text = "a b *, *, * -> a b *, a b 1, a b 1"
    yield case("LayerNormalization", text, x, outputs, nodes, "with statistics", **weights)
    nodes = "present_y = RMSNormalization<axis=1>(past_x, g)"
    yield case("RMSNormalization", "a * *, * * -> a * *", x, y, nodes, opset=23, g=(6, 8))
    nodes = "present_y = SimplifiedLayerNormalization(past_x, g)"
    yield case("SimplifiedLayerNormalization", "a b *, * -> a b *", x, y, nodes, g=(8,))
    both, sum_ = f"{x}, float[2, 6, 8] past_s", f"{y}, float[2, 6, 8] present_sum"
    nodes = "present_y, , , present_sum = com.microsoft.SkipSimplifiedLayerNormalization(past_x, past_s, g, b)"
    op, text = "com.microsoft.SkipSimplifiedLayerNormalization", "a b *, a b *, *, * -> a b *, a b 1, a b 1, a b *"
    yield case(op, text, both, sum_, nodes, **weights)
    nodes = "present_y = com.microsoft.SkipLayerNormalization(past_x, past_s, g, b)"
    op, text = "com.microsoft.SkipLayerNormalization", "a b *, a b *, *, * -> a b *"
    yield case(op, text, both, y, nodes, **weights)


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
    text = f"b * (kv g d), b * (kv d), b * (kv d), {cache}, *,  -> {out}"
    yield case(op, text, x, f"float[1, 2, 96] present_y, {presents}", nodes, "apart", **lengths)
    x = f"float[1, 2, 192] past_x, {state}"
    arguments = 'past_x, "", "", past_k, past_v, last, total, cos, sin'.replace('""', "")
    nodes = f"present_y, present_k, present_v = {op}<{heads}, do_rotary=1>({arguments})"
    text = f"b * [kv g d|kv d|kv d], _, _, {cache}, *, , * *, * * -> {out}"
    yield case(op, text, x, f"float[1, 2, 96] present_y, {presents}", nodes, "packed", **lengths, **rotary)
    arguments += ", , , sink"
    nodes = f"present_y, present_k, present_v = {op}<{heads}, do_rotary=1, softcap=5.0>({arguments})"
    text = f"b * [kv g d|kv d|kv d], _, _, {cache}, *, , * *, * *, _, _, (kv g) -> {out}"
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

    cos = {"cos": (1, 2, 8), "sin": (1, 2, 8)}
    x, y = "float[1, 6, 2, 16] past_x", "float[1, 6, 2, 16] present_y"
    nodes = "present_y = RotaryEmbedding(past_x, cos, sin)"
    yield case("RotaryEmbedding", "b h * *, * * *, * * * -> b h * *", x, y, nodes, opset=23, **cos)
    x, y = "float[1, 2, 96] past_x", "float[1, 2, 96] present_y"
    nodes = "present_y = RotaryEmbedding<num_heads=6>(past_x, cos, sin)"
    text = "b * (h d), * * *, * * * -> b * (h d); pin d"
    yield case("RotaryEmbedding", text, x, y, nodes, "packed", opset=23, **cos)
    op = "com.microsoft.RotaryEmbedding"
    nodes, text = f"present_y = {op}<num_heads=6>(past_x, p, cos, sin)", "b * (h d), * *, * *, * * -> b * (h d); pin d"
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


CASES = tuple(
    found
    for group in (
        unary,
        binary,
        contractions,
        quantized,
        moves,
        indexing,
        reductions,
        norms,
        attentions,
        experts,
    )
    for found in group()
)
