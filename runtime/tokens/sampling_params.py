"""How tokens are chosen and when a generation ends: the vendor's `SamplingParams`."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from furiosa_llm.runtime.errors import SamplingParamsError
from furiosa_llm.runtime.tokens import parameter_checks as checks
from furiosa_llm.runtime.tokens.parameter_checks import require
from furiosa_llm.runtime.tokens.structured_outputs import StructuredOutputsParams

_GREEDY_TEMPERATURE = 1e-5
_MAX_SEQUENCES = 128
_MAX_LOGPROBS = 20


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
    FINAL_ONLY = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters; raises SamplingParamsError, a ValueError, for values of a wrong type or out of range.

    `docs/sampling.md` says in which order they work. Lists are kept as tuples.
    """

    n: int = 1
    """Completions per prompt, 1 to 128; greedy ones are all the same."""
    best_of: int | None = None
    """Completions to generate, of which the `n` likeliest are given back; None for `n`, at most 128."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that are in the completion; in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time that a token is in the completion; in [-2, 2]."""
    repetition_penalty: float = 1.0
    """Above 1 it makes tokens of the prompt and the completion less likely; above 0."""
    temperature: float = 1.0
    """Not negative; below 1e-5 is greedy."""
    top_p: float = 1.0
    """Keeps the likeliest tokens whose probabilities add up to it; in [0, 1], where 0 keeps the likeliest one."""
    top_k: int = -1
    """Keeps that many of the likeliest tokens; -1 and 0 keep all."""
    min_p: float = 0.0
    """Drops tokens less likely than this share of the likeliest one's probability; in [0, 1]."""
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    """`use_beam_search`, `length_penalty`, `early_stopping`: beam search, which this release does not have."""
    max_tokens: int | None = 16
    """Greatest length of the completion in tokens, None for as many as the model's limit allows."""
    min_tokens: int = 0
    """The completion does not end before it has this many tokens."""
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    """What streamed outputs hold."""
    seed: int | None = None
    """Makes random sampling repeatable; below 2**64."""
    stop: str | tuple[str, ...] | list[str] = ()
    """Strings that end the completion and are left out of it."""
    stop_token_ids: tuple[int, ...] | list[int] = ()
    """Tokens that end the completion, besides the model's own."""
    ignore_eos: bool = False
    """Goes on after the model's end-of-sequence tokens."""
    include_stop_str_in_output: bool = False
    """Leaves the stop string, or the text of the stop token, in the completion."""
    logprobs: int | None = None
    """How many of the likeliest tokens' log probabilities to give with each token, 0 to 20; None gives none."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Token id -> what is added to its logit, in [-100, 100]."""
    allowed_token_ids: tuple[int, ...] | list[int] | None = None
    """The only tokens that may be chosen; None for all."""
    bad_words: tuple[str, ...] | list[str] = ()
    """Words that the completion will not hold."""
    structured_outputs: StructuredOutputsParams | None = None
    """What the completion has to look like; None for any text."""
    skip_special_tokens: bool = True
    """Leaves special tokens out of the text."""
    detokenize: bool = True
    """False gives no text, tokens only."""

    @classmethod
    def from_optional(cls, **values: Any) -> Self:
        """The parameters with None standing for the default, but for `max_tokens`, where None means no limit.

        The keys of `logit_bias` may be strings, as JSON has them.
        """
        unknown = sorted(set(values) - {parameter.name for parameter in fields(cls)})
        if unknown:
            raise SamplingParamsError(f"unknown sampling parameters: {', '.join(unknown)}")
        bias = values.get("logit_bias")
        if isinstance(bias, Mapping):
            values["logit_bias"] = {_json_key(token): value for token, value in bias.items()}
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

    @property
    def num_sequences(self) -> int:
        """How many completions are generated: `best_of`, or `n`."""
        return self.n if self.best_of is None else self.best_of

    @property
    def ranks_sequences(self) -> bool:
        """Whether more completions are generated than given back, so that the best are known only at the end."""
        return self.num_sequences > self.n

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises SamplingParamsError if a parameter names a token that a model of `vocab_size` tokens does not have."""
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            unknown = [token for token in getattr(self, name) or () if token >= vocab_size]
            require(not unknown, f"{name} holds {unknown[:5]}, but the model's tokens are 0 to {vocab_size - 1}.")

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_penalties()
        self._check_shape()
        self._check_lengths()
        self._check_ends()
        self._check_tokens()
        self._check_outputs()
        self._check_beam()

    def _check_counts(self) -> None:
        n = checks.integer("n", self.n)
        require(n >= 1, f"n must be at least 1, got {n}.")
        require(n <= _MAX_SEQUENCES, f"n must be at most {_MAX_SEQUENCES}, got {n}.")
        if self.best_of is not None:
            best_of = checks.integer("best_of", self.best_of)
            require(best_of >= n, f"best_of must be greater than or equal to n, got n={n} and best_of={best_of}.")
            require(best_of <= _MAX_SEQUENCES, f"best_of must be at most {_MAX_SEQUENCES}, got {best_of}.")

    def _check_penalties(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            checks.number_in(name, getattr(self, name), lambda value: -2.0 <= value <= 2.0, "in [-2, 2]")
        checks.number_in("repetition_penalty", self.repetition_penalty, lambda value: value > 0.0, "greater than 0")

    def _check_shape(self) -> None:
        checks.number_in("temperature", self.temperature, lambda value: value >= 0.0, "non-negative")
        checks.number_in("top_p", self.top_p, lambda value: 0.0 <= value <= 1.0, "in [0, 1]")
        top_k = checks.integer("top_k", self.top_k)
        require(top_k >= -1, f"top_k must be -1 or 0 (disable), or at least 1, got {top_k}.")
        checks.number_in("min_p", self.min_p, lambda value: 0.0 <= value <= 1.0, "in [0, 1]")
        if self.seed is not None:
            seed = checks.integer("seed", self.seed)
            require(seed >= 0, f"seed must be non-negative, got {seed}.")

    def _check_lengths(self) -> None:
        min_tokens = checks.integer("min_tokens", self.min_tokens)
        if self.max_tokens is not None:
            max_tokens = checks.integer("max_tokens", self.max_tokens)
            require(max_tokens >= 1, f"max_tokens must be at least 1, got {max_tokens}.")
            require(
                min_tokens <= max_tokens,
                f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {min_tokens}.",
            )
        require(min_tokens >= 0, f"min_tokens must be greater than or equal to 0, got {min_tokens}.")

    def _check_ends(self) -> None:
        stop = checks.strings("stop", [self.stop] if isinstance(self.stop, str) else self.stop)
        self._set("stop", self.stop if isinstance(self.stop, str) else stop)
        self._set("stop_token_ids", checks.token_ids("stop_token_ids", self.stop_token_ids))
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize"):
            checks.flag(name, getattr(self, name))
        require(
            self.detokenize or not stop, "stop needs the text of the completion, which detokenize=False leaves out."
        )

    def _check_tokens(self) -> None:
        self._set("logit_bias", checks.biases("logit_bias", self.logit_bias))
        self._set("bad_words", checks.strings("bad_words", self.bad_words))
        if self.allowed_token_ids is not None:
            allowed = checks.token_ids("allowed_token_ids", self.allowed_token_ids)
            require(bool(allowed), "allowed_token_ids must not be empty; leave it out to allow every token.")
            self._set("allowed_token_ids", allowed)
        require(
            self.structured_outputs is None or isinstance(self.structured_outputs, StructuredOutputsParams),
            f"structured_outputs must be StructuredOutputsParams, got {self.structured_outputs!r:.80}.",
        )

    def _check_outputs(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                count = checks.integer(name, value)
                require(0 <= count <= _MAX_LOGPROBS, f"{name} must be in [0, {_MAX_LOGPROBS}], got {count}.")
        require(
            isinstance(self.output_kind, RequestOutputKind),
            f"output_kind must be a RequestOutputKind, got {self.output_kind!r:.80}.",
        )

    def _check_beam(self) -> None:
        checks.flag("use_beam_search", self.use_beam_search)
        if self.use_beam_search:
            raise SamplingParamsError(
                "furiosa-llm currently does not support beam search; leave use_beam_search False, and give best_of for "
                "the likeliest of several completions."
            )
        early = self.early_stopping
        known = isinstance(early, bool) or early == "never"
        require(known, f"early_stopping must be True, False, or 'never', got {early!r:.80}.")
        require(early is False, "early_stopping is not effective and must be False when not using beam search.")
        penalty = checks.number("length_penalty", self.length_penalty)
        require(
            penalty == 1.0,
            "length_penalty is not effective and must be the default value of 1.0 when not using beam search.",
        )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _json_key(token: Any) -> Any:
    return int(token) if isinstance(token, str) and token.isascii() and token.isdecimal() else token
