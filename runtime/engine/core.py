"""The engine of `LLM`, `LLMEngine` and `AsyncLLMEngine`: checks a request, and gives it to one of the replicas."""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import cast

from furiosa_llm.runtime.adapters.adapter import LoRARequest, key_of
from furiosa_llm.runtime.adapters.registry import AdapterRegistry
from furiosa_llm.runtime.engine.machine_snapshot import MachineLayout, MachineSnapshot, machine_of
from furiosa_llm.runtime.engine.replica import Replica
from furiosa_llm.runtime.engine.router import choose_replica
from furiosa_llm.runtime.errors import ContextLengthError, EngineDeadError, InputError, UnsupportedError
from furiosa_llm.runtime.requests.prompts import Prompt, check_prompt_length, read_prompt
from furiosa_llm.runtime.requests.request import Request
from furiosa_llm.runtime.requests.request_table import Sink, Submission
from furiosa_llm.runtime.tokens.grammar import Grammar, Grammars
from furiosa_llm.runtime.tokens.sampler import derived_seed
from furiosa_llm.runtime.tokens.sampling_params import RequestOutputKind, SamplingParams
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What a model takes. Lengths are in tokens."""

    max_length: int | None
    """The most tokens of prompt and completion together; None if nothing but memory limits them."""
    max_prompt_length: int | None
    """The most tokens of the prompt alone; None for one less than `max_length`."""
    capacity: int
    """The most tokens of one sequence that had the whole KV cache."""
    vocab_size: int | None
    """Token ids are below it; None if the model does not say."""
    eos_token_ids: frozenset[int]
    """They end a completion."""

    @property
    def longest(self) -> int:
        """The most tokens of a prompt and its completion: of what the model takes, and what there is memory for."""
        return self.capacity if self.max_length is None else min(self.max_length, self.capacity)

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


def _end(replicas: Sequence[Replica], close_model: Callable[[], None], process: int) -> None:
    """Ends threads and processes; not in a fork of the process that has them."""
    if os.getpid() != process:
        return
    for replica in replicas:
        replica.close()
    close_model()


class EngineCore:
    """Replicas of one model, and what a request needs before it goes to one of them.

    A request without a seed gets one that follows from `seed` and from its place in order. `layout` says what lies
    on which PE, None: nobody knows. `close_model` is called once, after the replicas have ended.
    An engine that is not closed ends when nothing refers to it, or with the interpreter.
    """

    def __init__(
        self,
        *,
        replicas: Sequence[Replica],
        tokenizer: Tokenizer | None,
        limits: ModelLimits,
        adapters: AdapterRegistry | None = None,
        seed: int | None = None,
        layout: MachineLayout | None = None,
        close_model: Callable[[], None] = lambda: None,
    ) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self.replicas = tuple(replicas)
        self._adapters = adapters
        self._seed = seed
        self._layout = layout
        self._process = os.getpid()
        self._end = weakref.finalize(self, _end, self.replicas, close_model, self._process)
        self._grammars = Grammars(tokenizer)
        self._closed = False
        self._keys = itertools.count()
        self._sequence_ids = itertools.count()

    @property
    def dead(self) -> bool:
        """Whether it takes no requests any more: it was closed, or all its replicas were given up."""
        return self._closed or all(replica.death is not None for replica in self.replicas)

    @property
    def ready(self) -> bool:
        """Whether a request would be answered now: a replica is there that is not just being built anew."""
        return not self._closed and any(replica.death is None and replica.ready for replica in self.replicas)

    def prepare(self, params: SamplingParams) -> None:
        """Compiles the grammar of `params`, if they have one, so that `submit` does not have to: it may take a second.

        Raises SamplingParamsError if the model's tokens cannot be so constrained.
        """
        self._grammar_of(params)

    @property
    def adapters(self) -> AdapterRegistry:
        """The model's adapters; raises UnsupportedError if the engine was made without."""
        if self._adapters is None:
            raise UnsupportedError("the engine was made without adapters; make it with load_engine")
        return self._adapters

    def submit(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        sink: Sink,
        lora_request: LoRARequest | None = None,
    ) -> Handle:
        """Starts a request; its outputs go to `sink`, the last one finished, whatever happens.

        Its adapter is loaded if it is not. Raises AdapterError if that is not one of this model's,
        InputError or ContextLengthError if the prompt is no prompt or does not fit, SamplingParamsError if `params`
        name tokens that the model does not have, or a grammar that its tokens cannot follow, TokenizerError for text
        without a tokenizer, and EngineDeadError.
        """
        if self._closed:
            raise EngineDeadError("the engine is closed")
        if os.getpid() != self._process:
            raise EngineDeadError(
                f"the model was loaded by process {self._process}, of which this one is a fork without its threads; "
                f"load it here, after the fork"
            )
        check_params(params)
        if self.limits.vocab_size is not None:
            params.check_vocabulary(self.limits.vocab_size)
        text, token_ids = read_prompt(prompt, self.tokenizer, self.limits.vocab_size)
        adapter = None if lora_request is None else self.adapters.add(lora_request)
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
            grammar=self._grammar_of(params),
            adapter=adapter,
        )
        replica = self.replicas[choose_replica(self.replicas, token_ids, key_of(adapter))]
        handle = Handle(key=key, replica=replica)
        replica.submit(Submission(key=key, request=request, sink=sink))
        return handle

    def machine(self) -> MachineSnapshot:
        """What lies on every PE, and what replicas and stages have done so far; from any thread, at little cost.

        Raises UnsupportedError if the engine was made without a layout, which `load_engine` gives it.
        """
        if self._layout is None:
            raise UnsupportedError("the engine was made without a layout of its PEs; make it with load_engine")
        return machine_of(self._layout, self.replicas)

    def close(self) -> None:
        """Ends the replicas, with what they run, and gives the model's memory back."""
        self._closed = True
        self._end()

    def _grammar_of(self, params: SamplingParams) -> Grammar | None:
        wanted = params.structured_outputs
        return None if wanted is None else self._grammars.compile(wanted.llguidance_grammar)

    def _max_tokens(self, prompt: int, wanted: int | None) -> int:
        """How many tokens a completion may have; the refusals have the vendor's words, which programs look for."""
        check_prompt_length(prompt, self.limits.prompt_limit)
        limit = self.limits.max_length
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


