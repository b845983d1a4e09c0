"""Requests of the newer protocols that the server has to take: what the schema cannot say of their objects."""

from __future__ import annotations

import json
import random
from typing import Any

MADE = "made by newer_requests"
"""In the metadata of all of them: such a request is refused for a known reason alone."""
OBJECT: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "string", "pattern": "^[ab]{1,3}$"}, "b": {"enum": [1, 2.5, "é"]}},
    "required": ["b"],
    "additionalProperties": False,
}
_TEXT = "How is the weather? ☀"
_CALL = json.dumps({"b": 1})


def made_for(path: str, model: Any, chance: random.Random, last: str | None) -> dict[str, Any] | None:
    """The body of a request to `path`, None for others; `last` is a response that may be gone on with."""
    if path == "/v1/responses":
        return {"model": model, "metadata": {"x": MADE}, **_response(chance, last)}
    if path.startswith("/v1/messages"):
        body = {"model": model, **_message(chance)}
        counts = path.endswith("count_tokens")
        return body if counts else {"metadata": {"user_id": MADE}, **body, **_limits(chance)}
    return None


def is_made(body: Any) -> bool:
    """Whether it is one of these."""
    metadata = body.get("metadata") if isinstance(body, dict) else None
    return isinstance(metadata, dict) and MADE in metadata.values()


def _some(chance: random.Random, **fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if chance.random() < 0.3}


def _response(chance: random.Random, last: str | None) -> dict[str, Any]:
    called = [
        {
            "type": "function_call",
            "call_id": "c1",
            "name": "f",
            "arguments": _CALL,
            "id": "fc_1",
            "status": "completed",
        },
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    ]
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "Hm.", "annotations": []}], "id": "m"}
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]}
    user = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": _TEXT}]}
    tool = {"type": "function", "name": "f", "description": "x", "parameters": OBJECT, "strict": True}
    other = {"type": "function", "name": "g", "parameters": None}
    format_ = {"type": "json_schema", "name": "x", "schema": OBJECT, "strict": True}
    inputs: list[Any] = [
        _TEXT,
        [user],
        [user, thought, *called],
        [user, said, user],
        [{"role": "developer", "content": "x"}],
    ]
    calls = {"tools": [tool, other, {"type": "web_search"}], **_some(chance, tool_choice="required")}
    ways: list[dict[str, Any]] = [{}, {"text": {"format": format_}}, {"text": {"format": {"type": "text"}}}, calls]
    given = chance.choice(inputs)
    before = {"previous_response_id": last} if last is not None and chance.random() < 0.3 else {}
    more = _some(
        chance,
        instructions="Be short.",
        store=False,
        stream=True,
        temperature=0.7,
        top_p=0.9,
        parallel_tool_calls=False,
        reasoning={"effort": "low", "summary": "auto"},
        truncation="auto",
        include=["reasoning.encrypted_content"],
    )
    return {"input": given, "max_output_tokens": chance.choice((1, 40)), **chance.choice(ways), **before, **more}


def _message(chance: random.Random) -> dict[str, Any]:
    user: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": _TEXT, "cache_control": None}]}
    asked = [
        {"type": "thinking", "thinking": "Hm", "signature": ""},
        {"type": "tool_use", "id": "t1", "name": "f", "input": {"b": 1}},
    ]
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sunny"}]}
    answered = [user, {"role": "assistant", "content": asked}, {"role": "user", "content": [result]}]
    messages = chance.choice([[user], answered, [{"role": "user", "content": _TEXT}], [user, user]])
    tools = [
        {"name": "f", "description": "x", "input_schema": OBJECT},
        {"name": "g", "input_schema": {"type": "object"}},
    ]
    choices = [{"type": "auto"}, {"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "f"}]
    calls = {"tools": tools, "tool_choice": chance.choice([*choices, {"type": "none"}])}
    system = chance.choice(["Be short.", [{"type": "text", "text": "Be short."}]])
    thinking = chance.choice([{"type": "enabled", "budget_tokens": 1024}, {"type": "disabled"}])
    return {"messages": messages, **chance.choice([{}, calls]), **_some(chance, system=system, thinking=thinking)}


def _limits(chance: random.Random) -> dict[str, Any]:
    more = _some(chance, stop_sequences=["a", "é"], temperature=0.7, top_p=0.9, top_k=5, stream=True)
    return {"max_tokens": chance.choice((1, 40)), **more}
