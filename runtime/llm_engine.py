"""`LLMEngine`: requests in, outputs out as they come, with the vendor's names."""

from __future__ import annotations

from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Protocol, Self

from furiosa_llm.runtime.adapters.adapter import LoRARequest
from furiosa_llm.runtime.artifact.progress import shown
from furiosa_llm.runtime.closing import Closing
from furiosa_llm.runtime.engine.core import EngineCore, Handle, check_request_id
from furiosa_llm.runtime.engine.engine_args import EngineArgs
from furiosa_llm.runtime.engine.launch import load_engine
from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.runtime.requests.prompts import Prompt
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams


class HasCore(Protocol):
    """A loaded model that runs on an engine: an `LLM`."""

    @property
    def core(self) -> EngineCore:
        """What runs its requests."""
        ...


class Engine(Closing):
    """What both engines are: `core` under the vendor's names. Closing one closes the model, for all who use it."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._handles: dict[str, Handle] = {}

    @classmethod
    def from_llm(cls, llm: HasCore) -> Self:
        """An engine on a model that is loaded already."""
        return cls(llm.core)

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> Self:
        """Loads the model that `args` name; see `load_engine` for the errors. Shows progress as `LLM` does."""
        with shown():
            return cls(load_engine(args))

    def shutdown(self) -> None:
        """Closes the engine and its model, for all who use it; requests that have not ended fail."""
        self.core.close()

    def close(self) -> None:
        """`shutdown`, as files and locks call it."""
        self.shutdown()


class LLMEngine(Engine):
    """Runs requests in the background, as many at once as fit, from `add_request` on; `step` waits for an output.

    It is for one thread, but for `abort_request`, which any may call. Several engines may be made of one LLM, each with
    requests of its own.
    """

    def __init__(self, core: EngineCore) -> None:
        super().__init__(core)
        self._ready: SimpleQueue[RequestOutput] = SimpleQueue()

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        lora_request: LoRARequest | None = None,
    ) -> None:
        """Starts a request: text, token ids, `{"prompt": text}`, or `{"prompt_token_ids": [...]}`.

        It runs with the adapter of `lora_request`, which is loaded if it is not. Raises AdapterError if that is not one
        of the model's; InputError if a request of that id has not ended, or if the prompt is no prompt;
        ContextLengthError if prompt and completion do not fit; EngineDeadError if there is no replica left.
        """
        check_request_id(request_id, self._handles)
        params = SamplingParams() if sampling_params is None else sampling_params
        self._handles[request_id] = self.core.submit(request_id, prompt, params, self._take, lora_request)

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Loads an adapter, unless it is loaded; raises AdapterError if it is not one of the model's."""
        self.core.adapters.add(lora_request)
        return True

    def remove_lora(self, lora_id: int) -> bool:
        """Forgets an adapter; whether it was there. Requests that run with it end with it."""
        return self.core.adapters.remove(lora_id)

    def list_loras(self) -> set[int]:
        """The ids of the adapters that are loaded."""
        return self.core.adapters.ids()

    def abort_request(self, request_id: str | Sequence[str]) -> None:
        """Ends one request or several; each has a last output, with the finish reason "abort". Others are ignored."""
        for one in [request_id] if isinstance(request_id, str) else request_id:
            handle = self._handles.get(one)
            if handle is not None:
                handle.abort()

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has another output to give."""
        return bool(self._handles)

    def step(self) -> list[RequestOutput]:
        """Waits for an output, and returns it with all others that are there; nothing if no request is under way.

        A request that its replica failed ends with the finish reason "error", and its output has the `error`.
        """
        if not self._handles:
            return []
        outputs = [self._ready.get()]
        while True:
            try:
                outputs.append(self._ready.get_nowait())
            except Empty:
                break
        for output in outputs:
            if output.finished:
                del self._handles[output.request_id]
        return outputs

    def _take(self, outputs: Sequence[tuple[int, RequestOutput]]) -> None:
        for _, output in outputs:
            self._ready.put(output)
