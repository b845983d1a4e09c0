"""The pass: match every attention, write its replacement, prove it, and then use it or leave the graph as it was."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
from onnx_ir.passes import common as passes

from furiosa_llm.builder.factors.probe import Probes
from furiosa_llm.builder.rewrite.dead_code import remove_unused
from furiosa_llm.builder.rewrite.fusion.interior import interior_of, structure_of
from furiosa_llm.builder.rewrite.fusion.match import LeftAloneError, Match
from furiosa_llm.builder.rewrite.fusion.matching import match
from furiosa_llm.builder.rewrite.fusion.rewriting import Replacement, is_in_place, replace
from furiosa_llm.builder.rewrite.fusion.sizes import Sizes
from furiosa_llm.builder.rewrite.fusion.tracing import anchors
from furiosa_llm.builder.rewrite.fusion.trial import TOLERANCES, prove
from furiosa_llm.builder.rules.view import MICROSOFT

_OLDEST_OPSET = 13
"""Since this opset, Unsqueeze takes its axes as an input."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """What the pass did to the attentions of a model."""

    fused: int = 0
    left: tuple[str, ...] = ()
    """A line for each attention that stays as it is: the node that names it, and why."""
    changed: bool = False
    """Whether the graph has changed and must be probed again; sizes may come from other inputs than before."""


def fuse_attention(model: ir.Model, probes: Probes) -> Fusion:
    """Replace decomposed attention in `model` by GroupQueryAttention, after proving each replacement on numbers."""
    return _Pass(model, probes).run()


class _Pass:
    def __init__(self, model: ir.Model, probes: Probes) -> None:
        self._model = model
        self._graph = model.graph
        self._probes = probes
        self._facts = (probes.facts, probes.others)
        self._proved: dict[object, str | None] = {}
        """Structure of an attention -> the reason why its replacement is wrong; None if it is right."""
        self._left: dict[ir.Node, str] = {}

    def run(self) -> Fusion:
        """See `fuse_attention`."""
        before = list(self._graph)
        found = self._matches()
        sizes = Sizes(self._graph, self._probes.kinds)
        for one in found:
            if is_in_place(one, sizes):
                for past in (one.key.past, one.value.past):
                    sizes.replace_shape_of(past)
        imported = MICROSOFT in self._graph.opset_imports
        self._graph.opset_imports.setdefault(MICROSOFT, 1)
        fused = sum(self._fuse(one, sizes) for one in found)
        if not fused and not imported:
            del self._graph.opset_imports[MICROSOFT]
        if found:
            passes.TopologicalSortPass()(self._model)
            remove_unused(self._model)
            passes.CommonSubexpressionEliminationPass()(self._model)
        left = tuple(f'{node.op_type} "{node.name}": {reason}' for node, reason in self._left.items())
        return Fusion(fused=fused, left=left, changed=list(self._graph) != before)

    def _matches(self) -> list[Match]:
        found = []
        opset = self._graph.opset_imports.get("", 1)
        for node in anchors(self._graph):
            try:
                if opset < _OLDEST_OPSET:
                    raise LeftAloneError(f"opset {opset} is older than {_OLDEST_OPSET}")
                found.append(self._provable(match(node, self._facts)))
            except LeftAloneError as reason:
                self._left[node] = reason.told(self._probes.kinds)
        return found

    def _provable(self, found: Match) -> Match:
        dtype = self._probes.facts[found.query.value].dtype
        if dtype not in TOLERANCES:
            raise LeftAloneError(f"onnxruntime has no fused op for {dtype.name} on a CPU")
        return found

    def _fuse(self, found: Match, sizes: Sizes) -> bool:
        """Replace one attention; returns whether it was replaced."""
        replacement: Replacement | None = None
        try:
            interior = interior_of(found)
            replacement = replace(found, self._facts, sizes)
            self._prove(found, replacement, structure_of(found, interior, self._probes.facts))
        except LeftAloneError as reason:
            self._left[found.anchor] = reason.told(self._probes.kinds)
            if replacement is not None:
                self._graph.remove(replacement.nodes, safe=True)
            return False
        for old, new in zip(found.results, replacement.results, strict=True):
            _take_over(old, new)
        return True

    def _prove(self, found: Match, replacement: Replacement, structure: object) -> None:
        if structure not in self._proved:
            try:
                prove(found, replacement, self._graph, self._probes.kinds, self._probes.facts)
                self._proved[structure] = None
            except LeftAloneError as reason:
                self._proved[structure] = str(reason)
        wrong = self._proved[structure]
        if wrong is not None:
            raise LeftAloneError(wrong)


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Make `new` take the place of `old`, and its name if `old` is a graph output."""
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}/unfused"
        new.name, new.type, new.shape = name, old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
