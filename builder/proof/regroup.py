"""Reshape, seen on one rank: which pieces of the input make up which dimension of the output.

Local sizes settle where each piece goes of which a rank holds more than one index. An axis takes no room on a rank:
between two pieces with room it may belong to any dimension, and the candidates are tried in order of likelihood.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from furiosa_llm.builder.proof.pieces import (
    ONE,
    Dim,
    Padded,
    Piece,
    Size,
    cut_piece,
    global_size,
    is_whole,
    join,
    local_size,
    over,
    run,
)

_MAX_CANDIDATES = 24


@dataclasses.dataclass(frozen=True, slots=True)
class _Tagged:
    """A piece and the input dimension that it is from."""

    piece: Piece
    dim: int


@dataclasses.dataclass(slots=True, kw_only=True)
class _Gap:
    """Pieces without room, and the output dimensions that they may belong to."""

    pieces: list[_Tagged] = dataclasses.field(default_factory=list)
    before: int | None = None
    """The output dimension before the gap that has room."""
    before_dim: int | None = None
    """The input dimension that `before` ends with."""
    ones: list[int] = dataclasses.field(default_factory=list)
    """The output dimensions of local size 1 in the gap."""
    after: int | None = None
    """The output dimension after the gap."""
    after_dim: int | None = None
    """The input dimension that `after` begins with."""
    after_is_dynamic: bool = False
    blanks: list[int] = dataclasses.field(default_factory=list)
    """The input dimensions of size 1 in the gap, which have no pieces."""


def candidates(dims: Sequence[Dim], sizes: Sequence[Size]) -> dict[tuple[Dim, ...], float]:
    """What the dimensions of a reshape to local `sizes` may be, each with its unlikelihood, the likeliest first.

    None if nothing fits.
    """
    filled = _fill(dims, sizes)
    if filled is None:
        whole = all(is_whole(dim) for dim in dims)
        return {tuple(run(size) for size in sizes): 0.0} if whole else {}
    placed, gaps = filled
    choices = [sorted(_distributions(gap), key=lambda found: found[0]) for gap in gaps if gap.pieces]
    ranked = sorted(
        ((sum(price for price, _ in picks), picks) for picks in itertools.islice(itertools.product(*choices), 4096)),
        key=lambda found: found[0],
    )
    found: dict[tuple[Dim, ...], float] = {}
    for price, picks in ranked[: 4 * _MAX_CANDIDATES]:
        found.setdefault(_put_together(placed, [bins for _, bins in picks], len(sizes)), price)
    return dict(itertools.islice(found.items(), _MAX_CANDIDATES))


def _fill(dims: Sequence[Dim], sizes: Sequence[Size]) -> tuple[dict[int, list[Piece]], list[_Gap]] | None:
    """The pieces with room by output dimension, and the gaps between them."""
    queue = [_Tagged(piece, d) for d, dim in enumerate(dims) for piece in dim]
    placed: dict[int, list[Piece]] = {}
    gaps = [_Gap()]
    for d, size in enumerate(sizes):
        if size == ONE:
            gaps[-1].ones.append(d)
            continue
        rest, first = size, True
        while rest != ONE:
            if not queue:
                return None
            tagged = queue.pop(0)
            room = local_size((tagged.piece,))
            if room == ONE:
                if first:
                    gaps[-1].pieces.append(tagged)
                else:
                    placed[d].append(tagged.piece)
                continue
            if over(rest, room) is None:
                cut = _cut(tagged.piece, rest)
                if cut is None:
                    return None
                queue[:0] = [_Tagged(piece, tagged.dim) for half in cut for piece in half]
                continue
            if first:
                gaps[-1].after, gaps[-1].after_dim, first = d, tagged.dim, False
                gaps[-1].after_is_dynamic = size[0] != size[1]
            placed.setdefault(d, []).append(tagged.piece)
            rest = over(rest, room) or ONE
        gaps.append(_Gap(before=d, before_dim=tagged.dim))
    if any(local_size((tagged.piece,)) != ONE for tagged in queue):
        return None
    gaps[-1].pieces += queue
    for gap in gaps:
        start = -1 if gap.before_dim is None else gap.before_dim
        end = len(dims) if gap.after_dim is None else gap.after_dim
        gap.blanks = [d for d in range(start + 1, end) if not dims[d]]
    return placed, gaps


def _cut(piece: Piece, size: Size) -> tuple[Dim, Dim] | None:
    """A piece as a product whose first factor has local `size`."""
    inner = over(local_size((piece,)), size)
    if inner is None:
        return None
    if isinstance(piece, Padded) and piece.size % inner[0]:
        return None
    outer = over(global_size((piece,)), inner)
    return None if outer is None else cut_piece(piece, outer, inner)


_Bin = tuple[int, bool, list[Piece]]
"""An output dimension, whether the pieces come after the pieces with room, and the pieces."""


def _distributions(gap: _Gap) -> Iterator[tuple[float, list[_Bin]]]:
    """The ways to deal out a gap's pieces in order, each with its unlikelihood."""
    targets = [gap.before, *gap.ones, gap.after]
    behind = [True, *[False] * (len(targets) - 1)]
    places = [(target, side) for target, side in zip(targets, behind, strict=True) if target is not None]
    count = len(gap.pieces)
    for cuts in itertools.combinations_with_replacement(range(count + 1), len(places) - 1):
        bins = [gap.pieces[a:b] for a, b in itertools.pairwise([0, *cuts, count])]
        price = 0.0
        for dim in {tagged.dim for tagged in gap.pieces}:  # pieces of one dimension belong together
            own = [(target, t) for (target, _), found in zip(places, bins, strict=True) for t in found if t.dim == dim]
            price += max(_price(gap, target, tagged) for target, tagged in own)
            price += 0.5 * (sum(any(tagged.dim == dim for tagged in found) for found in bins) - 1)
        pairs = zip(places, bins, strict=True)
        yield price, [(target, side, [tagged.piece for tagged in own]) for (target, side), own in pairs]


