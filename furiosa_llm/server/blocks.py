"""One answer as blocks, each thought, text or a call, that begin, grow and end: what the newer protocols stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

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
