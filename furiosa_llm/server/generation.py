"""Requests of clients as requests of the engine: admitted, run together, measured, and given up with their clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from furiosa_llm.runtime.adapters.adapter import LoRARequest
from furiosa_llm.runtime.engine.core import with_kind
from furiosa_llm.runtime.errors import SamplingParamsError
from furiosa_llm.runtime.requests.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from furiosa_llm.runtime.requests.prompts import Prompt
from furiosa_llm.runtime.tokens.sampling_params import RequestOutputKind, SamplingParams
from furiosa_llm.server.encoder_decoder import EncoderDecoder
from furiosa_llm.server.errors import ApiError, blamed
from furiosa_llm.server.metrics import Metrics, RequestMeter
from furiosa_llm.server.model import Decoder
from furiosa_llm.server.notes import MAX_TOKENS, note

Outputs: TypeAlias = AsyncGenerator[tuple[int, RequestOutput], None]
"""What is new of each prompt, by its index: outputs of the kind DELTA."""

_RETRY_AFTER = 1
"""Seconds. Sequences end all the time: what is refused now has a chance soon."""


class Gate:
    """Counts the sequences that clients have under way, and refuses those beyond `limit`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0

    def check(self, sequences: int) -> None:
        """Raises an ApiError if so many can never be let in: better before their prompts are encoded than after."""
        if sequences > self._limit:
            raise ApiError(
                400, f"the request is for {sequences} sequences, the server takes {self._limit} at once; divide it"
            )

    @contextmanager
    def admit(self, sequences: int) -> Iterator[None]:
        """Lets so many in until the context ends; raises an ApiError if they are too many, now or ever."""
        self.check(sequences)
        if self._count + sequences > self._limit:
            raise ApiError(
                429,
                f"{self._count} sequences run or wait, and {sequences} more would exceed the limit of {self._limit}; "
                f"try again later",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(_RETRY_AFTER)},
            )
        self._count += sequences
        try:
            yield
        finally:
            self._count -= sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class Generator:
    """Runs prompts on a decoder for one client after another."""

    decoder: Decoder | EncoderDecoder
    """The model."""
    gate: Gate
    """Counts the sequences under way, and refuses more than may be."""
    metrics: Metrics
    """Where requests are counted."""
    max_length: int | None
    """The most tokens of a prompt and its completion, or of the completion alone; None for no limit."""
    goes_on: bool = True
    """Whether a completion goes on with its prompt, and so shares the limit with it."""

    async def run(
        self,
        request_id: str,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        adapter: LoRARequest | None = None,
        form_field: str = "structured_outputs",
    ) -> Outputs:
        """What comes of `prompts`, with `adapter`; closing the generator, or cancelling its task, aborts them.

        `form_field` is the field of the request that says what the answers have to look like, if one does: the one to
        blame if the model cannot be held to it.

        Raises ApiError, or what `AsyncLLMEngine.generate` does, when it is first asked for an output.
        """
        delta = with_kind(params, RequestOutputKind.DELTA)
        with self.gate.admit(len(prompts) * params.num_sequences):
            streams = [
                self._run_one(index, f"{request_id}-{index}", prompt, self._fitted(delta, prompt), adapter)
                for index, prompt in enumerate(prompts)
            ]
            async with aclosing(streams[0] if len(streams) == 1 else _merged(streams)) as outputs:
                try:
                    async for output in outputs:
                        yield output
                except SamplingParamsError as error:
                    raise blamed(error, form_field) from error

    def _fitted(self, params: SamplingParams, prompt: Prompt) -> SamplingParams:
        """`params` with no more tokens than there is room for behind `prompt`, which the answer says in a header."""
        assert isinstance(prompt, Mapping)
        if self.max_length is None:
            return params
        room = self.max_length - (len(prompt["prompt_token_ids"]) if self.goes_on else 0)
        if params.max_tokens is None or not 0 < room < params.max_tokens:
            return params
        note(MAX_TOKENS, str(room))
        return replace(params, max_tokens=room)

    async def _run_one(
        self, index: int, request_id: str, prompt: Prompt, params: SamplingParams, adapter: LoRARequest | None
    ) -> Outputs:
        meter = RequestMeter(self.metrics, params)
        try:
            async with aclosing(self.decoder.generate(prompt, params, request_id, adapter)) as outputs:
                async for output in outputs:
                    meter.see(output)
                    yield index, output
        finally:
            meter.end()


async def _merged(streams: Sequence[Outputs]) -> Outputs:
    """The items of all `streams` as they come; the first failure ends all of them."""
    ready: asyncio.Queue[Any] = asyncio.Queue()

    async def pump(stream: Outputs) -> None:
        async with aclosing(stream):
            async for item in stream:
                ready.put_nowait(item)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    for task in tasks:
        task.add_done_callback(ready.put_nowait)
    try:
        left = len(tasks)
        while left:
            item = await ready.get()
            if isinstance(item, asyncio.Task):
                item.result()
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(slots=True, kw_only=True)
class Completed:
    """A completion as its parts add up."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, part: CompletionOutput) -> None:
        """Takes what is new."""
        self.text += part.text
        self.token_ids += part.token_ids
        if part.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += part.logprobs
        self.finish_reason = part.finish_reason
        self.stop_reason = part.stop_reason


@dataclass(slots=True, kw_only=True)
class Answered:
    """A prompt with all of its completions."""

    token_ids: Sequence[int]
    """The prompt's tokens."""
    logprobs: Sequence[TokenLogprobs | None] | None
    """The log probabilities of the prompt's tokens, if they were asked for."""
    cached: int
    """How many of the prompt's tokens were in the prefix cache."""
    completions: list[Completed]
    """The completions, in their order."""


async def collect(outputs: Outputs, num_prompts: int, n: int) -> list[Answered]:
    """Everything that comes of `num_prompts` prompts with `n` completions each."""
    answers = [
        Answered(token_ids=(), logprobs=None, cached=0, completions=[Completed() for _ in range(n)])
        for _ in range(num_prompts)
    ]
    async with aclosing(outputs):
        async for index, output in outputs:
            answer = answers[index]
            answer.token_ids = output.prompt_token_ids
            answer.cached = output.num_cached_tokens or 0
            if output.prompt_logprobs is not None:
                answer.logprobs = output.prompt_logprobs
            for part in output.outputs:
                answer.completions[part.index].add(part)
    return answers
