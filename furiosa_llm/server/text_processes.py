"""Work on clients' texts in processes of its own, so that none of it stops the server, whatever it takes."""

from __future__ import annotations

import asyncio
import logging
import pickle
import signal
import socket
import subprocess
from dataclasses import replace
from typing import Any

from furiosa_llm.runtime.errors import InputError
from furiosa_llm.runtime.tokens.lean_process import lean_process
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer
from furiosa_llm.server import text_child
from furiosa_llm.server.body_reading import read_body
from furiosa_llm.server.settings import ServerSettings
from furiosa_llm.server.text_child import HEAD, Setup

logger = logging.getLogger(__name__)

_SMALL_BODY = 2**16
"""Bytes of a body that is read at once: in some milliseconds, whatever it holds."""
_PIECE = 2**18
"""Bytes of a message that are sent before anything else may happen: a body of many megabytes is copied in between."""
SHORT_TEXT = 4096
"""Characters of a text that is tokenized at once: in a millisecond or two."""
_SMALL_CONVERSATION = 2**18
"""Bytes of one that does not wait behind those that take long."""


class TextProcess:
    """One process, which does one piece of work at a time; one that ends in the middle is followed by another."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._turn = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._closed = False

    async def start(self) -> None:
        """Starts the process, which need not be ready when this returns."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = lean_process(text_child.__name__, stdin=theirs, stdout=subprocess.DEVNULL)
        self._streams = await asyncio.open_connection(sock=ours)
        setup = pickle.dumps(self._setup)
        self._streams[1].write(HEAD.pack(len(setup)) + setup)

    async def run(self, message: bytes, what: str) -> Any:
        """What the work in `message` gives, or raises; InputError if `what` it is exceeds the limits.

        Cancelled in the middle of it, it ends the process: nobody wants the result.
        """
        async with self._turn:
            if self._streams is not None and self._process is not None and self._process.poll() is not None:
                await self._end()  # it has ended by no fault of this work
            if self._streams is None:
                await self.start()
            try:
                done, result = await self._exchange(message)
            except (asyncio.IncompleteReadError, OSError):
                code = await self._end()
                if not self._closed:
                    await self.start()
                raise self._exceeded(code, what) from None
            except asyncio.CancelledError:
                self._end()
                raise
        if done:
            return result
        try:
            raise result or self._exceeded(None, what)
        finally:
            del result  # which has this frame in its traceback, and so the body, until cycles are looked for

    async def close(self) -> None:
        """Ends the process, whatever it is doing; who waits for it gets an error."""
        self._closed = True
        if self._streams is not None:
            await self._end()

    async def _exchange(self, message: bytes) -> tuple[bool, Any]:
        assert self._streams is not None
        reader, writer = self._streams
        writer.write(HEAD.pack(len(message)))
        for start in range(0, len(message), _PIECE):
            writer.write(message[start : start + _PIECE])
            await writer.drain()
        [size] = HEAD.unpack(await reader.readexactly(HEAD.size))
        answer: tuple[bool, Any] = pickle.loads(await reader.readexactly(size))
        return answer

    def _end(self) -> asyncio.Future[int]:
        """Ends the process and the connection; gives the code that it ends with, once its memory is free."""
        assert self._process is not None
        assert self._streams is not None
        self._process.kill()  # without effect if it has ended
        self._streams[1].close()
        self._streams = None
        return asyncio.get_running_loop().run_in_executor(None, self._process.wait)

    def _exceeded(self, code: int | None, what: str) -> InputError:
        if code == -signal.SIGALRM:
            message = f"{what} takes more than {self._setup.seconds:g} s, which is the limit (--text-timeout)"
        else:
            message = f"{what} takes more than {self._setup.nbytes} bytes of memory, the limit (--text-max-nbytes)"
            if code is not None:
                message += f", or ends the process that does it, with {code}"
        logger.warning("%s", message)
        return InputError(message)


class TextWork:
    """Reads bodies, renders conversations and tokenizes texts: what is small at once, the rest in two processes.

    What takes long does not hold up the conversations that do not.
    """

    def __init__(self, tokenizer: Tokenizer | None, settings: ServerSettings) -> None:
        self._tokenizer = tokenizer
        small = Setup(
            tokenizer=None,
            config={} if tokenizer is None else tokenizer.config,
            chat_templates=None if tokenizer is None else tokenizer.chat_templates,
            seconds=settings.text_timeout,
            nbytes=settings.text_max_nbytes,
        )
        self._quick = TextProcess(small)
        self._slow = TextProcess(replace(small, tokenizer=None if tokenizer is None else tokenizer.to_text()))

    async def start(self) -> None:
        """Starts the processes."""
        await self._quick.start()
        await self._slow.start()

    async def close(self) -> None:
        """Ends the processes."""
        await asyncio.gather(self._quick.close(), self._slow.close())

    async def read(self, body: bytes) -> Any:
        """What a body says; see `read_body`."""
        if len(body) <= _SMALL_BODY:
            return read_body(body)
        return await self._slow.run(_message("read", body), "reading the body")

    async def render(self, *arguments: Any, **options: Any) -> str:
        """The prompt of a conversation; see `ChatTemplate.render`."""
        message = _message("render", *arguments, **options)
        process = self._quick if len(message) <= _SMALL_CONVERSATION else self._slow
        text: str = await process.run(message, "the chat template")
        return text

    async def encode(self, text: str, **options: Any) -> list[int]:
        """The tokens of a text; see `Tokenizer.encode`."""
        assert self._tokenizer is not None
        if len(text) <= SHORT_TEXT:
            return self._tokenizer.encode(text, **options)
        tokens: list[int] = await self._slow.run(_message("encode", text, **options), "tokenizing the text")
        return tokens


def _message(name: str, /, *arguments: Any, **options: Any) -> bytes:
    return pickle.dumps((name, arguments, options), pickle.HIGHEST_PROTOCOL)
