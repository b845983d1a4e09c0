"""The stages of compilation, in order: load, normalise, probe, simplify, analyse; then plan and lower for each mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx_ir as ir

from furiosa_llm.builder import configuration
from furiosa_llm.builder.analysis import Analysis, analyse
from furiosa_llm.builder.build import Build
from furiosa_llm.builder.load import Source, check_external_data, load
from furiosa_llm.builder.lower import lower
from furiosa_llm.builder.normalize import normalize
from furiosa_llm.builder.planner import MAX_PADDING
from furiosa_llm.builder.planning import Planning
from furiosa_llm.builder.probe import Probes, probe
from furiosa_llm.builder.simplify import simplify
from furiosa_llm.builder.states import States, find_states
from furiosa_llm.builder.tactics import Tactics
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
    analysis: Analysis

    @functools.cached_property
    def planning(self) -> Planning:
        """Plans for any mesh."""
        return Planning(self.analysis, self.states, self.probes)

    def lowered_for(
        self, mesh: Mesh, *, max_padding: float = MAX_PADDING, tactics: Tactics | None = None, told: Stage
    ) -> Build:
        """Plan for `mesh` and emit the program; PlanError if `tactics` ask for what cannot be."""
        told("plan")
        pins = {} if tactics is None else tactics.pins(self.analysis, self.states)
        plan = self.planning.plan(mesh, max_padding, pins)
        told("lower")
        return Build(
            source=self.source,
            model=self.model,
            probes=self.probes,
            states=self.states,
            analysis=self.analysis,
            plan=plan,
            lowered=lower(self.analysis, mesh, plan.assignment, plan.outcome, self.source.model),
        )


def analyse_model(path: Path, dims: Mapping[str, int], *, weights: bool, told: Stage) -> Analysed:
    """Everything up to the analysis of the model at `path`.

    Args:
        path: The .onnx file.
        dims: Sizes of dynamic input dimensions that do not follow from the model.
        weights: Whether the files that hold its weights must be there.
        told: Told the name of each stage.
    """
    told("load")
    source = load(path)
    if weights:
        check_external_data(source)
    model = normalize(source)
    told("analyse")
    config = configuration.read_json(source.path, "config.json")
    probes = probe(model, dims, config)
    if simplify(model, probes):
        probes = probe(model, dims, config)
    return Analysed(
        source=source,
        model=model,
        probes=probes,
        states=find_states(model.graph, probes.facts),
        analysis=analyse(model.graph, probes.facts, probes.others),
    )
