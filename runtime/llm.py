"""`LLM`: loads an artifact and generates text, with the vendor's names and shapes."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self, overload

import numpy as np

from furiosa_llm.runtime.artifact.composite import whole_of_part
from furiosa_llm.runtime.artifact.manifest import Manifest
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.decoder import DecoderSession
from furiosa_llm.runtime.errors import ContextLengthError, InputError, UnsupportedError
from furiosa_llm.runtime.executor import Executor
from furiosa_llm.runtime.outputs import CompletionOutput, FinishReason, RequestOutput
from furiosa_llm.runtime.sampler import Sampler
from furiosa_llm.runtime.sampling_params import RequestOutputKind, SamplingParams
from furiosa_llm.runtime.text_stream import TextStream
from furiosa_llm.runtime.tokenizer import Tokenizer

_DEFAULT_PARAMS = SamplingParams()

_PREFILL_TOKENS = 512
"""Longer prompts are prefilled in chunks, because models give logits for all tokens, and those take memory."""


class LLM:
    """A decoder loaded from an artifact.

    Make one with `load_artifact`. Several threads may generate at once; their steps take turns. Close it, or use it as
    a context manager, to end its threads.
    """

    def __init__(self, executor: Executor, tokenizer: Tokenizer, *, seed: int | None = None) -> None:
        model = executor.artifact.manifest.model
        self.tokenizer = tokenizer
        self.is_generative_model = model.task == "decoder"
        self._executor = executor
        self._eos_token_ids = frozenset(model.eos_token_ids)
        self._max_length = model.max_sequence_length
        self._seed = seed
        self._idle_sessions: SimpleQueue[DecoderSession] = SimpleQueue()
        self._idle_sessions.put(DecoderSession(executor, max_length=model.max_sequence_length))
        self._request_ids = itertools.count()

    @classmethod
    def load_artifact(
        cls,
        path: str | os.PathLike[str],
        *,
        devices: str | None = None,
        data_parallel_size: int | None = None,
        pipeline_parallel_size: int | None = None,
        tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
        seed: int | None = None,
        threads: int | None = None,
        mapped: bool = False,
        full_verification: bool | None = None,
    ) -> Self:
        """Loads the artifact in the folder `path`.

        `threads` step the PEs (None: one for each core this process may use). `mapped` leaves the weights in their file
        instead of packing them for speed: it loads faster and shares memory with other processes. `tokenizer` is the
        folder of another tokenizer than the artifact's. `seed` is for requests that have none. `full_verification`
        compares the digests of the weights too; None does if they are below a gigabyte. Raises ArtifactError for a
        damaged artifact, UnsupportedError for one that does not generate, and for parallelism beyond tensor
        parallelism, which the artifact has built in.
        """
        for name, value in (
            ("data_parallel_size", data_parallel_size),
            ("pipeline_parallel_size", pipeline_parallel_size),
        ):
            if value not in (None, 1):
                raise UnsupportedError(f"{name}={value} is not supported by this release; leave it out, or give 1")
        if devices is not None:
            raise UnsupportedError(f"devices={devices!r:.80} is not supported by this release; leave it out")
        whole = whole_of_part(path)
        if whole is not None:
            raise UnsupportedError(f"{path} is a part of the encoder-decoder in {whole}; load that one")
        artifact = open_artifact(path, full=full_verification)
        _check_generative(artifact.manifest)
        if not isinstance(tokenizer, Tokenizer):
            tokenizer = Tokenizer.from_artifact(artifact) if tokenizer is None else Tokenizer.from_folder(tokenizer)
        return cls(Executor(artifact, threads=threads, mapped=mapped), tokenizer, seed=seed)

    @property
    def model_max_seq_len(self) -> int | None:
        """The model's limit in tokens, prompt and completion together; None if the model does not say."""
        return self._max_length

    @overload
    def generate(
        self,
        prompts: str,
        sampling_params: SamplingParams = _DEFAULT_PARAMS,
        prompt_token_ids: Sequence[int] | None = None,
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        prompts: list[str],
        sampling_params: SamplingParams = _DEFAULT_PARAMS,
        prompt_token_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        prompts: str | list[str],
        sampling_params: SamplingParams = _DEFAULT_PARAMS,
        prompt_token_ids: Sequence[Any] | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Completes `prompts`: a string gives one output, a list gives a list.

        `prompt_token_ids`, one sequence for each prompt, are used instead of the prompts' own tokens. Raises
        ContextLengthError, a ValueError, if a prompt and its completion do not fit the model's limit.
        """
        if isinstance(prompts, str):
            return self._complete(prompts, sampling_params, prompt_token_ids)
        token_ids = [None] * len(prompts) if prompt_token_ids is None else list(prompt_token_ids)
        if len(token_ids) != len(prompts):
            raise InputError(f"prompt_token_ids has {len(token_ids)} sequences for {len(prompts)} prompts")
        return [self._complete(prompt, sampling_params, ids) for prompt, ids in zip(prompts, token_ids, strict=True)]

    def stream(
        self,
        prompt: str,
        sampling_params: SamplingParams = _DEFAULT_PARAMS,
        prompt_token_ids: Sequence[int] | None = None,
    ) -> Iterator[str]:
        """The completion of `prompt` in pieces of text, as they come."""
        length = 0
        for output in self._outputs(prompt, sampling_params, prompt_token_ids):
            text = output.outputs[0].text
            if len(text) > length:
                yield text[length:]
                length = len(text)

    async def stream_generate(
        self,
        prompt: str,
        sampling_params: SamplingParams = _DEFAULT_PARAMS,
        prompt_token_ids: Sequence[int] | None = None,
    ) -> AsyncIterator[str]:
        """`stream` for asyncio: steps run in a thread, so that the event loop goes on."""
        pieces = self.stream(prompt, sampling_params, prompt_token_ids)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece

    def stream_outputs(
        self,
        prompt: str,
        sampling_params: SamplingParams = _DEFAULT_PARAMS,
        prompt_token_ids: Sequence[int] | None = None,
    ) -> Iterator[RequestOutput]:
        """The request after each token, the last time finished; `output_kind` says what the outputs hold."""
        kind = sampling_params.output_kind
        shown = CompletionOutput(index=0, text="", token_ids=[])
        for output in self._outputs(prompt, sampling_params, prompt_token_ids):
            if kind is RequestOutputKind.DELTA:
                now = output.outputs[0]
                fresh = replace(now, text=now.text[len(shown.text) :], token_ids=now.token_ids[len(shown.token_ids) :])
                shown = now
                yield replace(output, outputs=[fresh])
            elif kind is RequestOutputKind.CUMULATIVE or output.finished:
                yield output

    def close(self) -> None:
        """Ends the driver threads; the model cannot generate any more."""
        self._executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _complete(self, prompt: str, params: SamplingParams, token_ids: Sequence[int] | None) -> RequestOutput:
        *_, output = self._outputs(prompt, params, token_ids)
        return output

    def _outputs(
        self, prompt: str, sampling_params: SamplingParams, prompt_token_ids: Sequence[int] | None
    ) -> Iterator[RequestOutput]:
        """The whole request after each token."""
        token_ids = self.tokenizer.encode(prompt) if prompt_token_ids is None else [int(i) for i in prompt_token_ids]
        max_tokens = self._max_tokens(len(token_ids), sampling_params.max_tokens)
        request_id = str(next(self._request_ids))
        session = self._take_session()
        try:
            for completion in self._decode(session, token_ids, sampling_params, max_tokens):
                yield RequestOutput(
                    request_id=request_id,
                    prompt=prompt,
                    prompt_token_ids=token_ids,
                    outputs=[completion],
                    finished=completion.finish_reason is not None,
                )
        finally:
            self._idle_sessions.put(session)

    def _take_session(self) -> DecoderSession:
        """An idle session, or a new one if every one is in the middle of a request."""
        try:
            return self._idle_sessions.get_nowait()
        except Empty:
            return DecoderSession(self._executor, max_length=self._max_length)

    def _decode(
        self, session: DecoderSession, prompt: list[int], params: SamplingParams, max_tokens: int
    ) -> Iterator[CompletionOutput]:
        """The completion after each token: the prefill, then one step for each token but the last."""
        stops = self._stop_token_ids(params)
        sampler = Sampler(params, prompt, seed=self._seed)
        text = TextStream(self.tokenizer, params.stop_strings, min_tokens=params.min_tokens)
        session.reset()
        session.reserve(len(prompt) + max_tokens)
        token_ids: list[int] = []
        for start in range(0, len(prompt), _PREFILL_TOKENS):
            logits = session.step(np.array([prompt[start : start + _PREFILL_TOKENS]], dtype=np.int64))
        while True:
            forbidden = sorted(stops) if len(token_ids) < params.min_tokens else ()
            token = sampler.sample(logits[0], forbidden=forbidden)
            token_ids.append(token)
            reason: FinishReason | None = None
            if token in stops:
                reason = "stop"
            else:
                text.push(token)
                if text.stopped:
                    reason = "stop"
                elif len(token_ids) == max_tokens:
                    reason = "length"
            if reason is not None:
                text.flush()
            yield CompletionOutput(index=0, text=text.text, token_ids=list(token_ids), finish_reason=reason)
            if reason is not None:
                return
            logits = session.step(np.array([[token]], dtype=np.int64))

    def _stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        own = frozenset() if params.ignore_eos else self._eos_token_ids
        return own | frozenset(params.stop_token_ids)

    def _max_tokens(self, prompt: int, wanted: int | None) -> int:
        limit = self._max_length
        if prompt == 0:
            raise InputError("the prompt has no tokens; give a prompt that is not empty")
        if limit is None:
            if wanted is None:
                raise InputError("the model does not say how long a sequence may be; give max_tokens")
            return wanted
        if prompt >= limit:
            raise ContextLengthError(
                f"This model's maximum input context length is {limit - 1} tokens, however you requested {prompt} "
                f"tokens. Please reduce your prompt."
            )
        if wanted is None:
            return limit - prompt
        if prompt + wanted > limit:
            raise ContextLengthError(
                f"This model's maximum context length is {limit} tokens, however you requested {prompt + wanted} "
                f"tokens ({prompt} in your prompt; {wanted} for the completion). Please reduce your prompt; or "
                f"completion length."
            )
        return wanted


def _check_generative(manifest: Manifest) -> None:
    if manifest.model.task != "decoder":
        raise UnsupportedError(
            f"generate API can only be used for generative models; {manifest.model.name!r:.80} is of the task "
            f"{manifest.model.task!r}: use `furiosa-llm run`"
        )
