"""Which tokens a prompt and its completion hold, and how often, for the penalties on repeating them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from furiosa_llm.runtime.tokens.sampling_params import SamplingParams


class TokenCounts:
    """Every token of a prompt and its output once, with how often the output has it."""

    def __init__(self, prompt: Sequence[int]) -> None:
        seen = np.unique(np.asarray(prompt, dtype=np.int64))
        self._size = seen.size
        self._tokens = np.concatenate([seen, np.zeros(64, np.int64)])
        self._counts = np.zeros(self._tokens.size, np.float32)
        self._positions = {token: position for position, token in enumerate(seen.tolist())}

    def add(self, token: int) -> None:
        """Counts `token` of the output."""
        position = self._positions.setdefault(token, self._size)
        if position == self._size:
            self._append(token)
        self._counts[position] += 1

    def penalise(self, scores: npt.NDArray[np.float32], params: SamplingParams) -> None:
        """Lowers the `scores` [vocabulary] of the tokens that were seen, in place."""
        tokens = self._tokens[: self._size]
        known = tokens < scores.size
        tokens, counts = tokens[known], self._counts[: self._size][known]
        counted = scores[tokens]
        limits = np.finfo(np.float32)
        repetition = np.float32(max(params.repetition_penalty, float(limits.tiny)))
        with np.errstate(over="ignore"):  # Masks may be as low as the type goes, and penalties next to nothing.
            counted = np.where(counted > 0, np.minimum(counted / repetition, limits.max), counted * repetition)
        counted -= np.float32(params.frequency_penalty) * counts
        counted -= np.float32(params.presence_penalty) * (counts > 0)
        scores[tokens] = counted

    def _append(self, token: int) -> None:
        if self._size == self._tokens.size:
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._tokens[self._size] = token
        self._size += 1
