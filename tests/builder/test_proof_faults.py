"""Every kind of seeded fault is found, wherever it can be made."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np
import onnx
import pytest

from furiosa_llm.builder.outcome import InfeasibleError
from furiosa_llm.builder.proof import Fault, check_program
from furiosa_llm.builder.sweep import Sweeper
from furiosa_llm.runtime.artifact.layout import Mesh
from tests.builder.conftest import Built
from tests.builder.faults import KINDS, Subject, relaid, split_weights
from tests.builder.graphs import model
from tests.builder.plans import prepare_proto
from tests.builder.produced import produced
from tests.builder.proofs import assignments
from tests.builder.test_mutations import padded_quotient

ARTIFACTS = [
    ("tiny-llama-optimum", 4),
    ("tiny-qwen2-14-2-optimum", 4),
    ("tiny-gptoss-genai-fp32-fullkv", 4),
    ("tiny-qwen2-genai-int4", 4),
    ("tiny-llama-genai-int4-qdq", 8),
    ("tiny-gpt2-optimum", 4),
    ("tiny-t5-optimum/encoder_model.onnx", 4),
]
"""Decomposed attention, padded heads, fused attention with experts, quantised weights, biases, no states."""

FEW = 1
"""Places of each kind in each artifact that `make test` tries; `make test-real` tries all."""


def a_mean_of_parts() -> onnx.ModelProto:
    """A root mean square over a dimension that a product has split."""
    nodes = "h = MatMul(past_x, a) s = Mul(h, h) m = ReduceMean(s, last) y = Sqrt(m)"
    return model("float[4, 5] past_x", "float[4, 1] y", nodes, {"a": (5, 8), "last": np.array([-1])})


def an_uneven_output() -> onnx.ModelProto:
    """Seven columns over four ranks: what is gathered has padding in it."""
    return model("float[4, 5] past_x", "float[4, 7] y", "y = MatMul(past_x, a)", {"a": (5, 7)})


HANDMADE = {"/average": a_mean_of_parts, "/cleared": padded_quotient, "/order": an_uneven_output}
"""What no artifact of the zoo has, by what its nodes are named: a model to make it of."""

ONLY_HANDMADE = ("a mean of parts", "padding that", "a mask of padding", "gathered parts")
"""Kinds that are made in these models. Others may do no harm there: one weight alone may be split in any order."""


@functools.cache
def handmade(name: str) -> Subject:
    """A program with a node whose name ends so."""
    prepared, mesh = prepare_proto(HANDMADE[name]()), Mesh((2, 2))
    leaves = prepared.static_leaves()
    sweeper = Sweeper(prepared.analysis, mesh, leaves, prepared.states)
    for assignment in assignments(leaves, mesh, 0):
        try:
            outcome = sweeper.sweep(assignment)
        except InfeasibleError:
            continue
        subject = produced(prepared, mesh, assignment, outcome)
        if any(node.name.endswith(name) for node in subject.program.graph.node):
            return subject
    raise AssertionError(f"no plan gives a node {name}")


def faults_of(subject: Subject) -> tuple[Fault, ...]:
    return check_program(subject.program, subject.manifest, subject.constants).faults


@pytest.fixture(scope="module")
def subjects(built: Built) -> dict[str, Subject]:
    """Artifacts and programs without a fault."""
    found = {f"{path}-{tp}": Subject.of(built(path, tp)[1]) for path, tp in ARTIFACTS}
    return found | {name: handmade(name) for name in HANDMADE}


def seeded(kind: str, subject: Subject, limit: int | None) -> Iterator[tuple[int, Subject]]:
    """The places of a kind in one artifact, spread over all of them."""
    places = enumerate(KINDS[kind](subject))
    return itertools.islice(places, limit)


def missed(kind: str, subjects: dict[str, Subject], limit: int | None) -> tuple[int, list[str]]:
    """How many places a kind has, and those in which it is not found."""
    tried, found = 0, []
    for name, subject in subjects.items():
        if (name in HANDMADE) is not kind.startswith(ONLY_HANDMADE):
            continue
        for number, altered in seeded(kind, subject, limit):
            tried += 1
            if not faults_of(altered):
                found.append(f"{name}, place {number}")
    return tried, found


def test_what_is_seeded_has_no_fault_by_itself(subjects: dict[str, Subject]) -> None:
    for name, subject in subjects.items():
        assert faults_of(subject) == (), name
        same = subject.copy()
        same.relist_collectives()
        assert faults_of(same) == (), name
        for tensor, layout in itertools.islice(split_weights(subject), 2):
            assert faults_of(relaid(subject, tensor, layout)) == (), (name, tensor.name)


@pytest.mark.parametrize("kind", KINDS)
def test_seeded_fault_is_found(kind: str, subjects: dict[str, Subject]) -> None:
    tried, found = missed(kind, subjects, FEW)
    assert tried, "the kind can be made nowhere"
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_seeded_fault_is_found_everywhere(kind: str, subjects: dict[str, Subject]) -> None:
    _, found = missed(kind, subjects, None)
    assert found == []


def test_there_are_enough_kinds() -> None:
    assert len(KINDS) >= 30


def test_a_fault_says_what_was_found_and_what_to_do(subjects: dict[str, Subject]) -> None:
    subject = subjects["tiny-llama-optimum-4"]
    _, altered = next(seeded("a collective dropped", subject, 1))
    (fault, *_) = faults_of(altered)
    assert fault.node
    assert "partial sum" in fault.what
    assert "AllReduce" in fault.expected
    assert "build the artifact again" in fault.remedy
    assert str(fault) == f"{fault.node}: found {fault.what}, expected {fault.expected}; {fault.remedy}"
