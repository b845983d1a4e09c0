"""Models prepared for partitioning, and random assignments of their factors."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort

from furiosa_llm.builder.factors.analysis import Analysis, analyse
from furiosa_llm.builder.factors.factor import Factor
from furiosa_llm.builder.factors.probe import Probes
from furiosa_llm.builder.factors.states import States, find_states
from furiosa_llm.builder.lower.check_shapes import check_shapes, interpreter, local_shape
from furiosa_llm.builder.lower.emit import lower
from furiosa_llm.builder.plan.outcome import Axes, InfeasibleError, Outcome
from furiosa_llm.builder.plan.sweep import Sweeper
from furiosa_llm.builder.rewrite.normalize import normalize
from furiosa_llm.builder.rewrite.passes import rewrite
from furiosa_llm.builder.shapes.interface import PROBE, SECOND_PROBE, SizeSet, concrete, role_of
from furiosa_llm.builder.source import companions
from furiosa_llm.builder.source.load import Source, load
from furiosa_llm.runtime.artifact.layout import Mesh
from tests.support.builder.stitching import SplitModel, of_lowered, session

GARBAGE = 3.0
"""What the padding of split inputs is filled with: whatever it is, it must do no harm."""

Array = npt.NDArray[Any]
Assignment = Mapping[Factor, Axes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model as the planner sees it, and the unsplit model to compare with."""

    proto: onnx.ModelProto
    source: Source
    model: ir.Model
    probes: Probes
    states: States
    analysis: Analysis

    @functools.cached_property
    def reference(self) -> ort.InferenceSession:
        return session(self.proto)

    def feeds(self, sizes: SizeSet, seed: int = 0) -> dict[str, Array]:
        """Inputs at the given sizes."""
        rng = np.random.default_rng(seed)
        shapes = concrete(self.probes.kinds, sizes)
        return {str(v.name): _feed(v, shapes[str(v.name)], sizes, rng) for v in self.model.graph.inputs}

    def expected(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """What the unsplit model gives."""
        wanted = {value.name for value in self.reference.get_inputs()}
        names = [value.name for value in self.reference.get_outputs()]
        results = self.reference.run(names, {name: array for name, array in feeds.items() if name in wanted})
        return dict(zip(names, results, strict=True))

    def static_leaves(self) -> list[Factor]:
        """Every leaf that an assignment may split: not pinned, more than one index, of a size that never changes."""
        analysis = self.analysis
        dynamic = {
            leaf
            for value, dims in analysis.dims.items()
            for d, factor in enumerate(dims)
            if analysis.is_dynamic(value, d) and len(list(factor.leaves())) == 1
            for leaf in factor.leaves()
        }
        leaves = dict.fromkeys(leaf for dims in analysis.dims.values() for factor in dims for leaf in factor.leaves())
        return [leaf for leaf in leaves if leaf.size > 1 and leaf not in analysis.pinned and leaf not in dynamic]

    def split(self, mesh: Mesh, assignment: Assignment, outcome: Outcome) -> SplitModel:
        """The program of an assignment, with every local shape checked."""
        lowered = lower(self.analysis, mesh, assignment, outcome, self.source.model)
        program = ir.Model(lowered.graph, ir_version=10)
        run = interpreter(program, mesh).run
        for sizes in (PROBE, SECOND_PROBE):
            shapes = concrete(self.probes.kinds, sizes)
            facts = run({n: local_shape(lowered.input_layouts[n], s, mesh) for n, s in shapes.items()})
            if sizes is PROBE:
                check_shapes(lowered, facts)
        return of_lowered(lowered, mesh, self.proto.ir_version)

    def greatest_error(self, split: SplitModel, sizes: SizeSet, seed: int = 0) -> float:
        """The greatest relative error of any output on any rank."""
        feeds = self.feeds(sizes, seed)
        expected = self.expected(feeds)
        found = split.run(split.session(), feeds, padding=GARBAGE)
        return max(split.greatest_error(found, expected).values())


def _feed(value: ir.Value, shape: tuple[int, ...], sizes: SizeSet, rng: np.random.Generator) -> Array:
    assert value.dtype is not None
    match role_of(value):
        case "token_ids" if str(value.name).endswith("_ids"):  # of a vocabulary, not of a table of a few rows
            array: Array = rng.integers(0, 1000, shape)
        case "token_type_ids":
            array = rng.integers(0, 2, shape)
        case "attention_mask":
            array = np.ones(shape, dtype=np.int64)
        case "position_ids" if str(value.name).startswith("pos"):
            array = np.broadcast_to(np.arange(sizes.past, sizes.past + shape[-1]), shape)
        case _ if value.dtype is ir.DataType.BOOL:
            array = rng.integers(0, 2, shape)
        case _ if value.dtype.is_integer():
            array = rng.integers(-3 if value.dtype.is_signed() else 0, 4, shape)
        case _:
            array = rng.standard_normal(shape)
    return array.astype(value.dtype.numpy())


def without_accuracy_level(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with exact block-quantised products: rounding activations to 8 bits hides errors, or looks like one."""
    exact = onnx.ModelProto()
    exact.CopyFrom(proto)
    for node in exact.graph.node:
        for attribute in [a for a in node.attribute if a.name == "accuracy_level"]:
            node.attribute.remove(attribute)
    return exact


def prepare(path: Path, *, simplified: bool = True, fused: bool = False) -> Prepared:
    """A model file, up to its analysis."""
    return _prepare(load(path), without_accuracy_level(onnx.load(path)), simplified, fused)


def prepare_proto(proto: onnx.ModelProto, *, simplified: bool = False) -> Prepared:
    """A model made by hand, up to its analysis; as it was written, unless it is to be simplified."""
    return _prepare(Source(path=Path("handmade.onnx"), model=ir.from_proto(proto), proto=proto), proto, simplified)


def _prepare(source: Source, proto: onnx.ModelProto, simplified: bool, fused: bool = False) -> Prepared:
    model = normalize(source)
    for node in model.graph:
        node.attributes.pop("accuracy_level", None)
    config = companions.read_json(source.path, "config.json")
    probes = rewrite(model, {}, config, fuse=fused, fold=simplified).probes
    return Prepared(
        proto=proto,
        source=source,
        model=model,
        probes=probes,
        states=find_states(model.graph, probes.facts, probes.others),
        analysis=analyse(model.graph, probes.facts, probes.others),
    )


def runs_of(mesh: Mesh) -> list[Axes]:
    """Every ordered choice of mesh axes, none left out."""
    axes = range(len(mesh.shape))
    found: list[Axes] = [()]
    for _ in axes:
        found += [(*run, a) for run in found for a in axes if a not in run and (*run, a) not in found]
    return [run for run in dict.fromkeys(found) if run]


def random_assignment(
    sweeper: Sweeper, groups: Sequence[Iterable[Factor]], mesh: Mesh, rng: random.Random, count: int
) -> tuple[Assignment, Outcome]:
    """A feasible assignment that splits up to `count` groups of leaves, each over random axes."""
    assignment: dict[Factor, Axes] = {}
    outcome = sweeper.sweep(assignment)
    runs = runs_of(mesh)
    for group in rng.sample(list(groups), min(len(groups), 3 * count)):
        trial = assignment | dict.fromkeys(group, rng.choice(runs))
        try:
            outcome = sweeper.sweep(trial)
        except InfeasibleError:
            continue
        assignment = trial
        if len(assignment) >= count:
            break
    return assignment, outcome
