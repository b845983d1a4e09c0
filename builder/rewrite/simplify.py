"""Simplify a normalised graph: replace shape arithmetic by sizes, and compute only once what several layers share."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common as passes

from furiosa_llm.builder.factors.analysis import analyse
from furiosa_llm.builder.factors.probe import Probes
from furiosa_llm.builder.rewrite.dead_code import remove_unused
from furiosa_llm.builder.rewrite.size_folding import fold_sizes


def simplify(model: ir.Model, probes: Probes) -> bool:
    """Rewrite `model` in place; returns whether anything changed, after which it must be probed again."""
    before = list(model.graph)
    analysis = analyse(model.graph, probes.facts, probes.others)
    fold_sizes(model, analysis, probes.kinds, probes.all_facts)
    _merge_single_elements(model.graph)
    passes.CommonSubexpressionEliminationPass()(model)
    remove_unused(model)
    return list(model.graph) != before


def _merge_single_elements(graph: ir.Graph) -> None:
    """Merge equal constants of one element: they tie no dimensions together, and nodes that read them become equal."""
    first: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.size != 1 or isinstance(tensor, ir.ExternalTensor) or value.is_graph_output():
            continue
        if tensor.dtype is ir.DataType.STRING:
            continue
        key = (tensor.dtype, tuple(int(d) for d in tensor.shape.numpy()), tensor.tobytes())
        kept = first.setdefault(key, value)
        if kept is not value:
            value.replace_all_uses_with(kept)
