"""How tokens are chosen and when a generation ends: the vendor's `SamplingParams`."""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields
from typing import Any, Self

from furiosa_llm.runtime.errors import SamplingParamsError

_GREEDY_TEMPERATURE = 1e-5


class SamplingType(enum.IntEnum):
    """The kinds of sampling."""

    GREEDY = 0
    RANDOM = 1
    BEAM = 2


class RequestOutputKind(enum.IntEnum):
    """What the outputs of a running request hold: everything so far, what is new, or only the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters; raises SamplingParamsError, a ValueError, for values out of range.

    n: completions per prompt; only 1.
    best_of: completions to choose from; None or 1.
    repetition_penalty: in (0, 2]; above 1 makes tokens of the prompt and the completion less likely.
    temperature: not negative; below 1e-5 is greedy.
    top_p: in (0, 1]; keeps the likeliest tokens whose probabilities add up to it.
    top_k: keeps that many of the likeliest tokens; -1 keeps all.
    min_p: in [0, 1]; drops tokens less likely than this share of the likeliest one's probability.
    use_beam_search, length_penalty, early_stopping: beam search, which this release does not have.
    max_tokens: greatest length of the completion in tokens, None for as many as the model's limit allows.
    min_tokens: the completion does not end before it has this many tokens.
    output_kind: what streamed outputs hold.
    seed: makes random sampling repeatable.
    stop: strings that end the completion and are left out of it.
    stop_token_ids: tokens that end the completion, besides the model's own.
    ignore_eos: goes on behind the model's end-of-sequence tokens.
    """

    n: int = 1
    best_of: int | None = None
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    seed: int | None = None
    stop: str | tuple[str, ...] | list[str] = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False

    @classmethod
    def from_optional(cls, **values: Any) -> Self:
        """The parameters with None standing for the default, but for `max_tokens`, where None means no limit."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise SamplingParamsError(f"unknown sampling parameters: {', '.join(unknown)}")
        return cls(**{name: value for name, value in values.items() if value is not None or name == "max_tokens"})

    @property
    def sampling_type(self) -> SamplingType:
        """Greedy if the temperature is next to nothing, else random."""
        if self.use_beam_search:
            return SamplingType.BEAM
        return SamplingType.GREEDY if self.temperature < _GREEDY_TEMPERATURE else SamplingType.RANDOM

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_shape()
        self._check_lengths()
        self._check_beam()
        if self.sampling_type is SamplingType.GREEDY and (self.best_of or 1) > 1:
            raise SamplingParamsError(f"best_of must be 1 when using greedy sampling. Got {self.best_of}.")
        if (self.best_of or 1) > 1:
            raise SamplingParamsError(f"furiosa-llm currently does not support best_of > 1, got {self.best_of}.")

    def _check_counts(self) -> None:
        _require(self.n >= 1, f"n must be at least 1, got {self.n}.")
        if self.best_of is not None and self.best_of < self.n:
            raise SamplingParamsError(
                f"best_of must be greater than or equal to n, got n={self.n} and best_of={self.best_of}."
            )
        _require(self.n == 1, f"furiosa-llm currently does not support n > 1, got {self.n}.")

    def _check_shape(self) -> None:
        penalty = self.repetition_penalty
        _require(0.0 < penalty <= 2.0, f"repetition_penalty must be in (0, 2], got {penalty}.")
        _require(self.temperature >= 0.0, f"temperature must be non-negative, got {self.temperature}.")
        _require(0.0 < self.top_p <= 1.0, f"top_p must be in (0, 1], got {self.top_p}.")
        valid_top_k = self.top_k == -1 or self.top_k >= 1
        _require(valid_top_k, f"top_k must be -1 (disable), or at least 1, got {self.top_k}.")
        _require(0.0 <= self.min_p <= 1.0, f"min_p must be in [0, 1], got {self.min_p}.")

    def _check_lengths(self) -> None:
        if self.max_tokens is not None:
            _require(self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}.")
            _require(
                self.min_tokens <= self.max_tokens,
                f"min_tokens must be less than or equal to max_tokens={self.max_tokens}, got {self.min_tokens}.",
            )
        _require(self.min_tokens >= 0, f"min_tokens must be greater than or equal to 0, got {self.min_tokens}.")
        _require("" not in self.stop_strings, "stop must not hold an empty string.")
        if self.seed is not None:
            _require(self.seed >= 0, f"seed must be non-negative, got {self.seed}.")

    def _check_beam(self) -> None:
        if self.use_beam_search:
            raise SamplingParamsError(
                "furiosa-llm currently does not support beam search; leave use_beam_search False."
            )
        _require(
            self.early_stopping is False,
            "early_stopping is not effective and must be False when not using beam search.",
        )
        _require(
            self.length_penalty == 1.0,
            "length_penalty is not effective and must be the default value of 1.0 when not using beam search.",
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SamplingParamsError(message)
