"""Layouts judged by their trees, against brute force: every index of every layout, on every rank."""

from __future__ import annotations

import random

import numpy as np
import pytest

from furiosa_llm.runtime.artifact.checks.coverage import fault_of
from furiosa_llm.runtime.artifact.layout import Cat, Dim, Leaf, Mesh, Prefix, Prod, axes_of, global_size, index_map

MESH = Mesh((2, 3, 2))


def times_held(dim: Dim) -> tuple[int, int]:
    """The fewest and the most ranks that hold an index, of those that differ on the layout's own axes."""
    axes = axes_of(dim)
    ranks = {MESH.position(rank, axes): rank for rank in range(MESH.size)}
    held = np.concatenate([index_map(dim, MESH, rank) for rank in ranks.values()])
    counts = np.bincount(held[held >= 0], minlength=global_size(dim))
    return int(counts.min()), int(counts.max())


def random_dim(rng: random.Random, depth: int = 0) -> Dim:
    kind = rng.choice(["leaf", "leaf", "prod", "cat", "prefix"]) if depth < 3 else "leaf"
    if kind == "leaf":
        return Leaf(rng.randint(2, 13), tuple(rng.sample(range(3), rng.choice([0, 1, 1, 2]))))
    if kind == "prefix":
        whole = random_dim(rng, depth + 1)
        size = global_size(whole)
        return Prefix(rng.randint(size // 2 + 1, size - 1), whole) if axes_of(whole) and size > 2 else whole
    parts = tuple(random_dim(rng, depth + 1) for _ in range(rng.randint(1, 3)))
    return Prod(parts) if kind == "prod" else Cat(parts)


def layouts() -> list[Dim]:
    """Random layouts, of a size that can be counted."""
    found = [random_dim(random.Random(seed)) for seed in range(3000)]
    return [dim for dim in found if global_size(dim) <= 5000]


def test_what_is_accepted_lies_on_one_rank_each() -> None:
    accepted = [dim for dim in layouts() if fault_of(dim) is None]
    assert len([dim for dim in accepted if not isinstance(dim, Leaf) and axes_of(dim)]) > 100
    assert [dim for dim in accepted if times_held(dim) != (1, 1)] == []


def test_what_is_refused_does_not() -> None:
    refused = [dim for dim in layouts() if fault_of(dim) is not None]
    assert len(refused) > 300
    innocent = [dim for dim in refused if times_held(dim) == (1, 1)]
    # Where all that a part has lies at the start of an axis, sharing that axis does no harm; no builder does it.
    assert len(innocent) < len(refused) / 50, innocent


@pytest.mark.parametrize(
    ("dim", "found"),
    [
        (Prod((Leaf(2, (0,)), Leaf(2, (0,)))), "two parts of a product are split over mesh axis 0"),
        (Cat((Leaf(4, (0,)), Leaf(4))), r"split over mesh axes [0] and []"),
        (Cat((Leaf(4, (0, 1)), Leaf(4, (1, 0)))), None),
        (Prod((Leaf(2**40, (0,)), Leaf(2**40, (1,)))), None),
    ],
)
def test_what_is_said(dim: Dim, found: str | None) -> None:
    fault = fault_of(dim)
    assert fault is None if found is None else fault is not None and found in fault
