"""`LLM`: loads an artifact and generates text, with the vendor's names and shapes."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, contextmanager
from functools import cached_property
from typing import Any, Literal, NoReturn, Self, Unpack, cast, overload

from furiosa_llm.runtime.adapters.adapter import LoRARequest
from furiosa_llm.runtime.artifact.composite import is_composite
from furiosa_llm.runtime.artifact.pooling import PoolingType
from furiosa_llm.runtime.artifact.progress import shown, telling
from furiosa_llm.runtime.async_engine import AsyncLLMEngine
from furiosa_llm.runtime.closing import Closing
from furiosa_llm.runtime.encoder import EmbeddingOutput, Encoder, PoolingOutput, PoolingRequestOutput
from furiosa_llm.runtime.engine.core import EngineCore, adapters_for_each, params_for_each, with_kind
from furiosa_llm.runtime.engine.engine_args import (
    EngineArgs,
    EngineOptions,
    refuse_foreign_options,
    with_engine_options,
)
from furiosa_llm.runtime.engine.launch import make_plan, only_of_one_replica, open_model
from furiosa_llm.runtime.engine.machine_snapshot import MachineSnapshot
from furiosa_llm.runtime.errors import InputError, TokenizerError, UnsupportedError
from furiosa_llm.runtime.llm_engine import LLMEngine
from furiosa_llm.runtime.model import Decoder, Model
from furiosa_llm.runtime.placement.topology import Topology
from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.runtime.requests.prompts import Prompt, listed, paired, with_tokenizer_kwargs
from furiosa_llm.runtime.runners.batch_invariance import BatchInvariance
from furiosa_llm.runtime.seq2seq import Seq2Seq
from furiosa_llm.runtime.tokens.chat import Conversation, check_tools, check_variables, conversations_of, render
from furiosa_llm.runtime.tokens.sampling_params import RequestOutputKind, SamplingParams
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer

_DEFAULT_PARAMS = SamplingParams()
UseTqdm = bool | Callable[..., Any] | None
"""Whether a bar counts the prompts that are done, or what makes the bar; None: on a terminal and in a notebook."""


class LLM(Closing):
    """A model loaded from the artifact in the folder `model`: a decoder, an encoder, or an encoder with its decoder.

    Decoders `generate`, and run on an engine; encoders `encode` and `embed`; an encoder-decoder generates, one request
    after another. The options are the fields of `EngineArgs`, which says what they mean, and two more. `skip_engine`
    loads nothing to run the model with: what is wrong with the artifact or the options comes out all the same.
    `use_tqdm_on_load` shows progress on standard error, by default on a terminal and in a notebook. Raises
    TypeError for unknown options, UnsupportedError for options of the vendor's that mean nothing here, or that only
    decoders have, and what `make_plan` does.

    Several threads may generate at once; their requests run together. Close it, or use it as a context manager, to end
    its threads.
    """

    @with_engine_options
    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        skip_engine: bool = False,
        use_tqdm_on_load: bool | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        args = EngineArgs(model, **refuse_foreign_options(options))
        self._folder = os.fspath(model)
        with shown(use_tqdm_on_load):
            self._model = _load(args, skip_engine=skip_engine)

    @classmethod
    @with_engine_options
    def load_artifact(
        cls,
        path: str | os.PathLike[str],
        *,
        skip_engine: bool = False,
        use_tqdm_on_load: bool | None = None,
        **options: Unpack[EngineOptions],
    ) -> Self:
        """Loads the artifact in the folder `path`; takes the options of the class."""
        return cls(path, skip_engine=skip_engine, use_tqdm_on_load=use_tqdm_on_load, **options)

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

    def __repr__(self) -> str:
        kind = type(self._model).__name__.lower()
        limit = "any number of" if self.model_max_seq_len is None else f"at most {self.model_max_seq_len}"
        place = "one replica of one stage" if self.topology is None else str(self.topology)
        return f"<LLM {self._folder}: {kind}, {limit} tokens, {place}>"

    @property
    def tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer, or the one that was given; raises TokenizerError if there is none."""
        if self._model.tokenizer is None:
            raise TokenizerError("the artifact has no tokenizer.json; load it with the folder of a tokenizer")
        return self._model.tokenizer

    @property
    def core(self) -> EngineCore:
        """What runs a decoder's requests; raises EngineDeadError if it was loaded with `skip_engine`.

        Raises UnsupportedError for other models.
        """
        return self._model.core

    @property
    def topology(self) -> Topology | None:
        """Where a decoder's replicas and stages are; None for other models, which have one of each."""
        return self._model.plan.topology if isinstance(self._model, Decoder) else None

    def machine(self) -> MachineSnapshot:
        """What lies on every PE, and what replicas and stages have done so far; raises what `core` does.

        An encoder has no core, and answers all the same.
        """
        return self._model.machine()

    @property
    def batch_invariance(self) -> BatchInvariance:
        """Whether a decoder's bits depend on how many sequences are in a batch, on this machine, and which ops do that.

        Probed when it is first asked for; raises UnsupportedError for other models, which run one request at a time.
        """
        if not isinstance(self._model, Decoder):
            raise UnsupportedError("batch_invariance: only a decoder runs several requests in one batch")
        return self._model.batch_invariance

    @cached_property
    def engine(self) -> LLMEngine:
        """An `LLMEngine` on this model, the same each time; `LLMEngine.from_llm` makes others."""
        return LLMEngine.from_llm(self)

    @property
    def is_generative_model(self) -> bool:
        """Whether `generate` works; if not, `encode` and `embed` do."""
        return not isinstance(self._model, Encoder)

    @property
    def model_max_seq_len(self) -> int | None:
        """The limit in tokens, of a decoder's prompt and completion together; None if there is none.

        For an encoder it is the limit of a text, for an encoder-decoder the limit of a completion.
        """
        return self._model.max_length

    @property
    def max_seq_len_to_capture(self) -> int | None:
        """The same under the vendor's other name."""
        return self.model_max_seq_len

    @property
    def prompt_max_seq_len(self) -> int | None:
        """The limit of a prompt in tokens; None if there is none."""
        return self._model.max_prompt_length

    @overload
    def generate(
        self,
        prompts: str | Mapping[str, Any],
        sampling_params: SamplingParams | None = None,
        prompt_token_ids: Sequence[int] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        lora_request: LoRARequest | None = None,
        use_tqdm: UseTqdm = None,
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        prompts: list[Any] | tuple[Any, ...] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        prompt_token_ids: Sequence[Sequence[int]] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        use_tqdm: UseTqdm = None,
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        prompts: Any = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        prompt_token_ids: Any = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        use_tqdm: UseTqdm = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Completes `prompts`, as many at once as fit: a single one gives one output, a list a list in its order.

        A prompt is text, token ids, or a mapping with `prompt` or `prompt_token_ids`. The argument `prompt_token_ids`,
        one sequence for each prompt, is used instead of the prompts' own tokens, and may stand alone. A list of
        `sampling_params` has the parameters of each prompt, a list of `lora_request` its adapter (None: none). Of
        `tokenizer_kwargs` there is `add_special_tokens`. With `use_tqdm` a bar on standard error shows how many prompts
        are done, by default on a terminal and in a notebook; a callable makes the bar, as tqdm.tqdm does.

        If one prompt is refused, or Ctrl-C or a failure comes in between, all are given up. Raises ContextLengthError,
        a ValueError, if a prompt and its completion do not fit the limit, and ReplicaError if a replica fails while it
        has one of them; AdapterError if an adapter is not one of this model's.
        """
        asked, single = paired(prompts, prompt_token_ids)
        asked = [with_tokenizer_kwargs(prompt, tokenizer_kwargs, self._model.tokenizer) for prompt in asked]
        outputs = self._complete(asked, sampling_params, lora_request, use_tqdm)
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
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        use_tqdm: UseTqdm = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of several; always a list.

        `chat_template` replaces the model's own. With `continue_final_message` the answer goes on from the last
        message; `add_generation_prompt` must be False then. `chat_template_kwargs` are variables of the template, such
        as `enable_thinking`. `tools` are given to the template; what the model answers
        is text, of which calls of tools are not taken out. Raises TokenizerError if there is no template or it refuses
        the messages, InputError if they are no messages, else what `generate` does, which also explains `use_tqdm`.
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
                **check_variables(chat_template_kwargs),
            )
            for conversation in conversations_of(messages)
        ]
        return self._complete(prompts, sampling_params, lora_request, use_tqdm)

    def stream(
        self,
        prompt: Prompt | None = None,
        sampling_params: SamplingParams = _DEFAULT_PARAMS,
        prompt_token_ids: Sequence[int] | None = None,
        lora_request: LoRARequest | None = None,
    ) -> Iterator[str]:
        """The completion of `prompt` in pieces of text, as they come."""
        params = _delta(sampling_params)
        for output in self.stream_outputs(prompt, params, prompt_token_ids, lora_request):
            if output.outputs[0].text:
                yield output.outputs[0].text

    async def stream_generate(
        self,
        prompt: Prompt | None = None,
        sampling_params: SamplingParams = _DEFAULT_PARAMS,
        prompt_token_ids: Sequence[int] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        is_demo: bool = False,  # noqa: ARG002 - the vendor's, without effect
        lora_request: LoRARequest | None = None,
    ) -> AsyncIterator[str]:
        """`stream` for asyncio."""
        asked = with_tokenizer_kwargs(_one_prompt(prompt, prompt_token_ids), tokenizer_kwargs, self._model.tokenizer)
        if not isinstance(self._model, Decoder):
            pieces = self.stream(asked, sampling_params, lora_request=lora_request)
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                yield piece
            return
        engine = AsyncLLMEngine.from_llm(self)
        request_id = self._model.next_request_id()
        async with aclosing(engine.generate(asked, _delta(sampling_params), request_id, lora_request)) as outputs:
            async for output in outputs:
                if output.outputs[0].text:
                    yield output.outputs[0].text

    def stream_outputs(
        self,
        prompt: Prompt | None = None,
        sampling_params: SamplingParams = _DEFAULT_PARAMS,
        prompt_token_ids: Sequence[int] | None = None,
        lora_request: LoRARequest | None = None,
    ) -> Iterator[RequestOutput]:
        """The request after each token, the last time finished; `output_kind` says what the outputs hold."""
        return self._model.stream_outputs(_one_prompt(prompt, prompt_token_ids), sampling_params, lora_request)

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: PoolingType | None = None,
        normalize: bool | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: UseTqdm = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """An encoder's vectors of `prompts`; see `Encoder.encode`, and `generate` for `use_tqdm`.

        Raises UnsupportedError for other models.
        """
        encoder = self._encoding("encode")
        with _counting(use_tqdm, len(listed(prompts))):
            return encoder.encode(
                prompts, pooling=pooling, normalize=normalize, truncate_prompt_tokens=truncate_prompt_tokens
            )

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: PoolingType | None = None,
        normalize: bool | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: UseTqdm = None,
    ) -> list[PoolingRequestOutput[EmbeddingOutput]]:
        """`encode`, with each vector as a list of numbers."""
        encoder = self._encoding("embed")
        with _counting(use_tqdm, len(listed(prompts))):
            return encoder.embed(
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
        self._model.close()

    def close(self) -> None:
        """`shutdown`, as files and locks call it."""
        self.shutdown()

    def _complete(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None,
        use_tqdm: UseTqdm,
    ) -> list[RequestOutput]:
        params = params_for_each(sampling_params, len(prompts))
        adapters = adapters_for_each(lora_request, len(prompts))
        with _counting(use_tqdm, len(prompts)):
            return self._model.complete(prompts, params, adapters)

    def _encoding(self, name: str) -> Encoder:
        if not isinstance(self._model, Encoder):
            raise UnsupportedError(f"{name} API can only be used for encoders; this model generates: use generate")
        return self._model


def _counting(use_tqdm: UseTqdm, total: int) -> AbstractContextManager[None]:
    """Shows how many of `total` prompts are done inside."""
    return _counted_by(use_tqdm, total) if callable(use_tqdm) else shown(use_tqdm)


@contextmanager
def _counted_by(tqdm: Callable[..., Any], total: int) -> Iterator[None]:
    """Shows how many prompts are done by a bar that `tqdm` makes."""
    bar = tqdm(total=total, desc="Processed prompts", dynamic_ncols=True)
    done = 0

    def count(_: str, now: int, __: int) -> None:
        nonlocal done
        bar.update(now - done)
        done = now

    try:
        with telling(count):
            yield
    finally:
        bar.close()


def _load(args: EngineArgs, *, skip_engine: bool) -> Model:
    """The model that `args` name, of whatever kind it is."""
    if is_composite(args.model):
        only_of_one_replica(args, "an encoder-decoder")
        return Seq2Seq.load_artifact(
            args.model,
            seed=args.seed,
            tensor_parallel_size=args.tensor_parallel_size,
            tokenizer=args.tokenizer,
            threads=args.threads,
            mapped=args.mapped,
            compute=args.compute,
            full_verification=args.full_verification,
        )
    artifact = open_model(args)
    if artifact.manifest.model.task == "encoder":
        only_of_one_replica(args, "an encoder")
        return Encoder.of_artifact(artifact, tokenizer=args.tokenizer, threads=args.threads, mapped=args.mapped)
    return Decoder(make_plan(args, artifact), args, skip_engine=skip_engine)


def _one_prompt(prompt: Prompt | None, token_ids: Sequence[int] | None) -> Prompt:
    return cast(Prompt, prompt) if token_ids is None else {"prompt": prompt, "prompt_token_ids": token_ids}


def _delta(params: SamplingParams) -> SamplingParams:
    delta = with_kind(params, RequestOutputKind.DELTA)
    if delta.n > 1:
        raise InputError(f"a stream of text is of one completion, found n={delta.n}; give n=1, or use stream_outputs")
    return delta
