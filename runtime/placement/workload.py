"""What is asked of a replica: how many sequences, how long, and in which pieces prompts are computed."""

from __future__ import annotations

from dataclasses import dataclass

from furiosa_llm.runtime.errors import CapacityError

DEFAULT_CHUNK_SIZE = 256
"""Tokens of a prompt that are computed in a step, where the caller does not say."""
DEFAULT_LENGTH = 2048
"""Tokens that a sequence may reach where neither the model nor the caller limits them."""
MOST_CARDS = 32
"""The most cards that are tried where the caller does not say how many there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a replica is to hold at once. Prompts are prefilled one at a time."""

    max_batch_size: int = 1
    """The number of sequences."""
    max_model_len: int = DEFAULT_LENGTH
    """The most tokens of a sequence."""
    prefill_chunk_size: int = DEFAULT_CHUNK_SIZE
    """The most tokens of a prompt in a step."""

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_model_len", "prefill_chunk_size"):
            if getattr(self, name) < 1:
                raise CapacityError(f"{name} must be at least 1, got {getattr(self, name)}")
