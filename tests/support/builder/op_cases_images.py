"""Cases of convolutions, pools, and what else works on images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.support.builder.op_case import OpCase, case, codes, ints, number, positive


def convolutions() -> Iterator[OpCase]:
    """Conv and its kin: all channels, groups of them, and each alone."""
    text = "b (g i) * *, (g o) i * *, (g o) -> b (g o) * *; reduce i"
    x, y, nodes = "float[2, 3, 8, 8] past_x", "float[2, 5, 3, 3] y", "y = Conv<strides=[3, 3]>(past_x, w, b)"
    yield case("Conv", text, x, y, nodes, w=(5, 3, 2, 2), b=(5,))
    x, y, nodes = "float[2, 6, 8] past_x", "float[2, 9, 7] y", "y = Conv<group=3>(past_x, w, b)"
    yield case("Conv", text.replace(" * *", " *"), x, y, nodes, "groups", w=(9, 2, 2), b=(9,))
    text = "b (g i) *, (g o) i * -> b (g o) *; reduce i"
    x, y, nodes = "float[2, 6, 8] past_x", "float[2, 6, 8] y", "y = Conv<group=6, pads=[2, 0]>(past_x, w)"
    yield case("Conv", text, x, y, nodes, "depthwise", w=(6, 1, 3))
    x, y, nodes = "float[2, 3, 8] past_x", "float[2, 6, 7] y", "y = Conv<group=3>(past_x, w)"
    yield case("Conv", text, x, y, nodes, "depthwise, two of each", w=(6, 1, 2))
    text = "b (g i) *, (g i) o *, (g o) -> b (g o) *; reduce i"
    x, y, nodes = "float[2, 3, 8] past_x", "float[2, 5, 17] y", "y = ConvTranspose<strides=[2]>(past_x, w, b)"
    yield case("ConvTranspose", text, x, y, nodes, w=(3, 5, 3), b=(5,))
    x, y, nodes = "float[2, 6, 8] past_x", "float[2, 9, 9] y", "y = ConvTranspose<group=3>(past_x, w, b)"
    yield case("ConvTranspose", text, x, y, nodes, "groups", w=(6, 3, 2), b=(9,))
    op, text = "com.microsoft.FusedConv", "b * *, (g o) * *, (g o) -> b (g o) *"
    x, y = "float[2, 3, 8] past_x", "float[2, 6, 7] present_y"
    nodes = f'present_y = {op}<activation="Relu">(past_x, w, b)'
    yield case(op, text, x, y, nodes, w=(6, 3, 2), b=(6,))
    text = "b (g i) *, (g o) i *, (g o), b (g o) * -> b (g o) *; pin i"
    x = "float[2, 6, 8] past_x, float[2, 9, 7] past_z"
    nodes, y = f'present_y = {op}<activation="Relu", group=3>(past_x, w, b, past_z)', "float[2, 9, 7] present_y"
    yield case(op, text, x, y, nodes, "groups", w=(9, 2, 2), b=(9,))


def quantized_convolutions() -> Iterator[OpCase]:
    """Convolutions of codes."""
    zero, seven = np.array(0, dtype=np.uint8), np.array(7, dtype=np.uint8)
    text = "b (g i) *, (g o) i * -> b (g o) *; reduce i"
    x, y, w = "uint8[2, 6, 8] past_x", "int32[2, 9, 7] y", codes(9, 6, 2)
    yield case("ConvInteger", text, x, y, "y = ConvInteger(past_x, w)", w=w)
    nodes, text = "y = ConvInteger<group=3>(past_x, w, z, p)", "b (g i) *, (g o) i *, ,  -> b (g o) *; reduce i"
    yield case("ConvInteger", text, x, y, nodes, "groups", w=codes(9, 2, 2), z=seven, p=seven)
    scales = {"s": number(0.1), "z": zero, "t": positive(9) + 0.01, "p": np.full(9, 7, np.uint8)}
    arguments = "past_x, s, z, w, t, p, u, o, b"
    text = "b * *, , , (g o) * *, (g o), (g o), , , (g o) -> b (g o) *"
    extra = {"u": number(0.5), "o": seven, "b": np.arange(9, dtype=np.int32) * 100}
    y = "uint8[2, 9, 7] present_y"
    yield case("QLinearConv", text, x, y, f"present_y = QLinearConv({arguments})", w=w, **scales, **extra)
    text = "b (g i) *, , , (g o) i *, (g o), (g o), , , (g o) -> b (g o) *; pin i"
    nodes = f"present_y = QLinearConv<group=3>({arguments})"
    scales["p"] = np.zeros(9, np.uint8)
    yield case("QLinearConv", text, x, y, nodes, "groups", w=codes(9, 2, 2), **scales, **extra)


def pools() -> Iterator[OpCase]:
    """Pools, and ops that move or make pixels."""
    x, y = "float[2, 6, 8, 8] past_x", "float[2, 6, 4, 4] present_y"
    for op in ("AveragePool", "MaxPool", "LpPool"):
        nodes = f"present_y = {op}<kernel_shape=[2, 2], strides=[2, 2]>(past_x)"
        yield case(op, "b c * * -> b c * *", x, y, nodes)
    outputs = f"{y}, int64[2, 6, 4, 4] present_i"
    nodes = "present_y, present_i = MaxPool<kernel_shape=[2, 2], strides=[2, 2]>(past_x)"
    yield case("MaxPool", "* * * * -> * * * *, * * * *", x, outputs, nodes, "with positions")
    for op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"):
        yield case(op, "b c * * -> b c * *", x, "float[2, 6, 1, 1] present_y", f"present_y = {op}(past_x)")
    y = "float[2, 6, 16, 4] present_y"
    nodes, twice = "present_y = Resize(past_x, , scales)", np.array([1, 1, 2, 0.5], dtype=np.float32)
    yield case("Resize", "a b * *, _, * -> a b * *", x, y, nodes, scales=twice)
    nodes = 'present_y = Resize<mode="cubic">(past_x, , , sizes)'
    yield case("Resize", "a b * *, _, _, * -> a b * *", x, y, nodes, "to a size", sizes=ints(2, 6, 16, 4))
    nodes = "present_y = Upsample(past_x, scales)"
    y, twice = "float[2, 6, 16, 16] present_y", np.array([1, 1, 2, 2], dtype=np.float32)
    yield case("Upsample", "a b * *, * -> a b * *", x, y, nodes, scales=twice, opset=9)
    x, y = "float[2, 12, 3, 5] past_x", "float[2, 3, 6, 10] present_y"
    text, back = "b (p q c) h w -> b c (h p) (w q); pin p q", "b c (h p) (w q) -> b (p q c) h w; pin p q"
    yield case("DepthToSpace", text, x, y, "present_y = DepthToSpace<blocksize=2>(past_x)")
    nodes = 'present_y = DepthToSpace<blocksize=2, mode="CRD">(past_x)'
    yield case("DepthToSpace", text.replace("p q c", "c p q"), x, y, nodes, "columns first")
    x, y = "float[2, 3, 6, 10] past_x", "float[2, 12, 3, 5] present_y"
    yield case("SpaceToDepth", back, x, y, "present_y = SpaceToDepth<blocksize=2>(past_x)")


def channel_norms() -> Iterator[OpCase]:
    """Norms of channels and of groups of them."""
    x, y, weights = "float[2, 6, 4, 4] past_x", "float[2, 6, 4, 4] present_y", {"s": (6,), "b": (6,)}
    nodes = "present_y = BatchNormalization(past_x, s, b, m, v)"
    yield case(
        "BatchNormalization", "b c xa xb, c, c, c, c -> b c xa xb", x, y, nodes, **weights, m=(6,), v=positive(6)
    )
    nodes = "present_y = InstanceNormalization(past_x, s, b)"
    yield case("InstanceNormalization", "b c * *, c, c -> b c * *", x, y, nodes, **weights)
    nodes = "present_y = GroupNormalization<num_groups=3>(past_x, s, b)"
    text = "b (g c) * *, (g c), (g c) -> b (g c) * *; pin c"
    yield case("GroupNormalization", text, x, y, nodes, **weights)
    text = "b (g c) * *, g, g -> b (g c) * *; pin c"
    yield case("GroupNormalization", text, x, y, nodes, "opset 18", opset=18, s=(3,), b=(3,))
    yield case("LRN", "b * xa xb -> b * xa xb", x, y, "present_y = LRN<size=3>(past_x)")
    nodes = "present_y = MeanVarianceNormalization(past_x)"
    yield case("MeanVarianceNormalization", "* b * * -> * b * *", x, y, nodes)


GROUPS = (convolutions, quantized_convolutions, pools, channel_norms)
