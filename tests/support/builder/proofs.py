"""Prove a rule by brute force: split the factors of a small model in every feasible way, run all ranks, compare."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator

import onnx

from furiosa_llm.builder.factors.factor import Factor
from furiosa_llm.builder.plan.outcome import InfeasibleError
from furiosa_llm.builder.plan.sweep import Sweeper
from furiosa_llm.builder.shapes.interface import SizeSet
from furiosa_llm.runtime.artifact.layout import Mesh
from tests.support.builder.plans import Assignment, Prepared, prepare_proto, runs_of

MESHES = (Mesh((2,)), Mesh((2, 2)))
SIZES = SizeSet(batch=2, sequence=4, past=6, encoder=6, others=(7,) * 8)
TOLERANCE = 2e-5
MOST_PLANS = 16
"""For each mesh; a case with more assignments is sampled."""


@dataclasses.dataclass(frozen=True)
class Proof:
    """What was tried."""

    plans: int
    wrong: tuple[str, ...]
    """The assignments that gave something else than the unsplit model, with the error."""
    refused: tuple[str, ...]
    """Why a leaf could not be split alone over two ranks, for every one that could not."""


def prove(
    proto: onnx.ModelProto,
    seed: int = 0,
    *,
    simplified: bool = False,
    until_wrong: bool = False,
    most_plans: int = MOST_PLANS,
) -> Proof:
    """Try the feasible assignments of a model's factors on small meshes; all of them, or until one is wrong.

    Each factor alone is tried, and then others, until there are `most_plans` for a mesh.
    """
    prepared = prepare_proto(proto, simplified=simplified)
    plans, wrong, refused = 0, [], []
    for mesh in MESHES:
        leaves = prepared.static_leaves()
        sweeper = Sweeper(prepared.analysis, mesh, leaves, prepared.states)
        tried = 0
        for assignment in assignments(leaves, mesh, seed):
            try:
                outcome = sweeper.sweep(assignment)
            except InfeasibleError as infeasible:
                if mesh.size == 2 and len(assignment) == 1:
                    refused.append(str(infeasible))
                continue
            split = prepared.split(mesh, assignment, outcome)
            error = prepared.greatest_error(split, SIZES, seed)
            if not error < TOLERANCE:
                wrong.append(f"{mesh.shape} {describe(prepared, assignment)}: {error:.1e}")
            tried += 1
            if tried >= max(most_plans, len(leaves)) or (until_wrong and wrong):
                break
        plans += tried
    return Proof(plans, tuple(wrong), tuple(refused))


def assignments(leaves: list[Factor], mesh: Mesh, seed: int) -> Iterator[Assignment]:
    """Every leaf alone over all axes, then all ways to split one, two or more leaves, in a random order."""
    whole = tuple(range(len(mesh.shape)))
    yield from ({leaf: whole} for leaf in leaves)
    choices = itertools.islice(itertools.product([(), *runs_of(mesh)], repeat=len(leaves)), 5**5)
    found = [dict(zip(leaves, axes, strict=True)) for axes in choices]
    random.Random(seed).shuffle(found)
    for assignment in found:
        split = {leaf: axes for leaf, axes in assignment.items() if axes}
        if split and not (len(split) == 1 and whole in split.values()):
            yield split


def describe(prepared: Prepared, assignment: Assignment) -> str:
    """An assignment in terms of the graph's inputs and initializers."""
    values = (*prepared.model.graph.inputs, *prepared.model.graph.initializers.values())
    places = {
        leaf: [f"{v.name}[{d}]" for v in values for d, f in enumerate(prepared.analysis.dims[v]) if leaf in f.leaves()]
        for leaf in assignment
    }
    return ", ".join(f"{leaf.size} at {' '.join(places[leaf])} over {axes}" for leaf, axes in assignment.items())
