"""`Model`: a model of any kind, as `LLM` uses it; and `Decoder`, the kind that runs on an engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from queue import SimpleQueue
from typing import ClassVar

from furiosa_llm.runtime.adapters.adapter import LoRARequest
from furiosa_llm.runtime.artifact.progress import tell
from furiosa_llm.runtime.closing import Closing
from furiosa_llm.runtime.engine.core import EngineCore, Handle, with_kind
from furiosa_llm.runtime.engine.engine_args import EngineArgs
from furiosa_llm.runtime.engine.launch import Plan, start
from furiosa_llm.runtime.engine.machine_snapshot import MachineSnapshot
from furiosa_llm.runtime.errors import EngineDeadError, UnsupportedError
from furiosa_llm.runtime.requests.outputs import RequestOutput, raise_error
from furiosa_llm.runtime.requests.prompts import Prompt
from furiosa_llm.runtime.runners.batch_invariance import BatchInvariance, probe_batch_invariance
from furiosa_llm.runtime.tokens.sampling_params import RequestOutputKind, SamplingParams
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer


class Model(Closing):
    """A loaded model. Requests for completions go to its engine, unless its kind runs them by itself."""

    without_engine: ClassVar[str] = ""
    """What a kind says that has no engine."""
    tokenizer: Tokenizer | None
    max_length: int | None
    """In tokens: of a decoder's prompt and completion together, of an encoder's text, of Seq2Seq's completion."""
    max_prompt_length: int | None
    _request_ids: Iterator[int]

    @property
    def core(self) -> EngineCore:
        """The engine; raises UnsupportedError for a kind that runs without one."""
        raise UnsupportedError(self.without_engine)

    def machine(self) -> MachineSnapshot:
        """What lies on every PE, and what was done so far."""
        return self.core.machine()

    def complete(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], adapters: Sequence[LoRARequest | None]
    ) -> list[RequestOutput]:
        """The finished outputs of `prompts`, each with its own of `params` and `adapters`, in their order.

        If one fails, there are none.
        """
        ready: SimpleQueue[RequestOutput] = SimpleQueue()
        handles: list[Handle] = []
        finished: dict[str, RequestOutput] = {}
        try:
            for prompt, own_params, adapter in zip(prompts, params, adapters, strict=True):
                final = with_kind(own_params, RequestOutputKind.FINAL)
                handles.append(self._submit(prompt, final, adapter, ready))
            tell("completing prompts", 0, len(prompts))
            while len(finished) < len(prompts):
                output = ready.get()
                raise_error(output)
                finished[output.request_id] = output
                tell("completing prompts", len(finished), len(prompts))
        except BaseException:
            for handle in handles:
                handle.abort()
            raise
        return [finished[request_id] for request_id in sorted(finished, key=int)]

    def stream_outputs(
        self, prompt: Prompt, params: SamplingParams, adapter: LoRARequest | None = None
    ) -> Iterator[RequestOutput]:
        """The request after each token, the last time finished."""
        ready: SimpleQueue[RequestOutput] = SimpleQueue()
        handle = self._submit(prompt, params, adapter, ready)
        try:
            finished = False
            while not finished:
                output = ready.get()
                finished = output.finished
                raise_error(output)
                yield output
        finally:
            handle.abort()

    def next_request_id(self) -> str:
        """An id that no other request of this model has."""
        return str(next(self._request_ids))

    def _submit(
        self, prompt: Prompt, params: SamplingParams, adapter: LoRARequest | None, ready: SimpleQueue[RequestOutput]
    ) -> Handle:
        def take(outputs: Sequence[tuple[int, RequestOutput]]) -> None:
            for _, output in outputs:
                ready.put(output)

        return self.core.submit(self.next_request_id(), prompt, params, take, adapter)


class Decoder(Model):
    """A decoder that runs as `plan` says; with `skip_engine` nothing is loaded to run it with."""

    def __init__(self, plan: Plan, args: EngineArgs, *, skip_engine: bool) -> None:
        self.plan = plan
        self.tokenizer = plan.tokenizer
        self.max_length = plan.limits.max_length
        self.max_prompt_length = plan.limits.prompt_limit
        self._mapped = args.mapped
        self._core = None if skip_engine else start(plan, args)
        self._request_ids = itertools.count()

    @property
    def core(self) -> EngineCore:
        """The engine; raises EngineDeadError if it was not loaded."""
        if self._core is None:
            raise EngineDeadError("the model was loaded with skip_engine=True; load it without, to run it")
        return self._core

    @cached_property
    def batch_invariance(self) -> BatchInvariance:
        """See `LLM.batch_invariance`."""
        return self.plan.batch_invariance or probe_batch_invariance(self.plan.artifact, mapped=self._mapped)

    def close(self) -> None:
        """Ends the engine and its threads."""
        if self._core is not None:
            self._core.close()
