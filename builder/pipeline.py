"""The stages of compilation, in order: load to analysis once for each model, then plan and lower for each mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx_ir as ir

from furiosa_llm.builder.factors.analysis import Analysis, analyse
from furiosa_llm.builder.factors.probe import Probes, probe
from furiosa_llm.builder.factors.states import States, find_states
from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.emit import lower
from furiosa_llm.builder.plan.annotations import constraints_of
from furiosa_llm.builder.plan.constraints import leaf_parts
from furiosa_llm.builder.plan.plan import Plan, Planning
from furiosa_llm.builder.plan.search import MAX_PADDING, Pin
from furiosa_llm.builder.plan.tactics import Tactics, add_pin
from furiosa_llm.builder.rewrite.branches import settle_branches
from furiosa_llm.builder.rewrite.fusion import Fusion, fuse_attention
from furiosa_llm.builder.rewrite.normalize import normalize
from furiosa_llm.builder.rewrite.simplify import simplify
from furiosa_llm.builder.source import companions
from furiosa_llm.builder.source.load import Source, load
from furiosa_llm.runtime.artifact.layout import Mesh

Stage = Callable[[str], None]
"""Told the name of each stage as it begins."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysed:
    """A model of which everything is known that does not depend on the mesh."""

    source: Source
    model: ir.Model
    """The source, normalised."""
    probes: Probes
    states: States
    fusion: Fusion
    analysis: Analysis

    @functools.cached_property
    def planning(self) -> Planning:
        """Plans for any mesh."""
        return Planning(self.analysis, self.states, self.probes)

    def lowered_for(
        self, mesh: Mesh, *, max_padding: float = MAX_PADDING, tactics: Tactics | None = None, told: Stage
    ) -> Build:
        """Plan for `mesh` and lower.

        What the model's own multi-device annotations say is kept, too. Raises PlanError if that and `tactics` ask for
        what cannot be, and AnnotationError or ConstraintError for annotations that contradict each other.
        """
        told("plan")
        pins = {} if tactics is None else tactics.pins(self.analysis, self.states)
        constraints = constraints_of(self.source, self.analysis, mesh.size)
        for leaf, demand in leaf_parts(constraints, self.analysis).items():
            add_pin(pins, leaf, Pin(parts=demand.parts, origin=demand.origin.origin))
        plan = self.planning.plan(mesh, max_padding, pins)
        told("lower")
        return self.lowered_by(plan)

    def lowered_by(self, plan: Plan) -> Build:
        """Emit the program of a plan that is made already."""
        return Build(
            source=self.source,
            model=self.model,
            probes=self.probes,
            states=self.states,
            fusion=self.fusion,
            analysis=self.analysis,
            plan=plan,
            lowered=lower(self.analysis, plan.mesh, plan.assignment, plan.outcome, self.source.model),
        )


def analyse_model(path: Path, dims: Mapping[str, int], *, fuse: bool, told: Stage) -> Analysed:
    """Everything up to the analysis of the model at `path`, whose weights need not be there; see `analyse_source`."""
    told("load")
    return analyse_source(load(path), dims, fuse=fuse, told=told)


def analyse_source(source: Source, dims: Mapping[str, int], *, fuse: bool, told: Stage) -> Analysed:
    """Everything up to the analysis of a model.

    Args:
        source: The model.
        dims: Sizes of dynamic input dimensions that do not follow from the model.
        fuse: Whether attention that is written out in small ops is replaced by one op.
        told: Told the name of each stage.
    """
    model = normalize(source)
    told("analyse")
    config = companions.read_json(source.path, "config.json")
    probes = settle_branches(model, dims, config)
    if simplify(model, probes):
        probes = probe(model, dims, config)
    fusion = fuse_attention(model, probes) if fuse else Fusion()
    if fusion.changed:
        probes = probe(model, dims, config)
    return Analysed(
        source=source,
        model=model,
        probes=probes,
        states=find_states(model.graph, probes.facts),
        fusion=fusion,
        analysis=analyse(model.graph, probes.facts, probes.others),
    )