def check_request_id(request_id: object, taken: Container[str]) -> None:
    """Raises InputError if `request_id` is no str, or is in `taken`, the ids of the requests that have not ended."""
    if not isinstance(request_id, str):
        raise InputError(f"request_id: found a {type(request_id).__name__}, expected a str")
    if request_id in taken:
        raise InputError(f"request_id {request_id!r:.80} belongs to a request that has not ended; give another")


def params_for_each(params: object, count: int) -> list[SamplingParams]:
    """The sampling parameters of `count` prompts: those given for all (None: the default ones), or a list of them."""
    if params is None or isinstance(params, SamplingParams):
        return [SamplingParams() if params is None else params] * count
    if not isinstance(params, list | tuple):
        check_params(params)
    several: list[SamplingParams] = list(cast(Sequence[SamplingParams], params))
    for one in several:
        check_params(one)
    if len(several) != count:
        raise InputError(f"sampling_params has {len(several)} entries for {count} prompts")
    return several


def adapters_for_each(
    lora_request: LoRARequest | Sequence[LoRARequest | None] | None, count: int
) -> Sequence[LoRARequest | None]:
    """The adapters of `count` prompts: the one given for all, or a list of them."""
    if not isinstance(lora_request, list | tuple):
        return [cast(LoRARequest | None, lora_request)] * count
    if len(lora_request) != count:
        raise InputError(f"lora_request has {len(lora_request)} entries for {count} prompts")
    return lora_request


def with_kind(params: SamplingParams, kind: RequestOutputKind) -> SamplingParams:
    """`params` with another kind of outputs; raises InputError if they are no SamplingParams."""
    check_params(params)
    return replace(params, output_kind=kind)


def check_params(params: object) -> None:
    """Raises InputError unless `params` are SamplingParams."""
    if not isinstance(params, SamplingParams):
        raise InputError(f"sampling_params: found a {type(params).__name__}, expected SamplingParams")
