"""The passes over a normalised graph, in order: the one list, for builds and for the checker of annotations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from furiosa_llm.builder.factors.probe import Probes, probe
from furiosa_llm.builder.rewrite.branches import settle_branches
from furiosa_llm.builder.rewrite.fusion import Fusion, fuse_attention
from furiosa_llm.builder.rewrite.simplify import simplify
from furiosa_llm.builder.rewrite.weight_inputs import cut_weight_inputs


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rewritten:
    """What is known of a graph after all passes."""

    probes: Probes
    whole: Probes
    """Probes of the graph before its arithmetic was folded: they cover more values, with the same facts."""
    fusion: Fusion


def rewrite(
    model: ir.Model, dims: Mapping[str, int], config: Mapping[str, object], *, fuse: bool, fold: bool = True
) -> Rewritten:
    """Rewrite a normalised model in place, probing it again after each pass that changed it; see `analyse_source`.

    Without `fold`, the arithmetic of sizes stays as it was exported.
    """
    cut_weight_inputs(model.graph)
    probes = whole = settle_branches(model, dims, config)
    if fold and simplify(model, probes):
        probes = probe(model, dims, config)
    fusion = fuse_attention(model, probes) if fuse else Fusion()
    if fusion.changed:
        probes = probe(model, dims, config)
    return Rewritten(probes=probes, whole=whole, fusion=fusion)
