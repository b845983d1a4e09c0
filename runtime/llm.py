"""`LLM`: loads an artifact and generates text, with the vendor's names and shapes."""

from __future__ import annotations

import asyncio
import itertools
import os
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import cached_property
from queue import SimpleQueue
from typing import Any, Literal, NoReturn, Self, cast, overload

from furiosa_llm.runtime.artifact.composite import is_composite
from furiosa_llm.runtime.artifact.pooling import PoolingType
from furiosa_llm.runtime.async_engine import AsyncLLMEngine
from furiosa_llm.runtime.closing import Closing
from furiosa_llm.runtime.encoder import EmbeddingOutput, Encoder, PoolingOutput, PoolingRequestOutput
from furiosa_llm.runtime.engine.core import EngineCore, Handle, params_for_each, with_kind
from furiosa_llm.runtime.engine.engine_args import EngineArgs, refuse_foreign_options
from furiosa_llm.runtime.engine.launch import Plan, make_plan, only_of_one_replica, open_model, start
from furiosa_llm.runtime.engine.machine_snapshot import MachineSnapshot
from furiosa_llm.runtime.errors import EngineDeadError, InputError, TokenizerError, UnsupportedError
from furiosa_llm.runtime.llm_engine import LLMEngine, raise_error
from furiosa_llm.runtime.placement.topology import Topology
from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.runtime.requests.prompts import Prompt, paired, with_tokenizer_kwargs
from furiosa_llm.runtime.runners.batch_invariance import BatchInvariance, probe_batch_invariance
from furiosa_llm.runtime.seq2seq import Seq2Seq
from furiosa_llm.runtime.tokens.chat import Conversation, check_tools, conversations_of, render
from furiosa_llm.runtime.tokens.sampling_params import RequestOutputKind, SamplingParams
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer

_DEFAULT_PARAMS = SamplingParams()


