"""Factors: unification is exact, whatever comes before or after it, and conflicts corrupt nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from furiosa_llm.builder.factors.factor import (
    Factor,
    FactorConflictError,
    Kind,
    concatenation,
    leaves_in_prefixes,
    prefix,
    product,
    segment,
    segments_of,
    to_dim,
    unify,
)
from furiosa_llm.runtime.artifact.layout import Leaf, Mesh, axes_of, global_size, index_map, local_size

MESH = Mesh((2, 2, 2))
RUNS = [(), (0,), (1,), (2,), (0, 1), (2, 1), (0, 1, 2)]


@dataclasses.dataclass(frozen=True)
class Equation:
    """Two factors that have been unified: one index space, told in two ways."""

    left: Factor
    right: Factor

    def check(self, axes: Mapping[Factor, tuple[int, ...]]) -> None:
        for rank in range(MESH.size):
            left, right = (index_map(to_dim(side, dict(axes)), MESH, rank) for side in (self.left, self.right))
            np.testing.assert_array_equal(left, right)


def divisors(size: int) -> list[int]:
    return [d for d in range(2, size) if size % d == 0]


@st.composite
def views(draw: st.DrawFn, size: int, depth: int = 2) -> Factor:
    """A random way to write `size` indices as a tree."""
    kinds = ["leaf", "product", "concatenation", "prefix"]
    kind = draw(st.sampled_from(kinds)) if depth and size > 1 else "leaf"
    if kind == "product" and divisors(size):
        first = draw(st.sampled_from(divisors(size)))
        return product([draw(views(first, depth - 1)), draw(views(size // first, depth - 1))])
    if kind == "concatenation":
        first = draw(st.integers(1, size - 1))
        return concatenation([draw(views(first, depth - 1)), draw(views(size - first, depth - 1))])
    if kind == "prefix":
        block = draw(st.integers(2, size))
        return prefix(size, [draw(views(-(-size // block), depth - 1)), draw(views(block, depth - 1))])
    return Factor(size)


@st.composite
def equations(draw: st.DrawFn) -> tuple[list[Equation], list[Factor]]:
    """Several index spaces of one size, unified with each other and with other views of themselves."""
    size = draw(st.sampled_from([1, 2, 6, 7, 8, 12, 18, 24, 36]))
    spaces = [draw(views(size, 1)) for _ in range(draw(st.integers(1, 3)))]
    found, everything = [], list(spaces)
    for _ in range(draw(st.integers(1, 6))):
        space = draw(st.sampled_from(spaces))
        other = draw(st.sampled_from(spaces)) if draw(st.booleans()) else draw(views(size))
        everything.append(other)
        try:
            unify([space], [other])
        except FactorConflictError:
            continue
        found.append(Equation(space, other))
    return found, everything


@settings(max_examples=100, derandomize=True)
@given(equations(), st.data())
def test_both_sides_of_every_equation_have_one_index_map(
    drawn: tuple[list[Equation], list[Factor]], data: st.DataObject
) -> None:
    found, everything = drawn
    leaves = dict.fromkeys(leaf for factor in everything for leaf in factor.leaves())
    axes = {leaf: data.draw(st.sampled_from(RUNS)) for leaf in leaves if leaf.size > 1}
    for equation in found:
        equation.check(axes)
    for factor in everything:
        assert global_size(to_dim(factor, axes)) == factor.find().size


@settings(max_examples=100, derandomize=True)
@given(equations(), st.data())
def test_shards_make_up_the_whole(drawn: tuple[list[Equation], list[Factor]], data: st.DataObject) -> None:
    _, everything = drawn
    factor = data.draw(st.sampled_from(everything))
    leaves = list(dict.fromkeys(factor.leaves()))
    chosen = data.draw(st.sampled_from(leaves))  # alone: two leaves of one product must not share axes
    dim = to_dim(factor, {chosen: data.draw(st.sampled_from(RUNS))})
    maps = [index_map(dim, MESH, rank) for rank in range(MESH.size)]
    assert {len(indices) for indices in maps} == {local_size(dim, MESH)}
    by_position = {MESH.position(rank, axes_of(dim)): indices for rank, indices in enumerate(maps)}
    if list(factor.leaves()).count(chosen) == 1:
        covered = np.concatenate([indices[indices >= 0] for indices in by_position.values()])
        assert set(covered) == set(range(global_size(dim)))
        parts = {id(s): axes_of(to_dim(s, {chosen: axes_of(dim)})) for s in segments_of(factor)}
        if len(set(parts.values())) == 1:
            assert len(covered) == global_size(dim)


@settings(max_examples=100, derandomize=True)
@given(st.data())
def test_a_segment_is_that_run_of_indices(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([6, 8, 12, 18, 24]))
    factor = data.draw(views(size))
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    before = list(factor.leaves())
    try:
        cut = segment(factor, start, stop)
    except FactorConflictError:
        return
    assert cut.find().size == stop - start
    split = data.draw(st.sampled_from(before)) if before else Factor(1)
    axes = {leaf: (0,) for leaf in split.leaves() if leaf.size > 1}  # those of 1 are not tied to each other
    whole, part = (index_map(to_dim(f, axes), MESH, 4) for f in (factor, cut))
    np.testing.assert_array_equal(whole[(whole >= start) & (whole < stop)] - start, part[part >= 0])


def test_a_reshape_refines_a_leaf() -> None:
    hidden, heads, size = Factor(768), Factor(12), Factor(64)
    unify([hidden], [heads, size])
    assert repr(hidden) == "(12x64)"
    assert [leaf.size for leaf in hidden.leaves()] == [12, 64]


def test_packed_heads_and_vectors_are_a_product_of_concatenated_heads() -> None:
    kv, group, size = Factor(2), Factor(4), Factor(16)
    packed = concatenation([product([kv, group, size]), product([kv, size]), product([kv, size])])
    heads, vector = Factor(12), Factor(16)
    unify([packed], [heads, vector])
    assert repr(packed) == "(((2x4)|2|2)x16)"
    assert vector.find() is size.find()


def test_what_has_no_common_refinement_is_a_conflict() -> None:
    with pytest.raises(FactorConflictError):
        unify([Factor(6), Factor(4)], [Factor(8), Factor(3)])
    with pytest.raises(FactorConflictError):
        unify([Factor(6)], [Factor(7)])


def test_a_conflict_keeps_what_was_right_before_it() -> None:
    a, b, c, d = Factor(2), Factor(2), Factor(3), Factor(12)
    unify([d], [a, b, c])
    other = [Factor(2), Factor(3), Factor(2)]
    with pytest.raises(FactorConflictError):
        unify([d], other)
    axes = dict.fromkeys(other[0].leaves(), (0,))
    Equation(d, product([a, b, c])).check(axes)
    assert axes_of(to_dim(d, axes)) == (0,), "the leading parts are the same indices, whatever follows"


@pytest.mark.parametrize("size", [0, 1])
def test_nothing_to_index_is_no_conflict(size: int) -> None:
    unify([Factor(size)], [Factor(3), Factor(size)] if size == 0 else [])
    unify([Factor(size)], [Factor(size)])
    assert to_dim(Factor(size), {}) == Leaf(size)
    assert concatenation([Factor(0), Factor(0)]).find().size == 0


def test_merged_factors_are_one() -> None:
    a, b, c = Factor(5), Factor(5), Factor(5)
    unify([a], [b])
    unify([c], [a])
    assert a.find() is b.find() is c.find()
    assert a.find().kind is Kind.LEAF


def test_equal_segments_of_a_concatenation_may_be_one_leaf() -> None:
    half, whole = Factor(3), Factor(6)
    unify([whole], [concatenation([half, half])])
    indices = index_map(to_dim(whole, {half.find(): (0,)}), Mesh((3,)), 1)
    np.testing.assert_array_equal(indices, [1, 4])


def test_segments_of_a_product_of_a_concatenation() -> None:
    a, b, c = Factor(2), Factor(4), Factor(3)
    sizes = [part.find().size for part in segments_of(product([concatenation([a, b]), c]))]
    assert sizes == [6, 12]
    assert math.prod(leaf.size for leaf in c.leaves()) == 3


def test_blocks_of_two_sizes_are_one_factor() -> None:
    """176 in 6 blocks of 32 and in 2 of 128: the six are the first of two times four."""
    columns, blocks, larger = Factor(176), Factor(6), Factor(2)
    unify([columns], [prefix(176, [blocks, Factor(32)])])
    unify([columns], [prefix(176, [larger, Factor(128)])])
    assert repr(columns) == "(176 of ((6 of (2x4))x32))"
    axes = {larger.find(): (0,)}
    assert local_size(to_dim(columns, axes), Mesh((2,))) == 128
    assert index_map(to_dim(blocks, axes), Mesh((2,)), 1).tolist() == [4, 5, -1, -1]


def test_blocks_of_several_heads_are_a_prefix_of_heads() -> None:
    """9 heads of 64 in blocks of 128: the heads are split in pairs."""
    columns, pairs, heads = Factor(576), Factor(5), Factor(9)
    unify([columns], [prefix(576, [pairs, Factor(128)])])
    unify([columns], [heads, Factor(64)])
    assert repr(columns) == "((9 of (5x2))x64)"
    assert leaves_in_prefixes([columns]) == set(heads.leaves())
    indices = index_map(to_dim(heads, {pairs.find(): (0, 1)}), Mesh((2, 2)), 2)
    np.testing.assert_array_equal(indices, [8, -1, -1, -1])


def test_a_prefix_has_nothing_in_common_with_what_cuts_its_blocks() -> None:
    for other in ([Factor(16), Factor(36)], [concatenation([Factor(192), Factor(384)])]):
        with pytest.raises(FactorConflictError):
            unify([prefix(576, [Factor(5), Factor(128)])], other)
    with pytest.raises(FactorConflictError):
        segment(prefix(576, [Factor(5), Factor(128)]), 0, 128)
    with pytest.raises(FactorConflictError):
        prefix(16, [Factor(1), Factor(32)])
