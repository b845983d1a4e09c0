"""Log probabilities in the two shapes that OpenAI has for them."""

from __future__ import annotations

from collections.abc import Sequence

from furiosa_llm.runtime.requests.outputs import Logprob, TokenLogprobs
from furiosa_llm.runtime.tokens.text_stream import Detokenizer
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer
from furiosa_llm.server.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)

_LEAST = -9999.0
"""What stands for minus infinity, which JSON cannot say."""


class CompletionLogprobsMaker:
    """Makes the log probabilities of one completion, piece by piece; `count` is how many alternatives are wanted.

    Offsets count the characters of the text that is shown: a token within a character is where the character begins,
    and special tokens take no room unless they are shown.
    """

    def __init__(self, count: int, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._count = count
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._offset = 0
        self.begin(0)

    def begin(self, offset: int) -> None:
        """What follows is a text of its own, which is shown behind `offset` characters."""
        self._offset = offset
        self._shown = Detokenizer(self._tokenizer, skip_special_tokens=self._skips)

    def make(self, entries: Sequence[tuple[int, TokenLogprobs | None]]) -> CompletionLogprobs:
        """Takes the tokens that follow, each with what is known of its place."""
        made = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
        texts = self._tokenizer.decode_each([token for token, _ in entries])
        for (token, found), text in zip(entries, texts, strict=True):
            made.text_offset.append(self._offset)
            made.tokens.append(text)
            made.token_logprobs.append(None if found is None else _value(found[token]))
            made.top_logprobs.append(None if found is None else self._top(token, found))
            self._offset += len(self._shown.push(token))
        return made

    def _top(self, token: int, found: TokenLogprobs) -> dict[str, float]:
        # Several tokens may have the same text; the likeliest is the one that counts.
        top: dict[str, float] = {}
        for one in _likeliest(found, self._count):
            top.setdefault(_text(found[one]), _value(found[one]))
        top.setdefault(_text(found[token]), _value(found[token]))
        return top


def chat_logprobs(
    token_ids: Sequence[int], found: Sequence[TokenLogprobs], count: int, tokenizer: Tokenizer
) -> ChatLogprobs:
    """The log probabilities of `token_ids`, each with the `count` likeliest tokens at its place."""
    return ChatLogprobs(
        content=[
            TokenLogprob(
                **_top_logprob(token, at[token], tokenizer).model_dump(),
                top_logprobs=[_top_logprob(one, at[one], tokenizer) for one in _likeliest(at, count)],
            )
            for token, at in zip(token_ids, found, strict=True)
        ]
    )


def prompt_logprobs(entries: Sequence[TokenLogprobs | None]) -> PromptLogprobs:
    """Those of a prompt, as vLLM gives them."""
    return [
        None
        if found is None
        else {
            str(token): PromptLogprob(logprob=_value(one), rank=one.rank, decoded_token=one.decoded_token)
            for token, one in found.items()
        }
        for found in entries
    ]


def _likeliest(found: TokenLogprobs, count: int) -> list[int]:
    return sorted(found, key=lambda token: found[token].rank)[:count]


def _top_logprob(token: int, one: Logprob, tokenizer: Tokenizer) -> TopLogprob:
    text = _text(one)
    return TopLogprob(token=text, logprob=_value(one), bytes=list(tokenizer.bytes_of(token, text)))


def _value(one: Logprob) -> float:
    return max(one.logprob, _LEAST)


def _text(one: Logprob) -> str:
    return one.decoded_token or ""
