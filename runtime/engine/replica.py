"""Schedule, run, postprocess: the loop of one replica of the model, on a thread of its own.

The scheduler chooses a batch, the runner computes its logits, and the request table samples tokens from them and hands
the outputs out. Whatever happens arrives in the replica's inbox: new requests, aborts, batches that are done. The
thread sleeps on the inbox, so that nothing polls, and it alone touches the requests.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue

from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.errors import FuriosaLLMError
from furiosa_llm.runtime.engine.replica_counts import ReplicaCounts, ReplicaMeter
from furiosa_llm.runtime.engine.scheduler import Scheduler, SchedulerLimits
from furiosa_llm.runtime.errors import EngineDeadError, NoHostError, ReplicaError, StepTimeoutError
from furiosa_llm.runtime.requests.request_table import RequestTable, Submission
from furiosa_llm.runtime.runners.batch import (
    Batch,
    Picked,
    PicksTokens,
    Prefill,
    ReportsFailure,
    ReportsProgress,
    Runner,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultPolicy:
    """How long a replica waits for its runner, and how often it makes a new one. Times are in seconds."""

    step_timeout: float = 300.0
    """How long a batch may take before it counts as hung."""
    max_failures: int = 5
    """So many failures in a row, no batch done between them, are survived; one more is the end."""
    settled: float = 60.0
    """A runner that fails after being idle for so long is the first in a row: hosts may be lost over days."""
    backoff: float = 0.05
    """What is waited before a new runner is made; doubled for each failure in a row, up to `max_backoff`."""
    max_backoff: float = 5.0
    host_wait: float = 1.0
    """How often a replica that waits for a host asks for one, which is never a failure."""
    close_timeout: float = 5.0
    """How long a runner may take to close before it is left behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    number: int
    logits: Future[Array] | Future[Picked]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Abort:
    key: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failed:
    runner: Runner
    error: Exception


