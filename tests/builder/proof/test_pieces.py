"""Dimensions that double and double again: a few dozen nodes are no reason for 2^40 pieces."""

from __future__ import annotations

import pytest

from furiosa_llm.builder.proof.pieces import MAX_PIECES, Axis, Cat, Copies, Dim, Run, concatenate, join, local_size
from furiosa_llm.runtime.artifact.errors import LayoutError


def doubled(dim: Dim, times: int) -> Dim:
    for _ in range(times):
        dim = concatenate([dim, dim])
    return dim


def test_what_every_rank_holds_becomes_a_run() -> None:
    """Copies of one element, then of another one, are not copies of one."""
    exact = doubled((Copies((1, 1)),), 12)
    assert isinstance(exact[0], Cat)
    assert len(exact[0].parts) == exact[0].count == MAX_PIECES
    assert doubled((Copies((3, 5)),), 40) == (Run((3 * 2**40, 5 * 2**40)),)


def test_what_is_split_is_refused() -> None:
    with pytest.raises(LayoutError, match="a dimension that is split has more than 4096 pieces"):
        doubled((Axis(0, 4), Run((2, 2))), 40)


def test_pieces_within_pieces_count() -> None:
    """A product of concatenations has few parts, each of many pieces."""
    inner = doubled((Copies((1, 1)),), 10)
    assert local_size(inner) == (1024, 1024)
    assert join(inner, inner) == (Run((2**20, 2**20)),)
