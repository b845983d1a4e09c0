"""Block-quantised weights: MatMulNBits and DequantizeLinear."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from furiosa_llm.builder.rules.cost import DEQUANTIZE, Cost, elementwise, product
from furiosa_llm.builder.rules.facts import Fact, present
from furiosa_llm.builder.rules.operands import SCALED, Operands, Shapes, takes
from furiosa_llm.builder.rules.registry import op, spell, standard_shape, whole, words
from furiosa_llm.builder.rules.rule import Rule
from furiosa_llm.builder.rules.view import MICROSOFT, Inferred, NodeView, attributes_of


def matmul_nbits(view: NodeView) -> Rule:
    """`n` output columns; the contraction is (bytes, blocks, block), and neither a block nor a byte is ever cut.

    The bytes are bytes of packed zero points; each belongs to all blocks whose zero points share it.
    """
    bits, block = int(view.attribute("bits", 4)), int(view.attribute("block_size"))
    size, columns = int(view.attribute("K")), int(view.attribute("N"))
    if view.has(4):
        return _in_any_order(view, columns)
    blocks = -(-size // block)
    packed = view.has(3) and view.fact(3).dtype is ir.DataType.UINT8 and bits < 8
    per_byte = 8 // bits if packed else 1
    bytes_ = -(-blocks // per_byte)
    # The last block, or a row's last byte of zero points, may be filled in part; splits lie between whole blocks and
    # bytes.
    even = size == bytes_ * per_byte * block
    contraction, contracted = ("(k u w)", "k u") if even else ("x<k u w>", "x")
    groups, group = ("(k u)", "k u") if blocks == bytes_ * per_byte else ("g<k u>", "g")
    rows = words(view.rank(0) - 1)
    scales = ["n", groups] if view.rank(2) == 2 else [f"(n {group})"]
    operands: list[list[str] | None] = [[*rows, contraction], ["n", groups, "*"], scales]
    operands.append(_zero_points(view, "k" if packed else group) if view.has(3) else None)
    operands += [None, ["n"] if view.has(5) else None]
    return Rule(
        text=f"{spell(*operands[: len(view.node.inputs)])} -> {spell([*rows, 'n'])}; reduce {contracted}; pin u w",
        sizes={"n": columns, "k": bytes_, "u": per_byte, "w": block},
        masked=(5,) if view.has(5) else (),
        attributes={"N": "n", "K": "k u w" if even else "x"},
        padding="product",
        padding_ports=(0, 2),
    )


def _in_any_order(view: NodeView, columns: int) -> Rule:
    """Rows that g_idx assigns in any order are whole; columns are split if scales and zero points have columns."""
    rows = words(view.rank(0) - 1)
    if any(view.has(port) and view.rank(port) != 2 for port in (2, 3)):
        return whole(view, note="MatMulNBits with g_idx and scales in one vector: replicated")
    operands: list[list[str] | None] = [[*rows, "k"], ["n", "*", "*"], ["n", "*"]]
    operands += [["n", "*"] if view.has(3) else None, ["*"], ["n"] if view.has(5) else None]
    return Rule(
        text=f"{spell(*operands[: len(view.node.inputs)])} -> {spell([*rows, 'n'])}; reduce k; full k",
        sizes={"n": columns},
        attributes={"N": "n"},
        padding="product",
        padding_ports=(2,),
        note="MatMulNBits with g_idx: the rows are whole",
    )


def _zero_points(view: NodeView, symbols: str) -> list[str]:
    """A row for each output column, or all rows one after the other."""
    return ["n", f"({symbols})"] if view.rank(3) == 2 else [f"(n {symbols})"]


def _matmul_nbits_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    data = present(inputs[0])
    return [(data.dtype, (*data.shape[:-1], attributes_of(node)["N"]))]


def dequantize(view: NodeView) -> Rule:
    """Data dimensions pass; scales run along one axis, by elements or by blocks that are never cut."""
    data = words(view.rank(0))
    out, scale = list(data), list(data)
    clause, sizes = "", {}
    block = int(view.attribute("block_size", 0))
    axis = int(view.attribute("axis", 1)) % len(data) if data else 0
    if not block:
        scale = [] if view.rank(1) == 0 else ["1"] if view.shape(1) == (1,) else [data[axis]]
    elif view.shape(0)[axis] % block and view.is_dynamic(0, axis):
        data[axis] = out[axis] = scale[axis] = "*"
    else:
        data[axis] = out[axis] = "x<q w>" if view.shape(0)[axis] % block else "(q w)"
        scale[axis] = "q"
        clause, sizes = "; pin w", {"q": view.shape(1)[axis], "w": block}
    text = f"{spell(data, *[scale] * (len(view.node.inputs) - 1))} -> {spell(out)}{clause}"
    # Zero is not a zero of the data if it has a zero point, but it is one wherever the scale is zero.
    ports = (1,) if view.has(2) else (0, 1)
    return Rule(text=text, sizes=sizes, padding="product", padding_ports=ports)


def _matmul_nbits_fault(node: ir.Node, shapes: Shapes) -> str | None:
    K, N, block = (node.attributes[name].as_int() for name in ("K", "N", "block_size"))
    bits = node.attributes["bits"].as_int() if "bits" in node.attributes else 4
    if K < 1 or N < 1 or block < 1 or bits not in (2, 4, 8):
        return f"K={K}, N={N}, block_size={block} and bits={bits} are no weight's"
    blocks = -(-K // block)
    data, codes, scales = shapes[0], shapes[1], shapes[2]
    if data is None or data[-1] != K:
        return f"the last dimension is not K={K}"
    if codes != (N, blocks, -(-block * bits // 8)):
        return f"the codes are not {[N, blocks, -(-block * bits // 8)]}"
    if scales is None or math.prod(scales) != N * blocks:
        return f"the scales are not one for each of {N} times {blocks} blocks"
    return None


def _matmul_nbits_cost(view: NodeView) -> Cost:
    return product(view, view.shape(0)[-1], bias=5)


def _dequantize_cost(view: NodeView) -> Cost:
    """A multiplication, and a subtraction where there is a zero point."""
    return elementwise(DEQUANTIZE if view.has(2) else DEQUANTIZE - 1)(view)


op(
    "MatMulNBits",
    domain=MICROSOFT,
    rule=matmul_nbits,
    shape=_matmul_nbits_shape,
    definition=takes(range(3, 7), (0, 1, 2), "K", "N", "block_size"),
    operands=Operands(ranks={0: tuple(range(1, 9)), 1: (3,), 2: (1, 2), 3: (1, 2), 5: (1,)}, check=_matmul_nbits_fault),
    cost=_matmul_nbits_cost,
)
op("DequantizeLinear", rule=dequantize, moves="decode", operands=SCALED, cost=_dequantize_cost)
op(
    "DequantizeLinear",
    domain=MICROSOFT,
    rule=dequantize,
    shape=standard_shape("DequantizeLinear"),
    moves="decode",
    cost=_dequantize_cost,
)
