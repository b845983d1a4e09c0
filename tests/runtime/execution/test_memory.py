"""Where values lie: no two that may be touched at one time share bytes."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.runtime.execution.memory import Block, Lifetime, place

lifetimes = st.tuples(st.integers(0, 12), st.integers(0, 4)).map(lambda p: Lifetime(first=p[0], last=p[0] + p[1]))


@given(st.lists(st.tuples(st.integers(0, 300), lifetimes), max_size=30))
def test_values_that_may_meet_are_apart(values: list[tuple[int, Lifetime]]) -> None:
    named = [(str(index), nbytes, lifetime) for index, (nbytes, lifetime) in enumerate(values)]
    offsets, size = place(named)
    for (a, a_nbytes, a_life), (b, b_nbytes, b_life) in itertools.combinations(named, 2):
        apart = offsets[a] + a_nbytes <= offsets[b] or offsets[b] + b_nbytes <= offsets[a]
        # Two steps lie between the last touch of one and the first of the other: a barrier is in between.
        assert apart or a_life.last + 2 <= b_life.first or b_life.last + 2 <= a_life.first
    assert all(offsets[name] + nbytes <= size for name, nbytes, _ in named)
    assert all(offset % 64 == 0 for offset in offsets.values())


def test_a_chain_needs_three_places() -> None:
    _, size = place((str(i), 1024, Lifetime(first=i, last=i + 1)) for i in range(100))
    assert size == 3 * 1024


def test_blocks_are_aligned() -> None:
    array = Block(1000).array("FLOAT", (5, 2), offset=64)
    assert array.ctypes.data % 64 == 0
    assert array.shape == (5, 2)
