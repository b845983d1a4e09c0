"""Turns tokens into text as they come: whole characters only, and never part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from furiosa_llm.runtime.tokens.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_KEPT_TOKENS = 4
"""A token's text may depend on whether one goes before it, and on the last 3 bytes: an unfinished character."""

_MAX_TOKENS = 16
"""How many tokens are decoded together before they are cut to the kept ones, which takes a decoding of its own."""


class Detokenizer:
    """The text of a growing list of tokens, in pieces that add up to what the tokenizer gives for all of them.

    The last tokens are decoded together, and what they add to the text shown before is the new piece. Two things are
    held back because tokens to come may change them: a replacement character at the end, which may be the beginning of
    a character, and a run of byte tokens, which is decoded as a whole. (`tokenizers.decoders.DecodeStream` shows byte
    tokens before their run ends, with another text where it turns out to be no UTF-8, and raises at the next token.)
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._tokens: list[int] = []
        self._shown = 0  # characters of the text of `_tokens`

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is unfinished."""
        if not self._tokenizer.has_text(token_id, skip_special_tokens=self._skips):
            return ""
        self._tokens.append(token_id)
        if token_id in self._tokenizer.byte_ids:
            return ""
        text = self._decode()
        end = len(text) - text.endswith(_REPLACEMENT)
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        if len(self._tokens) > _MAX_TOKENS:
            self._cut()
        return piece

    def flush(self) -> str:
        """The text that is held back, at the end of the tokens."""
        text = self._decode()
        piece = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return piece

    def _cut(self) -> None:
        del self._tokens[:-_KEPT_TOKENS]
        text = self._decode()
        self._shown = len(text) - text.endswith(_REPLACEMENT)

    def _decode(self) -> str:
        return self._tokenizer.decode(self._tokens, skip_special_tokens=self._skips)


class TextStream:
    """The text of a completion up to the first of its stop strings, which do not end it within `min_tokens` tokens.

    The first is the one that is whole first, so that it does not matter how tokens part the text. `stop_string` is the
    one that was found, None before; `text` is everything handed out so far.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        *,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._include_stop = include_stop
        self._num_early = min_tokens - 1  # tokens whose text does not complete a stop string
        self._held = ""
        self._ignored = 0  # characters of the held text that do not complete a stop string
        self.text = ""
        self.stop_string: str | None = None

    def push(self, token_id: int) -> str:
        """The new text after `token_id`; what may turn out to begin a stop string is held back."""
        piece = self._detokenizer.push(token_id)
        if not self._stop:
            self.text += piece
            return piece
        early = self._num_early > 0
        self._num_early -= 1
        return self._release(piece, early=early, last=False)

    def flush(self) -> str:
        """The text that was held back, at the end of the completion."""
        return self._release(self._detokenizer.flush(), early=self._num_early >= 0, last=True)

    def _release(self, piece: str, *, early: bool, last: bool) -> str:
        if self.stop_string is not None:
            return ""
        self._held += piece
        if early:
            self._ignored = len(self._held)
        found = min(filter(None, map(self._find, self._stop)), default=None)
        if found is not None:
            end, start, self.stop_string = found
            return self._hand_out(end if self._include_stop else start)
        return self._hand_out(len(self._held) if last else len(self._held) - self._undecided())

    def _find(self, stop: str) -> tuple[int, int, str] | None:
        start = self._held.find(stop, max(0, self._ignored - len(stop) + 1))
        return None if start < 0 else (start + len(stop), start, stop)

    def _undecided(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0

    def _hand_out(self, length: int) -> str:
        piece, self._held = self._held[:length], self._held[length:]
        self._ignored = max(0, self._ignored - length)
        self.text += piece
        return piece
