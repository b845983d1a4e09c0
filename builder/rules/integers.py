"""Integer arithmetic: activations quantised dynamically or with constant scales, and products of codes.

A dynamic scale (DynamicQuantizeLinear) is computed over the whole tensor, so the tensor must be whole: ranks that
computed it over their own part would round differently from the unsplit model. Everything after it is exact: cutting
codes costs nothing, and sums of products in int32 are the same in parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from furiosa_llm.builder.rules.cost import DEQUANTIZE, QUANTIZE, SOFTMAX, Cost, elementwise, product
from furiosa_llm.builder.rules.facts import Fact, present
from furiosa_llm.builder.rules.linear_algebra import matmul_text
from furiosa_llm.builder.rules.operands import SCALED
from furiosa_llm.builder.rules.registry import as_input, op, spell, standard_shape, whole, whole_inputs, words
from furiosa_llm.builder.rules.rule import Rule
from furiosa_llm.builder.rules.view import MICROSOFT, Inferred, NodeView, attributes_of


def offsets(view: NodeView, zero_points: Mapping[int, int]) -> tuple[int, ...]:
    """The data inputs whose code 0 is not the number 0; `zero_points` maps data inputs to the inputs of zero points."""
    return tuple(port for port, point in zero_points.items() if view.has(point) and not view.fact(point).zero)


def per_channel(view: NodeView, port: int, channel: str) -> list[str] | None:
    """A scale or zero point: one for all, or one for each channel."""
    if not view.has(port):
        return None
    return ["1" if size == 1 else channel for size in view.shape(port)]


def dynamic_quantize(view: NodeView) -> Rule:
    """One scale for all elements, from the greatest and the least of them; the codes are again each rank's part."""
    dims = words(view.rank(0))
    note = "DynamicQuantizeLinear takes one scale over all elements: its input is whole (gathered where it was split)"
    clause = f"; full {' '.join(dims)}" if dims else ""
    return Rule(text=f"{spell(dims)} -> {spell(dims, [], [])}{clause}", padding="finite", note=note)


def quantize(view: NodeView) -> Rule:
    """Data dimensions pass; scales run along one axis, by elements or by blocks that are never cut."""
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
    return Rule(text=text, sizes=sizes, padding="finite")


# -- products ----------------------------------------------------------------------------------------------------


def _product(
    view: NodeView, a: int, b: int, per_row: Sequence[int], per_column: Sequence[int], points: Mapping[int, int]
) -> Rule | None:
    """A matrix product of inputs `a` and `b`, of which other inputs hold one number for each row or column.

    None where such numbers have more dimensions than one.
    """
    if any(view.has(port) and view.rank(port) > 1 for port in (*per_row, *per_column)):
        return None
    left, tail = matmul_text(view.shape(a), view.shape(b)).split(", ", 1)
    right, result = tail.split(" -> ", 1)
    operands: list[str] = []
    for port in range(len(view.node.inputs)):
        if port in (a, b):
            operands.append(left if port == a else right)
        elif not view.has(port):
            operands.append("_")
        else:
            channel = "m" if port in per_row else "n"
            operands.append(" ".join(per_channel(view, port, channel) or []))
    shifted = offsets(view, points)
    return Rule(
        text=f"{', '.join(operands)} -> {result}",
        padding="product",
        padding_ports=tuple(port for port in (a, b) if port not in shifted),
        offset=shifted,
    )


def matmul_integer(view: NodeView) -> Rule:
    """Sums of products of codes less their zero points: exact in int32, whole or in parts."""
    found = _product(view, 0, 1, (2,), (3,), {0: 2, 1: 3})
    return found or whole(view, note="MatMulInteger with zero points for each matrix: replicated")


def matmul_integer_to_float(view: NodeView) -> Rule:
    """MatMulInteger with its scales and a bias, which one rank alone adds where the contraction is split."""
    found = _product(view, 0, 1, (2, 4), (3, 5, 6), {0: 4, 1: 5})
    if found is None:
        return whole(view, note="MatMulIntegerToFloat with scales for each matrix: replicated")
    return dataclasses.replace(found, masked=(6,) if view.has(6) else ())


