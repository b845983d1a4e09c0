"""Log probabilities of tokens as the model gives them, before any sampling parameter, for completions and prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.requests.outputs import Logprob, TokenLogprobs
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer
from furiosa_llm.runtime.tokens.top_tokens import Floats, likeliest


def logprob(logits: Array, token: int) -> float:
    """The log probability of `token` under `logits` [vocabulary]."""
    row = _float32(logits)
    return float(row[token]) - _normaliser(row)


def logprobs(logits: Array, token: int, count: int, tokenizer: Tokenizer | None) -> TokenLogprobs:
    """The logprobs of `token` and the `count` likeliest tokens under `logits` [vocabulary]; of equals, the first."""
    row = _float32(logits)
    normaliser = _normaliser(row)
    tokens = list(dict.fromkeys([token, *_top(row, count)]))
    texts: Sequence[str | None] = [None] * len(tokens) if tokenizer is None else tokenizer.decode_each(tokens)
    return {
        token: Logprob(
            logprob=float(row[token]) - normaliser, rank=int(np.count_nonzero(row > row[token])) + 1, decoded_token=text
        )
        for token, text in zip(tokens, texts, strict=True)
    }


class PromptLogprobs:
    """The log probabilities of the tokens of a prompt, filled as its logits come.

    `entries` has one for each token, None for the first token and for tokens that have not come yet.
    """

    def __init__(self, prompt: Sequence[int], count: int, tokenizer: Tokenizer | None) -> None:
        self.entries: list[TokenLogprobs | None] = [None] * len(prompt)
        self._prompt = prompt
        self._count = count
        self._tokenizer = tokenizer
        self._num_missing = len(prompt) - 1

    @property
    def complete(self) -> bool:
        """Whether every entry but the first is there."""
        return self._num_missing <= 0

    def accept(self, start: int, logits: Array) -> None:
        """Takes `logits` [positions, vocabulary], the first row after the token at `start`.

        Rows that came before are left out, and so are rows after the prompt's last token: they are about the
        completion.
        """
        for position, row in enumerate(logits, start + 1):
            if position < len(self._prompt) and self.entries[position] is None:
                self.entries[position] = logprobs(row, self._prompt[position], self._count, self._tokenizer)
                self._num_missing -= 1


def _float32(logits: Array) -> Floats:
    return logits.astype(np.float32, copy=False)


def _normaliser(row: Floats) -> float:
    """The logarithm of the sum of the exponentials."""
    top = row.max()
    with np.errstate(over="ignore"):
        weights: Any = np.exp(row - top)
    return float(top) + math.log(float(weights.sum(dtype=np.float64)))


def _top(row: Floats, count: int) -> list[int]:
    if count == 0:
        return []
    count = min(count, row.size)
    tokens = likeliest(row, count)
    order = np.argsort(-row[tokens], kind="stable")
    found: list[int] = tokens[order[:count]].tolist()
    return found
