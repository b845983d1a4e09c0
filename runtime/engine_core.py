"""The engine behind `LLM`, `LLMEngine` and `AsyncLLMEngine`: checks a request, and gives it to one of the replicas."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from furiosa_llm.runtime.errors import ContextLengthError, EngineDeadError, InputError
from furiosa_llm.runtime.replica import Replica
from furiosa_llm.runtime.request import Request, check_token_ids
from furiosa_llm.runtime.request_table import Sink, Submission
from furiosa_llm.runtime.router import choose_replica
from furiosa_llm.runtime.sampler import derived_seed
from furiosa_llm.runtime.sampling_params import RequestOutputKind, SamplingParams
from furiosa_llm.runtime.tokenizer import Tokenizer

Prompt: TypeAlias = str | Mapping[str, Any]
"""Text, `{"prompt": text}` or `{"prompt_token_ids": [...]}`, or both of these, the token ids being what is run."""


_MAX_TOKENS = 2**31
"""What token ids are below if the model does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What a model takes. Lengths are in tokens.

    max_length: of prompt and completion together; None if nothing but memory limits it.
    max_prompt_length: of the prompt alone; None for one less than `max_length`.
    capacity: of one sequence in the KV cache, if it had all of it.
    vocab_size: token ids are below it; None if the model does not say.
    eos_token_ids: they end a completion.
    """

    max_length: int | None
    max_prompt_length: int | None
    capacity: int
    vocab_size: int | None
    eos_token_ids: frozenset[int]

    @property
    def prompt_limit(self) -> int | None:
        """The tokens that a prompt may have at most, so that one can follow; None if nothing but memory limits it."""
        limits = [limit for limit in (self.max_prompt_length, self.max_length and self.max_length - 1) if limit]
        return min(limits, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Handle:
    """A request that was taken: `abort` ends it, if it has not ended yet."""

    key: int
    replica: Replica

    def abort(self) -> None:
        """Ends the request; its sink gets a last output with the finish reason "abort"."""
        self.replica.abort(self.key)


class EngineCore:
    """Replicas of one model, and what a request needs before it goes to one of them.

    From `seed` follow those of requests that have none of their own, by their place in order. `close_model` is called
    once, behind the replicas' end.
    """

    def __init__(
        self,
        *,
        replicas: Sequence[Replica],
        tokenizer: Tokenizer | None,
        limits: ModelLimits,
        seed: int | None = None,
        close_model: Callable[[], None] = lambda: None,
    ) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self.replicas = tuple(replicas)
        self._seed = seed
        self._close_model = close_model
        self._closed = False
        self._keys = itertools.count()
        self._sequence_ids = itertools.count()

    @property
    def dead(self) -> bool:
        """Whether it takes no requests any more: it was closed, or all its replicas were given up."""
        return self._closed or all(replica.death is not None for replica in self.replicas)

    def submit(self, request_id: str, prompt: Prompt, params: SamplingParams, sink: Sink) -> Handle:
        """Starts a request; its outputs go to `sink`, the last one finished, whatever happens.

        Raises InputError or ContextLengthError if the prompt is none or does not fit, and EngineDeadError.
        """
        if self._closed:
            raise EngineDeadError("the engine is closed")
        _check_params(params)
        text, token_ids = self._read(prompt)
        key = next(self._keys)
        request = Request(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            tokenizer=self.tokenizer,
            eos_token_ids=self.limits.eos_token_ids,
            max_tokens=self._max_tokens(len(token_ids), params.max_tokens),
            sequence_ids=[next(self._sequence_ids) for _ in range(params.num_sequences)],
            seed=None if self._seed is None else derived_seed(self._seed, key),
        )
        replica = self.replicas[choose_replica(self.replicas, token_ids)]
        handle = Handle(key=key, replica=replica)
        replica.submit(Submission(key=key, request=request, sink=sink))
        return handle

    def close(self) -> None:
        """Ends the replicas, with what they run, and gives the model's memory back."""
        if self._closed:
            return
        self._closed = True
        for replica in self.replicas:
            replica.close()
        self._close_model()

    def _read(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """The text of a prompt, if it has one, and its tokens."""
        text, token_ids = _parts(prompt)
        if token_ids is None:
            assert text is not None
            if self.tokenizer is None:
                raise InputError("the artifact has no tokenizer; give prompt_token_ids, or load it with a tokenizer")
            token_ids = self.tokenizer.encode(text)
        checked = check_token_ids(token_ids, self.limits.vocab_size or _MAX_TOKENS)
        if not checked:
            raise InputError("the prompt has no tokens; give a prompt that is not empty")
        return text, checked

    def _max_tokens(self, prompt: int, wanted: int | None) -> int:
        """How many tokens a completion may have; the messages are worded as the vendor's, which programs look for."""
        limit, prompt_limit = self.limits.max_length, self.limits.prompt_limit
        if prompt_limit is not None and prompt > prompt_limit:
            raise ContextLengthError(
                f"This model's maximum input context length is {prompt_limit} tokens, however you requested {prompt} "
                f"tokens. Please reduce your prompt."
            )
        if wanted is None:
            if limit is None:
                raise InputError("the model does not say how long a sequence may be; give max_tokens")
            wanted = max(1, min(limit, self.limits.capacity) - prompt)
        total = prompt + wanted
        if limit is not None and total > limit:
            raise ContextLengthError(
                f"This model's maximum context length is {limit} tokens, however you requested {total} tokens "
                f"({prompt} in your prompt; {wanted} for the completion). Please reduce your prompt; or completion "
                f"length."
            )
        if total > self.limits.capacity:
            raise ContextLengthError(
                f"{total} tokens ({prompt} in your prompt; {wanted} for the completion) do not fit the KV cache, which "
                f"has room for {self.limits.capacity}; reduce them, or load the model with more "
                f"paged_attention_num_blocks"
            )
        return wanted


def with_kind(params: SamplingParams, kind: RequestOutputKind) -> SamplingParams:
    """`params` with another kind of outputs; raises InputError if they are none."""
    _check_params(params)
    return replace(params, output_kind=kind)


def _check_params(params: object) -> None:
    if not isinstance(params, SamplingParams):
        raise InputError(f"sampling_params: found a {type(params).__name__}, expected SamplingParams")


def _parts(prompt: Prompt) -> tuple[str | None, Sequence[int] | None]:
    """Text and token ids of a prompt, at least one of them; raises InputError for anything else."""
    if isinstance(prompt, str):
        return prompt, None
    if not isinstance(prompt, Mapping):
        raise InputError(
            f"Unsupported prompt type: {type(prompt).__name__}; give a str, {{'prompt': str}} or "
            f"{{'prompt_token_ids': [int, ...]}}"
        )
    unknown = sorted(str(key) for key in prompt if key not in ("prompt", "prompt_token_ids"))
    text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if unknown or (text is None and token_ids is None):
        found = ", ".join(map(repr, unknown)) or "neither"
        raise InputError(f"Unsupported prompt type: found {found}, expected 'prompt' or 'prompt_token_ids'")
    if text is not None and not isinstance(text, str):
        raise InputError(f"Unsupported prompt type: 'prompt' is a {type(text).__name__}, expected a str")
    return text, token_ids
