"""Contractions of matrices: MatMul, Gemm, and what onnxruntime fuses into them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from furiosa_llm.builder.rules.cost import Cost, function_flops, product
from furiosa_llm.builder.rules.facts import Fact, present
from furiosa_llm.builder.rules.operands import takes
from furiosa_llm.builder.rules.registry import op, spell, whole, words
from furiosa_llm.builder.rules.rule import Rule
from furiosa_llm.builder.rules.view import MICROSOFT, Inferred, NodeView, attributes_of


def matmul_text(a: tuple[int, ...], b: tuple[int, ...]) -> str:
    """`a m k, a k n -> a m n; reduce k`, with batch dimensions aligned from the right."""
    batch = max(len(a), len(b)) - 2
    names = words(max(batch, 0), "b")

    def batch_of(shape: tuple[int, ...]) -> list[str]:
        own = shape[:-2]
        tail = names[len(names) - len(own) :] if own else []
        return [name if size != 1 else "1" for name, size in zip(tail, own, strict=True)]

    left = ["k"] if len(a) == 1 else [*batch_of(a), "m", "k"]
    right = ["k"] if len(b) == 1 else [*batch_of(b), "k", "n"]
    sizes = [1] * max(batch, 0)
    for shape in (a, b):
        for i, size in enumerate(reversed(shape[:-2])):
            sizes[-1 - i] = max(sizes[-1 - i], size)
    out = [name if size != 1 else "1" for name, size in zip(names, sizes, strict=True)]
    out += (["m"] if len(a) > 1 else []) + (["n"] if len(b) > 1 else [])
    return f"{spell(left, right)} -> {spell(out)}; reduce k"


def matmul(view: NodeView) -> Rule:
    """Batched matrix product."""
    return Rule(text=matmul_text(view.shape(0), view.shape(1)), bilinear=True, padding="product")


def fused_matmul(view: NodeView) -> Rule:
    """MatMul with transposed operands and a factor."""
    if view.attribute("transBatchA", 0) or view.attribute("transBatchB", 0):
        return whole(view, note="FusedMatMul with transposed batch dimensions: replicated")
    a, b = view.shape(0), view.shape(1)
    if min(len(a), len(b)) < 2:
        return whole(view, note="FusedMatMul of a vector: replicated")
    left, rest = matmul_text(a, b).split(", ", 1)
    right, tail = rest.split(" -> ", 1)
    if view.attribute("transA", 0):
        left = left.removesuffix("m k") + "k m"
    if view.attribute("transB", 0):
        right = right.removesuffix("k n") + "n k"
    return Rule(text=f"{left}, {right} -> {tail}", padding="product")


def _fused_matmul_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    a, b = present(inputs[0]), present(inputs[1])
    attributes = attributes_of(node)
    left = (*a.shape[:-2], a.shape[-1], a.shape[-2]) if attributes.get("transA") else a.shape
    right = (*b.shape[:-2], b.shape[-1], b.shape[-2]) if attributes.get("transB") else b.shape
    batch = np.broadcast_shapes(left[:-2], right[:-2])
    return [(a.dtype, (*batch, left[-2], right[-1]))]


def gemm(view: NodeView) -> Rule:
    """Matrix product plus a bias, which one rank alone adds where the contraction is split."""
    operands = _gemm_operands(view, "k")
    text = f"{spell(*operands)} -> m n; reduce k"
    return Rule(text=text, masked=(2,) if view.has(2) else (), padding="product", padding_ports=(0, 1))


def fused_gemm(view: NodeView) -> Rule:
    """Gemm followed by an activation, which needs the whole sum: the contracted dimension is whole."""
    return Rule(text=f"{spell(*_gemm_operands(view, '*'))} -> m n", padding="finite")


def _fused_gemm_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    a, b = present(inputs[0]), present(inputs[1])
    attributes = attributes_of(node)
    return [(a.dtype, (a.shape[1 if attributes.get("transA") else 0], b.shape[0 if attributes.get("transB") else 1]))]


def _gemm_operands(view: NodeView, contracted: str) -> list[list[str] | None]:
    k = contracted
    left = [k, "m"] if view.attribute("transA", 0) else ["m", k]
    right = ["n", k] if view.attribute("transB", 0) else [k, "n"]
    operands: list[list[str] | None] = [left, right]
    if view.has(2):
        names = ["m", "n"][2 - view.rank(2) :]
        operands.append([n if s != 1 else "1" for n, s in zip(names, view.shape(2), strict=True)])
    return operands


def _matmul_cost(view: NodeView) -> Cost:
    return product(view, view.shape(0)[-2 if view.attribute("transA", 0) else -1])


def _gemm_cost(view: NodeView) -> Cost:
    activated = function_flops(view.attribute("activation", "none"))
    return product(view, view.shape(0)[0 if view.attribute("transA", 0) else 1], per_output=activated, bias=2)


op("MatMul", rule=matmul, core_dims=2, total="always", cost=_matmul_cost)
op(
    "FusedMatMul",
    domain=MICROSOFT,
    rule=fused_matmul,
    shape=_fused_matmul_shape,
    definition=takes(range(2, 3), (0, 1)),
    core_dims=2,
    cost=_matmul_cost,
)
op("TransposeMatMul", domain=MICROSOFT, rule=fused_matmul, shape=_fused_matmul_shape, core_dims=2, cost=_matmul_cost)
op("Gemm", rule=gemm, total="always", cost=_gemm_cost)
op("FusedGemm", domain=MICROSOFT, rule=fused_gemm, shape=_fused_gemm_shape, cost=_gemm_cost)
