"""A replica: batches join and leave, and whatever breaks ends its own requests only, and nothing hangs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.engine.replica import FaultPolicy, Replica
from furiosa_llm.runtime.engine.scheduler import SchedulerLimits
from furiosa_llm.runtime.errors import (
    EngineDeadError,
    ExecutionError,
    NoHostError,
    ReplicaError,
    StepTimeoutError,
    WorkerError,
)
from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.runtime.requests.request import Request
from furiosa_llm.runtime.requests.request_table import Submission
from furiosa_llm.runtime.runners.batch import Batch, Decode, Picked, Prefill, Runner
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer
from tests.support.runtime.runners import VOCAB, CountingRunner

ZOO = Path(__file__).parents[3] / "fixtures" / "zoo" / "tiny-llama-genai-fp32"
LIMITS = SchedulerLimits(
    num_groups=1, slots_per_group=4, num_pages=64, page_size=4, max_length=64, prefill_chunk_size=8
)
QUICK = FaultPolicy(backoff=0.001, close_timeout=0.05)
TIMEOUT = 30.0


class Desk:
    """Submits requests to a replica and collects what it says of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.outputs: SimpleQueue[tuple[int, RequestOutput]] = SimpleQueue()
        self.calls: list[int] = []
        self._tokenizer = tokenizer
        self._keys = itertools.count()
        self._ids = itertools.count()

    def submission(self, prompt: Sequence[int], **params: Any) -> Submission:
        chosen = SamplingParams(**{"temperature": 0.0, "max_tokens": 4, **params})
        key = next(self._keys)
        request = Request(
            request_id=f"request {key}",
            prompt=None,
            prompt_token_ids=prompt,
            params=chosen,
            tokenizer=self._tokenizer,
            eos_token_ids=frozenset(),
            max_tokens=chosen.max_tokens or 4,
            sequence_ids=[next(self._ids) for _ in range(chosen.num_sequences)],
        )
        return Submission(key=key, request=request, sink=self._take)

    def submit(self, replica: Replica, prompt: Sequence[int], **params: Any) -> int:
        submission = self.submission(prompt, **params)
        replica.submit(submission)
        return submission.key

    def finished(self, count: int = 1) -> dict[int, RequestOutput]:
        """The last outputs of the next `count` requests that end, by key."""
        found: dict[int, RequestOutput] = {}
        while len(found) < count:
            key, output = self.outputs.get(timeout=TIMEOUT)
            if output.finished:
                found[key] = output
        return found

    def _take(self, outputs: Sequence[tuple[int, RequestOutput]]) -> None:
        self.calls.append(len(outputs))
        for pair in outputs:
            self.outputs.put(pair)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(ZOO)


@pytest.fixture
def desk(tokenizer: Tokenizer) -> Desk:
    return Desk(tokenizer)


Start = Callable[..., Replica]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts replicas, which are closed behind the test."""
    started: list[Replica] = []

    def make(
        *runners: Runner | BaseException, limits: SchedulerLimits = LIMITS, policy: FaultPolicy = QUICK
    ) -> Replica:
        made = iter(runners)

        def next_runner() -> Runner:
            runner = next(made)
            if isinstance(runner, BaseException):
                raise runner
            return runner

        started.append(Replica(3, next_runner, limits, policy))
        return started[-1]

    yield make
    for replica in started:
        replica.close()


def counted(prompt: Sequence[int], count: int = 4) -> list[int]:
    return [(prompt[-1] + 1 + step) % VOCAB for step in range(count)]


class Gate:
    """A fault that holds batches back until it is opened; `reached` is set by the first."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, batch: Batch, runner: CountingRunner) -> None:
        self.reached.set()
        assert self.opened.wait(TIMEOUT)


def failing(*, at: int, error: BaseException) -> Callable[[Batch, CountingRunner], None]:
    """Fails the batch of that number, counted from 1."""

    def fault(batch: Batch, runner: CountingRunner) -> None:
        if len(runner.batches) >= at:
            raise error

    return fault


def test_requests_are_completed(desk: Desk, start: Start) -> None:
    replica = start(CountingRunner())
    prompts = {desk.submit(replica, prompt): prompt for prompt in ([1, 2, 3], [9], list(range(20)))}
    outputs = desk.finished(3)
    assert {key: output.outputs[0].token_ids for key, output in outputs.items()} == {
        key: counted(prompt) for key, prompt in prompts.items()
    }
    assert {output.outputs[0].finish_reason for output in outputs.values()} == {"length"}
    assert (replica.load, replica.num_requests) == (0, 0)
    assert not replica._table._running  # nothing is kept of what has ended
    assert replica.ready
    assert replica.death is None


