"""Systems under test: LoadGen's samples as requests of an engine, or as texts of an encoder."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import mlperf_loadgen as loadgen

from furiosa_llm.runtime.encoder import MAX_BATCH_SIZE, Encoder
from furiosa_llm.runtime.engine.core import EngineCore, Handle
from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.runtime.tokens.sampling_params import RequestOutputKind, SamplingParams

MIN_TOKENS = 2
"""Of a completion: LoadGen divides by the tokens after the first, and calls less an error."""


@dataclass(slots=True, eq=False)
class Query:
    """One sample on its way; times are of `time.perf_counter_ns`."""

    response_id: int
    """LoadGen's name of it."""
    sample: int
    """Its place in the dataset."""
    issued: int
    """When LoadGen gave it."""
    first: int = 0
    """When its first token was there; 0 without any."""
    done: int = 0
    """When it ended."""
    answer: array[int] | array[float] = field(default_factory=lambda: array("q"))
    """The bytes that it is answered with."""
    tokens: int = 0
    """How many tokens were generated; 0 for an encoder."""
    failed: bool = False
    """Whether there is no answer, because it was given up or the engine failed."""


class SystemUnderTest(ABC):
    """What LoadGen issues samples to. `finished` are the answered ones, `failures` why some of them failed."""

    def __init__(self) -> None:
        self.finished: deque[Query] = deque()
        self.failures: deque[BaseException] = deque()
        self._stopping = threading.Event()

    def issue(self, samples: Sequence[loadgen.QuerySample]) -> None:
        """Takes samples from LoadGen, on its thread, and returns at once; an exception would end the process."""
        now = time.perf_counter_ns()
        queries = [Query(one.id, one.index, now) for one in samples]
        for query in self._in_order(queries):
            if self._stopping.is_set():
                self._give_up(query)
                continue
            try:
                self._start(query)
            except Exception as error:  # noqa: BLE001 - it is kept, and raised when the run is over
                self._fail(query, error)

    def stop(self) -> None:
        """Gives up what runs and what is still to come; LoadGen gets answers without content."""
        self._stopping.set()

    @abstractmethod
    def close(self) -> None:
        """Ends what was started here; the model stays loaded."""

    @abstractmethod
    def _start(self, query: Query) -> None:
        """Starts a sample."""

    def _in_order(self, queries: list[Query]) -> list[Query]:
        """The order to start samples in that came at once."""
        return queries

    def _give_up(self, query: Query) -> None:
        query.failed = True
        self._finish(query)

    def _fail(self, query: Query, error: BaseException) -> None:
        self.failures.append(error)
        self._give_up(query)

    def _finish(self, query: Query) -> None:
        query.done = time.perf_counter_ns()
        self.finished.append(query)
        loadgen.QuerySamplesComplete([_response(query)])


class DecoderSystem(SystemUnderTest):
    """Samples as requests of an engine, whose outputs come straight from the replica's thread.

    `prompts` are the token ids of each sample. With `first_tokens` LoadGen hears of these when they are there.
    """

    def __init__(
        self, core: EngineCore, prompts: Sequence[list[int]], *, max_output_tokens: int, first_tokens: bool
    ) -> None:
        super().__init__()
        self._core = core
        self._prompts = prompts
        self._first_tokens = first_tokens
        self._params = SamplingParams(
            temperature=0.0,
            max_tokens=max_output_tokens,
            min_tokens=MIN_TOKENS,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if first_tokens else RequestOutputKind.FINAL,
        )
        self._queries: dict[str, Query] = {}
        self._handles: dict[str, Handle] = {}

    def stop(self) -> None:
        """Aborts the requests that run."""
        super().stop()
        for handle in list(self._handles.values()):
            handle.abort()

    def close(self) -> None:
        """Does nothing: the engine is another's."""

    def _start(self, query: Query) -> None:
        name = str(query.response_id)
        self._queries[name] = query
        prompt = {"prompt_token_ids": self._prompts[query.sample]}
        handle = self._core.submit(name, prompt, self._params, self._take)
        self._handles[name] = handle
        if name not in self._queries:  # it ended before its handle was known
            self._handles.pop(name, None)
        elif self._stopping.is_set():
            handle.abort()

    def _take(self, outputs: Sequence[tuple[int, RequestOutput]]) -> None:
        now = time.perf_counter_ns()
        for _, output in outputs:
            query = self._queries[output.request_id]
            for completion in output.outputs:
                query.answer.extend(completion.token_ids)
            query.tokens = len(query.answer)
            if query.tokens and not query.first:
                self._tell_first(query, now)
            if output.finished:
                self._end(query, output)

    def _end(self, query: Query, output: RequestOutput) -> None:
        name = output.request_id
        del self._queries[name]
        self._handles.pop(name, None)
        if output.error is not None:
            self._fail(query, output.error)
        elif any(completion.finish_reason == "abort" for completion in output.outputs):
            self._give_up(query)
        else:
            self._finish(query)

    def _tell_first(self, query: Query, now: int) -> None:
        query.first = now
        if self._first_tokens:
            loadgen.FirstTokenComplete([_response(query)])

    def _give_up(self, query: Query) -> None:
        self._queries.pop(str(query.response_id), None)
        if self._first_tokens and not query.first:
            # LoadGen wants to hear of a first token before it hears of the end.
            loadgen.FirstTokenComplete([_response(query)])
        super()._give_up(query)


class EncoderSystem(SystemUnderTest):
    """Samples as texts of an encoder, on a thread of its own; samples that wait together run together."""

    def __init__(self, encoder: Encoder, prompts: Sequence[list[int]]) -> None:
        super().__init__()
        self._encoder = encoder
        self._prompts = prompts
        self._waiting: SimpleQueue[Query | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="mlperf-encoder")
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, after what waits."""
        self._waiting.put(None)
        self._thread.join()

    def _start(self, query: Query) -> None:
        self._waiting.put(query)

    def _in_order(self, queries: list[Query]) -> list[Query]:
        """By length: texts of equal length share a step of the model."""
        return sorted(queries, key=lambda query: len(self._prompts[query.sample]))

    def _work(self) -> None:
        while (query := self._waiting.get()) is not None:
            batch = [query, *self._more(MAX_BATCH_SIZE - 1)]
            if self._stopping.is_set():
                for one in batch:
                    self._give_up(one)
                continue
            self._encode(batch)

    def _more(self, count: int) -> list[Query]:
        """At most `count` of the samples that wait."""
        found: list[Query] = []
        while len(found) < count:
            try:
                query = self._waiting.get_nowait()
            except Empty:
                break
            if query is None:
                self._waiting.put(None)
                break
            found.append(query)
        return found

    def _encode(self, batch: list[Query]) -> None:
        try:
            outputs = self._encoder.encode([{"prompt_token_ids": self._prompts[one.sample]} for one in batch])
        except Exception as error:  # noqa: BLE001 - LoadGen would wait for ever; it is raised when the run is over
            for query in batch:
                self._fail(query, error)
            return
        for query, output in zip(batch, outputs, strict=True):
            query.answer = array("f", output.outputs.data.tobytes())
            self._finish(query)


def _response(query: Query) -> loadgen.QuerySampleResponse:
    """LoadGen copies the bytes before it returns. Fewer tokens than it needs stand for no answer."""
    address, count = query.answer.buffer_info()
    nbytes = count * query.answer.itemsize
    return loadgen.QuerySampleResponse(query.response_id, address, nbytes, max(MIN_TOKENS, query.tokens))