def _price(gap: _Gap, target: int, tagged: _Tagged) -> float:
    """How unlikely it is that a piece belongs to an output dimension."""
    inside = {t.dim for t in gap.pieces} - {gap.before_dim, gap.after_dim}
    between = sorted(inside.union(gap.blanks))
    spare = len(between) < len(gap.ones)
    if tagged.dim == gap.before_dim == gap.after_dim and not gap.ones and not gap.after_is_dynamic:
        return 1.0 if target == gap.before else 0.0  # a factor that is split has its axes before its own indices
    if tagged.dim in (gap.before_dim, gap.after_dim):  # a piece at the end of a dimension stays there or is cut off
        own, other = (gap.before, gap.after) if tagged.dim == gap.before_dim else (gap.after, gap.before)
        if target in (own, other):
            return 4.0 if target == other else float(spare)
        place = 0 if tagged.dim == gap.before_dim else len(between)  # what is cut off comes next to what is left
        return 0.1 * abs(gap.ones.index(target) - min(place, len(gap.ones) - 1)) if spare else 2.0
    if target == gap.before:
        return 3.0 if gap.ones else 1.5
    place = between.index(tagged.dim)
    if gap.blanks and place >= len(gap.ones):  # every output dimension of size 1 is one that the input has already
        return 0.0 if target == gap.after else 1.0 + 0.1 * (len(gap.ones) - gap.ones.index(target))
    if target == gap.after:  # heads join their vectors if these follow, and the batch if the sequence follows
        return 2.0 if gap.ones or gap.after_is_dynamic else 1.0
    return 0.1 * abs(gap.ones.index(target) - min(place, len(gap.ones) - 1))


def _put_together(placed: dict[int, list[Piece]], picks: Sequence[list[_Bin]], count: int) -> tuple[Dim, ...]:
    front: dict[int, list[Piece]] = {}
    back: dict[int, list[Piece]] = {}
    for target, behind, own in itertools.chain.from_iterable(picks):
        (back if behind else front).setdefault(target, []).extend(own)
    return tuple(join(tuple(front.get(d, [])), tuple(placed.get(d, [])), tuple(back.get(d, []))) for d in range(count))