def test_requests_join_those_that_run(desk: Desk, start: Start) -> None:
    gate = Gate()
    runner = CountingRunner(fault=gate)
    replica = start(runner)
    desk.submit(replica, [1], max_tokens=8)
    assert gate.reached.wait(TIMEOUT)
    desk.submit(replica, [2], max_tokens=8)
    desk.submit(replica, [3, 4], max_tokens=8)
    assert replica.load == 4
    assert replica.num_requests == 3
    gate.opened.set()
    desk.finished(3)
    assert {len(batch.rows) for batch in runner.batches if isinstance(batch, Decode)} >= {3}
    assert max(desk.calls) == 3


def test_groups_are_under_way_at_once(desk: Desk, start: Start) -> None:
    together = threading.Barrier(2)

    def meet(batch: Batch, runner: CountingRunner) -> None:
        if isinstance(batch, Prefill):
            together.wait(TIMEOUT)

    replica = start(
        CountingRunner(num_groups=2, fault=meet),
        limits=SchedulerLimits(
            num_groups=2, slots_per_group=2, num_pages=64, page_size=4, max_length=64, prefill_chunk_size=8
        ),
    )
    desk.submit(replica, [1])
    desk.submit(replica, [2])
    assert {output.outputs[0].finish_reason for output in desk.finished(2).values()} == {"length"}


def test_memory_for_a_few_serves_many(desk: Desk, start: Start) -> None:
    limits = SchedulerLimits(
        num_groups=1, slots_per_group=4, num_pages=6, page_size=4, max_length=24, prefill_chunk_size=4
    )
    replica = start(CountingRunner(), limits=limits)
    prompts = {desk.submit(replica, [n, n + 1, 2, n], max_tokens=14): [n] for n in range(8)}
    outputs = desk.finished(8)
    assert {key: output.outputs[0].token_ids for key, output in outputs.items()} == {
        key: counted(prompt, 14) for key, prompt in prompts.items()
    }


def test_an_abort_ends_one_request(desk: Desk, start: Start) -> None:
    gate = Gate()
    replica = start(CountingRunner(fault=gate))
    aborted, kept = desk.submit(replica, [1], max_tokens=8), desk.submit(replica, [2], max_tokens=8)
    assert gate.reached.wait(TIMEOUT)
    replica.abort(aborted)
    replica.abort(aborted)
    replica.abort(99)
    gate.opened.set()
    outputs = desk.finished(2)
    assert outputs[aborted].outputs[0].finish_reason == "abort"
    assert outputs[aborted].error is None
    assert outputs[kept].outputs[0].token_ids == counted([2], 8)
    assert replica.num_requests == 0


def test_several_completions_of_one_prompt(desk: Desk, start: Start) -> None:
    replica = start(CountingRunner())
    desk.submit(replica, [1, 2], n=3, temperature=1.0, seed=1)
    [output] = desk.finished().values()
    assert [len(one.token_ids) for one in output.outputs] == [4, 4, 4]
    assert replica.load == 0


def test_a_completion_that_ends_early_leaves_the_others(desk: Desk, start: Start) -> None:
    replica = start(CountingRunner())
    desk.submit(replica, [1, 2], n=2, temperature=30.0, seed=1, max_tokens=16, stop_token_ids=list(range(0, VOCAB, 4)))
    [output] = desk.finished().values()
    lengths = [len(one.token_ids) for one in output.outputs]
    assert len(set(lengths)) == 2
    assert replica.num_requests == 0


def test_log_probabilities_are_of_the_requests_own_row(desk: Desk, start: Start) -> None:
    gate = Gate()
    replica = start(CountingRunner(fault=gate))
    for token in (1, 9, 17):
        desk.submit(replica, [token], logprobs=0)
    gate.opened.set()
    for output in desk.finished(3).values():
        [one] = output.outputs
        assert one.logprobs is not None
        assert [entry[token].rank for entry, token in zip(one.logprobs, one.token_ids, strict=True)] == [1] * 4


