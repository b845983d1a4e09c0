"""Placements: one form for each meaning of a sharding spec, and how a tensor gets from one to another."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import pytest
from onnx_ir import serde

from furiosa_llm.builder.plan.annotations.correspondence import Correspondence
from furiosa_llm.builder.plan.annotations.device_placement import (
    Component,
    DeviceSpec,
    placement_from,
    placement_of,
    relation,
    to_proto,
)
from furiosa_llm.runtime.artifact.layout import Mesh
from tests.support.builder.sharding_specs import ALL, EACH, PAIRS, Axes, Devices, spec

MESH = Mesh((2, 2))


def place(axes: Axes, devices: Devices, *shape: int | None) -> DeviceSpec:
    return placement_from(spec("t", axes, devices), shape)


def test_specs_that_mean_the_same_are_equal() -> None:
    assert place({1: 4}, EACH, 6, 8) == place({-1: [(8, 4)]}, EACH, 6, 8)
    assert place({1: [(4, 4), (2, 1)]}, EACH, 6, 8) == place({1: 4}, EACH, 6, 8)
    assert place({1: [(2, 2), (4, 2)]}, EACH, 6, 8) == place({1: 4}, EACH, 6, 8)
    assert place({1: 2, 0: 2}, (0, 2, 1, 3), 6, 8) == place({0: 2, 1: 2}, EACH, 6, 8)
    assert place({0: 1}, ALL, 6, 8) == place({}, EACH, 6, 8)
    assert place({0: 2}, PAIRS, 6) == place({0: 2}, ((1, 0), (3, 2)), 6)


def test_specs_that_mean_something_else_differ() -> None:
    assert place({1: [(2, 1), (4, 4)]}, EACH, 6, 8) != place({1: 4}, EACH, 6, 8)
    assert place({1: [(2, 1), (4, 2)]}, PAIRS, 6, 8) != place({1: [(4, 1), (2, 2)]}, PAIRS, 6, 8)
    assert place({0: [(9, 4), (2, 1)]}, EACH, 18) != place({0: 4}, EACH, 18)
    assert place({0: [(2, 2), (7, 2)]}, EACH, 14) != place({0: 4}, EACH, 14)
    assert place({0: 4}, (0, 1, 3, 2), 8) != place({0: 4}, EACH, 8)
    assert place({0: 2, 1: 2}, EACH, 6, 8) != place({0: 2, 1: 2}, (0, 2, 1, 3), 6, 8)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (({0: 4}, EACH), ({0: 4}, EACH), "same"),
        (({0: 4}, EACH), ({}, ALL), "gather"),
        (({0: 4}, EACH), ({0: 2}, PAIRS), "gather"),
        (({0: 2}, PAIRS), ({0: 4}, EACH), "slice"),
        (({}, ALL), ({1: 4}, EACH), "slice"),
        (({0: 4}, EACH), ({0: 2}, ((0, 2), (1, 3))), "exchange"),
        (({0: 4}, EACH), ({1: 4}, EACH), "exchange"),
        (({0: 4}, EACH), ({0: 4}, (3, 2, 1, 0)), "exchange"),
        (({0: 4}, EACH), ({0: 4}, (4, 5, 6, 7)), "elsewhere"),
        (({0: 2, 1: 2}, EACH), ({0: 2}, PAIRS), "gather"),
    ],
)
def test_relations(before: tuple[Axes, Devices], after: tuple[Axes, Devices], expected: str) -> None:
    for size in (8, 7, None):  # 7 over 4 is 2, 2, 2, 1 and over 2 is 4, 3: the borders still agree
        assert relation(place(*before, size, size), place(*after, size, size)) == expected


def test_uneven_shards_end_where_they_end() -> None:
    assert relation(place({0: 4}, EACH, 10), place({0: 2}, PAIRS, 10)) == "exchange"  # 3, 3, 3, 1 and 5, 5


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ([[Component(8, (0, 1))]], spec("t", {0: [(8, 4)]}, EACH)),
        ([[Component(8, (1, 0))]], spec("t", {0: [(8, 4)]}, (0, 2, 1, 3))),
        ([[Component(8, (0,))], [Component(6)]], spec("t", {0: [(8, 2)]}, PAIRS)),
        ([[Component(8, (1,))]], spec("t", {0: [(8, 2)]}, ((0, 2), (1, 3)))),
        ([[Component(2, (0,)), Component(4, (1,)), Component(3)]], spec("t", {0: [(24, 4)]}, EACH)),
        ([[Component(4, (1,)), Component(4, (0,))]], spec("t", {0: [(4, 2), (4, 2)]}, (0, 2, 1, 3))),
        ([[Component(9, (0, 1)), Component(2)]], spec("t", {0: [(9, 4), (2, 1)]}, EACH)),
        ([[Component(None)], [Component(None)]], spec("t", {}, ALL)),
    ],
)
def test_plans_are_said_with_the_fewest_components(
    axes: Sequence[Sequence[Component]], expected: onnx.ShardingSpecProto
) -> None:
    placement = placement_of(axes, MESH)
    assert placement is not None
    assert to_proto("t", placement) == expected


def test_dynamic_components_have_no_size() -> None:
    placement = placement_of([[Component(None), Component(8, (0, 1)), Component(4)]], MESH)
    assert placement is not None
    simple = to_proto("t", placement).sharded_dim[0].simple_sharding
    assert [(s.HasField("dim_value"), s.dim_value, s.num_shards) for s in simple] == [
        (False, 0, 1),
        (True, 32, 4),
    ]


def test_what_no_spec_can_say() -> None:
    assert placement_of([[Component(4)], None], MESH) is None
    assert placement_of([[Component(4, (0,))], [Component(4, (0,))]], MESH) is None  # a diagonal


def test_equal_nodes_that_became_one_are_found_by_what_reads_them() -> None:
    original = onnx.parser.parse_graph(
        "g (float[2] x) => (float[2] p, float[2] q) { a = Relu(x)\nb = Relu(x)\np = Neg(a)\nq = Abs(b) }"
    )
    kept = onnx.parser.parse_graph("g (float[2] x) => (float[2] p, float[2] q) { a = Relu(x)\np = Neg(a)\nq = Abs(a) }")
    graph = serde.deserialize_graph(kept)
    correspondence = Correspondence(original, graph)
    assert correspondence.node(original.node[1]) is graph[0]
    assert [value for _, _, _, value in correspondence.operands(original.node[1])] == [
        graph.inputs[0],
        graph[0].outputs[0],
    ]


def test_nodes_that_became_something_else_have_no_counterpart() -> None:
    original = onnx.parser.parse_graph("g (float[2] x) => (float[2] p, float[2] q) { p = Clip(x, l, h)\nq = Neg(x) }")
    kept = onnx.parser.parse_graph("g (float[2] x) => (float[2] p, float[2] q) { p = Clip(x)\nq = Abs(x) }")
    correspondence = Correspondence(original, serde.deserialize_graph(kept))
    assert [correspondence.node(node) for node in original.node] == [None, None]


def test_names_of_removed_aliases_are_found_again() -> None:
    original = onnx.parser.parse_graph(
        "g (float[2] x) => (float[2] out) { a = Relu(x)\nb = Identity(a)\nc = Identity(b)\nout = Neg(c) }"
    )
    kept = onnx.parser.parse_graph("g (float[2] x) => (float[2] out) { c = Relu(x)\nout = Neg(c) }")
    graph = serde.deserialize_graph(kept)
    correspondence = Correspondence(original, graph)
    assert {correspondence.value(name) for name in "abc"} == {graph[0].outputs[0]}
    assert correspondence.node(original.node[0]) is graph[0]
    assert correspondence.node(original.node[1]) is None
