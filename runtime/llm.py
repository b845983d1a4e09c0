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
from furiosa_llm.runtime.outputs import RequestOutput
from furiosa_llm.runtime.request import Request, SequenceRequest
from furiosa_llm.runtime.sampling_params import RequestOutputKind, SamplingParams
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
        params = replace(sampling_params, output_kind=RequestOutputKind.DELTA)
        for output in self._outputs(prompt, params, prompt_token_ids):
            for completion in output.outputs:
                if completion.index == 0 and completion.text:
                    yield completion.text

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
        return self._outputs(prompt, sampling_params, prompt_token_ids)

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
        *_, output = self._outputs(prompt, replace(params, output_kind=RequestOutputKind.FINAL), token_ids)
        return output

    def _outputs(
        self, prompt: str, params: SamplingParams, prompt_token_ids: Sequence[int] | None
    ) -> Iterator[RequestOutput]:
        """The request after each token, one completion behind another."""
        token_ids = self.tokenizer.encode(prompt) if prompt_token_ids is None else list(prompt_token_ids)
        request = Request(
            request_id=str(next(self._request_ids)),
            prompt=prompt,
            prompt_token_ids=token_ids,
            params=params,
            tokenizer=self.tokenizer,
            eos_token_ids=self._eos_token_ids,
            max_tokens=self._max_tokens(len(token_ids), params.max_tokens),
            sequence_ids=range(params.num_sequences),
            seed=self._seed,
        )
        session = self._take_session()
        try:
            for sequence in request.sequences:
                for _ in self._decode(session, request, sequence):
                    if output := request.output():
                        yield output
        finally:
            self._idle_sessions.put(session)

    def _take_session(self) -> DecoderSession:
        """An idle session, or a new one if every one is in the middle of a request."""
        try:
            return self._idle_sessions.get_nowait()
        except Empty:
            return DecoderSession(self._executor, max_length=self._max_length)

    def _decode(self, session: DecoderSession, request: Request, sequence: SequenceRequest) -> Iterator[None]:
        """Stops after each token: the prefill, then one step for each token but the last."""
        prompt = request.prompt_token_ids
        session.reset()
        session.reserve(len(prompt) + request.max_tokens)
        # A step gives the logits behind its last token only.
        chunk = 1 if sequence.wants_prompt_logits else _PREFILL_TOKENS
        for start in range(0, len(prompt), chunk):
            logits = session.step(np.array([prompt[start : start + chunk]], dtype=np.int64))
            if chunk == 1:
                sequence.accept_prompt_logits(start, logits)
        while True:
            token = sequence.sampler.sample(logits[0])
            sequence.accept(token, logits[0])
            yield
            if sequence.finished:
                return
            logits = session.step(np.array([[token]], dtype=np.int64))

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
