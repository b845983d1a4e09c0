"""A stage behind a socket: loads what its head asks for, and nothing of other stages, and runs its batches.

One thread does everything, in the order in which it arrives: a stage has one batch under way. The connections are kept
alive by ZeroMQ's own thread, however long a step takes.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import zmq

from furiosa_llm.runtime.adapters.adapter import Adapter
from furiosa_llm.runtime.artifact.compute import computing
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.closing import Closing
from furiosa_llm.runtime.distributed.artifact_cache import ArtifactCache, fetching
from furiosa_llm.runtime.distributed.link import Doorkeeper, Link, check_token, listen, receive
from furiosa_llm.runtime.distributed.stage_session import Sent, StageSession
from furiosa_llm.runtime.distributed.wire import (
    Kind,
    Message,
    Opening,
    error_json,
    header,
    integers,
    package_version,
    parse_adapter,
    parse_message,
    parse_opening,
    result_message,
    stage_name,
    tensor_frames,
)
from furiosa_llm.runtime.errors import StageError, WireError
from furiosa_llm.runtime.execution.driver import Crew, cores_for
from furiosa_llm.runtime.runners.loaded_model import LoadedModel, load_model, stage_tensors

logger = logging.getLogger(__name__)

HEAD_SECONDS = 10.0
"""A head of which nothing has been heard for so long has ended: its session ends, and another one may open one."""
_LOOK_MS = 500
"""So often a stage looks whether its head and the later stages are still there."""


@dataclass(slots=True, kw_only=True)
class _Open:
    """The session that there is."""

    number: int
    opening: Opening
    reply_to: bytes
    stage: StageSession
    links: dict[int, Link]
    adapters: dict[int, Adapter]
    heard: float
    dtype: str


class StageServer(Closing):
    """Serves at `address`, tcp://HOST:PORT of one interface (port 0: any), whoever has the `token`.

    `threads` cores step the ranks of the stage; None: all that this process may use.
    """

    def __init__(self, address: str, token: str, *, threads: int | None = None) -> None:
        check_token(token)
        self._token = token
        self._threads = cores_for(threads)
        self._context = zmq.Context()
        try:
            self._doorkeeper = Doorkeeper(self._context, token)
            self._socket = listen(self._context, address)
        except zmq.ZMQError as error:
            self._context.term()
            raise StageError(f"nothing can be bound to {address}: {error}; give an address of this host") from error
        self._socket.rcvtimeo = _LOOK_MS
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._crew = Crew(self._threads)
        self._loaded: tuple[Opening, LoadedModel] | None = None
        self._open: _Open | None = None
        self._looked = time.monotonic()
        self._ending = threading.Event()
        self._ended = threading.Event()

    def serve(self) -> None:
        """Answers until `close` is called from another thread; then gives everything back."""
        try:
            while not self._ending.is_set():
                self._serve_once()
        finally:
            self._end_session()
            self._crew.close()
            self._socket.close(linger=0)
            self._context.term()  # which ends the doorkeeper, too
            self._ended.set()

    def close(self) -> None:
        """Ends `serve`, once the step that runs has ended."""
        self._ending.set()
        self._ended.wait(5)

    def _serve_once(self) -> None:
        try:
            frames = receive(self._socket)
        except zmq.Again:
            self._look_for_head()
            frames = []
        except WireError as error:
            logger.warning("a message was refused: %s", error)
            return
        if frames:
            self._take(frames)
        if time.monotonic() - self._looked > _LOOK_MS / 1000:
            self._look_for_stages()

    def _look_for_head(self) -> None:
        """Ends the session if its head has ended; only while no message waits, which may be a sign of its life."""
        if self._open is not None and time.monotonic() - self._open.heard > HEAD_SECONDS:
            logger.warning("the head has not been heard of for %g s: its session ends", HEAD_SECONDS)
            self._end_session()

    def _look_for_stages(self) -> None:
        """Ends the session if a later stage is lost."""
        self._looked = time.monotonic()
        links = () if self._open is None else self._open.links.values()
        lost = next((why for link in links if (why := link.notice()) is not None), None)
        if lost is not None:
            self._fail(StageError(f"{self._name()}: {lost}"))

    def _take(self, frames: list[memoryview]) -> None:
        """A message; whatever is wrong with it is answered, and ends at most the session that it is of."""
        sender, *rest = frames
        try:
            message = parse_message(rest)
        except WireError as error:
            logger.warning("a message was refused: %s", error)
            return
        try:
            if message.kind is Kind.OPEN:
                self._begin(bytes(sender), message)
            elif self._open is not None and message.session == self._open.number:
                self._open.heard = time.monotonic()
                self._handle(message, self._open)
        except Exception as error:  # noqa: BLE001 - the head raises it, and this server goes on
            self._refuse(bytes(sender), message, error)

    def _refuse(self, sender: bytes, message: Message, error: Exception) -> None:
        if self._open is not None and message.session == self._open.number:
            self._fail(error)
        else:
            self._send(sender, header(Kind.ERROR, message.session), error_json(error))

    def _handle(self, message: Message, session: _Open) -> None:
        match message.kind:
            case Kind.RUN:
                session.stage.take_batch(message, session.adapters)
                self._run(message.number, session)
            case Kind.TENSORS:
                session.stage.take_tensors(message)
                self._run(message.number, session)
            case Kind.PING:
                counters = session.stage.counters.tobytes()
                self._send(session.reply_to, header(Kind.PONG, session.number), counters)
            case Kind.ADAPTER:
                adapter = parse_adapter(message.frames)
                session.adapters[adapter.key] = adapter
            case Kind.FORGET:
                for key in integers(message.frame()).tolist():
                    session.adapters.pop(key, None)
            case Kind.CLOSE:
                self._end_session()
            case _:
                raise WireError(f"a stage takes no message {message.kind.name}")

    def _run(self, number: int, session: _Open) -> None:
        while session.stage.knows(number) and (sent := session.stage.run(number)) is not None:
            self._pass_on(number, session, sent)

    def _pass_on(self, number: int, session: _Open, sent: Sent) -> None:
        for stage, arrays in sent.tensors.items():
            first = header(Kind.TENSORS, session.number, number=number, first=sent.step, second=session.opening.stage)
            session.links[stage].send([first, *tensor_frames(arrays)])
        if sent.logits is not None:
            self._send(
                session.reply_to, *result_message(session.number, number, sent.logits, sent.picks, session.dtype)
            )

    # -- sessions ----------------------------------------------------------------------------------------------

    def _begin(self, sender: bytes, message: Message) -> None:
        """Opens a session for the head `sender`, in place of its own one or of one whose head has ended."""
        opening = parse_opening(message.frame())
        there = self._open
        if there is not None and there.opening.head != opening.head:
            raise StageError(f"{stage_name(opening)} has another head; end that one, or wait {HEAD_SECONDS:g} s")
        self._end_session()
        if opening.version != package_version():
            raise StageError(
                f"{stage_name(opening)} has furiosa-llm-onnx {package_version()}, and its head {opening.version}; "
                f"install the same version on both"
            )
        model = self._model(opening)
        stage = StageSession(
            model,
            opening.stage,
            self._crew,
            slots_per_group=opening.slots_per_group,
            max_length=opening.max_length,
        )
        links = {
            other: Link(
                self._context,
                opening.addresses[other],
                self._token,
                f"stage {other} on {opening.hosts[other]}",
            )
            for other in stage.later
        }
        self._open = _Open(
            number=message.session,
            opening=opening,
            reply_to=sender,
            stage=stage,
            links=links,
            adapters={},
            heard=time.monotonic(),
            dtype=next(info.dtype for info in model.interface.outputs if info.role == "logits"),
        )
        self._send(sender, header(Kind.READY, message.session))

    def _model(self, opening: Opening) -> LoadedModel:
        """The stage, as it was loaded for the session before if that is what is asked for."""
        key = replace(opening, addresses=(), hosts=(), slots_per_group=1, max_length=1, head=0, source=None)
        if self._loaded is not None and self._loaded[0] == key:
            return self._loaded[1]
        self._loaded = None
        folder = self._folder(opening)
        artifact = open_artifact(folder, full=False)
        if artifact.digest != opening.digest:
            raise ArtifactError(
                f"{stage_name(opening)}: {opening.folder} is another artifact than the head's: digest "
                f"{artifact.digest[:16]}..., expected {opening.digest[:16]}...; copy the head's to that host"
            )
        model = load_model(
            computing(artifact, opening.compute),
            opening.stages,
            lanes=self._threads,
            threads=self._threads,
            mapped=opening.mapped,
            separate=opening.separate,
            companions=opening.companions,
            max_step_nbytes=opening.max_step_nbytes,
            only=opening.stage,
        )
        if opening.verify and opening.source is None:  # else it was compared as it was copied
            stored = {tensor.name for tensor in model.programs[0].graph.model.graph.initializer}
            with _named(opening):
                for name in sorted(stored & artifact.tensors.keys()):
                    artifact.check_tensor(name)
        self._loaded = (key, model)
        return model

    def _folder(self, opening: Opening) -> Path:
        """The folder that has what the stage reads, into which that is copied if it comes from the head."""
        if opening.source is None:
            return Path(opening.folder)
        cache = ArtifactCache(Path(opening.folder), opening.digest, opening.stages[opening.stage])
        with _named(opening), fetching(opening.source, self._token) as fetch:
            cache.fill(
                fetch,
                lambda found: stage_tensors(computing(found, opening.compute), opening.stages, opening.stage),
                verify=opening.verify,
            )
        return cache.folder

    def _name(self) -> str:
        assert self._open is not None
        return stage_name(self._open.opening)

    def _fail(self, error: Exception) -> None:
        """Ends the session by `error`; what is loaded stays for the next one."""
        if self._open is not None:
            logger.warning("the session ends: %s: %s", type(error).__name__, error)
            self._send(self._open.reply_to, header(Kind.ERROR, self._open.number), error_json(error))
            self._end_session()

    def _end_session(self) -> None:
        if self._open is not None:
            for link in self._open.links.values():
                link.close()
            self._open = None

    def _send(self, receiver: bytes, *frames: bytes | memoryview) -> None:
        """Sends a message; one to a receiver that is gone is dropped."""
        try:
            self._socket.send_multipart([receiver, *frames], flags=zmq.NOBLOCK)
        except zmq.ZMQError as error:
            logger.warning("a message could not be sent: %s", error)


@contextmanager
def _named(opening: Opening) -> Iterator[None]:
    """Says in errors of the artifact which stage they are of."""
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"{stage_name(opening)}: {error}") from error


def main() -> None:
    """Serves at the address that is given, with the token in the first line of the standard input; prints its own."""
    threads = int(sys.argv[2]) if len(sys.argv) > 2 else None
    with StageServer(sys.argv[1], sys.stdin.readline().strip(), threads=threads) as server:
        sys.stdout.write(f"{server.address}\n")
        sys.stdout.flush()
        threading.Thread(target=server.serve, daemon=True).start()
        sys.stdin.read()
