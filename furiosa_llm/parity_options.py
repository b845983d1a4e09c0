"""How an artifact and its model are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TOLERANCE = 1e-4
"""Of an output's mean error, relative to its greatest magnitude; honest artifacts: see docs/artifact-tools.md."""
HALF_TOLERANCE = 5e-3
"""Of a model with float16 weights: 11 bits, and a partial sum is rounded on every rank. Of a model with caches of
integers: a key or value that is rounded otherwise in its last bit may fall on the next of 255 levels or fewer."""
MAX_SEED = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityOptions:
    """How artifact and model are compared; see `furiosa_llm.runtime.verify_against`.

    `tolerance` is relative to an output's greatest magnitude; None: TOLERANCE, or HALF_TOLERANCE for what computes in
    float16 or keeps integers in its caches. `compute` is the type that both compute in; None: their own types.
    `prompts` are those of which greedy tokens are compared; None: DEFAULT_PROMPTS. `seed` draws lengths and inputs;
    None: one that the system gives, so that no artifact can know it. `time_limit` are the seconds after which nothing
    more is checked, `step_timeout` those that a step may take; None: what docs/limits.md says.
    """

    tolerance: float | None = None
    prompts: Sequence[str] | None = None
    max_tokens: int = 32
    sizes: Mapping[str, int] | None = None
    threads: int | None = None
    compute: str | None = None
    seed: int | None = None
    max_length: int | None = None
    time_limit: float | None = None
    step_timeout: float | None = None
