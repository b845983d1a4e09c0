"""Block-quantised weights: MatMulNBits and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from furiosa_llm.builder.rule import Rule
from furiosa_llm.builder.rules.registry import MICROSOFT, NodeView, rule, shape_rule, spell, whole, words
from furiosa_llm.builder.shapes import Fact, attributes_of


@rule("MatMulNBits", domain=MICROSOFT)
def matmul_nbits(view: NodeView) -> Rule:
    """`n` output columns; the contraction is (blocks, block), and a block is never cut."""
    bits, block = int(view.attribute("bits", 4)), int(view.attribute("block_size"))
    size, columns = int(view.attribute("K")), int(view.attribute("N"))
    blocks = -(-size // block)
    if view.has(4):
        return whole(view, note="MatMulNBits with g_idx: replicated")
    zero_point = view.fact(3) if view.has(3) else None
    packed_points = zero_point is not None and zero_point.dtype is ir.DataType.UINT8 and bits < 8
    per_byte = 8 // bits if packed_points else 1
    whole_blocks = size % block != 0 or blocks % per_byte != 0
    sizes = {"n": columns, "k": blocks // per_byte, "u": per_byte, "w": block}
    group = "*" if whole_blocks else "(k u)"
    names = words(view.rank(0) - 1)
    operands: list[list[str] | None] = [
        [*names, "*" if whole_blocks else "(k u w)"],
        ["n", group, "*"],
        ["n", group] if view.rank(2) == 2 else [f"(n {'.' if whole_blocks else 'k u'})" if not whole_blocks else "*"],
    ]
    if zero_point is not None:
        point = "*" if whole_blocks else "k" if packed_points else "(k u)"
        flat = len(zero_point.shape) == 1
        operands.append(
            [f"(n {'k' if packed_points else 'k u'})" if not whole_blocks else "*"] if flat else ["n", point]
        )
    if view.has(5):
        operands += [None] * (5 - len(operands)) + [["n"]]
    clauses = "" if whole_blocks else "; reduce k u; pin u w"
    return Rule(
        text=f"{spell(*operands)} -> {spell([*names, 'n'])}{clauses}",
        sizes=sizes,
        masked=(5,) if view.has(5) else (),
        attributes={"N": "n"} if whole_blocks else {"N": "n", "K": "k u w"},
    )


@shape_rule("MatMulNBits")
def _matmul_nbits_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> list[tuple[ir.DataType, tuple[int, ...]]]:
    data = inputs[0]
    assert data is not None
    return [(data.dtype, (*data.shape[:-1], attributes_of(node)["N"]))]


@rule("DequantizeLinear")
def dequantize(view: NodeView) -> Rule:
    """Data dimensions pass; scales run along one axis, by elements or by blocks that are never cut."""
    rank = view.rank(0)
    names = words(rank)
    axis = int(view.attribute("axis", 1)) % rank
    block = int(view.attribute("block_size", 0))
    if not block:
        scale = [] if view.rank(1) == 0 or view.shape(1) == (1,) else [names[axis]]
        scale = ["1"] if view.shape(1) == (1,) else scale
        operands = [names, *[scale] * (len(view.node.inputs) - 1)]
        return Rule(text=f"{spell(*operands)} -> {spell(names)}")
    if view.shape(0)[axis] % block:
        data = ["*" if d == axis else n for d, n in enumerate(names)]
        return Rule(text=f"{spell(data, *[data] * (len(view.node.inputs) - 1))} -> {spell(data)}")
    data = ["(q w)" if d == axis else n for d, n in enumerate(names)]
    scale = ["q" if d == axis else n for d, n in enumerate(names)]
    operands = [data, *[scale] * (len(view.node.inputs) - 1)]
    return Rule(text=f"{spell(*operands)} -> {spell(data)}; pin w", sizes={"q": view.shape(1)[axis], "w": block})
