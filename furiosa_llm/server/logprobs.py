"""Log probabilities in the two shapes that OpenAI has for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from furiosa_llm.runtime.requests.outputs import Logprob, TokenLogprobs
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
    """Makes the log probabilities of one completion, piece by piece; `count` is how many alternatives are wanted."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._offset = 0

    def make(self, entries: Iterable[tuple[int, TokenLogprobs | None]], texts: Sequence[str]) -> CompletionLogprobs:
        """Takes the tokens that follow; `entries` has each with what is known of its place, `texts` its text."""
        made = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
        for (token, found), text in zip(entries, texts, strict=True):
            made.text_offset.append(self._offset)
            made.tokens.append(text)
            made.token_logprobs.append(None if found is None else _value(found[token]))
            made.top_logprobs.append(None if found is None else self._top(token, found))
            self._offset += len(text)
        return made

    def _top(self, token: int, found: TokenLogprobs) -> dict[str, float]:
        # Several tokens may have the same text; the likeliest is the one that counts.
        top: dict[str, float] = {}
        for one in _likeliest(found, self._count):
            top.setdefault(_text(one), _value(one))
        top.setdefault(_text(found[token]), _value(found[token]))
        return top


def chat_logprobs(token_ids: Sequence[int], found: Sequence[TokenLogprobs], count: int) -> ChatLogprobs:
    """The log probabilities of `token_ids`, each with the `count` likeliest tokens at its place."""
    return ChatLogprobs(
        content=[
            TokenLogprob(
                **_top_logprob(at[token]).model_dump(),
                top_logprobs=[_top_logprob(one) for one in _likeliest(at, count)],
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


def _likeliest(found: TokenLogprobs, count: int) -> list[Logprob]:
    return sorted(found.values(), key=lambda one: one.rank)[:count]


def _top_logprob(one: Logprob) -> TopLogprob:
    text = _text(one)
    return TopLogprob(token=text, logprob=_value(one), bytes=list(text.encode()))


def _value(one: Logprob) -> float:
    return max(one.logprob, _LEAST)


def _text(one: Logprob) -> str:
    return one.decoded_token or ""
