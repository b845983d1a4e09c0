"""What a generation gives back: the vendor's `RequestOutput` and `CompletionOutput`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from furiosa_llm.runtime.artifact.errors import FuriosaLLMError

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One completion of a prompt.

    `text` is without special tokens and stop strings; `token_ids` are all that were generated, a final stop token
    among them. `finish_reason` is "stop" for a stop token or string, "length" for a limit, "abort" or "error" for what
    ended before, None while it runs.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A prompt and its completions. `prompt` is None if the request gave token ids; `finished`: nothing will follow.

    `error` is why the request failed; its completions have the finish reason "error" then.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    error: FuriosaLLMError | None = None
