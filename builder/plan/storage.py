"""How a weight is stored whose segments are split over different axes, and whether it can be."""

from __future__ import annotations

import itertools

from furiosa_llm.runtime.artifact.checks.coverage import fault_of
from furiosa_llm.runtime.artifact.layout import Cat, Dim, Prod, axes_of


def segments_by_axes(dim: Dim) -> list[Dim]:
    """Runs of segments of a concatenation that are split over the same axes; one run if there are no such segments.

    Each run is stored as a tensor of its own, so that nothing is stored twice.
    """
    if isinstance(dim, Prod) and isinstance(dim.parts[0], Cat):
        segments: tuple[Dim, ...] = tuple(Prod((part, *dim.parts[1:])) for part in dim.parts[0].parts)
    elif isinstance(dim, Cat):
        segments = dim.parts
    else:
        return [dim]
    runs = [list(run) for _, run in itertools.groupby(segments, key=lambda part: frozenset(axes_of(part)))]
    return [run[0] if len(run) == 1 else Cat(tuple(run)) for run in runs]


def can_be_stored(dim: Dim) -> bool:
    """Whether each run of a weight's dimension is on one rank only; segments inside of others cannot be set apart."""
    return all(fault_of(run) is None for run in segments_by_axes(dim))
