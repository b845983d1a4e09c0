"""When requests are sent, and what is noted of them: an engine that ends them on demand."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, cast

import pytest

from furiosa_llm import ReplicaError, SamplingParams
from furiosa_llm.bench.load import Observed, run_load
from furiosa_llm.bench.workload import Job
from furiosa_llm.runtime.engine.core import EngineCore
from furiosa_llm.runtime.requests.outputs import CompletionOutput, RequestOutput
from furiosa_llm.runtime.requests.request_table import Sink

JOBS = [Job(prompt_token_ids=(1,) * length, max_tokens=length) for length in (1, 2, 3, 4, 5)]


class _Handle:
    def __init__(self) -> None:
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


class _Core:
    """Gives each request its tokens one by one from a thread of its own.

    That first waits for `delay` seconds, and until `held` requests were sent.
    """

    def __init__(
        self, delay: float = 0.001, failing: Sequence[str] = (), broken: str | None = None, held: int = 1
    ) -> None:
        self.running = self.most = 0
        self.asked: list[tuple[str, int, SamplingParams]] = []
        self.handles: list[_Handle] = []
        self._delay = delay
        self._failing = failing
        self._broken = broken
        self._held = held
        self._all_sent = threading.Event()
        self._lock = threading.Lock()

    def submit(self, request_id: str, prompt: Sequence[int], params: SamplingParams, sink: Sink) -> Any:
        if request_id == self._broken:
            raise RuntimeError("the engine broke")
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        self.asked.append((request_id, len(prompt), params))
        if len(self.asked) >= self._held:
            self._all_sent.set()
        threading.Timer(self._delay, self._run, (request_id, params.max_tokens, sink)).start()
        self.handles.append(_Handle())
        return self.handles[-1]

    def _run(self, request_id: str, tokens: int, sink: Sink) -> None:
        self._all_sent.wait()
        error = ReplicaError("lost") if request_id in self._failing else None
        for token in range(tokens):
            last = token == tokens - 1
            if last:
                with self._lock:
                    self.running -= 1
            output = RequestOutput(
                request_id=request_id,
                prompt=None,
                prompt_token_ids=[],
                outputs=[CompletionOutput(index=0, text="", token_ids=[token])],
                finished=last,
                error=error if last else None,
            )
            sink([(0, output)])


def _observe(core: _Core, **options: Any) -> Observed:
    return run_load(cast(EngineCore, core), JOBS, SamplingParams(), **{"due": None, "concurrency": None, **options})


def test_all_at_once() -> None:
    core = _Core(held=5)
    observed = _observe(core)
    assert observed.max_concurrency == core.most == 5
    assert [(prompt, params.max_tokens) for _, prompt, params in core.asked] == [(n, n) for n in (1, 2, 3, 4, 5)]
    assert [len(record.token_times) for record in observed.records] == [1, 2, 3, 4, 5]
    assert [record.num_prompt for record in observed.records] == [1, 2, 3, 4, 5]
    assert observed.duration == max(record.ended or 0 for record in observed.records)


@pytest.mark.parametrize("concurrency", [1, 2, 3])
def test_no_more_than_the_limit_are_under_way(concurrency: int) -> None:
    core = _Core(held=concurrency)
    observed = _observe(core, concurrency=concurrency)
    assert core.most == observed.max_concurrency == concurrency
    assert all(record.ended is not None for record in observed.records)


def test_without_a_schedule_latency_counts_from_the_sending() -> None:
    observed = _observe(_Core(delay=0.02), concurrency=1)
    for before, after in zip(observed.records, observed.records[1:], strict=False):
        assert before.ended is not None
        assert after.due >= before.ended


def test_requests_are_sent_when_they_are_due() -> None:
    due = [0.0, 0.03, 0.03, 0.06, 0.12]
    observed = _observe(_Core(delay=0.0), due=due)
    assert [record.due for record in observed.records] == due
    assert all(record.token_times[0] >= record.due for record in observed.records)


def test_what_waits_for_others_is_late_by_the_schedule() -> None:
    observed = _observe(_Core(delay=0.02), due=[0.0] * 5, concurrency=1)
    assert [record.due for record in observed.records] == [0.0] * 5
    firsts = [record.token_times[0] for record in observed.records]
    assert firsts == sorted(firsts)
    assert firsts[-1] >= 5 * 0.02


def test_a_request_that_fails_is_noted_and_the_others_go_on() -> None:
    observed = _observe(_Core(failing=("1", "3")))
    assert [record.error for record in observed.records] == [None, "lost", None, "lost", None]


def test_what_stops_the_load_aborts_all() -> None:
    core = _Core(delay=0.05, broken="3")
    with pytest.raises(RuntimeError, match="the engine broke"):
        _observe(core)
    assert [handle.aborted for handle in core.handles] == [True] * 3
