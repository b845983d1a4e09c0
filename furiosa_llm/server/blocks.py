"""One answer as blocks, each thought, text or a call, that begin, grow and end: what the newer protocols stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import Request
from starlette.responses import Response

from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.server.chat_service import Chat
from furiosa_llm.server.errors import ApiError, error_event
from furiosa_llm.server.events import EventStream, events_of, json_answer, until_disconnect
from furiosa_llm.server.generation import collect
from furiosa_llm.server.tools import Found

Kind = Literal["thought", "text", "call"]
Change = tuple[Literal["begin", "grow", "end"], "Block", str]
"""What happens to a block, and what is new of its text."""


@dataclass(slots=True, kw_only=True)
class Block:
    """A part of an answer: `text` is what is thought or said, or the arguments of the call of `name`."""

    index: int
    kind: Kind
    text: str = ""
    id: str = ""
    name: str = ""


class Blocks:
    """The blocks of one answer so far, of which the last one may still grow."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open = False
        self._blank = ""
        """Blanks behind a block, which begin a text or are nothing."""

    def take(self, found: Found) -> Iterator[Change]:
        """What `found` changes."""
        if found.reasoning:
            yield from self._grow("thought", found.reasoning)
        if found.content:
            yield from self._say(found.content)
        for piece in found.calls:
            if piece.id is not None:
                yield from self._begin(Block(index=len(self.all), kind="call", id=piece.id, name=piece.name or ""))
            if piece.arguments:
                yield from self._grow("call", piece.arguments)

    def end(self) -> Iterator[Change]:
        """Ends the last block; nothing follows. An answer has one block at least."""
        if not self.all:
            yield from self._begin(Block(index=0, kind="text"))
        if self._open:
            self._open = False
            yield "end", self.all[-1], ""

    def _say(self, text: str) -> Iterator[Change]:
        text, self._blank = self._blank + text, ""
        if text.strip() or (self._open and self.all[-1].kind == "text"):
            yield from self._grow("text", text)
        else:
            self._blank = text

    def _grow(self, kind: Kind, text: str) -> Iterator[Change]:
        if not self._open or self.all[-1].kind != kind:
            yield from self._begin(Block(index=len(self.all), kind=kind))
        self.all[-1].text += text
        yield "grow", self.all[-1], text

    def _begin(self, block: Block) -> Iterator[Change]:
        if self._open:
            yield "end", self.all[-1], ""
        self.all.append(block)
        self._open, self._blank = True, ""
        yield "begin", block, ""


class BlockAnswer(ABC):
    """The one answer of a chat in blocks, at once or in events; protocols differ in how these are written."""

    def __init__(self, chat: Chat) -> None:
        self.blocks = Blocks()
        self._chat, self._head = chat, chat.head
        self._reader = chat.reader(streams=bool(chat.body.stream))
        self._num_prompt, self._num_completion, self._num_cached = 0, 0, 0
        self._begun = False

    async def respond(self, request: Request) -> Response:
        """The answer, or its events if the client asks for a stream."""
        outputs = self._chat.outputs
        if self._chat.body.stream:
            first = await until_disconnect(request.receive, anext(outputs))
            return EventStream(events_of(outputs, first, self._chunks, lambda: b"", end=b"", failed=self._failed))
        return json_answer(await until_disconnect(request.receive, self.finished()))

    async def finished(self) -> dict[str, Any]:
        """The answer at once, when it has ended."""
        [found] = await collect(self._chat.outputs, 1, 1)
        [completion] = found.completions
        self._num_prompt, self._num_cached = len(found.token_ids), found.cached
        self._num_completion = len(completion.token_ids)
        for _ in self._changes(completion.text, ended=True):
            pass
        return self._whole(completion.finish_reason, completion.stop_reason)

    def _chunks(self, found: tuple[int, RequestOutput]) -> bytes:
        """The events of the next output."""
        [part], output = found[1].outputs, found[1]
        self._num_prompt, self._num_cached = len(output.prompt_token_ids), output.num_cached_tokens or 0
        self._num_completion += len(part.token_ids)
        made = b"" if self._begun else self._begin()
        self._begun = True
        # Each change is told before the next one is made: a block is shown as it is then.
        for change in self._changes(part.text, ended=part.finish_reason is not None):
            made += self._change(*change)
        return made if part.finish_reason is None else made + self._end(part.finish_reason, part.stop_reason)

    def _changes(self, text: str, *, ended: bool) -> Iterator[Change]:
        yield from self.blocks.take(self._reader.read(text, ended=ended))
        if ended:
            yield from self.blocks.end()

    def _failed(self, error: ApiError) -> bytes:
        """The last event of an answer that fails."""
        return error_event(error)

    @abstractmethod
    def _whole(self, reason: str | None, stop: int | str | None) -> dict[str, Any]:
        """The answer that has ended for `reason`, with what `stop` says of it."""

    @abstractmethod
    def _begin(self) -> bytes:
        """The events before the first block."""

    @abstractmethod
    def _change(self, what: str, block: Block, piece: str) -> bytes:
        """The events of a change."""

    @abstractmethod
    def _end(self, reason: str, stop: int | str | None) -> bytes:
        """The events behind the last block."""
