"""Turns tokens into text as they come: whole characters only, and never part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from furiosa_llm.runtime.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_HELD_TOKENS = 4
"""A character of UTF-8 takes at most four tokens: behind more, a replacement character is not an unfinished one."""


class Detokenizer:
    """The text of a growing list of tokens, in pieces that add up to the text of all of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        # Tokens from `_context` on are decoded together, because a token's text may depend on the one before it.
        self._context = 0
        self._emitted = 0

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is unfinished."""
        self._token_ids.append(token_id)
        text = self._pending()
        held = len(self._token_ids) - self._emitted
        if text.endswith(_REPLACEMENT) and held <= _MAX_HELD_TOKENS:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """The text that is held back, at the end of the tokens."""
        return self._emit(self._pending())

    def _pending(self) -> str:
        known = self._tokenizer.decode(self._token_ids[self._context : self._emitted])
        return self._tokenizer.decode(self._token_ids[self._context :])[len(known) :]

    def _emit(self, text: str) -> str:
        self._context, self._emitted = self._emitted, len(self._token_ids)
        return text


class TextStream:
    """The text of a completion up to the first of its stop strings, which are not looked for in `min_tokens` tokens.

    `stopped` says that a stop string was found; `text` is everything handed out so far.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], *, min_tokens: int = 0) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = tuple(stop)
        self._ignored = min_tokens
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The new text behind `token_id`; what may turn out to begin a stop string is held back."""
        self._ignored -= 1
        return self._release(self._detokenizer.push(token_id), last=False)

    def flush(self) -> str:
        """The text that was held back, at the end of the completion."""
        return self._release(self._detokenizer.flush(), last=True)

    def _release(self, piece: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        self._held += piece
        if self._ignored > 0:
            return self._hand_out(len(self._held))
        found = [position for position in (self._held.find(stop) for stop in self._stop) if position >= 0]
        if found:
            self.stopped = True
            return self._hand_out(min(found))
        return self._hand_out(len(self._held) if last else len(self._held) - self._undecided())

    def _undecided(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stop), default=0)
        for length in range(min(longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0

    def _hand_out(self, length: int) -> str:
        piece, self._held = self._held[:length], self._held[length:]
        self.text += piece
        return piece
