"""onnxruntime's fused mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from furiosa_llm.builder.rule import Rule
from furiosa_llm.builder.rules.registry import MICROSOFT, NodeView, rule, shape_rule, spell, words
from furiosa_llm.builder.shapes import Fact

_PAIRED = {1: "(i u)", 2: "[i|i]"}
"""How gate and up projections share fc1, by the attribute swiglu_fusion: interleaved, or one after the other."""


@rule("MoE", domain=MICROSOFT)
def mixture_of_experts(view: NodeView) -> Rule:
    """The experts' inner dimension i is split; every rank holds a part of every expert."""
    inner = view.shape(4)[2]
    fusion = int(view.attribute("swiglu_fusion", 0))
    width = _PAIRED.get(fusion, "i") if view.shape(2)[1] == 2 * inner else "i"
    rows = words(view.rank(0) - 1)
    router = [f"({' '.join(rows)})", "*"] if view.rank(1) == 2 else [*rows, "*"]
    candidates: list[list[str]] = [
        [*rows, "*"],
        router,
        ["*", width, "*"],
        ["*", width],
        ["*", "*", "i"],
        ["*", "*"],
        ["*", "i", "*"],
        ["*", "i"],
    ]
    operands = [c if view.has(p) else None for p, c in enumerate(candidates[: len(view.node.inputs)])]
    pin = "; pin u" if "u" in width else ""
    return Rule(
        text=f"{spell(*operands)} -> {spell([*rows, '*'])}; reduce i{pin}",
        sizes={"i": inner, "u": 2},
        masked=(5,) if view.has(5) else (),
        padding="finite",
    )


@shape_rule("MoE")
def _moe_shape(_: ir.Node, inputs: Sequence[Fact | None]) -> list[tuple[ir.DataType, tuple[int, ...]]]:
    data = inputs[0]
    assert data is not None
    return [(data.dtype, data.shape)]
