"""What the planner chooses, what it refuses, and why."""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from furiosa_llm.builder import OptionError
from furiosa_llm.builder.artifact_builder import ArtifactBuilder
from furiosa_llm.builder.factors.factor import to_dim
from furiosa_llm.builder.factors.probe import PricedStep
from furiosa_llm.builder.plan.groups import LeafGroup, candidates
from furiosa_llm.builder.plan.mesh import MAX_PADDING, mesh_of
from furiosa_llm.builder.plan.outcome import Collective
from furiosa_llm.builder.plan.plan import Plan, Planning
from furiosa_llm.builder.plan.pricing import COLLECTIVE_CHARGE, Pricer, Subject, find_scales
from furiosa_llm.runtime.artifact.layout import local_size
from tests.support.builder.graphs import model
from tests.support.builder.plans import Prepared, prepare, prepare_proto
from tests.support.tiers import tiered


def plan_of(prepared: Prepared, tp: int, max_padding: float = MAX_PADDING) -> Plan:
    return Planning(prepared.analysis, prepared.states, prepared.probes).plan(mesh_of(tp), max_padding)


prepared_file = functools.cache(prepare)
"""A model up to its analysis, which planning leaves as it is."""


@functools.cache
def zoo_plan(zoo: Path, name: str, tp: int, max_padding: float = MAX_PADDING) -> Plan:
    return plan_of(prepared_file(zoo / name / "model.onnx"), tp, max_padding)


def axes_by_size(plan: Plan, size: int) -> list[tuple[int, ...]]:
    return sorted({axes for group, axes in plan.choices.items() if group.size == size})


def padding(group: LeafGroup, parts: int) -> float:
    return math.ceil(group.size / parts) * parts / group.size


def test_two_key_heads_over_eight_ranks(zoo: Path) -> None:
    """14/2 heads: each key head on four ranks, its seven query heads padded to eight among them."""
    plan = zoo_plan(zoo, "tiny-qwen2-14-2-optimum", 8)
    (key_heads,), (query_group,) = axes_by_size(plan, 2), axes_by_size(plan, 7)
    assert plan.mesh.parts(key_heads) == 2
    assert plan.mesh.parts(query_group) == 4
    assert not set(key_heads) & set(query_group)


def test_three_key_heads_over_eight_ranks(zoo: Path) -> None:
    """9/3 heads: key heads padded to four, and their three query heads split in two, padded to four."""
    plan = zoo_plan(zoo, "tiny-llama-9-3-optimum", 8)
    found = axes_by_size(plan, 3)
    assert sorted(plan.mesh.parts(axes) for axes in found) == [2, 4]


@pytest.mark.parametrize(
    ("name", "tp"),
    tiered(
        itertools.product(["tiny-qwen2-14-2-optimum", "tiny-llama-9-3-optimum", "tiny-llama-optimum"], [4, 8]),
        [("tiny-qwen2-14-2-optimum", 8), ("tiny-llama-9-3-optimum", 4)],
    ),
)
@pytest.mark.parametrize("limit", [1.0, 1.2, 1.34])
def test_padding_stays_within_its_limit(name: str, tp: int, limit: float, zoo: Path) -> None:
    plan = zoo_plan(zoo, name, tp, limit)
    assert {group for group, axes in plan.choices.items() if padding(group, plan.mesh.parts(axes)) > limit} == set()
    if limit == 1.0 and name == "tiny-qwen2-14-2-optimum" and tp == 8:
        assert axes_by_size(plan, 7) == []
        assert any(f"limit {limit}x" in refused.reason for refused in plan.refused)


@pytest.mark.parametrize("limit", [0.0, 0.99, -1.0, math.nan])
def test_padding_limits_below_one_mean_nothing(limit: float) -> None:
    with pytest.raises(OptionError, match="max_padding must be a number of at least 1"):
        ArtifactBuilder("model.onnx", max_padding=limit)


def test_attention_and_feed_forward_side_by_side_make_one_sum(zoo: Path) -> None:
    """One per layer, and one for the embedding."""
    plan = zoo_plan(zoo, "tiny-neox-optimum", 4)
    assert [c.kind for c in plan.outcome.collectives].count("AllReduce") == 2 + 1, (
        "one per layer, one for the embedding"
    )


@pytest.mark.parametrize(
    "name", tiered(["tiny-llama-optimum", "tiny-bloom-optimum", "tiny-gpt2-dynamo-tf5"], ["tiny-llama-optimum"])
)
def test_every_alternative_that_was_not_taken_has_its_reason(name: str, zoo: Path) -> None:
    plan = zoo_plan(zoo, name, 8)
    assert plan.refused
    for refused in plan.refused:
        chosen = plan.choices.get(refused.group, ())
        assert len(refused.axes) > len(chosen) or (chosen and refused.axes == ())
        assert refused.reason
        assert refused.group.description


@pytest.mark.parametrize("tp", [4, 8])
def test_a_plan_is_cheaper_than_none(tp: int, zoo: Path) -> None:
    plan = zoo_plan(zoo, "tiny-llama-optimum", tp)
    assert plan.price.nbytes < 2 * plan.unsplit.nbytes / tp
    assert plan.unsplit.collectives == 0
    assert plan.price.collectives == len(plan.outcome.collectives)


def test_layers_are_split_alike(zoo: Path) -> None:
    """A group has a leaf of each layer; what is alike in both is not two groups."""
    prepared = prepared_file(zoo / "tiny-llama-genai-fp32" / "model.onnx")
    plan = plan_of(prepared, 4)
    layers = {group.size: len(group.leaves) for group in plan.choices if group.size in (2, 176)}
    assert layers == {2: 2, 176: 2}


