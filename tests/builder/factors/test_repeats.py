"""Repeated layers: found by structure alone, and never where a layer differs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from furiosa_llm.builder.factors.analysis import Analysis
from furiosa_llm.builder.factors.probe import Probes
from furiosa_llm.builder.factors.repeats import Reduced, Repeat, find_repeats, reduce_repeats
from furiosa_llm.builder.factors.states import States
from furiosa_llm.builder.options import BuildOptions
from furiosa_llm.builder.pipeline import analyse_model
from furiosa_llm.builder.plan.plan import Plan, Planning
from furiosa_llm.builder.plan.pricing import Subject
from furiosa_llm.builder.plan.search import Planner
from furiosa_llm.builder.shapes.interpreter import Facts
from furiosa_llm.runtime.artifact.layout import Mesh
from tests.support.builder.plans import Prepared, prepare_proto
from tests.support.builder.stacks import change, reader_at_the_end, stack

FEW = Mesh((2, 2))
PERIOD = 4
"""Nodes of a layer of `stack`."""


def facts_of(prepared: Prepared) -> list[Facts]:
    probes = prepared.probes
    return [probes.facts, probes.others, probes.decode.facts, probes.longer.facts]


def repeats_of(proto: onnx.ModelProto) -> list[Repeat]:
    prepared = prepare_proto(proto)
    return find_repeats(prepared.model.graph, facts_of(prepared))


def reduced(prepared: Prepared) -> Reduced:
    found = reduce_repeats(prepared.model.graph, facts_of(prepared))
    assert found is not None
    return found


def choices(plan: Plan) -> dict[tuple[str, int, str], tuple[tuple[int, ...], int]]:
    return {
        (group.role, group.size, group.description): (axes, len(group.leaves)) for group, axes in plan.choices.items()
    }


def test_equal_layers_are_found() -> None:
    (repeat,) = repeats_of(stack(9))
    assert (repeat.period, repeat.copies) == (PERIOD, 9)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_few_layers_are_left_alone(layers: int) -> None:
    assert repeats_of(stack(layers)) == []


def test_layers_around_one_of_another_size() -> None:
    """Two runs, and what is odd between them stays: the sum behind the odd matrices is like any other."""
    first, second = repeats_of(stack(11, odd={5: 32}))
    assert (first.copies, second.copies) == (5, 5)
    assert second.start - first.stop == PERIOD - 1


def test_layers_that_alternate_repeat_in_pairs() -> None:
    (repeat,) = repeats_of(stack(12, odd=dict.fromkeys(range(1, 12, 2), 32)))
    assert (repeat.period, repeat.copies) == (2 * PERIOD, 6)


def test_a_weight_of_two_layers_is_no_layers_own() -> None:
    """Layers 3 and 4 share a matrix: no other two do."""

    def share(node: onnx.NodeProto) -> None:
        node.input[1] = "up3"

    repeats = repeats_of(change(stack(9), "a4", share))
    nodes = {i for r in repeats for i in range(r.start, r.stop)}
    assert 1 + 4 * PERIOD not in nodes or 1 + 3 * PERIOD not in nodes


def test_a_value_that_is_read_far_behind_stays() -> None:
    """What one of the middle layers gives is read at the end, so that it cannot be dropped."""
    assert all(r.stop <= 17 or r.start >= 13 for r in repeats_of(reader_at_the_end(stack(9), "c3", "c4")))


def test_an_output_in_the_middle_stays() -> None:
    proto = stack(9, outputs=["h4"])
    assert all(r.stop <= 17 or r.start >= 13 for r in repeats_of(proto))


def test_another_op_in_one_layer() -> None:
    def smooth(node: onnx.NodeProto) -> None:
        node.op_type = "Sigmoid"

    first, second = repeats_of(change(stack(11), "b5", smooth))
    assert first.stop <= 1 + 5 * PERIOD + 1 < second.start + PERIOD


def test_wiring_counts() -> None:
    """One layer adds its result to what the layer before was given."""

    def skip(node: onnx.NodeProto) -> None:
        node.input[0] = "h4"

    repeats = repeats_of(change(stack(11), "h6", skip))
    assert all(not r.start <= 1 + 5 * PERIOD + 3 < r.stop for r in repeats)


def test_the_reduced_graph_stands_for_the_whole() -> None:
    prepared = prepare_proto(stack(9))
    small = reduced(prepared)
    graph = prepared.model.graph
    assert len(small.graph) == len(graph) - 6 * PERIOD
    assert set(small.stand_ins) >= {v for node in graph for v in (*node.inputs, *node.outputs) if v is not None}
    assert sum(small.counts.values()) == len(small.stand_ins)
    weights = [small.stand_ins[graph.initializers[f"up{i}"]] for i in range(9)]
    assert len(set(weights)) == 3
    assert {small.counts[w] for w in weights} == {1, 7}
    facts = small.facts(prepared.probes.facts)
    for value, stand_in in small.stand_ins.items():
        assert facts[stand_in].shape == prepared.probes.facts[value].shape
    ir.to_proto(ir.Model(small.graph, ir_version=10))  # every value has one producer, in order


@pytest.mark.parametrize(
    "proto",
    [
        stack(9),
        stack(11, odd={5: 32}),
        stack(12, odd=dict.fromkeys(range(1, 12, 2), 32)),
        stack(9, outputs=["h4"]),
        reader_at_the_end(stack(9), "c3", "c4"),
    ],
    ids=["equal", "one-differs", "alternating", "output-inside", "read-at-the-end"],
)
def test_the_plan_is_the_one_of_the_whole_graph(proto: onnx.ModelProto) -> None:
    prepared = prepare_proto(proto)
    assert_same_plan(prepared.analysis, prepared.states, prepared.probes)


@pytest.mark.slow
def test_the_plan_of_a_full_size_graph_is_the_one_of_the_whole(graphs: Path) -> None:
    found = analyse_model(
        graphs / "qwen2.5-0.5b-dynamo-op21-fp32" / "model.onnx",
        BuildOptions(fuse_attention=False),
    )
    assert_same_plan(found.analysis, found.states, found.probes)


def assert_same_plan(analysis: Analysis, states: States, probes: Probes) -> None:
    plan = Planning(analysis, states, probes).plan(FEW)
    whole = Subject(analysis=analysis, states=states, decode=probes.decode, longer=probes.longer)
    decision = Planner(whole, FEW).decide()
    expected = {(g.role, g.size, g.description): (axes, len(g.leaves)) for g, axes in decision.choices.items()}
    assert choices(plan) == expected
    assert plan.price.collectives == decision.price.collectives
    assert plan.price.nbytes == pytest.approx(decision.price.nbytes, rel=1e-12)


def test_a_price_that_differs_on_the_whole_graph_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a reduced graph ever stand for the wrong number of layers, the whole graph is planned."""
    prepared = prepare_proto(stack(9))
    expected = choices(Planning(prepared.analysis, prepared.states, prepared.probes).plan(FEW))

    def wrong(graph: ir.Graph, facts: list[Facts]) -> Reduced:
        found = reduce_repeats(graph, facts)
        assert found is not None
        return dataclasses.replace(found, counts=dict.fromkeys(found.counts, 1))

    monkeypatch.setattr("furiosa_llm.builder.plan.plan.reduce_repeats", wrong)
    plan = Planning(prepared.analysis, prepared.states, prepared.probes).plan(FEW)
    assert choices(plan) == expected
    assert plan.price.collectives == len(plan.outcome.collectives)
