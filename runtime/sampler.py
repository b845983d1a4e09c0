"""Chooses the next token from logits: greedily, or at random from what the sampling parameters leave."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from furiosa_llm.runtime.ort import Array
from furiosa_llm.runtime.sampling_params import SamplingParams, SamplingType

Floats = npt.NDArray[np.float64]


class Sampler:
    """One request's sampling. `seed` is used where the parameters have none; None draws from the system."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], *, seed: int | None = None) -> None:
        self._params = params
        self._random = np.random.default_rng(params.seed if params.seed is not None else seed)
        self._seen = set(prompt)

    def sample(self, logits: Array, *, forbidden: Sequence[int] = ()) -> int:
        """The next token for `logits` [vocabulary], none of `forbidden`; it counts as seen from now on."""
        params = self._params
        plain = params.repetition_penalty == 1.0 and not forbidden
        if plain and params.sampling_type is SamplingType.GREEDY:
            token = int(logits.argmax())
        else:
            token = self._choose(self._adjusted(logits, forbidden))
        self._seen.add(token)
        return token

    def _adjusted(self, logits: Array, forbidden: Sequence[int]) -> Floats:
        scores = logits.astype(np.float64)
        if self._params.repetition_penalty != 1.0:
            seen = np.fromiter(self._seen, dtype=np.int64)
            seen = seen[seen < scores.size]
            penalty = self._params.repetition_penalty
            scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
        scores[list(forbidden)] = -np.inf
        return scores

    def _choose(self, scores: Floats) -> int:
        params = self._params
        if params.sampling_type is SamplingType.GREEDY:
            return int(scores.argmax())
        if 0 < params.top_k < scores.size:
            scores[scores < np.partition(scores, -params.top_k)[-params.top_k]] = -np.inf
        weights = np.exp((scores - scores.max()) / params.temperature)
        weights[weights < params.min_p] = 0.0
        if params.top_p < 1.0:
            _keep_top_p(weights, params.top_p)
        bounds = np.cumsum(weights)
        return int(np.searchsorted(bounds, self._random.random() * bounds[-1], side="right"))


def _keep_top_p(weights: Floats, top_p: float) -> None:
    """Zeroes all but the fewest greatest `weights` whose share of the sum reaches `top_p`."""
    order = np.argsort(-weights, kind="stable")
    shares = np.cumsum(weights[order])
    kept = int(np.searchsorted(shares, top_p * shares[-1])) + 1
    weights[order[kept:]] = 0.0
