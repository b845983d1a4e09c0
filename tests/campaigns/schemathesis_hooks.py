"""What schemathesis checks of this server beside its own checks: loaded by it, not imported by tests."""

from __future__ import annotations

import json
import random
import re
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema_rs
import schemathesis
from schemathesis import Case, CheckContext, HookContext
from schemathesis.core.transport import Response
from schemathesis.generation.meta import TestPhase

from tests.campaigns.newer_requests import OBJECT, is_made, made_for

_SCHEMAS = (
    r"response_format\.json_schema\.schema|(structured_outputs\.|guided_)(json|regex|grammar)|"
    r"tools\.\d+\.function\.parameters"
)
"""What the grammar library may refuse, as it does not know all that a schema, an expression or a grammar may hold."""

BETWEEN_FIELDS = re.compile(
    "|".join(
        (
            "maximum (input )?context length is",
            "the model takes at most",
            "the model's tokens are 0 to",
            "best_of must be greater than or equal to n",
            "min_tokens must be less than or equal to max_tokens",
            "max_tokens must be at least 1, got 0",
            "the best of several completions are known at the end",
            "stream_options is only allowed when stream is true",
            "top_logprobs needs logprobs",
            "tool_choice is only allowed when tools are given",
            "tools need a server that was started with",
            "the chat template refuses the messages",
            "the artifact has no chat template",
            "continue_final_message",
            "chat_template_kwargs cannot hold",
            "expected an object with 'role' and 'content'",
            "give either prompt or messages",
            "generates nothing; use /v1/embeddings",
            "makes no embeddings; use /v1/completions",
            "text_1 and text_2 need a text",
            "text_1 has [0-9]+ texts for the [0-9]+ of text_2",
            "the server takes [0-9]+ at once; divide it",
            "which cannot be cut",
            "the prompt has no tokens",
            "leave no token to choose",
            f"^({_SCHEMAS}) cannot be compiled: ",
            f"^({_SCHEMAS}) is not JSON: |^(structured_outputs.|guided_)json: found .*, expected a JSON schema",
            "(structured_outputs.|guided_)grammar has no rule `start:`, and so is read as GBNF",
            "the grammar has no beginning that this model has tokens for",
            "tool_choice names '.*', which is not among the tools",
            "but arguments are an object",
            "response_format and tools exclude each other on this server",
            "^(structured_outputs|guided_[a-z_]+) and (response_format|tools) exclude each other",
            "^guided fields: ",
            "prompt_logprobs are given with the whole answer",
            "^Unrecognized request argument supplied",
        )
    )
)
"""Why a request may be refused of which every field is as the schema has it: the schema cannot say what one field
means for another, nor what the model takes."""


_NEWER = ("/v1/responses", "/v1/messages")
_kept: deque[str] = deque(maxlen=1)
"""The response that was kept last."""


@schemathesis.check
def refusals_are_known(context: CheckContext, response: Response, case: Case[Any]) -> None:
    """A request that keeps to the schema is refused for a reason between its fields only."""
    if case.path.startswith(_NEWER):
        # They hold objects that the schema does not describe, those of chats in other shapes: ours alone are right.
        body: Any = case.body
        gone = response.status_code == 404 and isinstance(body, dict) and "previous_response_id" in body
        if is_made(body) and response.status_code != 200 and not gone:
            message = response.json()["error"]["message"]
            assert response.status_code == 400, f"expected an answer, found {response.status_code}: {message}"
            assert BETWEEN_FIELDS.search(message), f"it is right, but is refused: {message}"
        return
    positive = case.meta is not None and case.meta.generation.mode.is_positive
    if positive and response.status_code == 400:
        message = response.json()["error"]["message"]
        assert BETWEEN_FIELDS.search(message), f"it keeps to the schema, but is refused: {message}"


