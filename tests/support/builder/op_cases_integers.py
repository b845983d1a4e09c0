"""Cases of quantised weights and of integer arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.support.builder.op_case import Array, OpCase, X, case, codes, number, positive


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
    clause = "reduce x; pin u w"
    text = f"a b x<k u w>, n (k u) *, n (k u) -> a b n; {clause}"
    yield product("short block", text, "q, s", 56, q=q, s=s)
    text = f"a b x<k u w>, n (k u) *, (n k u), (n k) -> a b n; {clause}"
    yield product("short block flat", text, "q, s, z", 60, q=q, s=s.reshape(-1), z=codes(12))
    text = f"a b x<k u w>, n g<k u> *, (n g), n (k) -> a b n; {clause}"
    flat = s[:, :3].reshape(-1)
    yield product("half a byte", text, "q, s, z", 48, q=codes(6, 3, 8), s=flat, z=codes(6, 2))
    text = f"a b x<k u w>, n g<k u> *, n g<k u>, n (k), _, n -> a b n; {clause}"
    weights: dict[str, Any] = {"q": codes(6, 5, 8), "s": positive(6, 5), "z": codes(6, 3), "b": (6,)}
    yield product("short block and half a byte", text, "q, s, z, , b", 70, **weights)
    text = f"a b x<k u w>, n (k u) *, n (k u), n (k u) -> a b n; {clause}"
    weights = {"q": codes(6, 3, 16), "s": positive(6, 3), "z": codes(6, 3)}
    yield product("short block of eight bits", text, "q, s, z", 40, 8, **weights)
    text = f"a b x<k u w>, n (k u) *, n (k u) -> a b n; {clause}"
    yield product("less than a block", text, "q, s", 12, q=codes(6, 1, 8), s=positive(6, 1))
    text = f"a b x<k u w>, n g<k u> *, n g<k u>, n (k) -> a b n; {clause}"
    weights = {"q": codes(6, 2, 4), "s": positive(6, 2), "z": codes(6, 1)}
    yield product("half of the only byte", text, "q, s, z", 32, 2, **weights)

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
    text = "a x<q w>, a q, a q -> a x<q w>; pin w"
    nodes = nodes.replace("block_size=2", "block_size=4")
    weights = {"q": signed, "s": positive(6, 3), "z": signed[:, :3].copy()}
    yield case("DequantizeLinear", text, x, "float[6, 6] y", nodes, "short block", **weights)
    text, nodes = text.replace(", a q, a q", ", a q"), nodes.replace(", z)", ")")
    del weights["z"]
    yield case("DequantizeLinear", text, x, "float[6, 6] y", nodes, "short block around zero", **weights)
    text = "v *, ia ib, v * -> ia ib *; lookup v"
    nodes = "y = com.microsoft.GatherBlockQuantized<block_size=16, bits=4>(q, index, s)"
    x, y = "int64[2, 3] index", "float[2, 3, 32] y"
    yield case("com.microsoft.GatherBlockQuantized", text, x, y, nodes, q=codes(10, 16), s=positive(10, 2))
    y = y.replace("32", "24")
    yield case(
        "com.microsoft.GatherBlockQuantized", text, x, y, nodes, "short block", q=codes(10, 12), s=positive(10, 2)
    )


def integer_products() -> Iterator[OpCase]:
    """Products of codes, with zero points and without."""
    x, w = "uint8[6, 10] past_x", codes(10, 7)
    zero, seven, many = (np.array(v, dtype=np.uint8) for v in (0, 7, np.arange(7)))
    text, y = "m k, k n -> m n; reduce k", "int32[6, 7] y"
    yield case("MatMulInteger", text, x, y, "y = MatMulInteger(past_x, w)", w=w)
    nodes = "y = MatMulInteger(past_x, w, z, p)"
    text = "m k, k n, ,  -> m n; reduce k"
    yield case("MatMulInteger", text, x, y, nodes, "zero points", w=w, z=seven, p=seven)
    yield case("MatMulInteger", text, x, y, nodes, "zero points that are zero", w=w, z=seven, p=zero)
    text = "m k, k n, , n -> m n; reduce k"
    yield case("MatMulInteger", text, x, y, nodes, "zero points of columns", w=w, z=seven, p=many)
    op, scales = "com.microsoft.MatMulIntegerToFloat", {"s": number(0.1), "t": positive(7) + 0.01}
    nodes, y = f"y = {op}(past_x, w, s, t, z, p, b)", "float[6, 7] y"
    text = "m k, k n, , n, , n, n -> m n; reduce k"
    yield case(op, text, x, y, nodes, w=w, z=seven, p=many, b=(7,), **scales)
    scales |= {"u": number(5), "o": seven}
    nodes, y = "present_y = QLinearMatMul(past_x, s, z, w, t, p, u, o)", "uint8[6, 7] present_y"
    text = "m *, , , * n, n, n, ,  -> m n"
    yield case("QLinearMatMul", text, x, y, nodes, w=w, z=seven, p=many, **scales)
    op, text = "com.microsoft.QGemm", "m k, , , n k, n, n, n -> m n; reduce k"
    nodes, y = f"y = {op}<transB=1>(past_x, s, z, w, t, p, c)", "float[6, 7] y"
    bias, back = np.arange(7, dtype=np.int32) * 100, np.ascontiguousarray(w.T)
    plain = {key: scales[key] for key in ("s", "t")}
    yield case(op, text, x, y, nodes, w=back, z=seven, p=many, c=bias, **plain)
    nodes, y = f"present_y = {op}(past_x, s, z, w, t, p, , u, o)", "uint8[6, 7] present_y"
    text = "m *, , , * n, n, n, _, ,  -> m n"
    yield case(op, text, x, y, nodes, "rounded", w=w, z=seven, p=many, **scales)
    op, text = "com.microsoft.MatMulBnb4", "a b (k u w), (n k u), (n k) -> a b n; reduce k; pin u w"
    nodes = f"y = {op}<K=64, N=6, block_size=16, quant_type=1>(past_x, q, s)"
    x, y = "float[2, 3, 64] past_x", "float[2, 3, 6] y"
    yield case(op, text, x, y, nodes, q=codes(6 * 32), s=positive(24))
    nodes = f"y = {op}<K=40, N=6, block_size=16, quant_type=1>(past_x, q, s)"
    x = "float[2, 3, 40] past_x"
    yield case(op, "* * *, *, * -> * * *", x, y, nodes, "short block", q=codes(6 * 20), s=positive(15))


def quantizers() -> Iterator[OpCase]:
    """What makes codes, and computes on them."""
    outputs = "uint8[6, 5] present_y, float present_s, uint8 present_z"
    nodes = "present_y, present_s, present_z = DynamicQuantizeLinear(past_x)"
    yield case("DynamicQuantizeLinear", "a b -> a b, , ; full a b", X, outputs, nodes)
    seven, y = np.array(7, dtype=np.uint8), "uint8[6, 5] present_y"
    nodes = "present_y = QuantizeLinear(past_x, s, z)"
    yield case("QuantizeLinear", "a b, ,  -> a b", X, y, nodes, s=number(0.1), z=seven)
    rows, nodes = positive(6) + 0.01, "present_y = QuantizeLinear<axis=0>(past_x, s)"
    yield case("QuantizeLinear", "a b, a -> a b", X, y, nodes, "by row", s=rows)
    x, y = "float[6, 10] past_x", "uint8[6, 10] present_y"
    nodes = "present_y = QuantizeLinear<axis=1, block_size=2>(past_x, s)"
    yield case("QuantizeLinear", "a (q w), a q -> a (q w); pin w", x, y, nodes, "by block", s=positive(6, 5) + 0.01)
    nodes = "present_y = QuantizeLinear<axis=1, block_size=4>(past_x, s)"
    yield case("QuantizeLinear", "a *, a * -> a *", x, y, nodes, "short block", s=positive(6, 3) + 0.01)
    op, nodes = "com.microsoft.QuantizeLinear", "present_y = com.microsoft.QuantizeLinear(past_x, s, z)"
    yield case(op, "a b, ,  -> a b", X, "uint8[6, 5] present_y", nodes, s=number(0.1), z=seven)
    op, nodes = "com.microsoft.DequantizeLinear", "w = com.microsoft.DequantizeLinear(q, s, z) y = MatMul(past_x, w)"
    x = "float[6, 4] past_x"
    yield case(op, "a b, ,  -> a b", x, "float[6, 7] y", nodes, q=codes(4, 7), s=number(0.1), z=seven)
    a, b, y = "uint8[3, 1, 5] past_a", "uint8[6, 5] past_b", "uint8[3, 6, 5] present_y"
    parts = {"s": number(0.5), "z": seven, "t": number(0.2), "o": seven, "u": number(0.6)}
    for op in ("com.microsoft.QLinearAdd", "com.microsoft.QLinearMul"):
        nodes = f"present_y = {op}(past_a, s, z, past_b, t, z, u, o)"
        yield case(op, "a 1 c, , , b c, , , ,  -> a b c", f"{a}, {b}", y, nodes, **parts)
    nodes, op = "c = Cast<to=9>(past_b) present_y = com.microsoft.QLinearWhere(c, past_a, s, z, past_b, t, z, u, o)", ""
    text = "b c, a 1 c, , , b c, , , ,  -> a b c"
    yield case("com.microsoft.QLinearWhere", text, f"{a}, {b}", y, nodes, **parts)
    x, y = "uint8[6, 4, 5] past_x", "uint8[6, 4, 5] present_y"
    parts = {"s": number(0.5), "z": seven, "u": number(0.6), "o": seven}
    for op in ("com.microsoft.QLinearSigmoid", "com.microsoft.QLinearLeakyRelu"):
        yield case(op, "a b c, , , ,  -> a b c", x, y, f"present_y = {op}(past_x, s, z, u, o)", **parts)
    op, parts["u"] = "com.microsoft.QLinearSoftmax", number(1 / 256)
    parts["o"] = np.array(0, dtype=np.uint8)
    nodes = f"present_y = {op}<opset=13, axis=1>(past_x, s, z, u, o)"
    yield case(op, "a * c, , , ,  -> a * c", x, y, nodes, **parts)
    op, x = "com.microsoft.QLinearConcat", "uint8[6, 5] past_x, uint8[6, 3] past_z"
    nodes = f"present_y = {op}<axis=1>(u, o, past_x, s, z, past_z, s, z)"
    text, y = ", , a p0, , , a p1, ,  -> a [p0|p1]", "uint8[6, 8] present_y"
    yield case(op, text, x, y, nodes, **parts)


GROUPS = (quantized, integer_products, quantizers)
