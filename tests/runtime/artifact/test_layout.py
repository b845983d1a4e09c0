"""Layouts: every index on exactly the ranks that should have it, whatever the tree."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.runtime.artifact.errors import LayoutError
from furiosa_llm.runtime.artifact.layout import (
    Cat,
    Dim,
    Leaf,
    Mesh,
    Prefix,
    Prod,
    axes_of,
    from_json,
    global_size,
    index_map,
    leaves,
    local_size,
    parts_of,
    simplify,
    to_json,
)

MESH = Mesh((2, 3, 2))


def trees(axes: tuple[int, ...]) -> st.SearchStrategy[Dim]:
    """Trees whose leaves may be split over any of `axes`, each leaf over different ones of a product."""
    leaf = st.builds(Leaf, st.integers(1, 7), st.lists(st.sampled_from(axes), max_size=2, unique=True).map(tuple))
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3).map(lambda parts: Cat(tuple(parts))),
            st.lists(inner, min_size=1, max_size=3).map(lambda parts: Prod(tuple(parts))),
            st.builds(prefix, inner, st.integers(0, 100)),
        ),
        max_leaves=5,
    )


def prefix(dim: Dim, missing: int) -> Dim:
    """A prefix of a dimension that is split, without up to a half of it."""
    size = global_size(dim)
    missing = min(missing, (size - 1) // 2)
    return Prefix(size - missing, dim) if missing and axes_of(dim) else dim


def disjoint(dim: Dim) -> bool:
    """Whether the parts of every product are split over different axes, as they must be to cover their indices."""
    if isinstance(dim, Leaf):
        return True
    own = [set(axes_of(part)) for part in parts_of(dim)]
    if isinstance(dim, Prod) and sum(map(len, own)) != len(set().union(*own)):
        return False
    return all(map(disjoint, parts_of(dim)))


@given(trees((0, 1, 2)))
def test_local_sizes_are_those_of_the_maps(dim: Dim) -> None:
    assert all(index_map(dim, MESH, rank).size == local_size(dim, MESH) for rank in range(MESH.size))


@given(trees((0, 1, 2)).filter(disjoint))
def test_every_index_is_on_one_rank_of_each_replica(dim: Dim) -> None:
    found = np.concatenate([index_map(dim, MESH, rank) for rank in range(MESH.size)])
    counts = np.bincount(found[found >= 0], minlength=global_size(dim))
    assert counts.size == global_size(dim)
    assert counts.min() >= 1
    if not any(isinstance(part, Cat) for part in walk(dim)):
        split = math.prod(MESH.shape[axis] for axis in axes_of(dim))
        assert set(counts) == {MESH.size // split}


def walk(dim: Dim) -> list[Dim]:
    """`dim` and everything below it."""
    return [dim, *(inner for part in parts_of(dim) for inner in walk(part))]


@given(trees((0, 1, 2)))
def test_ranks_that_differ_on_other_axes_see_the_same(dim: Dim) -> None:
    others = [axis for axis in range(3) if axis not in axes_of(dim)]
    for group in MESH.groups(others):
        first = index_map(dim, MESH, group[0])
        assert all(np.array_equal(first, index_map(dim, MESH, rank)) for rank in group)


@given(trees((0, 1, 2)))
def test_simplify_keeps_the_maps(dim: Dim) -> None:
    simple = simplify(dim)
    assert len(list(leaves(simple))) <= len(list(leaves(dim)))
    assert all(np.array_equal(index_map(dim, MESH, r), index_map(simple, MESH, r)) for r in range(MESH.size))


@given(trees((0, 1, 2)))
def test_json_gives_the_same_layout(dim: Dim) -> None:
    assert from_json(to_json(dim), MESH) == dim


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_groups_divide_the_mesh(shape: list[int], data: st.DataObject) -> None:
    mesh = Mesh(tuple(shape))
    axes = data.draw(st.lists(st.sampled_from(range(len(shape))), unique=True))
    groups = mesh.groups(axes)
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.size))
    for group in groups:
        assert [mesh.position(rank, axes) for rank in group] == list(range(mesh.parts(axes)))


def test_nine_heads_over_four_ranks() -> None:
    heads = Leaf(9, (0, 1))
    maps = [index_map(heads, Mesh((2, 2)), rank).tolist() for rank in range(4)]
    assert maps == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [-1, -1, -1]]


def test_five_and_a_half_blocks_over_four_ranks() -> None:
    columns = Prefix(176, Prod((Leaf(6, (0, 1)), Leaf(32))))
    assert local_size(columns, Mesh((2, 2))) == 64
    found = [index_map(columns, Mesh((2, 2)), rank) for rank in range(4)]
    np.testing.assert_array_equal(found[1], np.arange(64, 128))
    np.testing.assert_array_equal(found[2], [*range(128, 176), *[-1] * 16])
    assert (found[3] == -1).all()
    assert to_json(columns) == {"prefix": 176, "of": {"prod": [{"size": 6, "axes": [0, 1]}, 32]}}


def test_a_prefix_that_is_not_split_has_no_padding() -> None:
    columns = Prefix(176, Prod((Leaf(6), Leaf(32))))
    assert simplify(columns) == Leaf(176)
    assert local_size(columns, MESH) == 176
    np.testing.assert_array_equal(index_map(columns, MESH, 5), np.arange(176))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "a layout is an integer"),
        (-1, "a layout's size is an integer from 0"),
        (2**48, "a layout's size is an integer from 0"),
        ("64", "a layout is an integer"),
        ({"size": 4}, "a layout is an integer"),
        ({"size": 4, "axes": []}, "distinct mesh axes below 3"),
        ({"size": 4, "axes": [0, 0]}, "distinct mesh axes below 3"),
        ({"size": 4, "axes": [3]}, "distinct mesh axes below 3"),
        ({"size": 4, "axes": [True]}, "distinct mesh axes below 3"),
        ({"prod": []}, "a layout is an integer"),
        ({"sum": [1]}, "a layout is an integer"),
        ({"prefix": 5}, "a layout is an integer"),
        ({"prefix": 5, "of": {"size": 6, "axes": [0]}, "by": 1}, "a layout is an integer"),
        ({"prefix": "5", "of": {"size": 6, "axes": [0]}}, "a layout's size is an integer from 0"),
        ({"prefix": -5, "of": {"size": 6, "axes": [0]}}, "a layout's size is an integer from 0"),
        ({"prefix": 5, "of": {"size": 6, "axes": [3]}}, "distinct mesh axes below 3"),
        ({"prefix": 5, "of": 6}, "a dimension that is split; found one of 6"),
        ({"prefix": 5, "of": {"prefix": 6, "of": 7}}, "a dimension that is split; found one of 7"),
        ({"prefix": 6, "of": {"size": 6, "axes": [0]}}, "more than half of its dimension, but not all; found 6 of 6"),
        ({"prefix": 7, "of": {"size": 6, "axes": [0]}}, "more than half of its dimension, but not all; found 7 of 6"),
        ({"prefix": 3, "of": {"size": 6, "axes": [0]}}, "more than half of its dimension, but not all; found 3 of 6"),
        ({"prefix": 0, "of": {"size": 0, "axes": [0]}}, "more than half of its dimension, but not all; found 0 of 0"),
    ],
)
def test_malformed_layouts_are_refused(value: object, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        from_json(value, MESH)


def test_deep_nesting_is_refused() -> None:
    for kind in ("cat", "prefix"):
        value: object = 1
        for _ in range(100):
            value = {"cat": [value]} if kind == "cat" else {"prefix": 1, "of": value}
        with pytest.raises(LayoutError, match="nested deeper"):
            from_json(value, MESH)


def test_a_rank_off_the_mesh_is_refused() -> None:
    with pytest.raises(LayoutError, match="rank 12 is not on a mesh of 12 ranks"):
        MESH.coordinates(12)
