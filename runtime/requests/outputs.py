"""What a generation gives back: the vendor's `RequestOutput` and `CompletionOutput`, with log probabilities."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from furiosa_llm.runtime.artifact.errors import FuriosaLLMError

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """How likely a token was at its place.

    `logprob` is the natural logarithm of its probability as the model gives it, before any sampling parameter. `rank`
    is one more than the number of likelier tokens. `decoded_token` is its text by itself, None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None


TokenLogprobs = dict[int, Logprob]
"""The log probabilities at one place by token: the token that is there first, then the likeliest in order."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CompletionOutput:
    """One completion of a prompt.

    `text` is without special tokens and stop strings, unless the parameters ask for them; `token_ids` are all that were
    generated, a final stop token among them. `finish_reason` is "stop" for a stop token or string, "length" for a
    limit, "abort" for a request that was aborted, "error" for one that failed, None while it runs. `stop_reason` is the
    stop string or the one of `stop_token_ids` that ended it, None otherwise. `logprobs` are given for each token if the
    parameters ask for them, and `cumulative_logprob`, their sum, then or if the best of several completions were chosen
    by it.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    stop_reason: int | str | None = None

    def __repr__(self) -> str:
        return _repr(self, always=("index", "text", "token_ids", "finish_reason"))


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RequestOutput:
    """A prompt and its completions. `prompt` is None if the request gave token ids; `finished`: nothing will follow.

    `prompt_logprobs` has an entry for each token of the prompt if the parameters ask for them, None for the first one.
    `num_cached_tokens` says how many tokens of the prompt were in the prefix cache, None if nothing has run yet.
    `error` is why the request failed, None if it did not. `began` is when it was first in a batch, by the monotonic
    clock, None if it was in none.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int | None = None
    error: FuriosaLLMError | None = None
    began: float | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        return _repr(self, always=("request_id", "prompt", "prompt_token_ids", "outputs", "finished"))


def _repr(output: Any, *, always: tuple[str, ...]) -> str:
    """The vendor's fields, and the others if they hold something."""
    values = [(one.name, getattr(output, one.name)) for one in fields(output) if one.repr]
    shown = [f"{name}={value!r}" for name, value in values if name in always or value is not None]
    return f"{type(output).__name__}({', '.join(shown)})"


def raise_error(output: RequestOutput) -> None:
    """Raises the error that ended a request, if one did."""
    if output.error is not None:
        raise output.error