@pytest.mark.parametrize("length", [3, 20])
def test_the_logits_behind_a_prompt(desk: Desk, start: Start, length: int) -> None:
    replica = start(CountingRunner())
    prompt = list(range(length))
    desk.submit(replica, prompt, prompt_logprobs=1)
    [output] = desk.finished().values()
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert [
        max(entry, key=lambda token: entry[token].logprob) for entry in output.prompt_logprobs[1:] if entry
    ] == prompt[1:]
    assert output.outputs[0].token_ids == counted(prompt)


@pytest.mark.parametrize("error", [ExecutionError("segment 3 broke"), MemoryError("no more")])
def test_a_failed_batch_ends_the_requests_and_the_runner_is_replaced(
    desk: Desk, start: Start, error: BaseException
) -> None:
    gate, fail = Gate(), failing(at=3, error=error)

    def fault(batch: Batch, runner: CountingRunner) -> None:
        gate(batch, runner)
        fail(batch, runner)

    broken = CountingRunner(fault=fault)
    replica = start(broken, CountingRunner())
    keys = [desk.submit(replica, [1, 2]), desk.submit(replica, [3])]
    gate.opened.set()
    outputs = desk.finished(2)
    assert sorted(outputs) == keys
    for output in outputs.values():
        assert isinstance(output.error, ReplicaError)
        assert output.error.__cause__ is error
        assert f"replica 3 failed while it had the request: {type(error).__name__}: {error}" in str(output.error)
        assert output.outputs[0].finish_reason == "error"
    assert outputs[keys[0]].error is not outputs[keys[1]].error
    again = desk.submit(replica, [5])
    assert desk.finished()[again].outputs[0].token_ids == counted([5])
    assert broken.closed.is_set()
    assert replica.ready
    assert (replica.load, replica.num_requests) == (0, 0)