class LLM(Closing):
    """A model loaded from the artifact in the folder `model`: a decoder, an encoder, or an encoder with its decoder.

    Decoders `generate`, and run on an engine; encoders `encode` and `embed`; an encoder-decoder generates, one request
    after another. The options are the fields of `EngineArgs`, which says what they mean, and `skip_engine`, which loads
    nothing to run the model with: what is wrong with the artifact or the options comes out all the same. Raises
    TypeError for unknown options, UnsupportedError for options of the vendor's that mean nothing here, or that only
    decoders have, and what `make_plan` does.

    Several threads may generate at once; their requests run together. Close it, or use it as a context manager, to end
    its threads.
    """

    def __init__(self, model: str | os.PathLike[str], *, skip_engine: bool = False, **options: Any) -> None:
        args = EngineArgs(model, **refuse_foreign_options(options))
        self.topology: Topology | None = None
        self._plan: Plan | None = None
        self._mapped = args.mapped
        self._core: EngineCore | None = None
        self._encoder: Encoder | None = None
        self._seq2seq: Seq2Seq | None = None
        self._request_ids = itertools.count()
        if is_composite(model):
            only_of_one_replica(args, "an encoder-decoder")
            self._seq2seq = Seq2Seq.load_artifact(
                model, seed=args.seed, tensor_parallel_size=args.tensor_parallel_size, **_loading(args)
            )
            self._tokenizer = self._seq2seq.tokenizer
            return
        artifact = open_model(args)
        if artifact.manifest.model.task == "encoder":
            only_of_one_replica(args, "an encoder")
            self._encoder = Encoder.of_artifact(
                artifact, tokenizer=args.tokenizer, threads=args.threads, mapped=args.mapped
            )
            self._tokenizer = self._encoder.tokenizer
            return
        plan = make_plan(args, artifact)
        self._plan = plan
        self._tokenizer = plan.tokenizer
        self.topology = plan.topology
        self._core = None if skip_engine else start(plan, args)

    @classmethod
    def load_artifact(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """Loads the artifact in the folder `path`; takes the options of the class."""
        return cls(path, **options)

    @classmethod
    def load_artifacts(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """`load_artifact` under its old name; warns that it is deprecated."""
        warnings.warn("LLM.load_artifacts is deprecated; use LLM.load_artifact", DeprecationWarning, stacklevel=2)
        return cls.load_artifact(path, **options)

    @classmethod
    def from_artifacts(cls, *_: Any, **__: Any) -> NoReturn:
        """The vendor's loader of artifacts of before 2025; raises UnsupportedError."""
        raise UnsupportedError(
            "from_artifacts: the vendor's artifacts of before 2025 hold no ONNX model; build one, and use load_artifact"
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer, or the one that was given; raises TokenizerError if there is none."""
        if self._tokenizer is None:
            raise TokenizerError("the artifact has no tokenizer.json; load it with the folder of a tokenizer")
        return self._tokenizer

    @property
    def core(self) -> EngineCore:
        """What runs a decoder's requests; raises EngineDeadError if it was loaded with `skip_engine`.

        Raises UnsupportedError for other models.
        """
        if self._encoder is not None:
            raise UnsupportedError(
                "generate API can only be used for generative models; this is an encoder: use embed, or `furiosa-llm "
                "embed`; `furiosa-llm run` gives its outputs as they are"
            )
        if self._seq2seq is not None:
            raise UnsupportedError("an encoder-decoder runs without an engine; use generate or stream_outputs")
        if self._core is None:
            raise EngineDeadError("the model was loaded with skip_engine=True; load it without, to run it")
        return self._core

    def machine(self) -> MachineSnapshot:
        """What lies on every PE, and what replicas and stages have done so far; raises what `core` does."""
        return self.core.machine() if self._encoder is None else self._encoder.machine()

    @cached_property
    def batch_invariance(self) -> BatchInvariance:
        """Whether a decoder's bits depend on how many sequences are in a batch, on this machine, and which ops do that.

        Probed when it is first asked for; raises UnsupportedError for other models, which run one request at a time.
        """
        if self._plan is None:
            raise UnsupportedError("batch_invariance: only a decoder runs several requests in one batch")
        return self._plan.batch_invariance or probe_batch_invariance(self._plan.artifact, mapped=self._mapped)

    @cached_property
    def engine(self) -> LLMEngine:
        """An `LLMEngine` on this model, the same each time; `LLMEngine.from_llm` makes others."""
        return LLMEngine.from_llm(self)

    @property
    def is_generative_model(self) -> bool:
        """Whether `generate` works; if not, `encode` and `embed` do."""
        return self._encoder is None

    @property
    def model_max_seq_len(self) -> int | None:
        """The limit in tokens, of a decoder's prompt and completion together; None if there is none.

        Of an encoder it is that of a text, of an encoder-decoder that of a completion.
        """
        if self._encoder is not None:
            return self._encoder.max_length
        if self._seq2seq is not None:
            return self._seq2seq.max_completion_length
        return self._plan.limits.max_length if self._plan is not None else None

    @property
    def max_seq_len_to_capture(self) -> int | None:
        """The same under the vendor's other name."""
        return self.model_max_seq_len

    @property
    def prompt_max_seq_len(self) -> int | None:
        """The limit of a prompt in tokens; None if there is none."""
        if self._encoder is not None:
            return self._encoder.max_length
        if self._seq2seq is not None:
            return self._seq2seq.max_prompt_length
        return self._plan.limits.prompt_limit if self._plan is not None else None

    @overload
    def generate(
        self,
        prompts: str | Mapping[str, Any],
        sampling_params: SamplingParams | None = None,
        prompt_token_ids: Sequence[int] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        prompts: list[Any] | tuple[Any, ...] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        prompt_token_ids: Sequence[Sequence[int]] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        prompts: Any = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        prompt_token_ids: Any = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Completes `prompts`, as many at once as fit: a single one gives one output, a list a list in its order.

        A prompt is text, token ids, or a mapping with `prompt` or `prompt_token_ids`. The argument `prompt_token_ids`,
        one sequence for each prompt, is used instead of the prompts' own tokens, and may stand alone. A list of
        `sampling_params` has those of each prompt. Of `tokenizer_kwargs` there is `add_special_tokens`.

        If one prompt is refused, or Ctrl-C or a failure comes in between, all are given up. Raises ContextLengthError,
        a ValueError, if a prompt and its completion do not fit the limit, and ReplicaError if a replica fails while it
        has one of them.
        """
        asked, single = paired(prompts, prompt_token_ids)
        asked = [with_tokenizer_kwargs(prompt, tokenizer_kwargs, self._tokenizer) for prompt in asked]
        outputs = self._complete(asked, sampling_params)
        return outputs[0] if single else outputs

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: Literal["string"] = "string",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of several; always a list.

        `chat_template` replaces the model's own. With `continue_final_message` the answer goes on from the last
        message; `add_generation_prompt` must be False then. `tools` are told to the template; what the model answers is
        text, of which calls of tools are not taken out. Raises TokenizerError if there is no template or it refuses the
        messages, InputError if they are none, else what `generate` does.
        """
        if chat_template_content_format != "string":
            raise UnsupportedError(
                f"chat_template_content_format={chat_template_content_format!r:.80} is not supported; give 'string'"
            )
        check_tools(tools)
        prompts: list[Prompt] = [
            render(
                self.tokenizer,
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
            )
            for conversation in conversations_of(messages)
        ]
        return self._complete(prompts, sampling_params)

    def stream(
        self,
        prompt: Prompt | None = None,
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
        prompt: Prompt | None = None,
        sampling_params: SamplingParams = _DEFAULT_PARAMS,
        prompt_token_ids: Sequence[int] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        is_demo: bool = False,  # noqa: ARG002 - the vendor's, without effect
    ) -> AsyncIterator[str]:
        """`stream` for asyncio."""
        asked = with_tokenizer_kwargs(_one_prompt(prompt, prompt_token_ids), tokenizer_kwargs, self._tokenizer)
        if self._seq2seq is not None:
            pieces = self.stream(asked, sampling_params)
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                yield piece
            return
        engine = AsyncLLMEngine.from_llm(self)
        async with aclosing(engine.generate(asked, _delta(sampling_params), self._next_id())) as outputs:
            async for output in outputs:
                if output.outputs[0].text:
                    yield output.outputs[0].text

    def stream_outputs(
        self,
        prompt: Prompt | None = None,
        sampling_params: SamplingParams = _DEFAULT_PARAMS,
        prompt_token_ids: Sequence[int] | None = None,
    ) -> Iterator[RequestOutput]:
        """The request after each token, the last time finished; `output_kind` says what the outputs hold."""
        asked = _one_prompt(prompt, prompt_token_ids)
        if self._seq2seq is not None:
            yield from self._seq2seq.stream_outputs(asked, sampling_params)
            return
        ready: SimpleQueue[RequestOutput] = SimpleQueue()
        handle = self._submit(asked, sampling_params, ready)
        try:
            finished = False
            while not finished:
                output = ready.get()
                finished = output.finished
                raise_error(output)
                yield output
        finally:
            handle.abort()

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: PoolingType | None = None,
        normalize: bool | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """An encoder's vectors of `prompts`; see `Encoder.encode`. Raises UnsupportedError for other models."""
        return self._encoding("encode").encode(
            prompts, pooling=pooling, normalize=normalize, truncate_prompt_tokens=truncate_prompt_tokens
        )

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: PoolingType | None = None,
        normalize: bool | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[PoolingRequestOutput[EmbeddingOutput]]:
        """`encode`, with each vector as a list of numbers."""
        return self._encoding("embed").embed(
            prompts, pooling=pooling, normalize=normalize, truncate_prompt_tokens=truncate_prompt_tokens
        )

    def bert_forward(self, *_: Any, **__: Any) -> NoReturn:
        """The vendor's question answering with BERT; raises UnsupportedError."""
        raise UnsupportedError(
            "bert_forward is not supported: encode gives an encoder's vectors, `furiosa-llm run` and Executor.run the "
            "outputs of any model"
        )

    def shutdown(self) -> None:
        """Ends the engine and its threads; the model cannot run any more."""
        for one in (self._core, self._encoder, self._seq2seq):
            if one is not None:
                one.close()

    def close(self) -> None:
        """`shutdown`, as files and locks call it."""
        self.shutdown()

    def _complete(
        self, prompts: Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[RequestOutput]:
        """The finished outputs of `prompts`, in their order."""
        params = params_for_each(sampling_params, len(prompts))
        if self._seq2seq is not None:
            return [self._seq2seq.generate(prompt, one)[0] for prompt, one in zip(prompts, params, strict=True)]
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

    def _encoding(self, name: str) -> Encoder:
        if self._encoder is None:
            raise UnsupportedError(f"{name} API can only be used for encoders; this model generates: use generate")
        return self._encoder

    def _submit(self, prompt: Prompt, params: SamplingParams, ready: SimpleQueue[RequestOutput]) -> Handle:
        def take(outputs: Sequence[tuple[int, RequestOutput]]) -> None:
            for _, output in outputs:
                ready.put(output)

        return self.core.submit(self._next_id(), prompt, params, take)

    def _next_id(self) -> str:
        return str(next(self._request_ids))


def _loading(args: EngineArgs) -> dict[str, Any]:
    """The options that every kind of model has."""
    return {
        "tokenizer": args.tokenizer,
        "threads": args.threads,
        "mapped": args.mapped,
        "full_verification": args.full_verification,
    }


def _one_prompt(prompt: Prompt | None, token_ids: Sequence[int] | None) -> Prompt:
    return cast(Prompt, prompt) if token_ids is None else {"prompt": prompt, "prompt_token_ids": token_ids}


def _delta(params: SamplingParams) -> SamplingParams:
    delta = with_kind(params, RequestOutputKind.DELTA)
    if delta.n > 1:
        raise InputError(f"a stream of text is of one completion, found n={delta.n}; give n=1, or use stream_outputs")
    return delta
