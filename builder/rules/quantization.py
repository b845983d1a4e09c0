"""Block-quantised weights: MatMulNBits and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from furiosa_llm.builder.rule import Rule
from furiosa_llm.builder.rules.registry import (
    MICROSOFT,
    NodeView,
    rule,
    shape_rule,
    spell,
    standard_shape,
    whole,
    words,
)
from furiosa_llm.builder.shapes import Fact, attributes_of


@rule("MatMulNBits", domain=MICROSOFT)
def matmul_nbits(view: NodeView) -> Rule:
    """`n` output columns; the contraction is (blocks, block), and neither a block nor a byte is ever cut."""
    bits, block = int(view.attribute("bits", 4)), int(view.attribute("block_size"))
    size, columns = int(view.attribute("K")), int(view.attribute("N"))
    if view.has(4):
        return whole(view, note="MatMulNBits with g_idx: replicated")
    blocks = -(-size // block)
    packed = view.has(3) and view.fact(3).dtype is ir.DataType.UINT8 and bits < 8
    per_byte = 8 // bits if packed else 1
    rows = words(view.rank(0) - 1)
    if size % block or blocks % per_byte:  # the last block, or the last byte of a row, is used in part
        contraction, groups, points, clause = "*", "r", "t", "pin r t" if packed else "pin r"
        sizes = {"r": blocks, "t": -(-blocks // per_byte)}
    else:
        contraction, groups, points, clause = "(k u w)", "k u", "k", "reduce k u; pin u w"
        sizes = {"k": blocks // per_byte, "u": per_byte, "w": block}
    if not packed:
        points = groups
    operands: list[list[str] | None] = [[*rows, contraction], ["n", f"({groups})", "*"], _per_group(view, 2, groups)]
    operands.append(_per_group(view, 3, points) if view.has(3) else None)
    operands += [None, ["n"] if view.has(5) else None]
    return Rule(
        text=f"{spell(*operands[: len(view.node.inputs)])} -> {spell([*rows, 'n'])}; {clause}",
        sizes={"n": columns, **sizes},
        masked=(5,) if view.has(5) else (),
        attributes={"N": "n"} if contraction == "*" else {"N": "n", "K": "k u w"},
        padding="product",
        padding_ports=(0, 2),
    )


def _per_group(view: NodeView, port: int, groups: str) -> list[str]:
    """Scales or zero points: `[n, groups]`, or flat."""
    return ["n", f"({groups})"] if view.rank(port) == 2 else [f"(n {groups})"]


@shape_rule("MatMulNBits")
def _matmul_nbits_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> list[tuple[ir.DataType, tuple[int, ...]]]:
    data = inputs[0]
    assert data is not None
    return [(data.dtype, (*data.shape[:-1], attributes_of(node)["N"]))]


@rule("DequantizeLinear")
def dequantize(view: NodeView) -> Rule:
    """Data dimensions pass; scales run along one axis, by elements or by blocks that are never cut."""
    return _dequantize(view)


@rule("DequantizeLinear", domain=MICROSOFT)
def dequantize_microsoft(view: NodeView) -> Rule:
    """Onnxruntime's op for codes that ONNX did not have."""
    return _dequantize(view)


shape_rule("DequantizeLinear")(standard_shape("DequantizeLinear"))
shape_rule("QuantizeLinear")(standard_shape("QuantizeLinear"))


def _dequantize(view: NodeView) -> Rule:
    data = words(view.rank(0))
    out, scale = list(data), list(data)
    clause, sizes = "", {}
    block = int(view.attribute("block_size", 0))
    axis = int(view.attribute("axis", 1)) % len(data) if data else 0
    if not block:
        scale = [] if view.rank(1) == 0 else ["1"] if view.shape(1) == (1,) else [data[axis]]
    elif view.shape(0)[axis] % block:
        data[axis] = out[axis] = scale[axis] = "*"
    else:
        data[axis] = out[axis] = "(q w)"
        scale[axis] = "q"
        clause, sizes = "; pin w", {"q": view.shape(1)[axis], "w": block}
    text = f"{spell(data, *[scale] * (len(view.node.inputs) - 1))} -> {spell(out)}{clause}"
    # Zero is not a zero of the data if it has a zero point, but it is one wherever the scale is zero.
    ports = (1,) if view.has(2) else (0, 1)
    return Rule(text=text, sizes=sizes, padding="product", padding_ports=ports)