SCHEMAS: Sequence[Any] = (
    {"enum": ["yes", "no"]},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    {"anyOf": [{"const": None}, {"type": "integer", "minimum": -5, "maximum": 50}]},
    {
        "type": "object",
        "properties": {"a": {"type": "string", "pattern": "^[ab]{1,3}$"}, "b": {"enum": [1, 2.5, "é"]}},
        "required": ["b"],
        "additionalProperties": False,
    },
    {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": ["object", "null"]}}},
)
"""Those that a model which babbles gets to the end of."""

OBJECTS = SCHEMAS[-2:]
GRAMMARS = ('start: "a"+ B\nB: /[0-9]{1,3}/', 'root ::= "x" | "(" root ")"')
PATTERNS = ("[ab]{2,5}", "(x|yé)?z", ".{0,4}")


_KEPT = ("model", "prompt", "messages", "stream")
_AT_ODDS = frozenset(
    (
        *("top_logprobs", "stream_options", "min_tokens", "allowed_token_ids", "chat_template_kwargs"),
        *("response_format", "structured_outputs", "tools", "tool_choice", "max_completion_tokens", "echo"),
        *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_json_object"),
        *("guided_whitespace_pattern", "prompt_logprobs"),
    )
)
"""What seldom goes with the rest of a request that was made by chance."""


def _form(chance: random.Random, *, is_chat: bool) -> dict[str, Any]:
    """Fields that say what an answer has to look like."""
    schema = chance.choice(SCHEMAS)
    tool = {"type": "function", "function": {"name": "f", "parameters": chance.choice(OBJECTS), "strict": True}}
    other = {"type": "function", "function": {"name": chance.choice(("g", 'é "')), "parameters": {}}}
    named = {"type": "function", "function": {"name": "f"}}
    forms: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json": schema, "disable_any_whitespace": chance.random() < 0.5}},
        {"structured_outputs": {"json": json.dumps(schema), "whitespace_pattern": chance.choice((None, " ?"))}},
        {"structured_outputs": {"regex": chance.choice(PATTERNS)}},
        {"structured_outputs": {"choice": ["yes", "yé", "no."]}},
        {"structured_outputs": {"grammar": chance.choice(GRAMMARS)}},
    ]
    calls: list[dict[str, Any]] = [
        {"tools": [tool, other], "tool_choice": "required"},
        {"tools": [other, tool], "tool_choice": named},
        {"tools": [tool, other], "parallel_tool_calls": chance.random() < 0.5},
        {"tools": [tool], **forms[0]},
    ]
    return chance.choice(calls if is_chat and chance.random() < 0.5 else forms)


@schemathesis.hook
def before_call(context: HookContext, case: Case[Any], kwargs: dict[str, Any]) -> None:
    """Makes half of the requests that are made by chance such that the model has to keep to a form, to its end.

    A schema that is made from the document says nearly nothing, and a request with all fields is seldom taken.
    """
    meta = case.meta
    if meta is None or not meta.generation.mode.is_positive or meta.phase.name is TestPhase.COVERAGE:
        return
    if not isinstance(case.body, dict):
        return
    chance = random.Random(json.dumps(case.body, sort_keys=True))
    if chance.random() < 0.5:
        return
    if case.path.startswith(_NEWER):
        case.body = made_for(case.path, case.body["model"], chance, _kept[-1] if _kept else None) or case.body
    if not case.path.endswith("/completions"):
        return
    names = sorted(set(case.body) - _AT_ODDS.union(_KEPT))
    kept = (*_KEPT, *chance.sample(names, min(len(names), 3)))
    body = {name: value for name, value in case.body.items() if name in kept}
    case.body = {**body, "max_tokens": 70, **_form(chance, is_chat="messages" in body)}


def _texts(answer: dict[str, Any]) -> Iterator[str]:
    """Those of the answer's choices that are a whole one: neither cut by their length or a stop string, nor calls."""
    for choice in answer["choices"]:
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        if choice["finish_reason"] == "stop" and not isinstance(choice["stop_reason"], str) and text is not None:
            yield text


