"""The soundness fuzz: random feasible assignments, not the cheap ones, each run on all ranks and compared.

Over the models of the zoo:

    python -m tests.campaigns.fuzz_plans --plans 3000

Every plan follows from its seed. A failure is made small before it is shown, and ends the campaign with status 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from furiosa_llm.builder.errors import ShapeError
from furiosa_llm.builder.factors.factor import Factor
from furiosa_llm.builder.plan.groups import candidates, group_leaves
from furiosa_llm.builder.plan.outcome import InfeasibleError
from furiosa_llm.builder.plan.sweep import Sweeper
from furiosa_llm.builder.shapes.interface import SizeSet
from furiosa_llm.runtime.artifact.layout import Mesh
from tests.support.builder.plans import Assignment, Prepared, prepare, random_assignment
from tests.support.builder.proofs import describe

ZOO = Path(__file__).resolve().parents[2] / "fixtures" / "zoo"
MESHES = (Mesh((2,)), Mesh((2, 2)), Mesh((2, 2, 2)), Mesh((3,)), Mesh((2, 3)))
STEPS = ((2, 9, 0), (2, 1, 9), (3, 5, 7), (2, 1, 1), (2, 2, 0))
"""Batch, new positions, past."""
TOLERANCE = 1e-4
STAGES = ("exported", "simplified", "fused", "fused")
"""What is planned: the graph as it was exported, with its sizes folded, with its attention fused, too."""
CRASHES = (
    *(AssertionError, KeyError, IndexError, RuntimeError, ValueError, ShapeError),
    *(Fail, InvalidArgument, RuntimeException),
)


@dataclasses.dataclass(frozen=True)
class Failure:
    """A plan that went wrong."""

    seed: int
    model: str
    mesh: tuple[int, ...]
    found: str
    assignment: str
    """What is left of the plan once everything that does not matter is taken away."""

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.model} on {self.mesh}: {self.found}\n    {self.assignment}"


def zoo_models() -> list[str]:
    """Every graph of the zoo that onnxruntime can run in float32."""
    paths = sorted(str(path.relative_to(ZOO)) for path in ZOO.glob("*/*.onnx"))
    return [path for path in paths if "merged" not in path and "fp16" not in path]


class Fuzzer:
    """Random plans of one model."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._prepared: dict[str, Prepared] = {}

    def plan(self, seed: int) -> Failure | None:
        """Make and run the plan of one seed, of the model as it was exported, or at a later stage of the build."""
        rng = random.Random(f"{self.name} {seed}")
        stage = rng.choice(STAGES)
        if stage not in self._prepared:
            self._prepared[stage] = prepare(ZOO / self.name, simplified=stage != "exported", fused=stage == "fused")
        prepared, mesh = self._prepared[stage], rng.choice(MESHES)
        leaves, groups = _groups(prepared, rng)
        sweeper = Sweeper(prepared.analysis, mesh, leaves, prepared.states)
        sizes = _sizes(prepared, rng)
        assignment, _ = random_assignment(sweeper, groups, mesh, rng, rng.choice([1, 2, 4, 8, 16]))
        trial = Trial(prepared, sweeper, mesh, sizes)
        found = trial.run(assignment)
        if found is None:
            return None
        return Failure(seed, self.name, mesh.shape, found, describe(prepared, trial.smallest(assignment)))


def _groups(prepared: Prepared, rng: random.Random) -> tuple[list[Factor], Sequence[Sequence[Factor]]]:
    """What is split together: the planner's groups, its candidates one by one, or any leaf at all."""
    kind = rng.choice(["groups", "candidates", "leaves"])
    any_leaf = kind == "leaves"
    leaves = prepared.static_leaves() if any_leaf else candidates(prepared.analysis, prepared.states)
    if kind == "groups":
        return leaves, [group.leaves for group in group_leaves(prepared.analysis, prepared.states, leaves)]
    return leaves, [(leaf,) for leaf in leaves]


def _sizes(prepared: Prepared, rng: random.Random) -> SizeSet:
    batch, sequence, past = rng.choice(STEPS)
    if past and sequence > 1 and any(node.op_type == "GroupQueryAttention" for node in prepared.model.graph):
        batch = 1
    return SizeSet(batch=batch, sequence=sequence, past=past, encoder=6, others=(5,) * 8)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One model on one mesh at one step."""

    prepared: Prepared
    sweeper: Sweeper
    mesh: Mesh
    sizes: SizeSet

    def run(self, assignment: Assignment) -> str | None:
        """What is wrong with an assignment, if anything."""
        try:
            outcome = self.sweeper.sweep(assignment)
        except InfeasibleError:
            return None
        try:
            error = self.prepared.greatest_error(self.prepared.split(self.mesh, assignment, outcome), self.sizes)
        except CRASHES as crash:
            return f"{type(crash).__name__}: {crash}"
        return None if error < TOLERANCE else f"relative error {error:.1e}"

    def smallest(self, assignment: Assignment) -> Assignment:
        """The part of a wrong assignment that is still wrong, and would not be if anything were taken away."""
        for leaf in list(assignment):
            fewer = {other: axes for other, axes in assignment.items() if other is not leaf}
            if self.run(fewer) is not None:
                assignment = fewer
        return assignment


def campaign(names: Sequence[str], plans: int, first_seed: int = 0) -> Iterator[Failure | None]:
    """The outcome of `plans` plans, the models in turn."""
    fuzzers = [Fuzzer(name) for name in names]
    for number in range(plans):
        yield fuzzers[number % len(fuzzers)].plan(first_seed + number // len(fuzzers))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Run random plans over the zoo and compare with the unsplit models.")
    parser.add_argument("--plans", type=int, default=300)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--model", default="", help="only models whose path has this in it")
    arguments = parser.parse_args()
    names = [name for name in zoo_models() if arguments.model in name]
    started, failures = time.monotonic(), 0
    for failure in campaign(names, arguments.plans, arguments.first_seed):
        if failure is not None:
            failures += 1
            sys.stdout.write(f"{failure}\n")
            sys.stdout.flush()
    seconds = time.monotonic() - started
    sys.stdout.write(f"{arguments.plans} plans of {len(names)} models: {failures} wrong, {seconds:.0f} s\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