class _RunnerFailedError(Exception):
    """The runner is to blame for `cause`, and no request that it has not seen."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Stop:
    """The last message of an inbox."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaUsage:
    """What a replica has at the moment."""

    running: int
    """Sequences that have a slot."""
    waiting: int
    """Sequences that have no slot yet."""
    used_pages: int
    """Pages of the KV cache, the prefix cache's among them, which are given up as soon as a sequence needs them."""
    num_pages: int
    """All pages of the KV cache."""
    preemptions: int
    """How often a sequence lost its place to an earlier one, so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _UnderWay:
    batch: Batch
    deadline: float


_Message = Submission | _Abort | _Done | _Failed | _Stop


class Replica:
    """Runs requests on a runner that `make_runner` makes, and on another when that one has failed.

    `index` is its place among the replicas. `submit` and `abort` return at once, from any thread; outputs go to the
    requests' sinks from the replica's own thread. A runner that fails ends the requests that were in a batch already,
    each with a ReplicaError; it is replaced, and the others run on the new one. An exception in the replica's own
    thread ends all of them. A replica that cannot replace its runner any more is dead: it ends what it has, and refuses
    requests.
    """

    def __init__(
        self,
        index: int,
        make_runner: Callable[[], Runner],
        limits: SchedulerLimits,
        policy: FaultPolicy | None = None,
    ) -> None:
        self.index = index
        self._make_runner = make_runner
        self._policy = policy or FaultPolicy()
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._gate = threading.Lock()  # nothing is put into the inbox after the _Stop
        self._closing = threading.Event()
        self._stopped = False
        self._table = RequestTable()
        self._scheduler = Scheduler(limits)
        self._scheduler_lock = threading.Lock()  # routers ask for prefixes from their own threads
        self._under_way: dict[int, _UnderWay] = {}
        self._numbers = itertools.count()
        self._failure: BaseException | None = None
        self._failures = 0
        self._used = time.monotonic()
        """When the runner was made, or had a batch last."""
        self._death: BaseException | None = None
        self._meter = ReplicaMeter()
        self._runner: Runner | None = self._make_watched_runner()
        self._thread = threading.Thread(target=self._run, name=f"furiosa-replica-{index}", daemon=True)
        self._thread.start()

    @property
    def death(self) -> BaseException | None:
        """Why the replica was given up; None while it is alive."""
        return self._death

    @property
    def ready(self) -> bool:
        """Whether it has a runner at the moment."""
        return self._failure is None

    @property
    def load(self) -> int:
        """The tokens of the requests that it has, waiting and running: of prompts and of completions."""
        return self._table.load

    @property
    def num_requests(self) -> int:
        """The requests that it has, waiting and running."""
        return self._table.count

    @property
    def usage(self) -> ReplicaUsage:
        """Its sequences and pages."""
        with self._scheduler_lock:
            scheduler = self._scheduler
            return ReplicaUsage(
                running=scheduler.num_running,
                waiting=scheduler.num_waiting,
                used_pages=scheduler.used_pages,
                num_pages=scheduler.limits.num_pages,
                preemptions=scheduler.num_preemptions,
            )

    @property
    def counts(self) -> ReplicaCounts:
        """What it has done, on all the runners that it has had."""
        return self._meter.read()

    def cached_prefix(self, tokens: Sequence[int], adapter: int = 0) -> int:
        """How many of the first tokens of a new prompt, with that adapter, have their KV in a slot already."""
        with self._scheduler_lock:
            return self._scheduler.cached_prefix(tokens, adapter)

    def submit(self, submission: Submission) -> None:
        """Takes a request; its sink gets a finished output, whatever happens. Raises EngineDeadError if closed."""
        with self._gate:
            if self._closing.is_set():
                raise EngineDeadError("the engine is closed")
            self._table.announce(submission)
            self._inbox.put(submission)

    def abort(self, key: int) -> None:
        """Ends the request of that key, if it has not ended yet."""
        with self._gate:
            if not self._closing.is_set():
                self._inbox.put(_Abort(key=key))

    def close(self) -> None:
        """Ends the thread and the runner; requests that have not ended fail with EngineDeadError."""
        with self._gate:
            if not self._closing.is_set():
                self._inbox.put(_Stop())
                self._closing.set()  # after the message: whoever wakes up by it finds the message
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _make_watched_runner(self) -> Runner:
        runner = self._make_runner()
        self._picker = runner if isinstance(runner, PicksTokens) else None
        self._meter.follow(runner)
        if isinstance(runner, ReportsFailure):
            runner.watch(lambda error: self._inbox.put(_Failed(runner=runner, error=error)))
        return runner

    def _run(self) -> None:
        while not self._stopped:
            try:
                if self._failure is not None:
                    self._recover(self._failure)
                self._serve()
            except _RunnerFailedError as error:
                self._note_failure(error.cause)
            except BaseException as error:  # noqa: BLE001 - whatever it is, those who wait must hear of it
                self._note_failure(error)
                self._end(self._table.unfinished(), error)
        self._close_runner()

    def _note_failure(self, failure: BaseException) -> None:
        waits = isinstance(failure, NoHostError)
        if not (waits and isinstance(self._failure, NoHostError)):  # said once, not each time that it asks for one
            logger.warning("replica %d failed: %s: %s", self.index, type(failure).__name__, failure)
        if self._runner is not None and not self._under_way and time.monotonic() - self._used > self._policy.settled:
            self._failures = 0
        self._failure = failure
        self._failures += not waits  # which is nobody's failure

    def _serve(self) -> None:
        """Keeps the runner busy, hands outputs out while it computes, and handles what arrives, until it is closed."""
        while not self._stopped:
            self._fill()
            self._table.deliver()
            self._handle(self._next())
            self._handle_waiting()
        self._table.deliver()

    def _handle_waiting(self) -> None:
        """Handles what is there already; the _Stop is the last of it."""
        while not self._inbox.empty():
            self._handle(self._inbox.get())

    def _handle_for(self, seconds: float) -> None:
        """Handles what arrives for so long, or until it is closed."""
        deadline = time.monotonic() + seconds
        while not self._stopped and (left := deadline - time.monotonic()) > 0:
            with suppress(Empty):
                self._handle(self._inbox.get(timeout=left))
                self._table.deliver()

    def _next(self) -> _Message:
        """What arrives next; if nothing does while a batch is overdue, the runner has failed."""
        if not self._under_way:
            return self._inbox.get()
        deadline = min(one.deadline for one in self._under_way.values())
        try:
            return self._inbox.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            raise _RunnerFailedError(StepTimeoutError(self._overdue())) from None

    def _handle(self, message: _Message) -> None:
        match message:
            case _Done():
                self._finish(message)
            case _Abort():
                self._end_sequences(self._table.end(message.key, "abort"))
            case _Failed():
                if message.runner is self._runner:
                    raise _RunnerFailedError(message.error)
            case _Stop():
                self._stopped = True
                for key in self._table.unfinished():
                    self._table.end(key, "error", EngineDeadError("the engine was closed before the request ended"))
                self._forget_batches()
            case _:
                self._admit(message)

    def _admit(self, submission: Submission) -> None:
        self._table.admit(submission)
        if self._death is not None:
            self._table.end(submission.key, "error", self._failed_with(self._death))
        elif self._failure is None:  # else it is scheduled with the others that wait, when there is a runner again
            self._schedule_request(submission)

    def _schedule_request(self, submission: Submission) -> None:
        request = submission.request
        try:
            with self._scheduler_lock:
                for one in request.sequences:
                    self._scheduler.add(
                        one.sequence_id,
                        request.prompt_token_ids,
                        prompt_logits=one.wants_prompt_logits,
                        adapter=request.adapter,
                    )
        except FuriosaLLMError as error:
            self._end_sequences(self._table.end(submission.key, "error", error))

    def _fill(self) -> None:
        """Submits batches as long as the scheduler has one that can run."""
        while (batch := self._schedule()) is not None:
            assert self._runner is not None
            number = next(self._numbers)
            self._under_way[number] = _UnderWay(batch=batch, deadline=time.monotonic() + self._policy.step_timeout)
            report = partial(self._report, number)
            if self._picker is None:
                self._runner.submit(batch).add_done_callback(report)
            else:
                self._picker.submit_picking(batch, self._table.picks(batch)).add_done_callback(report)

    def _schedule(self) -> Batch | None:
        with self._scheduler_lock:
            batch = self._scheduler.schedule()
            if isinstance(batch, Prefill):
                for piece in batch.pieces:
                    self._table.begin(piece.sequence_id, self._scheduler.num_cached_tokens(piece.sequence_id))
        return batch

    def _report(self, number: int, logits: Future[Array] | Future[Picked]) -> None:
        self._inbox.put(_Done(number=number, logits=logits))

    def _finish(self, done: _Done) -> None:
        """Samples from the logits of a batch for the scheduler; what a runner reports that was given up is ignored."""
        returned = self._under_way.pop(done.number, None)
        if returned is None:
            return
        self._used = time.monotonic()
        failure = done.logits.exception()
        if failure is not None:
            raise _RunnerFailedError(failure)
        accepted = self._table.accept(returned.batch, done.logits.result())
        self._end_sequences(accepted.failed)
        with self._scheduler_lock:
            self._scheduler.complete(returned.batch, accepted.tokens, accepted.finished)
        self._meter.note(returned.batch)
        self._failures = 0

    def _end_sequences(self, sequence_ids: Sequence[int]) -> None:
        with self._scheduler_lock:
            for sequence_id in sequence_ids:
                self._scheduler.abort(sequence_id)

    def _end(self, keys: Sequence[int], failure: BaseException) -> None:
        """Ends requests because of `failure`, each with an error of its own."""
        for key in keys:
            self._table.end(key, "error", self._failed_with(failure))

    def _forget_batches(self) -> None:
        self._under_way.clear()
        with self._scheduler_lock:
            self._scheduler.clear()

    def _recover(self, failure: BaseException) -> None:
        """Ends the requests that the failure hit and makes a new runner; gives up after too many failures in a row."""
        dies = self._failures > self._policy.max_failures
        self._end(self._table.unfinished() if dies else self._table.begun(), failure)
        self._forget_batches()
        self._table.deliver()
        self._close_runner()
        if dies:
            self._death = self._failure
            return
        delay = self._policy.backoff * 2 ** max(0, self._failures - 1)
        self._handle_for(
            self._policy.host_wait if isinstance(failure, NoHostError) else min(delay, self._policy.max_backoff)
        )
        if not self._stopped:
            try:
                self._runner = self._make_watched_runner()
            except BaseException as error:  # noqa: BLE001 - what waits may run on the one that is made next
                raise _RunnerFailedError(error) from None
            self._used = time.monotonic()
            self._failure = None
            for submission in self._table.waiting():
                self._schedule_request(submission)

    def _close_runner(self) -> None:
        """Closes the runner, if there is one, in a thread of its own: one that hangs is left behind."""
        if self._runner is None:
            return
        runner, self._runner = self._runner, None
        closing = threading.Thread(target=_close, args=(runner,), name=f"furiosa-close-{self.index}", daemon=True)
        closing.start()
        closing.join(self._policy.close_timeout)
        self._meter.settle()
        if closing.is_alive():
            logger.warning("replica %d: its runner does not close; it is left behind", self.index)

    def _failed_with(self, cause: BaseException) -> ReplicaError:
        error = ReplicaError(f"replica {self.index} failed while it had the request: {type(cause).__name__}: {cause}")
        error.__cause__ = cause
        return error

    def _overdue(self) -> str:
        batches = ", ".join(_describe(one.batch) for one in self._under_way.values())
        runner: object = self._runner
        doing = f"; {runner.progress()}" if isinstance(runner, ReportsProgress) else ""
        return (
            f"{batches}: not back within {self._policy.step_timeout:g} s{doing}; give a greater step_timeout if the "
            f"model is that slow"
        )


def _describe(batch: Batch) -> str:
    if isinstance(batch, Prefill):
        return f"prefill of {batch.num_tokens} tokens after {batch.pieces[0].start}"
    return f"decode of {len(batch.rows)} sequences"


def _close(runner: Runner) -> None:
    try:
        runner.close()
    except Exception as error:  # noqa: BLE001 - it has failed before, and is not used again
        logger.warning("a runner failed to close: %s: %s", type(error).__name__, error)