def _matmul_integer_to_float_shape(_: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    return _product_shape(inputs[0], inputs[1], inputs[2])


def qlinear_matmul(view: NodeView) -> Rule:
    """Only columns are split: the op rounds the sum to 8 bits, so it must be whole."""
    found = _product(view, 0, 3, (1, 2), (4, 5), {0: 2, 3: 5})
    if found is None:
        return whole(view, note="QLinearMatMul with scales for each matrix: replicated")
    left, _, right = found.text.partition("; reduce k")[0].partition(" -> ")
    dims = [["*" if word == "k" else word for word in operand.split(" ")] for operand in left.split(", ")]
    note = "QLinearMatMul rounds its sum to 8 bits: its contraction is gathered (as bytes), not computed in parts"
    text = f"{', '.join(' '.join(words_) for words_ in dims)} -> {right}"
    return Rule(text=text, padding="finite", note=note)


def qgemm(view: NodeView) -> Rule:
    """Gemm of codes; where it rounds its sum to 8 bits, the sum must be whole."""
    k = "*" if view.has(7) else "k"
    left = [k, "m"] if view.attribute("transA", 0) else ["m", k]
    right = ["n", k] if view.attribute("transB", 0) else [k, "n"]
    operands: list[list[str] | None] = [left, per_channel(view, 1, "*"), per_channel(view, 2, "*"), right]
    operands += [per_channel(view, 4, "n"), per_channel(view, 5, "n")]
    if len(view.node.inputs) > 6:
        bias = ["m", "n"][2 - view.rank(6) :] if view.has(6) else []
        shape = view.shape(6) if view.has(6) else ()
        operands.append([n if s != 1 else "1" for n, s in zip(bias, shape, strict=True)] if view.has(6) else None)
    operands += [per_channel(view, port, "*") for port in range(7, len(view.node.inputs))]
    text = f"{spell(*operands)} -> m n"
    if k == "*":
        note = "QGemm rounds its sum to 8 bits: its contraction is gathered (as bytes), not computed in parts"
        return Rule(text=text, padding="finite", note=note)
    shifted = offsets(view, {0: 2, 3: 5})
    return Rule(
        text=f"{text}; reduce k",
        masked=(6,) if view.has(6) else (),
        padding="product",
        padding_ports=tuple(port for port in (0, 3) if port not in shifted),
        offset=shifted,
    )


def _qgemm_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    a, b, scale = present(inputs[0]), present(inputs[3]), present(inputs[1])
    attributes = attributes_of(node)
    rows, columns = a.shape[1 if attributes.get("transA") else 0], b.shape[0 if attributes.get("transB") else 1]
    point = inputs[8] if len(inputs) > 8 else None
    return [(scale.dtype if point is None else point.dtype, (rows, columns))]


def _product_shape(a: Fact | None, b: Fact | None, kind: Fact | None) -> Inferred:
    assert a is not None
    assert b is not None
    assert kind is not None
    return [(kind.dtype, (*a.shape[:-1], b.shape[-1]))]


def matmul_bnb4(view: NodeView) -> Rule:
    """Rows of 4-bit codes, two in a byte, in blocks that are never cut; all rows one after the other."""
    size, columns, block = (int(view.attribute(name)) for name in ("K", "N", "block_size"))
    if size % block or not view.attribute("transB", 1):
        return whole(view, note="MatMulBnb4 whose blocks run from row to row, or transposed: replicated")
    rows = words(view.rank(0) - 1)
    operands = [[*rows, "(k u w)"], ["(n k u)"] if view.rank(1) == 1 else ["(n k u)", "1"], ["(n k)"]]
    return Rule(
        text=f"{spell(*operands)} -> {spell([*rows, 'n'])}; reduce k; pin u w",
        sizes={"n": columns, "k": size // block, "u": block // 2, "w": 2},
        attributes={"N": "n", "K": "k u w"},
        padding="product",
        padding_ports=(0, 2),
    )


def _matmul_bnb4_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    data, attributes = present(inputs[0]), attributes_of(node)
    return [(data.dtype, (*data.shape[:-1], attributes["N" if attributes.get("transB", 1) else "K"]))]


# -- what else onnxruntime computes on codes ---------------------------------------------------------------------


def quantized_softmax(view: NodeView) -> Rule:
    """Softmax of codes; before opset 13 it took all dimensions from the axis on as one."""
    rank = view.rank(0)
    axis = int(view.attribute("axis", -1)) % rank
    along = [axis] if int(view.attribute("opset", 13)) >= 13 else range(axis, rank)
    names = ["*" if d in along else n for d, n in enumerate(words(rank))]
    return Rule(text=f"{spell(names, *whole_inputs(view))} -> {spell(names)}", padding="finite")


def quantized_concat(view: NodeView) -> Rule:
    """Triples of codes, scale and zero point follow the result's scale and zero point; the axis is a concatenation."""
    axis = int(view.attribute("axis")) % len(view.out())
    names = words(len(view.out()))
    ports = range(2, len(view.node.inputs), 3)
    parts = [f"p{i}" for i in range(len(ports))]
    operands = [per_channel(view, port, "*") for port in range(len(view.node.inputs))]
    for port, part in zip(ports, parts, strict=True):
        operands[port] = [part if d == axis else name for d, name in enumerate(names)]
    out = ["[" + "|".join(parts) + "]" if d == axis else name for d, name in enumerate(names)]
    return Rule(text=f"{spell(*operands)} -> {spell(out)}", axis=axis, padding="finite")


def _quantized_concat_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    data = [fact for fact in inputs[2::3] if fact is not None]
    axis = attributes_of(node)["axis"] % len(data[0].shape)
    shape = list(data[0].shape)
    shape[axis] = sum(fact.shape[axis] for fact in data)
    return [(data[0].dtype, tuple(shape))]


def _product_cost(view: NodeView) -> Cost:
    """A product of codes; its sum is scaled, rounded to codes again, or neither."""
    after = {"QLinearMatMul": QUANTIZE, "MatMulIntegerToFloat": 1}
    return product(view, view.shape(0)[-1], per_output=after.get(view.node.op_type, 0), bias=6)


def _qgemm_cost(view: NodeView) -> Cost:
    contracted = view.shape(0)[0 if view.attribute("transA", 0) else 1]
    return product(view, contracted, per_output=QUANTIZE if view.has(7) else 1, bias=6)


op("DynamicQuantizeLinear", rule=dynamic_quantize, cost=elementwise(2 + QUANTIZE))
op("QuantizeLinear", rule=quantize, operands=SCALED, cost=elementwise(QUANTIZE))
op(
    "QuantizeLinear",
    domain=MICROSOFT,
    rule=quantize,
    shape=standard_shape("QuantizeLinear"),
    cost=elementwise(QUANTIZE),
)
op("MatMulInteger", rule=matmul_integer, core_dims=2, cost=_product_cost)
op(
    "MatMulIntegerToFloat",
    domain=MICROSOFT,
    rule=matmul_integer_to_float,
    shape=_matmul_integer_to_float_shape,
    core_dims=2,
    cost=_product_cost,
)
op("QLinearMatMul", rule=qlinear_matmul, cost=_product_cost)
op("QGemm", domain=MICROSOFT, rule=qgemm, shape=_qgemm_shape, cost=_qgemm_cost)
op("MatMulBnb4", domain=MICROSOFT, rule=matmul_bnb4, shape=_matmul_bnb4_shape, cost=_product_cost)
op(
    "QLinearSoftmax",
    domain=MICROSOFT,
    rule=quantized_softmax,
    shape=as_input,
    cost=elementwise(DEQUANTIZE + SOFTMAX + QUANTIZE),
)
op(
    "QLinearConcat",
    domain=MICROSOFT,
    rule=quantized_concat,
    shape=_quantized_concat_shape,
    cost=elementwise(DEQUANTIZE + QUANTIZE),
)
