"""A replica whose stages are servers on other hosts; see `Runner`. The head has no weights, and no hidden states."""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import zmq

from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.errors import FuriosaLLMError
from furiosa_llm.runtime.artifact.progress import tell
from furiosa_llm.runtime.distributed.link import Context, Link, receive
from furiosa_llm.runtime.distributed.wire import (
    Frames,
    Kind,
    Message,
    Opening,
    adapter_frames,
    batch_bytes,
    error_of,
    header,
    integers,
    num_rows,
    opening_json,
    parse_error,
    parse_message,
    parse_result,
    stage_name,
)
from furiosa_llm.runtime.errors import StageError, WireError
from furiosa_llm.runtime.execution.counters import WIDTH, Counters, new_counters
from furiosa_llm.runtime.runners.batch import Batch, Picked
from furiosa_llm.runtime.runners.far_runner import FarRunner

_PING_SECONDS = 1.0
_POLL_MS = 100
_GOODBYE_MS = 200
CONNECT_SECONDS = 5.0
"""A stage that cannot be reached within so long is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _UnderWay:
    """A batch under way; one of the two futures is None."""

    picks: tuple[bool, ...]
    logits: Future[Array] | None
    picked: Future[Picked] | None

    def fail(self, error: Exception) -> None:
        for future in (self.logits, self.picked):
            if future is not None:
                future.set_exception(error)

    def succeed(self, found: Picked) -> None:
        if self.logits is not None:
            self.logits.set_result(found.logits)
        if self.picked is not None:
            self.picked.set_result(found)


class RemoteRunner(FarRunner[_UnderWay]):
    """One replica; stage i of it is on the server that `openings[i]` is sent to, which has the `token`.

    A stage takes at most `load_seconds` to load. Raises what
    a stage raises that cannot, and StageError for one that cannot be reached. A stage that is lost, or that a batch
    fails on, fails all that is under way.
    """

    def __init__(self, openings: Sequence[Opening], token: str, *, load_seconds: float) -> None:
        super().__init__()
        self._openings = openings
        count = len(openings)
        self._session = secrets.randbits(62)
        self._numbers = itertools.count(1)
        self._counters = new_counters(count)
        self._heard = [time.monotonic()] * count
        self._ending = threading.Event()
        self._context: Context = zmq.Context()
        self._links = [self._connect(opening, token) for opening in openings]
        # A second connection for batches: they are sent by whoever submits them, without a thread in between.
        self._batches = [self._connect(opening, token) for opening in openings]
        self._poller = zmq.Poller()
        for link in self._links:
            self._poller.register(link.socket, zmq.POLLIN)
            self._poller.register(link.monitor, zmq.POLLIN)
        try:
            self._open(load_seconds)
        except BaseException:
            self._close_sockets()
            raise
        self._thread = threading.Thread(target=self._serve, name="furiosa-stages", daemon=True)
        self._thread.start()

    @property
    def num_groups(self) -> int:
        """How many batches may be under way at once."""
        return len(self._links)

    def submit(self, batch: Batch) -> Future[Array]:
        """Sends `batch` to all stages and returns at once."""
        future: Future[Array] = Future()
        self._send_batch(batch, _UnderWay(picks=(False,) * num_rows(batch), logits=future, picked=None))
        return future

    def submit_picking(self, batch: Batch, picks: Sequence[bool]) -> Future[Picked]:
        """See `PicksTokens`."""
        future: Future[Picked] = Future()
        self._send_batch(batch, _UnderWay(picks=tuple(picks), logits=None, picked=future))
        return future

    def progress(self) -> str:
        """How long ago each stage answered: one that runs a step answers when that has ended."""
        now = time.monotonic()
        ago = zip(self._links, self._heard, strict=True)
        return ", ".join(f"{link.what} answered {now - heard:.1f} s ago" for link, heard in ago)

    def counts(self) -> Counters:
        """See `ReportsCounts`; as the stages said a second ago."""
        return self._counters.copy()

    def close(self) -> None:
        """Ends the session of every stage, which keeps its weights; what is under way fails."""
        super().close()
        self._thread.join(timeout=5)

    def _connect(self, opening: Opening, token: str) -> Link:
        return Link(self._context, opening.addresses[opening.stage], token, stage_name(opening))

    # -- sending -----------------------------------------------------------------------------------------------

    def _send_batch(self, batch: Batch, entry: _UnderWay) -> None:
        with self._lock:
            if self._error is not None:
                entry.fail(self._error)
                return
            number = next(self._numbers)
            self._under_way[number] = entry
            for message in self._news(batch):
                self._send(message)
            self._send([header(Kind.RUN, self._session, number=number), batch_bytes(batch, entry.picks)])

    def _news(self, batch: Batch) -> list[Frames]:
        """What stages are told before `batch`: the adapters in it that they do not have, and those that are gone."""
        gone, new = self._changed_adapters(batch)
        forget: Frames = [header(Kind.FORGET, self._session), np.array(gone, np.int64).tobytes()]
        return [
            *([forget] if gone else []),
            *([header(Kind.ADAPTER, self._session), *adapter_frames(one)] for one in new),
        ]

    def _send(self, frames: Frames) -> None:
        for link in self._batches:
            link.send(frames)

    # -- receiving ---------------------------------------------------------------------------------------------

    def _open(self, load_seconds: float) -> None:
        """Has every stage load, all at the same time, and waits for them."""
        began = time.monotonic()
        for stage, link in enumerate(self._links):
            link.send([header(Kind.OPEN, self._session), opening_json(self._openings[stage])])
        missing = set(range(len(self._links)))
        while missing:
            tell("loading the stages", len(self._links) - len(missing), len(self._links))
            for stage, message in self._receive():
                if message.kind is Kind.READY:
                    missing.discard(stage)
                elif message.kind is Kind.ERROR:
                    raise self._error_of(stage, message)
            waited = time.monotonic() - began
            for stage in missing:
                link = self._links[stage]
                if not link.connected and waited > CONNECT_SECONDS:
                    raise StageError(
                        f"{link.what} does not answer at {self._openings[stage].addresses[stage]}; is it started, and "
                        f"does a firewall let its port through?"
                    )
                if waited > load_seconds:
                    raise StageError(f"{link.what} is not loaded after {load_seconds:g} s; give it longer")

    def _serve(self) -> None:
        pinged = 0.0
        try:
            while not self._ending.is_set():
                if time.monotonic() - pinged > _PING_SECONDS:
                    pinged = time.monotonic()
                    for link in self._links:
                        link.send([header(Kind.PING, self._session)])
                for stage, message in self._receive():
                    self._handle(stage, message)
        except FuriosaLLMError as error:
            self._fail(error)
        self._close_sockets()

    def _receive(self) -> list[tuple[int, Message]]:
        """What has arrived, waiting a little; raises StageError for a lost stage, WireError for no message."""
        ready = dict(self._poller.poll(_POLL_MS))
        found = []
        for stage, link in enumerate(self._links):
            if link.socket in ready:
                message = parse_message(receive(link.socket))
                if message.session == self._session:
                    found.append((stage, message))
            if link.monitor in ready and (lost := link.notice()) is not None:
                raise StageError(lost)
        return found

    def _handle(self, stage: int, message: Message) -> None:
        self._heard[stage] = time.monotonic()
        match message.kind:
            case Kind.RESULT:
                with self._lock:
                    entry = self._under_way.pop(message.number, None)
                if entry is not None:
                    self._take_result(entry, message)
            case Kind.ERROR:
                raise self._error_of(stage, message)
            case Kind.PONG:
                counters = integers(message.frame())
                if counters.size != WIDTH:
                    raise WireError(f"{self._links[stage].what} sends {counters.size} counters, expected {WIDTH}")
                self._counters[stage] = counters
            case _:
                raise WireError(f"{self._links[stage].what} sends a message {message.kind.name}")

    def _error_of(self, stage: int, message: Message) -> FuriosaLLMError:
        """The error that a stage has sent, with its name."""
        error, what = error_of(*parse_error(message.frame())), self._links[stage].what
        return error if what in str(error) else type(error)(f"{what}: {error}")

    def _take_result(self, entry: _UnderWay, message: Message) -> None:
        try:
            found = parse_result(message, entry.picks)
        except WireError as error:
            entry.fail(error)
            raise
        entry.succeed(found)

    def _stop(self) -> None:
        self._ending.set()

    def _close_sockets(self) -> None:
        """Ends the sessions, on the thread that has the sockets."""
        with self._lock:
            for link in self._links:
                link.send([header(Kind.CLOSE, self._session)])
                link.close(linger_ms=_GOODBYE_MS)
            for link in self._batches:
                link.close()
        self._context.term()