def test_routers_and_rotary_tables_are_left_alone(zoo: Path) -> None:
    """They are small, and splitting them costs collectives."""
    plan = zoo_plan(zoo, "tiny-mixtral-dynamo-tf5", 4)
    assert all("Gemm[1][4, 64]" not in group.description for group in plan.choices)


# -- policies --------------------------------------------------------------------------------------------------------


def payload(plan: Plan, collective: Collective, step: PricedStep, prepared: Prepared) -> float:
    """Elements that one rank gives into a collective, per new position."""
    value, assignment = collective.value, dict(plan.assignment)
    size = 1.0
    for factor, total in zip(prepared.analysis.dims[value], step.facts[value].shape, strict=True):
        dim = to_dim(factor, assignment)
        size *= total * local_size(dim, plan.mesh) / factor.find().size
    return size / step.positions


@pytest.mark.parametrize(
    ("name", "tp"),
    tiered(
        itertools.product(
            ["tiny-llama-optimum", "tiny-bloom-optimum", "tiny-phi3-optimum", "tiny-llama-genai-fp32"], [4, 8]
        ),
        [("tiny-llama-optimum", 8), ("tiny-llama-genai-fp32", 4)],
    ),
)
def test_no_collective_grows_with_the_context(name: str, tp: int, zoo: Path) -> None:
    prepared = prepared_file(zoo / name / "model.onnx")
    plan = plan_of(prepared, tp)
    for collective in plan.outcome.collectives:
        short, long = (payload(plan, collective, s, prepared) for s in (prepared.probes.decode, prepared.probes.longer))
        assert short == long


def talking_heads() -> Prepared:
    """Attention whose heads are mixed between scores and softmax: split heads would mean a sum of all scores.

    The cache is all that costs anything, and the heads are all that could be split.
    """
    nodes = """
        x = Gather(e, input_ids)
        q0 = MatMul(x, wq) q1 = Reshape(q0, heads) q = Transpose<perm=[0, 2, 1, 3]>(q1)
        k0 = MatMul(x, wk) k1 = Reshape(k0, heads) k2 = Transpose<perm=[0, 2, 1, 3]>(k1)
        present_k = Concat<axis=2>(past_k, k2) kt = Transpose<perm=[0, 1, 3, 2]>(present_k)
        s = MatMul(q, kt) st = Transpose<perm=[0, 2, 3, 1]>(s) m = MatMul(st, mix) a = Softmax<axis=2>(m)
        logits = ReduceSum<keepdims=0>(a, axis)
    """
    weights = {"e": (1000, 1), "wq": (1, 4096), "wk": (1, 4096), "mix": (8, 8)}
    sizes = {"heads": np.array([0, 0, 8, 512]), "axis": np.array([2])}
    inputs = "int64[batch, sequence] input_ids, float[batch, 8, past, 512] past_k"
    outputs = "float[batch, sequence, 8] logits, float[batch, 8, total, 512] present_k"
    return prepare_proto(model(inputs, outputs, nodes, {**weights, **sizes}))


def test_what_would_grow_with_the_context_is_refused_with_that_reason() -> None:
    prepared = talking_heads()
    plan = plan_of(prepared, 4)
    reasons = {refused.reason for refused in plan.refused if refused.group.size == 8}
    assert any("would grow with the context" in reason for reason in reasons)
    for collective in plan.outcome.collectives:
        short, long = (payload(plan, collective, s, prepared) for s in (prepared.probes.decode, prepared.probes.longer))
        assert short == long


def test_head_vectors_and_inputs_that_are_no_state_are_no_candidates() -> None:
    prepared = talking_heads()
    leaves = candidates(prepared.analysis, prepared.states)
    assert 512 not in {leaf.size for leaf in leaves}, "attention kernels want whole heads"
    assert 8 in {leaf.size for leaf in leaves}


def test_scales_are_no_matrices_of_their_own(zoo: Path) -> None:
    """A collective must save a share of the median matrix: the codes of gate and up, 176 x 2 x 16 bytes."""
    prepared = prepared_file(zoo / "tiny-llama-genai-int4" / "model.onnx")
    probes = prepared.probes
    subject = Subject(analysis=prepared.analysis, states=prepared.states, decode=probes.decode, longer=probes.longer)
    pricer = Pricer(subject, mesh_of(8), candidates(prepared.analysis, prepared.states))
    assert pricer.charge == COLLECTIVE_CHARGE * 176 * 2 * 16
    names = sorted(str(value.name) for value in find_scales(prepared.analysis) if "layers.0" in str(value.name))
    assert len(names) == 5
    assert all(name.endswith("scales") for name in names)


@pytest.mark.parametrize("tp", tiered([4, 8], [4]))
def test_blocks_are_split_as_wholes(tp: int, zoo: Path) -> None:
    """176 are 5.5 blocks of 32: 6 over 4 are two each, over 8 one each; a limit below 8/6 refuses that."""
    plan = zoo_plan(zoo, "tiny-llama-genai-int4", tp)
    assert [plan.mesh.parts(axes) for axes in axes_by_size(plan, 6)] == [tp]
    limited = zoo_plan(zoo, "tiny-llama-genai-int4", tp, 1.3)
    assert [limited.mesh.parts(axes) for axes in axes_by_size(limited, 6)] == [2]
    assert any(f"6 over {tp} needs padding to 8 (1.33x, limit 1.3x)" in refused.reason for refused in limited.refused)
