"""What schemathesis checks of this server beside its own checks: loaded by it, not imported by tests."""

from __future__ import annotations

import json
import re
from typing import Any

import schemathesis
from schemathesis import Case, CheckContext
from schemathesis.core.transport import Response

BETWEEN_FIELDS = re.compile(
    "|".join(
        (
            "maximum (input )?context length is",
            "the model takes at most",
            "the model's tokens are 0 to",
            "when using greedy sampling",
            "best_of must be greater than or equal to n",
            "min_tokens must be less than or equal to max_tokens",
            "max_tokens must be at least 1, got 0",
            "the best of several completions are known at the end",
            "stream_options is only allowed when stream is true",
            "top_logprobs needs logprobs",
            "tool_choice is only allowed when tools are given",
            "tools need a server that was started with",
            "no call can be forced",
            "the chat template refuses the messages",
            "the artifact has no chat template",
            "continue_final_message",
            "chat_template_kwargs cannot hold",
            "expected an object with 'role' and 'content'",
            "give either prompt or messages",
            "generates nothing; use /v1/embeddings",
            "makes no embeddings; use /v1/completions",
            "the server takes [0-9]+ at once; divide it",
            "which cannot be cut",
            "the prompt has no tokens",
            "leave no token to choose",
            "response_format",
        )
    )
)
"""Why a request may be refused of which every field is as the schema has it: the schema cannot say what one field
means for another, nor what the model takes."""


@schemathesis.check
def refusals_are_known(context: CheckContext, response: Response, case: Case[Any]) -> None:
    """A request that keeps to the schema is refused for a reason between its fields only."""
    positive = case.meta is not None and case.meta.generation.mode.is_positive
    if positive and response.status_code == 400:
        message = response.json()["error"]["message"]
        assert BETWEEN_FIELDS.search(message), f"it keeps to the schema, but is refused: {message}"


@schemathesis.check
def streams_are_whole(context: CheckContext, response: Response, case: Case[Any]) -> None:
    """A stream is events of JSON, each with choices or an error, and ends with [DONE] unless it failed."""
    if not response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        return
    text = response.content.decode()
    assert text.endswith("\n\n"), "the stream breaks off"
    events = text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in events), "something else than data"
    *chunks, last = [event.removeprefix("data: ") for event in events]
    assert last == "[DONE]", f"the stream ends with {last:.200}"
    ended = {choice["index"] for chunk in chunks for choice in json.loads(chunk)["choices"] if choice["finish_reason"]}
    assert ended == set(range(len(ended))), f"these choices ended: {ended}"
    assert ended, "no choice ended"
