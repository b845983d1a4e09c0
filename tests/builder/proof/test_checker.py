"""The checker of produced programs finds nothing in what the builder writes, for any model, size and assignment."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest

from furiosa_llm.builder import ArtifactBuilder
from furiosa_llm.builder.plan.groups import candidates, group_leaves
from furiosa_llm.builder.plan.outcome import InfeasibleError
from furiosa_llm.builder.plan.sweep import Sweeper
from furiosa_llm.builder.proof import check_program, prove
from furiosa_llm.runtime.artifact.layout import Mesh
from tests.builder.plan.test_sweep import PASSES, STOPS
from tests.builder.test_zoo import ROWS
from tests.campaigns.fuzz_plans import MESHES, ZOO
from tests.conftest import Built
from tests.support.builder.faults import Subject
from tests.support.builder.op_cases import CASES
from tests.support.builder.plans import prepare, prepare_proto, random_assignment
from tests.support.builder.produced import produced
from tests.support.builder.proofs import assignments
from tests.support.tiers import MECHANISMS, tiered

Make = Callable[[], onnx.ModelProto]
SMALL: dict[str, Make] = {case.name: case.model for case in CASES}
SMALL |= {f"partial sum, {name}": case.model for name, case in {**PASSES, **STOPS}.items()}
PLANS = 2
"""Assignments of each small model."""

RANDOM = ("tiny-qwen2-14-2-optimum", "tiny-gpt2-dynamo-tf5", "tiny-llama-genai-int4", "tiny-bloom-optimum")


def check(subject: Subject) -> None:
    assert check_program(subject.program, subject.manifest, subject.constants).faults == ()


@pytest.mark.parametrize(("path", "tp"), tiered(ROWS, MECHANISMS))
def test_no_artifact_of_the_zoo_has_a_fault(path: str, tp: int, built: Built) -> None:
    _, artifact = built(path, tp)
    report = prove(artifact.folder)
    assert report.faults == ()
    assert report.is_proved
    assert report.num_nodes == len(artifact.program.graph.node)
    made = {name for node in artifact.program.graph.node for name in node.output if name}
    assert made <= report.placements.keys()
    assert "unknown" not in report.placements.values()


def feasible(proto: onnx.ModelProto) -> Iterator[Subject]:
    """The programs of a small model's assignments."""
    prepared, mesh = prepare_proto(proto), Mesh((2, 2))
    leaves = prepared.static_leaves()
    sweeper = Sweeper(prepared.analysis, mesh, leaves, prepared.states)
    for assignment in assignments(leaves, mesh, 0):
        try:
            outcome = sweeper.sweep(assignment)
        except InfeasibleError:
            continue
        yield produced(prepared, mesh, assignment, outcome)


@pytest.mark.parametrize("name", SMALL)
def test_no_rule_gives_a_fault(name: str) -> None:
    for subject in itertools.islice(feasible(SMALL[name]()), PLANS):
        check(subject)


@pytest.mark.parametrize("name", tiered(RANDOM, RANDOM[:1]))
def test_no_random_plan_has_a_fault(name: str) -> None:
    prepared = prepare(ZOO / name / "model.onnx")
    leaves = candidates(prepared.analysis, prepared.states)
    groups = [group.leaves for group in group_leaves(prepared.analysis, prepared.states, leaves)]
    for seed in range(3):
        rng = random.Random(f"{name} {seed}")
        mesh = rng.choice(MESHES)
        sweeper = Sweeper(prepared.analysis, mesh, leaves, prepared.states)
        assignment, outcome = random_assignment(sweeper, groups, mesh, rng, 8)
        check(produced(prepared, mesh, assignment, outcome))


def test_placements_are_those_of_the_plan(built: Built) -> None:
    _, artifact = built("tiny-llama-genai-fp32", 4)
    placements = prove(artifact.folder).placements
    assert placements["model.embed_tokens.weight"] == "[axis0(2) axis1(2) 256, 64]"
    assert placements["past_key_values.0.key"] == "[?, axis0(2), ?, 16]"
    assert placements["logits"] == "[?, ?, 1024]"
    assert "partial over axes [0, 1]" in placements["/model/layers.0/attn/o_proj/MatMul/output_0"]


def test_a_malformed_graph_is_a_fault(built: Built) -> None:
    subject = Subject.of(built("tiny-llama-genai-fp32", 4)[1]).copy()
    node = subject.program.graph.node[-1]
    subject.program.graph.node.append(node)
    (fault,) = check_program(subject.program, subject.manifest, subject.constants).faults
    assert fault.node == "program.onnx"
    assert "malformed" in fault.what


@pytest.mark.slow
def test_an_artifact_is_checked_in_less_time_than_it_is_built(zoo: Path, tmp_path: Path) -> None:
    started = time.process_time()
    ArtifactBuilder(zoo / "tiny-qwen3moe-optimum" / "model.onnx", tensor_parallel_size=8).build(tmp_path / "artifact")
    built = time.process_time()
    prove(tmp_path / "artifact")
    assert time.process_time() - built < (built - started) / 2
