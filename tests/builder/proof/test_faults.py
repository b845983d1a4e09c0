"""Every kind of seeded fault is found, wherever it can be made."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np
import onnx
import pytest

from furiosa_llm.builder.plan.outcome import InfeasibleError
from furiosa_llm.builder.plan.sweep import Sweeper
from furiosa_llm.builder.proof import Fault, check_program
from furiosa_llm.runtime.artifact.layout import Mesh
from tests.builder.rules.test_mutations import padded_quotient
from tests.conftest import Built
from tests.support.builder.faults import KINDS, Subject, relaid, split_weights
from tests.support.builder.graphs import model
from tests.support.builder.op_case import codes, positive
from tests.support.builder.plans import prepare_proto
from tests.support.builder.produced import produced
from tests.support.builder.proofs import assignments

ARTIFACTS = [
    ("tiny-llama-optimum", 4),
    ("tiny-qwen2-14-2-optimum", 8),
    ("tiny-gptoss-genai-fp32-fullkv", 4),
    ("tiny-llama-genai-int4", 4),
    ("tiny-llama-genai-int4-qdq", 8),
    ("tiny-gpt2-optimum", 4),
    ("tiny-t5-optimum/decoder_with_past_model.onnx", 4),
    ("tiny-bert-optimum", 4),
]
"""Attention that was fused, padded heads, experts, short blocks, biases, decomposed attention, no states."""

FEW = 1
"""Places of each kind in each artifact that are tried; `make test` ends at the second artifact that has one."""
SEVERAL = 2
"""The same of `make test-all`, in every artifact; a release tries all places."""


def a_mean_of_parts() -> onnx.ModelProto:
    """A root mean square over a dimension that a product has split."""
    nodes = "h = MatMul(past_x, a) s = Mul(h, h) m = ReduceMean(s, last) y = Sqrt(m)"
    return model("float[4, 5] past_x", "float[4, 1] y", nodes, {"a": (5, 8), "last": np.array([-1])})


def an_uneven_output() -> onnx.ModelProto:
    """Seven columns over four ranks: what is gathered has padding in it."""
    return model("float[4, 5] past_x", "float[4, 7] y", "y = MatMul(past_x, a)", {"a": (5, 7)})


def a_short_block() -> onnx.ModelProto:
    """Four blocks over four ranks, the last one half full: what is multiplied with the rest of it is not zero."""
    nodes = (
        "h = MatMul(past_x, a) s = Sigmoid(h) y = com.microsoft.MatMulNBits<K=56, N=6, bits=4, block_size=16>(s, q, t)"
    )
    weights = {"a": (5, 56), "q": codes(6, 4, 8), "t": positive(6, 4)}
    return model("float[4, 5] past_x", "float[4, 6] y", nodes, weights)


def blocks_around_a_point() -> onnx.ModelProto:
    """Six blocks over four ranks: scales are zero in those that are padding, and not in the rest of the last one."""
    nodes = "h = MatMul(past_x, a) s = Sigmoid(h) w = DequantizeLinear<axis=0, block_size=16>(q, t, z) y = MatMul(s, w)"
    weights = {"a": (5, 88), "q": codes(88, 6), "t": positive(6, 6), "z": codes(6, 6)}
    return model("float[4, 5] past_x", "float[4, 6] y", nodes, weights)


def a_product_of_codes() -> onnx.ModelProto:
    """Six codes over four ranks: one rank has padding alone."""
    return model("uint8[4, 6] past_x", "int32[4, 7] y", "y = MatMulInteger(past_x, w)", {"w": codes(6, 7)})


HANDMADE = {
    "a mean": ("/average", a_mean_of_parts),
    "a quotient": ("/cleared", padded_quotient),
    "an output": ("/order", an_uneven_output),
    "a short block": ("/cleared", a_short_block),
    "blocks around a point": ("/cleared", blocks_around_a_point),
    "a product of codes": ("/AllReduce", a_product_of_codes),
}
"""What no artifact of the zoo has: the ends of names of nodes that there are then, and a model to make it of."""

ONLY_HANDMADE = ("a mean of parts", "padding that", "a mask of padding", "gathered parts", "zero points that")
"""Kinds that are made in these models. Others may do no harm there: one weight alone may be split in any order."""


@functools.cache
def handmade(name: str) -> Subject:
    """A program with a node of that name."""
    ending, make = HANDMADE[name]
    prepared, mesh = prepare_proto(make()), Mesh((2, 2))
    leaves = prepared.static_leaves()
    sweeper = Sweeper(prepared.analysis, mesh, leaves, prepared.states)
    for assignment in assignments(leaves, mesh, 0):
        try:
            outcome = sweeper.sweep(assignment)
        except InfeasibleError:
            continue
        subject = produced(prepared, mesh, assignment, outcome)
        if any(node.name.endswith(ending) for node in subject.program.graph.node):
            return subject
    raise AssertionError(f"no plan gives a node {ending}")


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


def missed(
    kind: str, subjects: dict[str, Subject], limit: int | None, enough: float = math.inf
) -> tuple[int, list[str]]:
    """How many places of a kind were tried, and those in which it is not found."""
    tried, found = 0, []
    for name, subject in subjects.items():
        if tried >= enough:
            break
        if (name in HANDMADE) is not kind.startswith(ONLY_HANDMADE):
            continue
        for number, altered in seeded(kind, subject, limit):
            tried += 1
            if not faults_of(altered):
                found.append(f"{name}, place {number}")
    return tried, found


@pytest.mark.slow
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
    tried, found = missed(kind, subjects, FEW, enough=1)
    assert tried, "the kind can be made nowhere"
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_seeded_fault_is_found_in_every_artifact(kind: str, subjects: dict[str, Subject]) -> None:
    _, found = missed(kind, subjects, SEVERAL)
    assert found == []


@pytest.mark.release
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
