"""Runs the application on uvicorn until it is to stop, and lets requests end before."""

from __future__ import annotations

import copy
import gc
import logging
import os
import resource
import signal
import socket
import textwrap
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.config import LOGGING_CONFIG
from uvicorn.logging import DefaultFormatter

from furiosa_llm.runtime.errors import InputError
from furiosa_llm.server.connections import connection_class
from furiosa_llm.server.notes import on_one_line
from furiosa_llm.server.settings import ServerSettings

logger = logging.getLogger(__name__)

_MAX_HEAD_NBYTES = 16 * 2**10
"""Of a request: its first line and its headers."""

_OTHER_FILES = 256
"""Open files other than connections: the model's, its worker processes', and clients that are turned away."""


_STOPPING_SECONDS = 0.5
"""For what comes after the requests have ended."""

_SAYING_SECONDS = 0.1
"""For the last line of the log."""


class Server(uvicorn.Server):
    """uvicorn's, but for the exit code: it would end by the signal that stopped it, and a drained server is no failure.

    The first SIGTERM or SIGINT lets requests end; a second SIGINT does not wait for them. What has not stopped
    `stop_within` seconds after the first is ended where it is: a step that does not leave its kernel, or a thread that
    does not give the interpreter back. With `ends_process` that includes what comes after `run`.
    """

    def __init__(self, config: uvicorn.Config, stop_within: float, *, ends_process: bool) -> None:
        super().__init__(config)
        self._stop_within = stop_within
        self._ends_process = ends_process
        self._stopped = threading.Event()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stops as uvicorn does, at the latest some time later."""
        if not self.should_exit:
            threading.Thread(target=self._end_if_not_stopped, name="stop-watch", daemon=True).start()
        super().handle_exit(sig, frame)

    def _end_if_not_stopped(self) -> None:
        if not self._stopped.wait(self._stop_within):
            # In a thread of its own: where nobody reads the log any more, writing to it does not return.
            saying = threading.Thread(target=_say_that_it_ends, name="stop-word", daemon=True)
            saying.start()
            saying.join(_SAYING_SECONDS)
            os._exit(0)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles signals as long as the context lasts; threads other than the main one get none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            if not self._ends_process:
                self._stopped.set()
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts as uvicorn does."""
        await super().startup(sockets)
        if self._ends_process:
            gc.freeze()  # what is there stays: a collection that went through all of it would hold up every request

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops as uvicorn does, which after a second SIGINT leaves requests and the application to their fate.

        The model's threads would outlive the interpreter then, and abort the process.
        """
        await super().shutdown(sockets)
        if self.force_exit:
            for task in self.server_state.tasks:
                task.cancel()
            await self.lifespan.shutdown()


def check_address(host: str, port: int) -> None:
    """Raises InputError if nothing can listen there: better before a model is loaded than after."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with closing(socket.socket(family, kind, protocol)) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host} port {port}: {error}; give another --host or --port") from error


def make_server(
    app: FastAPI,
    settings: ServerSettings,
    *,
    host: str,
    port: int,
    log_level: str = "info",
    access_log: bool = True,
    ends_process: bool = False,
) -> Server:
    """A server of `app`, whose `run` returns when it is to stop; with `ends_process` so does the process, soon."""
    _make_room_for(settings.max_connections)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        loop="asyncio",
        http=connection_class(settings),
        ws="none",
        h11_max_incomplete_event_size=_MAX_HEAD_NBYTES,
        timeout_keep_alive=settings.idle_timeout,
        log_level=log_level,
        log_config=_log_config(log_level),
        access_log=access_log,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout)),
        server_header=False,
    )
    return Server(config, settings.shutdown_timeout + _STOPPING_SECONDS, ends_process=ends_process)


class _OneLine(DefaultFormatter):
    """uvicorn's form of a message, which foreign text in it cannot make two; a traceback's lines are indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line."""
        return on_one_line(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        """The traceback."""
        return textwrap.indent(super().formatException(ei), "  ")


def _say_that_it_ends() -> None:
    logger.warning("what runs has not stopped; the process ends without it")
    logging.shutdown()


def _make_room_for(connections: int) -> None:
    """Lets the process open so many files, as far as the system does."""
    wanted = connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft in range(wanted):
        possible = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
        if possible < wanted:
            logger.warning(
                "%d open files are the most that the system allows, fewer than %d connections may need; raise its "
                "limit (ulimit -Hn)",
                possible,
                connections,
            )


def _log_config(level: str) -> dict[str, Any]:
    """uvicorn's, with our own messages in the same form."""
    config = copy.deepcopy(LOGGING_CONFIG)
    for formatter in config["formatters"].values():
        formatter["use_colors"] = False  # the stream writes out what would steer the terminal
    config["formatters"]["default"]["()"] = _OneLine
    config["loggers"]["furiosa_llm"] = {"handlers": ["default"], "level": level.upper(), "propagate": False}
    return config