def _check_form(body: dict[str, Any], text: str) -> None:
    match body:
        case {"structured_outputs": {"json": schema}} if schema in SCHEMAS:
            jsonschema_rs.validate(schema, json.loads(text))
        case {"structured_outputs": {"json": str(schema)}} if json.loads(schema) in SCHEMAS:
            jsonschema_rs.validate(json.loads(schema), json.loads(text))
        case {"structured_outputs": {"regex": str(pattern)}} if pattern in PATTERNS:
            assert re.fullmatch(pattern, text), f"{text!r} is not {pattern}"
        case {"structured_outputs": {"choice": list(choices)}}:
            assert text in choices, f"{text!r} is none of {choices}"
        case {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}} if schema in SCHEMAS:
            jsonschema_rs.validate(schema, json.loads(text))
        case {"response_format": {"type": "json_object" | "json_schema"}}:
            json.loads(text)


@schemathesis.check
def answers_keep_to_their_form(context: CheckContext, response: Response, case: Case[Any]) -> None:
    """What ends by itself is what the request asks for."""
    body = case.body
    if response.status_code != 200 or not case.path.endswith("/completions") or not isinstance(body, dict):
        return
    shows_more = body.get("echo") or body.get("include_stop_str_in_output") or body.get("skip_special_tokens") is False
    if shows_more or response.headers["content-type"][0] != "application/json":
        return
    for text in _texts(response.json()):
        _check_form(body, text)


@schemathesis.check
def newer_answers_are_whole(context: CheckContext, response: Response, case: Case[Any]) -> None:
    """An answer says how it ended, and what it says or calls keeps to what was asked for."""
    is_json = response.headers.get("content-type", [""])[0] == "application/json"
    body: Any = case.body
    if response.status_code != 200 or not is_json or not is_made(body):
        return
    answer = response.json()
    if case.path == "/v1/responses":
        assert answer["status"] in ("completed", "incomplete"), answer["status"]
        if answer["store"] is not False:
            _kept.append(answer["id"])
        if answer["status"] == "completed":
            calls = [json.loads(item["arguments"]) for item in answer["output"] if item["type"] == "function_call"]
            assert all(isinstance(call, dict) for call in calls)
            if body.get("text", {}).get("format", {}).get("schema") is not None:
                parts = [item["content"] for item in answer["output"] if item["type"] == "message"]
                jsonschema_rs.validate(OBJECT, json.loads("".join(one["text"] for part in parts for one in part)))
    elif "count_tokens" not in case.path:
        assert answer["stop_reason"] in ("end_turn", "max_tokens", "stop_sequence", "tool_use"), answer["stop_reason"]
        assert all(isinstance(one["input"], dict) for one in answer["content"] if one["type"] == "tool_use")


@schemathesis.check
def streams_are_whole(context: CheckContext, response: Response, case: Case[Any]) -> None:
    """A stream is events of JSON, each with choices or an error, and ends with [DONE] unless it failed."""
    if not response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        return
    text = response.content.decode()
    assert text.endswith("\n\n"), "the stream breaks off"
    events = text.removesuffix("\n\n").split("\n\n")
    if case.path.startswith(_NEWER):
        kinds = [json.loads(event.partition("data: ")[2])["type"] for event in events]
        assert kinds[-1] in ("response.completed", "response.incomplete", "message_stop"), f"it ends with {kinds[-1]}"
        return
    assert all(event.startswith("data: ") for event in events), "something else than data"
    *chunks, last = [event.removeprefix("data: ") for event in events]
    assert last == "[DONE]", f"the stream ends with {last:.200}"
    ended = {choice["index"] for chunk in chunks for choice in json.loads(chunk)["choices"] if choice["finish_reason"]}
    assert ended == set(range(len(ended))), f"these choices ended: {ended}"
    assert ended, "no choice ended"
