"""`AsyncLLMEngine`: requests as asynchronous generators of outputs, with the vendor's names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from furiosa_llm.runtime.adapters.adapter import LoRARequest
from furiosa_llm.runtime.engine.core import EngineCore, check_params, check_request_id
from furiosa_llm.runtime.llm_engine import Engine
from furiosa_llm.runtime.requests.outputs import RequestOutput, raise_error
from furiosa_llm.runtime.requests.prompts import Prompt
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams


class _Mailbox:
    """What replicas' threads have for the requests of one event loop, which is woken once for all outputs of a step."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.queues: dict[int, asyncio.Queue[RequestOutput]] = {}

    def __call__(self, outputs: Sequence[tuple[int, RequestOutput]]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._sort, outputs)
        except RuntimeError:
            # A loop that is closed has nobody left to wait; asking beforehand would leave a gap.
            if not self._loop.is_closed():
                raise

    def _sort(self, outputs: Sequence[tuple[int, RequestOutput]]) -> None:
        for key, output in outputs:
            queue = self.queues.get(key)
            if queue is not None:
                queue.put_nowait(output)


class AsyncLLMEngine(Engine):
    """Runs requests of any number of tasks at once, from any event loop."""

    def __init__(self, core: EngineCore) -> None:
        super().__init__(core)
        self._mailboxes: dict[asyncio.AbstractEventLoop, _Mailbox] = {}

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None,
        request_id: str,
        lora_request: LoRARequest | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of a request as they come, the last one finished.

        It runs with the adapter of `lora_request`, which is loaded if it is not. A generator that is
        closed, or whose task is cancelled, aborts its request. Raises what `LLMEngine.add_request` does, when it is
        first asked for an output, and ReplicaError if the request's replica fails.
        """
        params = SamplingParams() if sampling_params is None else sampling_params
        check_params(params)
        if params.structured_outputs is not None:
            await asyncio.to_thread(self.core.prepare, params)  # other requests' tokens do not wait for it
        if lora_request is not None:
            await self.add_lora(lora_request)
        check_request_id(request_id, self._handles)
        loop = asyncio.get_running_loop()
        mailbox = self._mailboxes.get(loop) or _Mailbox(loop)
        handle = self.core.submit(request_id, prompt, params, mailbox, lora_request)
        self._mailboxes[loop] = mailbox  # not before, lest a refused request leave it behind
        # The mailbox sorts in this very loop, hence not before this coroutine waits for the first time.
        queue = mailbox.queues[handle.key] = asyncio.Queue()
        self._handles[request_id] = handle
        try:
            finished = False
            while not finished:
                output = await queue.get()
                finished = output.finished
                raise_error(output)
                yield output
        finally:
            handle.abort()
            del self._handles[request_id], mailbox.queues[handle.key]
            if not mailbox.queues:
                self._mailboxes.pop(loop, None)

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """`LLMEngine.add_lora`, on another thread."""
        await asyncio.to_thread(self.core.adapters.add, lora_request)
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        """Forgets an adapter; whether it was there. Requests that run with it end with it."""
        return self.core.adapters.remove(lora_id)

    async def list_loras(self) -> set[int]:
        """The ids of the adapters that are loaded."""
        return self.core.adapters.ids()

    async def abort(self, request_id: str) -> None:
        """Ends a request; its generator gives a last output, with the finish reason "abort". Others are ignored."""
        handle = self._handles.get(request_id)
        if handle is not None:
            handle.abort()
