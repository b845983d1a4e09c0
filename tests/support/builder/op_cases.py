"""For every op with a rule: small models with that op in them, and the rule's text there."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.support.builder import op_cases_fused, op_cases_images, op_cases_integers
from tests.support.builder.op_case import OpCase, X, Y, case, codes, ints, number


def unary() -> Iterator[OpCase]:
    """Elementwise ops of one input."""
    names = (
        "Abs Asinh Atan Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu Mish Neg "
        "Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Tan Tanh ThresholdedRelu"
    )
    for op in names.split():
        yield case(op, "a b -> a b", X, Y, f"present_y = {op}(past_x)")
    yield case("Swish", "a b -> a b", X, Y, "present_y = Swish(past_x)", opset=24)
    nodes = "e = Exp(past_x) f = Sum(e, one) present_y = Acosh(f)"
    yield case("Acosh", "a b -> a b", X, Y, nodes, one=number(1))
    yield case(
        "CastLike",
        "a b, . . -> a b",
        X,
        "double[6, 5] present_y",
        "present_y = CastLike(past_x, d)",
        d=np.zeros((1, 1)),
    )
    nodes = "present_y = CastLike(past_x, d)"
    yield case("CastLike", "a b, . . . -> a b", X, "double[6, 5] present_y", nodes, "more", d=np.zeros((2, 3, 1)))
    yield case("Dropout", "a b -> a b", X, Y, "present_y = Dropout(past_x)")
    y = "float[6, 5] present_y, bool[6, 5] present_m"
    nodes = "present_y, present_m = Dropout(past_x, half)"
    yield case("Dropout", "a b,  -> a b, a b", X, y, nodes, "with a mask", half=number(0.5))
    nodes = "b = BitCast<to=6>(past_x) present_y = Cast<to=1>(b)"
    yield case("BitCast", "a b -> a b", X, Y, nodes, opset=26)
    for op in ("Acos", "Asin", "Atanh", "Log", "Reciprocal", "Sqrt"):
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
    x = "float[6, 5] past_x, float[6, 5] past_z"
    yield case("SwiGLU", "a b, a b -> a b", x, Y, "present_y = SwiGLU(past_x, past_z)", opset=28, runs=False)
    x = "float[6, 5] past_x, float[6, 5] past_z, float[6, 1] past_g"
    nodes = "present_y = com.microsoft.GatedAdd(past_x, past_z, past_g)"
    yield case("com.microsoft.GatedAdd", "a b, a b, a 1 -> a b", x, Y, nodes)
    nodes = "present_y = com.microsoft.ScaledSiLU<alpha=1.5>(past_x)"
    yield case("com.microsoft.ScaledSiLU", "a b -> a b", X, Y, nodes)
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
    yield case(
        "com.microsoft.TransposeMatMul", text, x, y, nodes.replace("FusedMatMul", "TransposeMatMul"), w=(3, 7, 5)
    )
    nodes = 'y = com.microsoft.FusedGemm<activation="Relu">(past_x, w, b)'
    text = "m *, * n, n -> m n"
    x, y = "float[6, 5] past_x", "float[6, 7] y"
    yield case("com.microsoft.FusedGemm", text, x, y, nodes, w=(5, 7), b=(7,))


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
    x, y = "float[6, 1, 5] past_x", "float[6, 3, 5] present_y"
    yield case("Expand", "a 1 c, * -> a . c", x, y, "present_y = Expand(past_x, t)", "by fewer sizes", t=ints(3, 1))
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
    nodes, x, y = "present_y = Tile(past_x, t)", "float[6, 5] past_x", "float[6, 10] present_y"
    yield case("Tile", "a b, * -> a (r1 b)", x, y, nodes, t=ints(1, 2))
    x, y = "float[3, 1, 5] past_x", "float[3, 6, 5] present_y"
    yield case("Tile", "a 1 c, * -> a . c", x, y, nodes, "of one", t=ints(1, 6, 1))
    nodes = "s = Shape(ids) r = Slice(s, one, two) t = Concat<axis=0>(one, r) present_y = Tile(past_x, t)"
    x, y = "int64[2, sequence] ids, float[6, 5] past_x", "float[6, n] present_y"
    yield case("Tile", "a *, * -> a *", x, y, nodes, "by a dynamic size", one=ints(1), two=ints(2))
    x = y = "float[6, 5, 5] "
    nodes = "present_y = Trilu<upper=0>(past_x, k)"
    yield case("Trilu", "a * *,  -> a * *", x + "past_x", y + "present_y", nodes, k=np.array(1, dtype=np.int64))
    y = "float[6, 8] present_y"
    yield case("Pad", "a *, * -> a *", X, y, "present_y = Pad(past_x, t)", t=ints(0, 1, 0, 2))
    nodes = "present_y = Pad(past_x, t, v, a)"
    yield case("Pad", "a *, *, , * -> a *", X, y, nodes, "an axis", t=ints(1, 2), v=number(0.5), a=ints(-1))
    nodes = 'present_y = Pad<mode="reflect">(past_x, t)'
    yield case("Pad", "a *, * -> a *", X, y, nodes, "reflected", t=ints(0, 1, 0, 2))
    nodes = "present_y = Pad<pads=[0, 1, 0, 2]>(past_x)"
    yield case("Pad", "a * -> a *", X, y, nodes, "opset 10", opset=10)
    nodes = "present_y = com.microsoft.Pad(past_x, t)"
    yield case("com.microsoft.Pad", "a *, * -> a *", X, y, nodes, t=ints(0, 1, 0, 2))
    nodes = "present_y = com.microsoft.ExpandDims(past_x, t)"
    y = "float[6, 1, 5] present_y"
    yield case("com.microsoft.ExpandDims", "a b,  -> a 1 b", X, y, nodes, t=np.array(1, dtype=np.int32))
    x = y = "float[6, 5, 5] "
    nodes = "present_y = com.microsoft.Trilu<upper=0>(past_x)"
    yield case("com.microsoft.Trilu", "a * * -> a * *", x + "past_x", y + "present_y", nodes)
    x, y = "float[5, 5] past_x", "float[5, 5] present_y"
    yield case("EyeLike", "* * -> * *", x, y, "e = EyeLike(past_x) present_y = Add(past_x, e)")
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
    for kind, table in (("uint8", codes(9, 5)), ("int8", codes(9, 5).view(np.int8))):
        nodes, y = "c = Gather(w, index) y = DequantizeLinear(c, s, z)", "float[2, 3, 5] y"
        parts = {"w": table, "s": number(0.1), "z": table[0, 0]}
        yield case("Gather", "a b, ia ib -> ia ib b; lookup a", x, y, nodes, f"table of {kind}", **parts)
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
    nodes = "present_y = Scatter<axis=1>(past_x, i, past_u)"
    yield case("Scatter", text, x, Y, nodes, i=i, opset=10)
    x, y = "float[6, 5, 7] past_x, int64[3, 1] index", "float[3, 5, 7] present_y"
    nodes = "present_y = com.microsoft.GatherND(past_x, index)"
    yield case("com.microsoft.GatherND", "* b c, ia * -> ia b c", x, y, nodes)
    x, y = "float[2, 6, 9, 5] past_x, float[2, 6, 3, 5] past_u", "float[2, 6, 9, 5] present_y"
    nodes, text = "present_y = TensorScatter(past_x, past_u, i)", "a b * d, a b * d, a -> a b * d"
    yield case("TensorScatter", text, x, y, nodes, i=ints(6, 2), opset=24)
    nodes, text = 'present_y = TensorScatter<mode="circular">(past_x, past_u)', "a b * d, a b * d -> a b * d"
    yield case("TensorScatter", text, x, y, nodes, "without places", opset=24)
    nodes, kept = "present_y = Compress<axis=1>(past_x, c)", np.array([True, False, True, False, True])
    yield case("Compress", "a *, * -> a *", X, "float[6, 3] present_y", nodes, c=kept)
    nodes = "present_y = Compress(past_x, c)"
    yield case("Compress", "* *, * -> *", X, "float[3] present_y", nodes, "of all", c=kept)
    x, y = "float[4, 6, 5] past_x", "float[4, 6, 5] present_y"
    nodes = "present_y = ReverseSequence<time_axis=0, batch_axis=1>(past_x, n)"
    yield case("ReverseSequence", "* b c, b -> * b c", x, y, nodes, n=ints(1, 2, 3, 4, 2, 3))
    x, text = "float[6, 5] past_x, float[2, 5] past_u", "* b, * *, * b -> * b"
    yield case("ScatterND", text, x, Y, "present_y = ScatterND(past_x, i, past_u)", i=np.array([[4], [1]]))


def reductions() -> Iterator[OpCase]:
    """Sums, norms and what else looks along an axis."""
    x, kept, dropped = "float[6, 4, 3] past_x", "float[6, 1, 3] present_y", "float[6, 3] present_y"
    for op in ("ReduceSum", "ReduceMean"):
        yield case(op, "a b c, * -> a 1 c; reduce b", x, kept, f"present_y = {op}(past_x, t)", t=ints(-2))
        nodes = f"present_y = {op}<keepdims=0, axes=[1]>(past_x)"
        yield case(op, "a b c -> a c; reduce b", x, dropped, nodes, "opset 11", opset=11)
    y = "float[6, 4, 3] present_y"
    nodes = "present_y = ReduceSum<noop_with_empty_axes=1>(past_x)"
    yield case("ReduceSum", "a b c -> a b c", x, y, nodes, "of no axes")
    y, x8 = "float[1, 1, 1] y", "float[6, 4, 8] past_x"
    yield case("ReduceSum", "a b c -> 1 1 1; reduce a b c", x8, y, "y = ReduceSum(past_x)", "of all axes")
    weights = {"w": (6, 8), "t": ints(0)}
    nodes = "s = ReduceMean<keepdims=0>(w, t) y = Mul(past_x, s)"
    text, x8 = "a b, * -> b; reduce a", "float[3, 8] past_x"
    yield case("ReduceMean", text, x8, "float[3, 8] y", nodes, "of a weight", **weights)
    for op in ("L1", "SumSquare"):
        nodes = f"present_y = Reduce{op}(past_x, t)"
        yield case(f"Reduce{op}", "a b c, * -> a 1 c; reduce b", x, kept, nodes, t=ints(1))
    for op in ("Max", "Min", "Prod", "L2", "LogSumExp"):
        nodes = f"present_y = Reduce{op}(past_x, t)"
        yield case(f"Reduce{op}", "a * c, * -> a 1 c", x, kept, nodes, t=ints(1))
    nodes = "e = Exp(past_x) present_y = ReduceLogSum(e, t)"
    yield case("ReduceLogSum", "a * c, * -> a 1 c", x, kept, nodes, t=ints(1))
    y = "float[6, 4, 3] present_y"
    for op in ("Softmax", "LogSoftmax", "Hardmax"):
        yield case(op, "a * c -> a * c", x, y, f"present_y = {op}<axis=1>(past_x)")
        yield case(op, "a * * -> a * *", x, y, f"present_y = {op}(past_x)", "opset 11", opset=11)
    yield case("LpNormalization", "a * c -> a * c", x, y, "present_y = LpNormalization<axis=1>(past_x)")
    nodes = "present_y = CumSum(past_x, t)"
    yield case("CumSum", "a * c,  -> a * c", x, y, nodes, t=np.array(1, dtype=np.int64))
    nodes = "present_y = CumProd(past_x, t)"
    yield case("CumProd", "a * c,  -> a * c", x, y, nodes, t=np.array(1, dtype=np.int64), opset=26)
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


def einsums() -> Iterator[OpCase]:
    """Equations."""
    both, y = "float[2, 6, 3, 4] past_q, float[2, 6, 7, 4] past_k", "float[2, 6, 3, 7] y"
    nodes = 'y = Einsum<equation="bhqd,bhkd->bhqk">(past_q, past_k)'
    yield case("Einsum", "b h q d, b h k d -> b h q k; reduce d", both, y, nodes, "scores")
    both = "float[2, 3, 6, 4] past_q, float[2, 7, 6, 4] past_k"
    nodes = 'y = Einsum<equation="bqhd, bkhd -> bhqk">(past_q, past_k)'
    yield case("Einsum", "b q h d, b k h d -> b h q k; reduce d", both, y, nodes, "scores of heads inside")
    x, y, w = "float[2, 3, 5] past_x", "float[2, 3, 6, 4] y", (5, 6, 4)
    nodes = 'y = Einsum<equation="...c,chd->...hd">(past_x, w)'
    yield case("Einsum", "e0 e1 c, c h d -> e0 e1 h d; reduce c", x, y, nodes, "projection", w=w)
    x, y = "float[2, 3, 6, 4] past_x", "float[2, 3, 5] y"
    nodes = 'y = Einsum<equation="abhd,hdc">(past_x, w)'
    text = "a b h d, h d c -> a b c; reduce h d"
    yield case("Einsum", text, x, y, nodes, "implicit", w=(6, 4, 5))
    x, y = "float[6, 4, 7] past_x", "float[7, 6] y"
    yield case("Einsum", "i j k -> k i; reduce j", x, y, 'y = Einsum<equation="ijk->ki">(past_x)', "of one")
    x, y = "float[5, 5, 6] past_x", "float[6, 5] present_y"
    yield case("Einsum", "* * k -> k *", x, y, 'present_y = Einsum<equation="iik->ki">(past_x)', "diagonal")
    both, y = "float[3, 1, 5] past_a, float[6, 5, 4] past_b", "float[3, 6, 4] y"
    nodes = 'y = Einsum<equation="...k,...kn->...n">(past_a, past_b)'
    text = "e0 1 k, e1 k n -> e0 e1 n; reduce k"
    yield case("Einsum", text, both, y, nodes, "broadcast", runs=False)
    three, y = "float[6, 4] past_a, float[4, 8] past_b, float[8] past_c", "float[6] y"
    nodes = 'y = Einsum<equation="ij,jk,k->i">(past_a, past_b, past_c)'
    yield case("Einsum", "i j, j k, k -> i; reduce j k", three, y, nodes, "of three")


CASES = tuple(
    found
    for group in (
        unary,
        binary,
        contractions,
        einsums,
        moves,
        indexing,
        reductions,
        norms,
        *op_cases_fused.GROUPS,
        *op_cases_images.GROUPS,
        *op_cases_integers.GROUPS,
    )
    for found in group()
)
