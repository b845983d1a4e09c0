"""Plain onnxruntime on the unsplit files of an encoder-decoder: the loop that artifacts are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

Choose = Callable[[Any], int]
Named = dict[str, Any]


def greedy(logits: Any) -> int:
    return int(logits.argmax())


class CachedReference:
    """T5 as Optimum exports it: an encoder, a decoder for the first step, and one behind a past."""

    def __init__(self, folder: Path) -> None:
        names = ("encoder_model", "decoder_model", "decoder_with_past_model")
        self._encoder, self._first, self._later = (
            onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in names
        )

    def logits(self, prompt: Sequence[int], tokens: Sequence[int]) -> list[Any]:
        """The logits behind each of `tokens`, the first of which begins the completion."""
        ids = np.array([prompt])
        mask = np.ones_like(ids)
        (hidden,) = self._encoder.run(None, {"input_ids": ids, "attention_mask": mask})
        found: list[Any] = []
        states: Named = {}
        for token in tokens:
            feeds: Named = {"encoder_attention_mask": mask, "input_ids": np.array([[token]])}
            if states:
                past = {name.replace("present", "past_key_values"): state for name, state in states.items()}
                outputs = _run(self._later, feeds | past)
            else:
                outputs = _run(self._first, feeds | {"encoder_hidden_states": hidden})
            found.append(outputs.pop("logits")[0, -1])
            states |= outputs  # the states of attention to the prompt come from the first step only
        return found


class WholeReference:
    """An encoder and a decoder without a past: every step reads all tokens."""

    def __init__(self, encoder: Path, decoder: Path) -> None:
        self._encoder, self._decoder = onnxruntime.InferenceSession(encoder), onnxruntime.InferenceSession(decoder)

    def logits(self, prompt: Sequence[int], tokens: Sequence[int]) -> list[Any]:
        ids = np.array([prompt])
        mask = np.ones_like(ids)
        (hidden,) = self._encoder.run(None, {"input_ids": ids, "attention_mask": mask})
        feeds: Named = {"encoder_attention_mask": mask, "encoder_hidden_states": hidden}
        steps = [np.array([tokens[: end + 1]]) for end in range(len(tokens))]
        return [_run(self._decoder, feeds | {"input_ids": step})["logits"][0, -1] for step in steps]


def generate(
    reference: CachedReference | WholeReference,
    prompt: Sequence[int],
    *,
    start: int,
    count: int,
    ends: Sequence[int] = (),
) -> list[int]:
    """The greedy tokens of a completion: `count`, or up to the first of `ends`."""
    tokens = [start]
    while len(tokens) <= count and tokens[-1] not in ends:
        tokens.append(greedy(reference.logits(prompt, tokens)[-1]))
    return tokens[1:]


def _run(session: onnxruntime.InferenceSession, feeds: Named) -> Named:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))
