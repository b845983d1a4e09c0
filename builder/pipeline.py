"""A build from beginning to end: the one place that states the order of its stages.

`Assembly.build` reads top to bottom: load, `analyse_source` (normalize, rewrite, analyse), plan, lower, write, prove.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from furiosa_llm.builder.errors import OptionError
from furiosa_llm.builder.factors.analysis import Analysis, analyse
from furiosa_llm.builder.factors.longest import longest_sequence
from furiosa_llm.builder.factors.probe import Probes
from furiosa_llm.builder.factors.states import States, find_states
from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.emit import lower
from furiosa_llm.builder.lower.kernels import check_kernels, described, missing_kernels
from furiosa_llm.builder.options import BuildOptions
from furiosa_llm.builder.plan.annotations import constraints_of
from furiosa_llm.builder.plan.assignment_json import recorded_assignment
from furiosa_llm.builder.plan.constraints import leaf_parts
from furiosa_llm.builder.plan.pins import add_pin, pins_of
from furiosa_llm.builder.plan.plan import Plan, Planning
from furiosa_llm.builder.plan.search import Pin
from furiosa_llm.builder.proof import prove
from furiosa_llm.builder.rewrite.fusion import Fusion
from furiosa_llm.builder.rewrite.normalize import normalize
from furiosa_llm.builder.rewrite.passes import rewrite
from furiosa_llm.builder.rewrite.weight_inputs import check_adapted
from furiosa_llm.builder.shapes.roles import find_roles, read_role
from furiosa_llm.builder.source.companions import max_sequence_length, read_json
from furiosa_llm.builder.source.load import Source, load
from furiosa_llm.builder.write.artifact import write_artifact
from furiosa_llm.builder.write.build_report import BuildReport
from furiosa_llm.builder.write.output_folder import output_folder
from furiosa_llm.builder.write.report import report_of
from furiosa_llm.builder.write.streaming import MAX_WORKERS
from furiosa_llm.runtime.artifact.adapters.files import AdapterFile
from furiosa_llm.runtime.artifact.json_reader import Field
from furiosa_llm.runtime.artifact.manifest import Manifest
from furiosa_llm.runtime.artifact.progress import tell

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """How an artifact is made, from whatever source."""

    options: BuildOptions
    name: str
    """The artifact's name."""
    load: Callable[[], Source]
    """Returns the source, whose files are checked."""
    check: Callable[[Source, Manifest], None]
    """Raises if the written artifact cannot be trusted: the source changed meanwhile, or was damaged."""
    allow_no_kernel: bool = False
    """Whether to write what has no kernels on this machine, whatever it computes in."""
    plan: Mapping[str, Any] | None = None
    """The `plan` of a manifest to follow; by default a new plan is made."""
    adapters: Mapping[str, AdapterFile] = dataclasses.field(default_factory=dict)
    """Adapters that go into the artifact, by name."""

    def build(self, destination: Path, *, force: bool, workers: int | None) -> BuildReport:
        """Write the artifact to `destination`, or nothing; see `ArtifactBuilder`."""
        started = time.monotonic()
        threads = _checked_workers(workers)
        with output_folder(destination, force=force) as folder:
            build = self.lowered()
            missing = missing_kernels(build)
            if not self.allow_no_kernel:
                check_kernels(missing)
            if missing:
                logger.warning("%s", described(missing))
            manifest = write_artifact(
                folder,
                build,
                name=self.name,
                options=self.options,
                plan=self.plan,
                adapters=self.adapters,
                workers=threads,
            )
            self.check(build.source, manifest)
            tell("prove")
            faults = tuple(map(str, prove(folder).faults))
        seconds = time.monotonic() - started
        return report_of(
            build, manifest, artifact=str(destination), seconds=seconds, faults=faults, missing_kernels=missing
        )

    def lowered(self) -> Build:
        """Run all stages up to the program; nothing is written."""
        mesh = self.options.mesh
        tell("load")
        analysed = analyse_source(self.load(), self.options)
        if self.plan is None:
            return analysed.lowered_for(self.options)
        tell("lower")
        plan = Field(self.plan, "manifest.json $.plan")
        if "assignment" not in self.plan:
            plan.fail("the key 'assignment'", "an object without it")
        assignment = recorded_assignment(plan.child("assignment"), analysed.analysis, mesh)
        return analysed.lowered_by(analysed.planning.follow(assignment, mesh))


def analyse_model(path: Path, options: BuildOptions) -> Analysed:
    """Run all stages up to the analysis of the model at `path`, whose weights need not exist; see `analyse_source`."""
    tell("load")
    return analyse_source(load(path, options.fixed, options.lora_modules), options)


def analyse_source(source: Source, options: BuildOptions) -> Analysed:
    """Run all stages up to the analysis of a model."""
    model = normalize(source)
    find_roles(model.graph, {name: read_role(name, text) for name, text in options.roles.items()})
    tell("analyse")
    config = read_json(source.path, "config.json")
    rewritten = rewrite(model, options.dims, config, fuse=options.fuse_attention)
    probes = rewritten.probes
    check_adapted(model.graph, probes.facts)
    return Analysed(
        source=source,
        model=model,
        probes=probes,
        states=find_states(model.graph, probes.facts, probes.others),
        fusion=rewritten.fusion,
        analysis=analyse(model.graph, probes.facts, probes.others),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysed:
    """A model, and everything about it that does not depend on the mesh."""

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

    @functools.cached_property
    def max_length(self) -> int | None:
        """See `Build`."""
        limits = (max_sequence_length(self.source.path), longest_sequence(self.analysis, self.probes))
        return min((limit for limit in limits if limit is not None), default=None)

    def lowered_for(self, options: BuildOptions) -> Build:
        """Plan for the mesh of `options` and lower.

        The plan also keeps what the model's own multi-device annotations say. Raises PlanError if annotations and
        tactics ask for the impossible, and AnnotationError or ConstraintError for annotations that contradict each
        other.
        """
        tell("plan")
        pins = {} if options.tactics is None else pins_of(options.tactics, self.analysis, self.states)
        constraints = constraints_of(self.source, self.analysis, options.tensor_parallel_size)
        for leaf, demand in leaf_parts(constraints, self.analysis).items():
            add_pin(pins, leaf, Pin(parts=demand.parts, origin=demand.origin.origin))
        plan = self.planning.plan(options.mesh, options.max_padding, pins)
        tell("lower")
        return self.lowered_by(plan)

    def lowered_by(self, plan: Plan) -> Build:
        """Emit the program of a plan that exists already."""
        return Build(
            source=self.source,
            model=self.model,
            probes=self.probes,
            states=self.states,
            fusion=self.fusion,
            analysis=self.analysis,
            max_length=self.max_length,
            plan=plan,
            lowered=lower(self.analysis, plan.mesh, plan.assignment, plan.outcome, self.source.model),
        )


def _checked_workers(workers: int | None) -> int:
    if workers is None:
        return MAX_WORKERS
    if not 1 <= workers <= MAX_WORKERS:
        raise OptionError(f"workers must be 1 to {MAX_WORKERS}, got {workers}.")
    return workers
