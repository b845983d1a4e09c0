"""`LLM`: loads an artifact and generates text, with the vendor's names and shapes."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from functools import cached_property
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Literal, NoReturn, Self, overload

from furiosa_llm.runtime.async_engine import AsyncLLMEngine
from furiosa_llm.runtime.chat import Conversation, conversations_of, render
from furiosa_llm.runtime.engine import LLMEngine, raise_error
from furiosa_llm.runtime.engine_args import EngineArgs, refuse_foreign_options
from furiosa_llm.runtime.engine_core import EngineCore, Handle, Prompt, with_kind
from furiosa_llm.runtime.errors import EngineDeadError, InputError, UnsupportedError
from furiosa_llm.runtime.launch import make_plan, start
from furiosa_llm.runtime.outputs import RequestOutput
from furiosa_llm.runtime.sampling_params import RequestOutputKind, SamplingParams

_DEFAULT_PARAMS = SamplingParams()


class LLM:
    """A decoder loaded from the artifact in the folder `model`.

    The options are the fields of `EngineArgs`, which says what they mean, and `skip_engine`, which loads nothing to run
    the model with: what is wrong with the artifact or the options comes out all the same. Raises TypeError for unknown
    options, UnsupportedError for options of the vendor's that mean nothing here, and what `make_plan` does.

    Several threads may generate at once; their requests run together. Close it, or use it as a context manager, to end
    its threads.
    """

    def __init__(self, model: str | os.PathLike[str], *, skip_engine: bool = False, **options: Any) -> None:
        args = EngineArgs(model, **refuse_foreign_options(options))
        plan = make_plan(args)
        self.tokenizer = plan.tokenizer
        self.topology = plan.topology
        self._limits = plan.limits
        self._core = None if skip_engine else start(plan, args)
        self._request_ids = itertools.count()

    @classmethod
    def load_artifact(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """Loads the artifact in the folder `path`; takes the options of the class."""
        return cls(path, **options)

    @property
    def core(self) -> EngineCore:
        """What runs the requests; raises EngineDeadError if the model was loaded with `skip_engine`."""
        if self._core is None:
            raise EngineDeadError("the model was loaded with skip_engine=True; load it without, to run it")
        return self._core

    @cached_property
    def engine(self) -> LLMEngine:
        """An `LLMEngine` on this model, the same each time; `LLMEngine.from_llm` makes others."""
        return LLMEngine.from_llm(self)

    @property
    def is_generative_model(self) -> bool:
        """Whether `generate` works: always, as no other model is loaded."""
        return True

    @property
    def model_max_seq_len(self) -> int | None:
        """The limit in tokens, prompt and completion together; None if neither the model nor an option gives one."""
        return self._limits.max_length

    @property
    def max_seq_len_to_capture(self) -> int | None:
        """The same under the vendor's other name."""
        return self._limits.max_length

    @property
    def prompt_max_seq_len(self) -> int | None:
        """The limit of a prompt in tokens; None if there is none."""
        return self._limits.prompt_limit

    @overload
    def generate(
        self,
        prompts: str,
        sampling_params: SamplingParams = _DEFAULT_PARAMS,
        prompt_token_ids: Sequence[int] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        prompts: list[str],
        sampling_params: SamplingParams | Sequence[SamplingParams] = _DEFAULT_PARAMS,
        prompt_token_ids: Sequence[Sequence[int]] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        prompts: str | list[str],
        sampling_params: SamplingParams | Sequence[SamplingParams] = _DEFAULT_PARAMS,
        prompt_token_ids: Sequence[Any] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Completes `prompts`, as many at once as fit: a string gives one output, a list gives a list in its order.

        `prompt_token_ids`, one sequence for each prompt, are used instead of the prompts' own tokens; a list of
        `sampling_params` has those of each prompt. If one prompt is refused, or Ctrl-C or a failure comes in between,
        all are given up. Raises ContextLengthError, a ValueError, if a prompt and its completion do not fit the limit,
        and ReplicaError if a replica fails while it has one of them.
        """
        _refuse_tokenizer_kwargs(tokenizer_kwargs)
        single = isinstance(prompts, str)
        texts = [prompts] if isinstance(prompts, str) else _checked_list(prompts)
        token_ids: Sequence[Any] | None = (
            [prompt_token_ids] if single and prompt_token_ids is not None else prompt_token_ids
        )
        if token_ids is not None and len(token_ids) != len(texts):
            raise InputError(f"prompt_token_ids has {len(token_ids)} sequences for {len(texts)} prompts")
        asked: list[Prompt] = [
            text if token_ids is None else {"prompt": text, "prompt_token_ids": token_ids[index]}
            for index, text in enumerate(texts)
        ]
        outputs = self._complete(asked, sampling_params)
        return outputs[0] if single else outputs

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] = _DEFAULT_PARAMS,
        chat_template: str | None = None,
        chat_template_content_format: Literal["string"] = "string",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of several; always a list.

        `chat_template` replaces the model's own. With `continue_final_message` the answer goes on from the last
        message; `add_generation_prompt` must be False then. Raises TokenizerError if there is no template or it refuses
        the messages, InputError if they are none, UnsupportedError for tools, else what `generate` does.
        """
        if chat_template_content_format != "string":
            raise UnsupportedError(
                f"chat_template_content_format={chat_template_content_format!r:.80} is not supported; give 'string'"
            )
        if tools:
            raise UnsupportedError("tools are not supported by chat; write them into the system message")
        prompts: list[Prompt] = [
            render(
                self.tokenizer,
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
            for conversation in conversations_of(messages)
        ]
        return self._complete(prompts, sampling_params)

    def stream(
        self,
        prompt: str,
        sampling_params: SamplingParams = _DEFAULT_PARAMS,
        prompt_token_ids: Sequence[int] | None = None,
    ) -> Iterator[str]:
        """The completion of `prompt` in pieces of text, as they come."""
        params = _delta(sampling_params)
        for output in self.stream_outputs(prompt, params, prompt_token_ids):
            if output.outputs[0].text:
                yield output.outputs[0].text

    async def stream_generate(
        self,
        prompt: str,
        sampling_params: SamplingParams = _DEFAULT_PARAMS,
        prompt_token_ids: Sequence[int] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        is_demo: bool = False,  # noqa: ARG002 - the vendor's, without effect
    ) -> AsyncIterator[str]:
        """`stream` for asyncio."""
        _refuse_tokenizer_kwargs(tokenizer_kwargs)
        asked = _one_prompt(prompt, prompt_token_ids)
        engine = AsyncLLMEngine.from_llm(self)
        async with aclosing(engine.generate(asked, _delta(sampling_params), self._next_id())) as outputs:
            async for output in outputs:
                if output.outputs[0].text:
                    yield output.outputs[0].text

    def stream_outputs(
        self,
        prompt: str,
        sampling_params: SamplingParams = _DEFAULT_PARAMS,
        prompt_token_ids: Sequence[int] | None = None,
    ) -> Iterator[RequestOutput]:
        """The request after each token, the last time finished; `output_kind` says what the outputs hold."""
        ready: SimpleQueue[RequestOutput] = SimpleQueue()
        handle = self._submit(_one_prompt(prompt, prompt_token_ids), sampling_params, ready)
        try:
            finished = False
            while not finished:
                output = ready.get()
                finished = output.finished
                raise_error(output)
                yield output
        finally:
            handle.abort()

    def encode(self, *_: Any, **__: Any) -> NoReturn:
        """Raises UnsupportedError: a model that generates has no embeddings."""
        raise UnsupportedError("encode API can only be used for encoders; this model generates: use generate")

    def embed(self, *_: Any, **__: Any) -> NoReturn:
        """Raises UnsupportedError: a model that generates has no embeddings."""
        raise UnsupportedError("embed API can only be used for encoders; this model generates: use generate")

    def shutdown(self) -> None:
        """Ends the engine and its threads; the model cannot generate any more."""
        if self._core is not None:
            self._core.close()

    def close(self) -> None:
        """`shutdown`, as files and locks call it."""
        self.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _complete(
        self, prompts: Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """The finished outputs of `prompts`, in their order."""
        params = [sampling_params] * len(prompts) if isinstance(sampling_params, SamplingParams) else sampling_params
        if len(params) != len(prompts):
            raise InputError(f"sampling_params has {len(params)} entries for {len(prompts)} prompts")
        ready: SimpleQueue[RequestOutput] = SimpleQueue()
        handles: list[Handle] = []
        finished: dict[str, RequestOutput] = {}
        try:
            for prompt, one in zip(prompts, params, strict=True):
                handles.append(self._submit(prompt, with_kind(one, RequestOutputKind.FINAL), ready))
            while len(finished) < len(prompts):
                output = ready.get()
                raise_error(output)
                finished[output.request_id] = output
        except BaseException:
            for handle in handles:
                handle.abort()
            raise
        return [finished[request_id] for request_id in sorted(finished, key=int)]

    def _submit(self, prompt: Prompt, params: SamplingParams, ready: SimpleQueue[RequestOutput]) -> Handle:
        def take(outputs: Sequence[tuple[int, RequestOutput]]) -> None:
            for _, output in outputs:
                ready.put(output)

        return self.core.submit(self._next_id(), prompt, params, take)

    def _next_id(self) -> str:
        return str(next(self._request_ids))


def _one_prompt(prompt: str, token_ids: Sequence[int] | None) -> Prompt:
    return prompt if token_ids is None else {"prompt": prompt, "prompt_token_ids": token_ids}


def _delta(params: SamplingParams) -> SamplingParams:
    delta = with_kind(params, RequestOutputKind.DELTA)
    if delta.n > 1:
        raise InputError(f"a stream of text is of one completion, found n={delta.n}; give n=1, or use stream_outputs")
    return delta


def _checked_list(prompts: Any) -> list[str]:
    if not isinstance(prompts, list):
        raise InputError(f"prompts: found a {type(prompts).__name__}, expected a str or a list of them")
    return prompts


def _refuse_tokenizer_kwargs(options: dict[str, Any] | None) -> None:
    if options:
        raise UnsupportedError(f"tokenizer_kwargs={options!r:.80} are not supported; give prompt_token_ids instead")
