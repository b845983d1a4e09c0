"""What a person or an annotated model demands of a plan, before it is made."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """One dimension of one value is to be split into a number of parts."""

    value: str
    """The value's name in the model as the user gave it."""
    dim: int
    """The dimension, counted from the front."""
    parts: int
    """How many parts; 1: it stays whole on every rank."""
    origin: str
    """Who demands it, as a phrase for messages: `annotation of node MatMul "/lm_head/MatMul"`."""
