"""What a `TextProcess` runs: bodies read, prompts rendered, texts tokenized, one piece of work after the other.

It is started without this package's heavier modules, and what it imports has to stay so.
"""

from __future__ import annotations

import contextlib
import pickle
import signal
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from furiosa_llm.runtime.artifact.errors import FuriosaLLMError
from furiosa_llm.runtime.errors import InputError
from furiosa_llm.runtime.tokens.chat_template import ChatTemplate, Templates
from furiosa_llm.runtime.tokens.lean_process import limit_memory
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer
from furiosa_llm.server.body_reading import read_body

FD = 0
"""Where the other end of the connection is: the standard input."""
HEAD = struct.Struct("<Q")
"""The number of bytes of the message behind it."""
MAX_TOKENS = 2**18
"""Of one text: more are of no use to any model, and a long answer of the server."""

_SECONDS_TO_LOAD = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a child is told first.

    tokenizer: a tokenizer.json; None for a child that only reads and renders.
    config: what tokenizer_config.json holds.
    chat_templates: the model's own.
    seconds: what one piece of work may take.
    nbytes: the memory that all its work may take.
    """

    tokenizer: str | None
    config: Mapping[str, Any]
    chat_templates: Templates
    seconds: float
    nbytes: int


class _Works:
    """Each method but the constructor is a kind of work."""

    def __init__(self, setup: Setup) -> None:
        self._template = ChatTemplate(setup.config, setup.chat_templates)
        self._tokenizer: Tokenizer | None = None
        if setup.tokenizer is not None:
            self._tokenizer = Tokenizer.of_text(setup.tokenizer, setup.config, setup.chat_templates)

    def read(self, body: bytes) -> Any:
        return read_body(body)

    def render(self, *arguments: Any, **options: Any) -> str:
        return self._template.render(*arguments, **options)

    def encode(self, text: str, **options: Any) -> list[int]:
        assert self._tokenizer is not None
        tokens = self._tokenizer.encode(text, **options)
        if len(tokens) > MAX_TOKENS:
            raise InputError(f"the text has {len(tokens)} tokens, at most {MAX_TOKENS} are taken; send less")
        return tokens


def main() -> None:
    """Works until the connection ends. What takes too long ends the process, and with it the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes; the parent says what it means
    # The parent may be killed at any moment, with what it was sending or was to be sent.
    with (
        contextlib.suppress(ConnectionError),
        socket.socket(fileno=FD) as connection,
        connection.makefile("rwb") as stream,
    ):
        first = _received(stream.read)
        if not first:
            return
        setup: Setup = pickle.loads(first)
        signal.alarm(_SECONDS_TO_LOAD)
        works = _Works(setup)
        limit_memory(setup.nbytes)
        signal.alarm(0)
        while message := _received(stream.read):
            # By default the signal ends the process, whatever it is doing: even if the parent is no more.
            signal.setitimer(signal.ITIMER_REAL, setup.seconds)
            answer = _answer(works, message)
            signal.setitimer(signal.ITIMER_REAL, 0)
            stream.write(HEAD.pack(len(answer)) + answer)
            stream.flush()


def _received(read: Callable[[int], bytes]) -> bytes:
    """The next message; empty if the connection has ended, be it inside of one."""
    head = read(HEAD.size)
    if len(head) < HEAD.size:
        return b""
    [size] = HEAD.unpack(head)
    message = read(size)
    return message if len(message) == size else b""


def _answer(works: _Works, message: bytes) -> bytes:
    """Whether it was done, and the result or the error."""
    try:
        name, arguments, options = pickle.loads(message)
        return pickle.dumps((True, getattr(works, name)(*arguments, **options)), pickle.HIGHEST_PROTOCOL)
    except FuriosaLLMError as error:
        return pickle.dumps((False, error))
    except MemoryError:
        return pickle.dumps((False, None))
