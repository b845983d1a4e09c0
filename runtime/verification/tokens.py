"""Greedy decoding by an artifact and by the unsplit model, token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.execution.decoder import DecoderModel, DecoderSession
from furiosa_llm.runtime.verification.errors import TokenComparison, magnitude_of


def compare_tokens(
    executor: DecoderModel,
    reference: DecoderModel,
    tokens: Sequence[int],
    prompt: str,
    max_tokens: int,
    others: Mapping[str, Array] = MappingProxyType({}),
) -> TokenComparison:
    """Completes the `tokens` of `prompt` by `max_tokens` on both sides, or up to the first token that differs.

    `others` are inputs that tokens do not make.
    """
    ours, theirs = (DecoderSession(model, others=others) for model in (executor, reference))
    token_ids = np.array([tokens], dtype=np.int64)
    error, magnitude, compared = 0.0, 0.0, 0
    gap: float | None = None
    while compared < max_tokens and gap is None:
        found, expected = (session.step(token_ids)[0].astype(np.float64) for session in (ours, theirs))
        error = max(error, _difference(found, expected))
        magnitude = max(magnitude, magnitude_of(expected, logits=True))
        token = int(expected.argmax())
        if int(found.argmax()) == token:
            compared += 1
        else:
            second, best = np.partition(expected, -2)[-2:]
            gap = float(best - second)
        token_ids = np.array([[token]], dtype=np.int64)
    return TokenComparison(
        prompt=prompt,
        tokens=compared,
        first_difference=None if gap is None else compared,
        gap=gap,
        logit_error=error,
        magnitude=magnitude,
    )


def _difference(found: Array, expected: Array) -> float:
    """The greatest difference of two finite logits; infinite if logits that are not finite differ."""
    finite = np.isfinite(expected) & np.isfinite(found)
    if not np.array_equal(found[~finite], expected[~finite], equal_nan=True):
        return math.inf
    return float(np.abs(found[finite] - expected[finite]).max(initial=0.0))
