"""Chooses the next token from logits: greedily, or at random from what the sampling parameters leave.

The order of the steps is in `docs/sampling.md`. A row's token depends on its own logits, parameters, tokens and seed
alone: rows that share a batch share no arithmetic, and no random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.errors import ExecutionError, SamplingParamsError
from furiosa_llm.runtime.tokens.grammar import Constraint
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams, SamplingType
from furiosa_llm.runtime.tokens.token_counts import TokenCounts
from furiosa_llm.runtime.tokens.top_tokens import choose, likeliest, likely, nucleus

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

_HOTTEST = 1e30
"""A greater temperature makes no difference to probabilities, and would overflow."""


def derived_seed(seed: int, number: int) -> int:
    """A seed for the request of that `number`, of an engine that has `seed`."""
    return int(np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1, np.uint64)[0])


def sample_rows(samplers: Sequence[Sampler], logits: Array) -> list[int]:
    """The next token of each sampler for its row of `logits` [rows, vocabulary]; it counts as output from now on.

    Raises ExecutionError, which names the request, for logits that hold no finite greatest value, and
    SamplingParamsError if the parameters leave no token. No sampler has changed then, and none has drawn.
    """
    if logits.dtype != np.float32:
        logits = logits.astype(np.float32)
    if all(sampler.takes_likeliest for sampler in samplers):
        tokens: list[int] = logits.argmax(axis=1).tolist()
        for sampler, row, token in zip(samplers, logits, tokens, strict=True):
            sampler.check_finite(row[token])
    else:
        # Scoring may raise, and drawing takes a random number that does not come again: all rows are scored first.
        scored = [sampler.score(row) for sampler, row in zip(samplers, logits, strict=True)]
        tokens = [sampler.choose(*found) for sampler, found in zip(samplers, scored, strict=True)]
    for sampler, token in zip(samplers, tokens, strict=True):
        sampler.record(token)
    return tokens


def take_likeliest(sampler: Sampler, token: int, greatest: float) -> int:
    """As `sample_rows` for one sampler that `takes_likeliest`, of a row whose likeliest `token` has this logit."""
    sampler.check_finite(greatest)
    sampler.record(token)
    return token


class Sampler:
    """The sampling of one completion, the `index`-th of its request.

    Random numbers come from `SeedSequence(seed, spawn_key=(index,))`, one for each token that is drawn; `seed` is used
    where the parameters have none, and the system's entropy where neither has. `stop_token_ids` are not chosen before
    `min_tokens`, `bad_words` are sequences of tokens that are not completed, `constraint` says which tokens may follow.
    `name` is for errors.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        *,
        stop_token_ids: Iterable[int] = (),
        bad_words: Iterable[Sequence[int]] = (),
        constraint: Constraint | None = None,
        seed: int | None = None,
        index: int = 0,
        name: str = "",
    ) -> None:
        self._params = params
        self._name = name
        self._stops = _indices(sorted(stop_token_ids))
        self._bad_words = tuple(tuple(word) for word in bad_words)
        self._constraint = constraint
        self._output: list[int] = []
        self._counts = TokenCounts(prompt) if _penalises(params) else None
        self._biased = _indices(params.logit_bias)
        self._biases = np.fromiter(params.logit_bias.values(), dtype=np.float32)
        self._allowed = None if params.allowed_token_ids is None else _indices(params.allowed_token_ids)
        self._greedy = params.sampling_type is SamplingType.GREEDY
        changes = self._counts or self._bad_words or params.logit_bias or constraint is not None
        self._plain = not (changes or params.allowed_token_ids is not None)
        if not self._greedy:
            chosen = params.seed if params.seed is not None else seed
            self._random = np.random.default_rng(np.random.SeedSequence(chosen, spawn_key=(index,)))

    @property
    def takes_likeliest(self) -> bool:
        """Whether the next token is the likeliest one, with nothing in the logits changed."""
        return self._greedy and self._plain and not self._forbids_stops

    @property
    def complete(self) -> bool:
        """Whether the tokens so far are all that the constraint, if there is one, lets the completion be."""
        return self._constraint is not None and self._constraint.complete

    def sample(self, logits: Array) -> int:
        """The next token for `logits` [vocabulary]; it counts as output from now on."""
        return sample_rows([self], logits[None])[0]

    def record(self, token: int) -> None:
        """Counts `token` as output."""
        self._output.append(token)
        if self._counts is not None:
            self._counts.add(token)
        if self._constraint is not None:
            self._constraint.record(token)

    def score(self, logits: Floats) -> tuple[Floats, np.float32]:
        """What the next token for `logits` [vocabulary] is chosen by, and the greatest of it; nothing is drawn yet."""
        plain = self._plain and not self._forbids_stops
        scores = logits if plain else self._processed(logits)
        top: np.float32 = scores.max()
        self.check_finite(top)
        return scores, top

    def choose(self, scores: Floats, top: np.float32) -> int:
        """The next token by what `score` gave."""
        return int(scores.argmax()) if self._greedy else self._draw(scores, top)

    def check_finite(self, greatest: float | np.float32) -> None:
        """Raises ExecutionError unless the `greatest` of the logits, which is NaN if one is, is a finite number."""
        if not math.isfinite(greatest):
            raise ExecutionError(
                f"request {self._name!r}: the logits are not finite: the greatest is {greatest}; the model overflows, "
                f"or its weights are damaged"
            )

    @property
    def _forbids_stops(self) -> bool:
        return len(self._output) < self._params.min_tokens and self._stops.size > 0

    def _processed(self, logits: Floats) -> Floats:
        """What changes which token is the likeliest."""
        if self._allowed is None:
            scores = logits.copy()
        else:
            scores = np.full_like(logits, -np.inf)
            allowed = _within(self._allowed, logits)
            scores[allowed] = logits[allowed]
        if self._constraint is not None:
            before = scores.max()
            self._constraint.mask(scores)
            self._check_left(before, scores)
        self._forbid(scores)
        biased = self._biased < scores.size
        scores[self._biased[biased]] += self._biases[biased]
        if self._counts is not None:
            self._counts.penalise(scores, self._params)
        return scores

    def _forbid(self, scores: Floats) -> None:
        before = scores.max()
        for *start, last in self._bad_words:
            if last < scores.size and (not start or self._output[-len(start) :] == start):
                scores[last] = -np.inf
        if self._forbids_stops:
            self._forbid_stops(scores)
        self._check_left(before, scores)

    def _forbid_stops(self, scores: Floats) -> None:
        stops = _within(self._stops, scores)
        forbidden = scores[stops]
        scores[stops] = -np.inf
        if self._constraint is not None and scores.max() == -np.inf:
            scores[stops] = forbidden  # the constraint has come to its end, however short that is

    def _check_left(self, before: np.float32, scores: Floats) -> None:
        if scores.max() == -np.inf and np.isfinite(before):
            given = "allowed_token_ids, bad_words and min_tokens"
            if self._constraint is not None:
                given = "structured_outputs, allowed_token_ids, bad_words and min_tokens"
            raise SamplingParamsError(f"request {self._name!r}: {given} leave no token to choose; allow more tokens")

    def _draw(self, scores: Floats, top: np.float32) -> int:
        params = self._params
        temperature = min(params.temperature, _HOTTEST)
        tokens: Indices | None = None
        if 0 < params.top_k < scores.size:
            tokens = likeliest(scores, params.top_k)
            scores = scores[tokens]
        if params.min_p > 0.0:
            kept = likely(scores, top, params.min_p, temperature)
            tokens = kept if tokens is None else tokens[kept]
            scores = scores[kept]
        # Masks may be as low as a type goes: what overflows is as unlikely as can be.
        with np.errstate(over="ignore"):
            weights = np.exp((scores - top) / np.float32(temperature))
        if params.top_p < 1.0:
            kept = nucleus(weights, params.top_p)
            tokens = kept if tokens is None else tokens[kept]
            weights = weights[kept]
        position = choose(weights, self._random.random())
        return position if tokens is None else int(tokens[position])


def _penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _indices(tokens: Iterable[int]) -> Indices:
    return np.fromiter(tokens, dtype=np.int64)


def _within(tokens: Indices, scores: Floats) -> Indices:
    return tokens[tokens < scores.size]
