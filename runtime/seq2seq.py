"""`Seq2Seq`: texts in, texts out, from the composite artifact of an encoder and its decoder."""

from __future__ import annotations

import itertools
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Self

from furiosa_llm.runtime.adapters.adapter import LoRARequest
from furiosa_llm.runtime.artifact.composite import Composite, open_composite
from furiosa_llm.runtime.artifact.composite_manifest import PartName
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.progress import tell
from furiosa_llm.runtime.engine.machine_snapshot import MachineSnapshot, layout_of_parts, replica_snapshot, snapshot
from furiosa_llm.runtime.engine.replica import ReplicaUsage
from furiosa_llm.runtime.engine.replica_counts import ReplicaCounts
from furiosa_llm.runtime.errors import ContextLengthError, InputError, SamplingParamsError, UnsupportedError
from furiosa_llm.runtime.execution.counters import added
from furiosa_llm.runtime.execution.executor import Executor
from furiosa_llm.runtime.execution.prompt_feeds import prompt_feeds
from furiosa_llm.runtime.execution.seq2seq_decoder import CachedSteps, Steps, WholeSteps
from furiosa_llm.runtime.model import Model
from furiosa_llm.runtime.placement.stages import check_tensor_parallel_size
from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.runtime.requests.prompts import Prompt, check_prompt_length, listed, read_prompt
from furiosa_llm.runtime.requests.request import Request
from furiosa_llm.runtime.tokens.grammar import Grammars
from furiosa_llm.runtime.tokens.sampler import derived_seed, sample_rows
from furiosa_llm.runtime.tokens.sampling_params import RequestOutputKind, SamplingParams
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer, tokenizer_of

_DEFAULT_PARAMS = SamplingParams()


