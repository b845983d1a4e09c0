"""An encoder-decoder that many clients ask: without an engine, some requests at a time, whose steps take turns."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

from furiosa_llm.runtime.adapters.adapter import LoRARequest
from furiosa_llm.runtime.engine.machine_snapshot import MachineSnapshot
from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.runtime.requests.prompts import Prompt
from furiosa_llm.runtime.seq2seq import Seq2Seq
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams

_AT_ONCE = 4
"""Requests that run; the others wait. Each has states of its own."""


class EncoderDecoder:
    """A model that writes an answer to a text, and does not go on with the text."""

    def __init__(self, model: Seq2Seq) -> None:
        self.model = model
        self._threads = ThreadPoolExecutor(_AT_ONCE, "furiosa-encoder-decoder")
        self._under_way = 0

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,  # noqa: ARG002 - the model counts its requests itself
        adapter: LoRARequest | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """What `Seq2Seq.stream_outputs` gives; closed, it ends the request within a step."""
        loop, ready, gone = asyncio.get_running_loop(), asyncio.Queue[Any](), threading.Event()

        def run() -> None:
            with closing(self.model.stream_outputs(prompt, params, adapter)) as outputs:
                for output in outputs:
                    if gone.is_set():
                        return
                    loop.call_soon_threadsafe(ready.put_nowait, output)

        work = asyncio.wrap_future(self._threads.submit(run))
        work.add_done_callback(ready.put_nowait)
        self._under_way += 1
        try:
            while not isinstance(item := await ready.get(), asyncio.Future):
                yield item
            item.result()
        finally:
            self._under_way -= 1
            gone.set()
            if not work.cancel() and not work.cancelled():
                work.exception()  # nobody else asks for it

    def machine(self) -> MachineSnapshot:
        """What lies on every PE, and what was done so far."""
        running = min(self._under_way, _AT_ONCE)
        return self.model.machine(running=running, waiting=self._under_way - running)

    def close(self) -> None:
        """Ends the threads; requests that run fail."""
        self.model.close()
        self._threads.shutdown(cancel_futures=True)
