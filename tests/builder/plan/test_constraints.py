"""Demands on dimensions of values become demands on the leaves that plans are made of."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from furiosa_llm.builder.errors import ConstraintError
from furiosa_llm.builder.plan.constraints import Constraint, leaf_parts
from tests.support.builder.graphs import model
from tests.support.builder.plans import prepare_proto


def small_demand(*given: tuple[str, int, int]) -> Mapping[int, int]:
    """Leaf sizes and parts that demands on `a`, of 8 heads of 16, `b`, its heads, and `c`, packed, lead to."""
    prepared = prepare_proto(
        model(
            "float[2, 6, 64] x, float[2, 8, 6, 16] past_y",
            "float[2, 8, 6, 16] b, float[2, 6, 32] e",
            "a = MatMul(x, W)\nr = Reshape(a, s)\nt = Transpose<perm = [0, 2, 1, 3]>(r)\nb = Add(t, past_y)\n"
            "c = MatMul(x, V)\nd, e = Split<axis = -1>(c, p)",
            {"W": (64, 128), "s": np.array([2, 6, 8, 16]), "V": (64, 64), "p": np.array([32, 32])},
        )
    )
    values = {str(v.name): v for v in prepared.analysis.dims}
    demands = [
        (Constraint(value=v, dim=d, parts=n, origin=f"line {i}"), values[v]) for i, (v, d, n) in enumerate(given)
    ]
    return {leaf.size: found.parts for leaf, found in leaf_parts(demands, prepared.analysis).items()}


def test_demands_on_dimensions_become_demands_on_leaves() -> None:
    assert small_demand(("a", 2, 8)) == {8: 8, 16: 1}
    assert small_demand(("a", 2, 16)) == {8: 8, 16: 2}
    assert small_demand(("a", 2, 4), ("b", 3, 1)) == {8: 4, 16: 1}
    assert small_demand(("a", 2, 4), ("b", 1, 2)) == {8: 2, 16: 2}
    assert small_demand(("c", 2, 1), ("W", 1, 1)) == {8: 1, 16: 1, 32: 1}


def test_what_is_cut_apart_inside_a_dimension_stays_whole() -> None:
    prepared = prepare_proto(
        model(
            "float[2, 6, 64] x",
            "float[2, 6, 8, 10] c",
            "a = MatMul(x, W)\nr = Reshape(a, s)\nb, c = Split<axis = -1>(r, p)",
            {"W": (64, 128), "s": np.array([2, 6, 8, 16]), "p": np.array([6, 10])},
        )
    )
    weight = next(v for v in prepared.analysis.dims if v.name == "W")
    found = leaf_parts([(Constraint(value="W", dim=1, parts=4, origin="line 0"), weight)], prepared.analysis)
    assert {leaf.size: demand.parts for leaf, demand in found.items()} == {8: 4, 6: 1, 10: 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            [("a", 2, 4), ("b", 1, 8)],
            r'line 0 wants dimension 2 of "a" split by 4, but line 1 wants dimension 1 of "b"',
        ),
        ([("a", 2, 4), ("W", 1, 1)], r'line 0 .* split by 4, but line 1 wants dimension 1 of "W" whole'),
        ([("b", 1, 4), ("b", 1, 2)], r"run over the same indices; demand the same of both, or drop one"),
        ([("c", 2, 4)], r"a concatenation, \(32\|32\), whose segments are split one by one; constrain what is cut"),
        ([("b", 4, 2)], r'speaks of dimension 4 of "b", which has 4 dimensions; use one from 0 to 3'),
    ],
)
def test_demands_that_cannot_be_met_are_refused(given: list[tuple[str, int, int]], message: str) -> None:
    with pytest.raises(ConstraintError, match=message):
        small_demand(*given)