class Seq2Seq(Model):
    """An encoder-decoder loaded from a composite artifact.

    Make one with `load_artifact`. Several threads may generate at once; their steps take turns. Close it, or use it as
    a context manager, to end its threads. A text is encoded with the tokenizer's special tokens around it, as these
    models are trained.
    """

    without_engine = "an encoder-decoder runs without an engine; use generate or stream_outputs"

    def __init__(
        self,
        composite: Composite,
        executors: Mapping[PartName, Executor],
        tokenizer: Tokenizer | None,
        *,
        seed: int | None = None,
    ) -> None:
        self.composite = composite
        self.tokenizer = tokenizer
        self._executors = executors
        self.max_prompt_length = composite.encoder.manifest.model.max_sequence_length
        limit = composite.decoder.manifest.model.max_sequence_length
        self.max_length = None if limit is None else limit - 1  # the token that it begins with takes a place
        self._vocab_size = composite.decoder.manifest.model.vocab_size
        self._seed = seed
        self._grammars = Grammars(tokenizer)
        self._idle: SimpleQueue[Steps] = SimpleQueue()
        self._layout = layout_of_parts(list(composite.parts.values()))
        self._request_ids = itertools.count()

    @classmethod
    def load_artifact(
        cls,
        path: str | os.PathLike[str],
        *,
        tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
        seed: int | None = None,
        tensor_parallel_size: int | None = None,
        threads: int | None = None,
        mapped: bool = False,
        compute: str | None = None,
        full_verification: bool | None = None,
    ) -> Self:
        """Loads the composite artifact in the folder `path`; it takes the arguments of `LLM.load_artifact`.

        Raises ArtifactError for a damaged artifact, or one whose parts do not fit, and InputError for one of another
        tensor parallel size than asked for.
        """
        composite = open_composite(path, full=full_verification, compute=compute)
        return cls.of_composite(
            composite,
            tokenizer=tokenizer,
            seed=seed,
            tensor_parallel_size=tensor_parallel_size,
            threads=threads,
            mapped=mapped,
        )

    @classmethod
    def of_composite(
        cls,
        composite: Composite,
        *,
        tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
        seed: int | None = None,
        tensor_parallel_size: int | None = None,
        threads: int | None = None,
        mapped: bool = False,
    ) -> Self:
        """Loads a composite artifact that is open; `load_artifact` says the rest."""
        check_tensor_parallel_size(composite.encoder, tensor_parallel_size)
        loaded_tokenizer = tokenizer_of(composite.encoder, tokenizer)
        with ExitStack() as stack:
            executors = {
                name: stack.enter_context(Executor(part, threads=threads, mapped=mapped))
                for name, part in composite.parts.items()
            }
            loaded = cls(composite, executors, loaded_tokenizer, seed=seed)
            stack.pop_all()
        return loaded

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams = _DEFAULT_PARAMS
    ) -> list[RequestOutput]:
        """The completions of `prompts` (one, or a list of them), in their order.

        Raises ContextLengthError for a prompt or `max_tokens` beyond the model's limit, InputError for what is no
        prompt, TokenizerError for text without a tokenizer.
        """
        asked = listed(prompts)
        return self.complete(asked, [sampling_params] * len(asked), [None] * len(asked))

    def complete(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], adapters: Sequence[LoRARequest | None]
    ) -> list[RequestOutput]:
        """See `Model`; raises UnsupportedError for adapters."""
        for adapter in adapters:
            _check_without(adapter)
        outputs: list[RequestOutput] = []
        for prompt, own_params in zip(prompts, params, strict=True):
            tell("completing prompts", len(outputs), len(prompts))
            outputs.append(self._complete(prompt, own_params))
        return outputs

    def stream_outputs(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams = _DEFAULT_PARAMS,
        adapter: LoRARequest | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """The request after each token, the last time finished; `output_kind` says what the outputs hold."""
        _check_without(adapter)
        text, token_ids = read_prompt(prompt, self.tokenizer, self._vocab_size, add_special_tokens=True)
        request = self._request(text, token_ids, sampling_params)
        hidden = self._encoded(token_ids)
        steps = self._take_steps()
        try:
            for sequence in request.sequences:
                steps.start(hidden)
                token = self.composite.manifest.decoder_start_token_id
                while not sequence.finished:
                    logits = steps.step(token)
                    (token,) = sample_rows([sequence.sampler], logits[None])
                    sequence.accept(token, logits)
                    output = request.output()
                    if output is not None:
                        yield output
        finally:
            self._idle.put(steps)

    def machine(self, *, running: int = 0, waiting: int = 0) -> MachineSnapshot:
        """What lies on every PE, and what the model has done so far, as one replica of one stage.

        The caller says how many requests are `running` and `waiting`: the model knows only what it runs.
        """
        usage = ReplicaUsage(running=running, waiting=waiting, used_pages=0, num_pages=0, preemptions=0)
        done = added([one for executor in self._executors.values() for one in executor.counts])
        counts = ReplicaCounts(stages=(done,))
        one = replica_snapshot(self._layout, 0, usage=usage, counts=counts, alive=True, ready=True)
        return snapshot(self._layout, [one])

    def close(self) -> None:
        """Ends the threads; the model cannot generate any more."""
        for executor in self._executors.values():
            executor.close()

    def _complete(self, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        *_, output = self.stream_outputs(prompt, replace(params, output_kind=RequestOutputKind.FINAL))
        return output

    def _request(self, text: str | None, token_ids: Sequence[int], params: SamplingParams) -> Request:
        if params.prompt_logprobs is not None:
            raise SamplingParamsError("prompt_logprobs: an encoder gives no logits of its prompt; leave it out")
        if self._vocab_size is not None:
            params.check_vocabulary(self._vocab_size)
        wanted = params.structured_outputs
        number = next(self._request_ids)
        return Request(
            request_id=str(number),
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            tokenizer=self.tokenizer,
            eos_token_ids=frozenset(self.composite.manifest.eos_token_ids),
            max_tokens=self._max_tokens(len(token_ids), params.max_tokens),
            sequence_ids=range(params.num_sequences),
            seed=None if self._seed is None else derived_seed(self._seed, number),
            penalised=(self.composite.manifest.decoder_start_token_id,),
            grammar=None if wanted is None else self._grammars.compile(wanted.llguidance_grammar),
        )

    def _encoded(self, prompt: Sequence[int]) -> Array:
        encoder = self._executors["encoder"]
        feeds = prompt_feeds(encoder.artifact.manifest.inputs, [prompt])
        return encoder.run(feeds)[self.composite.manifest.hidden.output]

    def _take_steps(self) -> Steps:
        """Idle steps, or new ones if all are in the middle of a request."""
        try:
            return self._idle.get_nowait()
        except Empty:
            decoder, first = self._executors["decoder"], self._executors.get("decoder_first")
            manifest = self.composite.manifest
            return WholeSteps(decoder, manifest) if first is None else CachedSteps(first, decoder, manifest)

    def _max_tokens(self, prompt: int, wanted: int | None) -> int:
        check_prompt_length(prompt, self.max_prompt_length)
        limit = self.max_length
        if wanted is None and limit is None:
            raise InputError("the model does not say how long a completion may be; give max_tokens")
        if limit is not None and (wanted or 0) > limit:
            raise ContextLengthError(
                f"This model's maximum completion length is {limit} tokens, however you requested {wanted} tokens. "
                f"Please reduce the completion length."
            )
        return wanted or limit or 0


def _check_without(adapter: LoRARequest | None) -> None:
    if adapter is not None:
        raise UnsupportedError("lora_request: an encoder-decoder takes no adapters; leave it out")