def test_an_exception_in_the_loop_itself(desk: Desk, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = start(CountingRunner(), CountingRunner())
    with monkeypatch.context() as broken:
        broken.setattr(replica._scheduler, "schedule", lambda: 1 / 0)
        lost = desk.submit(replica, [1])
        assert isinstance(desk.finished()[lost].error, ReplicaError)
    again = desk.submit(replica, [5])
    assert desk.finished()[again].outputs[0].token_ids == counted([5])


def test_a_runner_that_does_not_take_batches(desk: Desk, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = CountingRunner()
    monkeypatch.setattr(broken, "submit", lambda batch: 1 / 0)
    replica = start(broken, CountingRunner())
    lost = desk.submit(replica, [1])
    error = desk.finished()[lost].error
    assert error is not None
    assert isinstance(error.__cause__, ZeroDivisionError)
    desk.submit(replica, [1])
    assert desk.finished().popitem()[1].error is None


def test_a_batch_that_does_not_return(desk: Desk, start: Start) -> None:
    gate = Gate()
    hung = CountingRunner(fault=gate)
    replica = start(hung, CountingRunner(), policy=FaultPolicy(step_timeout=0.05, backoff=0.001))
    lost = desk.submit(replica, [1, 2, 3])
    error = desk.finished()[lost].error
    assert error is not None
    assert isinstance(error.__cause__, StepTimeoutError)
    assert "prefill of 3 tokens after 0: not back within 0.05 s; batch 1; give a greater step_timeout" in str(error)
    running = desk.submit(replica, [5])
    gate.opened.set()
    assert desk.finished()[running].outputs[0].token_ids == counted([5])


def test_a_runner_that_does_not_close_is_left_behind(desk: Desk, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    broken = CountingRunner(fault=failing(at=1, error=ExecutionError("broke")))
    monkeypatch.setattr(broken, "close", lambda: released.wait(TIMEOUT))
    replica = start(broken, CountingRunner())
    desk.submit(replica, [1])
    desk.submit(replica, [2])
    assert len(desk.finished(2)) == 2
    desk.submit(replica, [3])
    assert desk.finished().popitem()[1].error is None
    released.set()


def test_a_runner_that_fails_to_close_is_replaced(desk: Desk, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = CountingRunner(fault=failing(at=1, error=ExecutionError("broke")))
    monkeypatch.setattr(broken, "close", lambda: 1 / 0)
    replica = start(broken, CountingRunner())
    desk.submit(replica, [1])
    desk.finished()
    desk.submit(replica, [3])
    assert desk.finished().popitem()[1].error is None


def test_rebuilding_is_tried_again(desk: Desk, start: Start) -> None:
    broken = CountingRunner(fault=failing(at=1, error=ExecutionError("broke")))
    replica = start(broken, OSError("not yet"), OSError("nor now"), CountingRunner())
    desk.submit(replica, [1])
    desk.finished()
    desk.submit(replica, [3])
    assert desk.finished().popitem()[1].outputs[0].token_ids == counted([3])
    assert replica.death is None


def test_a_replica_that_cannot_be_rebuilt_is_dead(desk: Desk, start: Start) -> None:
    broken = CountingRunner(fault=failing(at=1, error=ExecutionError("broke")))
    errors = [OSError(f"attempt {attempt}") for attempt in range(1, 6)]
    replica = start(broken, *errors, CountingRunner())
    desk.submit(replica, [1])
    desk.finished()
    late = desk.submit(replica, [3])
    error = desk.finished()[late].error
    assert error is not None
    assert error.__cause__ is replica.death is errors[-1]
    assert not replica.ready
    assert replica.num_requests == 0
    again = desk.submit(replica, [4])
    assert isinstance(desk.finished()[again].error, ReplicaError)


def test_failures_with_batches_between_them_are_not_counted_together(desk: Desk, start: Start) -> None:
    runners = [CountingRunner(fault=failing(at=2, error=ExecutionError("broke"))) for _ in range(8)]
    replica = start(*runners, CountingRunner())
    for _ in runners:
        desk.submit(replica, [1])
        assert desk.finished().popitem()[1].error is not None
    desk.submit(replica, [1])
    assert desk.finished().popitem()[1].error is None


class _Spoiled(CountingRunner):
    """Gives no numbers behind token 7."""

    def submit(self, batch: Batch) -> Future[Array]:
        logits = super().submit(batch).result()
        if isinstance(batch, Prefill):
            tokens = [piece.tokens[-1] for piece in batch.pieces]
        else:
            tokens = [row.token for row in batch.rows]
        for row, token in zip(logits, tokens, strict=False):
            if token == 7:
                row[:] = np.nan
        spoiled: Future[Array] = Future()
        spoiled.set_result(logits)
        return spoiled


def test_logits_that_are_no_numbers_end_their_own_request(desk: Desk, start: Start) -> None:
    replica = start(_Spoiled())
    good, bad = desk.submit(replica, [1], max_tokens=5), desk.submit(replica, [5], max_tokens=5)
    other = desk.submit(replica, [20], max_tokens=5)
    outputs = desk.finished(3)
    assert outputs[good].outputs[0].token_ids == counted([1], 5)
    assert outputs[other].outputs[0].token_ids == counted([20], 5)
    assert isinstance(outputs[bad].error, ExecutionError)
    assert outputs[bad].outputs[0].token_ids == [6, 7]
    assert replica.num_requests == 0


class _Picking(_Spoiled):
    """Gives of rows that are picked the likeliest token."""

    def __init__(self) -> None:
        super().__init__()
        self.picks: list[tuple[Batch, Sequence[bool]]] = []

    def submit_picking(self, batch: Batch, picks: Sequence[bool]) -> Future[Picked]:
        self.picks.append((batch, picks))
        logits = self.submit(batch).result()
        picked = np.array(picks, dtype=np.bool_)
        found: Future[Picked] = Future()
        found.set_result(
            Picked(
                rows=tuple(picks),
                tokens=logits[picked].argmax(axis=1).astype(np.int32),
                greatest=logits[picked].max(axis=1),
                logits=logits[~picked],
            )
        )
        return found


KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"logprobs": 0},
    {"temperature": 1.0, "seed": 5},
    {},
    {"repetition_penalty": 1.5},
    {"min_tokens": 2, "stop_token_ids": [9]},
    {"n": 2, "temperature": 0.5, "seed": 3},
    {"prompt_logprobs": 1},
)


def test_of_greedy_rows_the_likeliest_tokens_alone_are_asked_for(desk: Desk, start: Start) -> None:
    """In batches with rows whose logits are wanted: the outputs are those of a runner that gives all logits."""
    found = []
    picking = _Picking()
    for runner in (CountingRunner(), picking):
        replica = start(runner)
        keys = [desk.submit(replica, [10 + 2 * number], max_tokens=5, **kind) for number, kind in enumerate(KINDS)]
        outputs = desk.finished(len(keys))
        found.append([[(one.token_ids, one.logprobs) for one in outputs[key].outputs] for key in keys])
        assert [outputs[key].error for key in keys] == [None] * len(keys)
    assert found[0] == found[1]
    assert any(len(set(picks)) == 2 for _, picks in picking.picks)
    assert all(len(picks) == len(batch.rows) for batch, picks in picking.picks if isinstance(batch, Decode))


def test_a_likeliest_token_that_is_no_number_ends_its_own_request(desk: Desk, start: Start) -> None:
    replica = start(_Picking())
    good, bad = desk.submit(replica, [1], max_tokens=5), desk.submit(replica, [5], max_tokens=5)
    outputs = desk.finished(2)
    assert outputs[good].outputs[0].token_ids == counted([1], 5)
    assert isinstance(outputs[bad].error, ExecutionError)
    assert outputs[bad].outputs[0].token_ids == [6, 7]
    assert replica.num_requests == 0


def test_waiting_for_a_host_is_no_failure(desk: Desk, start: Start) -> None:
    """More attempts than failures are survived; what comes meanwhile waits, and may be aborted."""
    broken = CountingRunner(fault=failing(at=1, error=ExecutionError("broke")))
    waits = [NoHostError("no room") for _ in range(20)]
    replica = start(broken, *waits, CountingRunner(), policy=replace(QUICK, host_wait=0.02))
    desk.submit(replica, [1])
    desk.finished()
    kept, aborted = desk.submit(replica, [3]), desk.submit(replica, [4])
    assert not replica.ready
    replica.abort(aborted)
    outputs = desk.finished()
    assert outputs[aborted].outputs[0].finish_reason == "abort"
    assert not replica.ready
    assert desk.finished()[kept].outputs[0].token_ids == counted([3])
    assert (replica.ready, replica.death) == (True, None)


def test_a_replica_that_waits_for_a_host_can_be_closed(desk: Desk, start: Start) -> None:
    broken = CountingRunner(fault=failing(at=1, error=ExecutionError("broke")))
    replica = start(broken, NoHostError("no room"), policy=replace(QUICK, host_wait=60.0))
    desk.submit(replica, [1])
    desk.finished()
    late = desk.submit(replica, [3])
    replica.close()
    assert isinstance(desk.finished()[late].error, EngineDeadError)


class _FirstOfTwoSpoiled(CountingRunner):
    """Gives no numbers for the first of two rows."""

    def submit(self, batch: Batch) -> Future[Array]:
        logits = super().submit(batch).result()
        if isinstance(batch, Decode) and len(batch.rows) == 2:
            logits[0] = np.nan
        spoiled: Future[Array] = Future()
        spoiled.set_result(logits)
        return spoiled


def test_completions_end_together_when_one_cannot_be_sampled(desk: Desk, start: Start) -> None:
    replica = start(_FirstOfTwoSpoiled())
    desk.submit(replica, [1], n=2, temperature=1.0, seed=0, max_tokens=30)
    [output] = desk.finished().values()
    assert isinstance(output.error, ExecutionError)
    assert [one.finish_reason for one in output.outputs] == ["error", "error"]
    again = desk.submit(replica, [5])
    assert desk.finished()[again].outputs[0].token_ids == counted([5])


def test_a_request_that_the_scheduler_refuses_ends_alone(desk: Desk, start: Start) -> None:
    replica = start(CountingRunner())
    too_long, fits = desk.submit(replica, [1] * 64), desk.submit(replica, [5])
    outputs = desk.finished(2)
    assert isinstance(outputs[too_long].error, ValueError)
    assert outputs[fits].outputs[0].token_ids == counted([5])


def test_closing_ends_what_runs(desk: Desk, start: Start) -> None:
    gate = Gate()
    runner = CountingRunner(fault=gate)
    replica = start(runner)
    key = desk.submit(replica, [1])
    assert gate.reached.wait(TIMEOUT)
    replica.close()
    assert isinstance(desk.finished()[key].error, EngineDeadError)
    assert runner.closed.is_set()
    with pytest.raises(EngineDeadError, match="the engine is closed"):
        desk.submit(replica, [1])
    replica.abort(key)
    replica.close()
    gate.opened.set()


def test_cached_prefixes_are_told_to_routers_and_requests(desk: Desk, start: Start) -> None:
    replica = start(CountingRunner())
    prompt = [number % VOCAB for number in range(40)]
    assert replica.cached_prefix(prompt) == 0
    desk.submit(replica, prompt)
    assert not desk.finished().popitem()[1].num_cached_tokens
    assert replica.cached_prefix(prompt) == 38
    desk.submit(replica, prompt)
    assert desk.finished().popitem()[1].num_cached_tokens == 38


def crowd(
    desk: Desk, start: Start, *runners: Runner | BaseException, policy: FaultPolicy = QUICK
) -> tuple[Replica, list[int]]:
    """A replica whose first runner fails, with the keys of four requests that ran there and of two that waited."""
    ready, gate = threading.Event(), Gate()

    def fault(batch: Batch, runner: CountingRunner) -> None:
        if isinstance(batch, Decode) and len(batch.rows) == 4:
            ready.set()
            gate(batch, runner)
            raise ExecutionError("broke")

    replica = start(CountingRunner(fault=fault), *runners, policy=policy)
    keys = [desk.submit(replica, [number], max_tokens=20) for number in range(6)]
    assert ready.wait(TIMEOUT)
    gate.opened.set()
    return replica, keys


def test_requests_that_wait_run_on_the_new_runner(desk: Desk, start: Start) -> None:
    _, keys = crowd(desk, start, OSError("not yet"), CountingRunner())
    outputs = desk.finished(6)
    assert [isinstance(outputs[key].error, ReplicaError) for key in keys] == [True] * 4 + [False] * 2
    assert [outputs[key].outputs[0].token_ids for key in keys[4:]] == [counted([4], 20), counted([5], 20)]
    assert desk.outputs.empty()


def test_requests_that_wait_end_with_a_replica_that_dies(desk: Desk, start: Start) -> None:
    _, keys = crowd(desk, start, *[OSError("no more")] * 2, policy=FaultPolicy(max_failures=1, backoff=0.001))
    outputs = desk.finished(6)
    assert [type(error.__cause__) for key in keys if (error := outputs[key].error)] == [ExecutionError] * 4 + [
        OSError
    ] * 2


def test_requests_that_wait_end_when_the_replica_is_closed(desk: Desk, start: Start) -> None:
    replica, keys = crowd(desk, start, policy=FaultPolicy(backoff=TIMEOUT, max_backoff=TIMEOUT))
    assert sorted(desk.finished(4)) == keys[:4]
    replica.abort(keys[4])
    replica.close()
    outputs = desk.finished(2)
    assert outputs[keys[4]].outputs[0].finish_reason == "abort"
    assert isinstance(outputs[keys[5]].error, EngineDeadError)


class _Watched(CountingRunner):
    """Fails when it is told to, with nothing under way."""

    def __init__(self) -> None:
        super().__init__()
        self.fail: Callable[[Exception], None] = lambda error: None
        self.watched = threading.Event()

    def watch(self, on_failure: Callable[[Exception], None]) -> None:
        self.fail = on_failure
        self.watched.set()


def test_a_runner_that_fails_while_idle_is_replaced_at_once(desk: Desk, start: Start) -> None:
    broken = _Watched()
    made = threading.Event()
    runners = iter([broken, _Watched()])

    def make() -> Runner:
        runner = next(runners)
        if runner is not broken:
            made.set()
        return runner

    replica = Replica(3, make, LIMITS, QUICK)
    desk.submit(replica, [1])
    assert desk.finished().popitem()[1].error is None
    broken.fail(WorkerError("gone"))
    assert made.wait(TIMEOUT)
    broken.fail(WorkerError("of one that is not there any more"))
    desk.submit(replica, [5])
    assert desk.finished().popitem()[1].outputs[0].token_ids == counted([5])
    assert broken.closed.is_set()
    replica.close()


@pytest.mark.parametrize(("settled", "runs"), [(0.0, True), (TIMEOUT, False)])
def test_failures_of_runners_that_were_idle_for_long_are_not_in_a_row(settled: float, runs: bool, desk: Desk) -> None:
    """Hosts that are lost over days, with no request between them, are no reason to give up."""
    made: SimpleQueue[_Watched] = SimpleQueue()

    replica = Replica(3, lambda: _noted(made), LIMITS, FaultPolicy(max_failures=1, backoff=0.001, settled=settled))
    for _ in range(2):
        runner = made.get(timeout=TIMEOUT)
        assert runner.watched.wait(TIMEOUT)
        runner.fail(WorkerError("gone"))
    desk.submit(replica, [1])
    assert (desk.finished().popitem()[1].error is None) is runs
    replica.close()


def _noted(made: SimpleQueue[_Watched]) -> Runner:
    runner = _Watched()
    made.put(runner)
    return runner
