"""Finds the few tokens that top-k, min-p and top-p leave, without sorting the vocabulary, and draws one of them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

_GROUPS_PER_TOKEN = 8
_MIN_GROUPS = 512
_MIN_GROUP_SIZE = 4
_BLOCK = 256
_NARROW_ENOUGH = 64
_MARGIN = 1e-4
"""What the rounding of float32 sums over a vocabulary stays well below, relative to the sum."""


def likeliest(scores: Floats, count: int) -> Indices:
    """The positions of the `count` greatest `scores`, and of the scores that equal the least of them."""
    candidates = np.flatnonzero(scores >= _lower_bound(scores, count))
    if candidates.size == count:
        return candidates
    found = scores[candidates]
    return candidates[np.flatnonzero(found >= np.partition(found, -count)[-count])]


def _lower_bound(scores: Floats, count: int) -> np.float32:
    """A value that at least `count` of the `scores` reach, and not many more.

    The greatest ones of many groups are scores, too: the bound is the `count`-th greatest of them. What is left over
    after the whole groups may be left out, which lowers the bound at most.
    """
    groups = max(_MIN_GROUPS, _GROUPS_PER_TOKEN * count)
    whole = scores.size // groups * groups
    large = whole >= _MIN_GROUP_SIZE * groups
    greatest = scores[:whole].reshape(-1, groups).max(axis=0) if large else scores
    bound: np.float32 = np.partition(greatest, -count)[-count]
    return bound


def likely(scores: Floats, top: np.float32, min_p: float, temperature: float) -> Indices:
    """The positions of the `scores` whose probability is at least `min_p` times the probability of the score `top`."""
    return np.flatnonzero(scores >= top + np.float32(temperature * math.log(min_p)))


def nucleus(weights: Floats, share: float) -> Indices:
    """The positions of the fewest greatest `weights` that have a `share` of their sum; of equal ones the first."""
    total = float(weights.sum())
    found = np.sort(_may_be_in_nucleus(weights, total, share))[::-1]
    reached = np.cumsum(found, dtype=np.float64)
    last = min(int(reached.searchsorted(share * total)), found.size - 1)
    least = found[last]
    kept = weights > least
    missing = last + 1 - np.count_nonzero(kept)
    kept[np.flatnonzero(weights == least)[:missing]] = True
    return np.flatnonzero(kept)


def _may_be_in_nucleus(weights: Floats, total: float, share: float) -> Floats:
    """Drops `weights` so small that all those dropped together are less than what the nucleus may miss of the `total`.

    What the dropped ones leave of that is more for each of the others, so that the same may be done again.
    """
    may_miss = (1.0 - share - _MARGIN) * total
    while may_miss > 0.0 and weights.size > _NARROW_ENOUGH:
        kept = weights[weights >= may_miss / weights.size]
        remaining = float(kept.sum())
        may_miss -= total - remaining
        shrinks = 2 * kept.size < weights.size
        weights, total = kept, remaining
        if not shrinks:
            break
    return weights


def choose(weights: Floats, fraction: float) -> int:
    """The position at which the sum of the `weights` so far passes `fraction`, in [0, 1), of the whole."""
    if weights.size <= _BLOCK:
        bounds = np.cumsum(weights, dtype=np.float64)
        return _passed(bounds, fraction * bounds[-1])
    whole = weights.size // _BLOCK * _BLOCK
    sums = weights[:whole].reshape(-1, _BLOCK).sum(axis=1)
    bounds = np.cumsum([0.0, *sums.tolist(), float(weights[whole:].sum())])
    target = fraction * bounds[-1]
    block = _passed(bounds, target) - 1
    inner = np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    return block * _BLOCK + _passed(inner, target - bounds[block])


def _passed(bounds: npt.NDArray[np.float64], target: float) -> int:
    """The first position whose bound is above `target`, or the last that raises the bounds: rounding may miss it."""
    return int(min(bounds.searchsorted(target, "right"), bounds.searchsorted(bounds[-1])))
