"""What schemathesis checks of this server beside its own checks: loaded by it, not imported by tests."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema_rs
import schemathesis
from schemathesis import Case, CheckContext, HookContext
from schemathesis.core.transport import Response

_SCHEMAS = (
    r"response_format\.json_schema\.schema|structured_outputs\.(json|regex|grammar)|tools\.\d+\.function\.parameters"
)
"""What the grammar library may refuse, as it does not know all that a schema, an expression or a grammar may hold."""

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
            f"^({_SCHEMAS}) cannot be compiled: ",
            f"^({_SCHEMAS}) is not JSON: |^structured_outputs.json: found .*, expected a JSON schema",
            "structured_outputs.grammar is read as GBNF",
            "the grammar has no beginning that this model has tokens for",
            "tool_choice names '.*', which is not among the tools",
            "but arguments are an object",
            "response_format and tools exclude each other on this server",
            "^structured_outputs and (response_format|tools) exclude each other",
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
"""Those that the model gets to the end of. A schema that is made from the document seldom constrains anything."""


def _with_sense(body: dict[str, Any], chance: random.Random) -> None:
    """Puts one of SCHEMAS wherever a request has a schema of its own making; text that is to be one among it."""
    match body.get("response_format"):
        case {"type": "json_schema", "json_schema": dict(named)}:
            named["schema"] = chance.choice(SCHEMAS)
    match body.get("structured_outputs"):
        case {"json": dict() | str() as given} as form:
            schema = chance.choice(SCHEMAS)
            form["json"] = json.dumps(schema) if isinstance(given, str) else schema
        case {"regex": str()} as form:
            form["regex"] = chance.choice(("[ab]{2,5}", "(x|yé)?z", ".{0,4}"))
        case {"grammar": str()} as form:
            form["grammar"] = chance.choice(('start: "a"+ B\nB: /[0-9]{1,3}/', 'root ::= "x" | "(" root ")"'))
    for tool in body.get("tools") or ():
        tool["function"]["parameters"] = chance.choice(SCHEMAS[3:])
    match body.get("tool_choice"):
        case {"function": dict(named)} if body.get("tools"):
            named["name"] = chance.choice(body["tools"])["function"]["name"]


@schemathesis.hook
def before_call(context: HookContext, case: Case[Any], kwargs: dict[str, Any]) -> None:  # noqa: ARG001 - as it is called
    """Gives most requests that keep to the schema a form that constrains the answer, and room for it."""
    generating = case.path.endswith("/completions") and isinstance(case.body, dict)
    positive = case.meta is not None and case.meta.generation.mode.is_positive
    if not (generating and positive):
        return
    chance = random.Random(json.dumps(case.body, sort_keys=True))  # noqa: S311 - so that a finding can be repeated
    if chance.random() < 0.7:
        body = copy.deepcopy(case.body)
        if body.get("response_format") and body.get("structured_outputs"):
            del body[chance.choice(("response_format", "structured_outputs"))]
        _with_sense(body, chance)
        case.body = body


def _texts(answer: dict[str, Any]) -> Iterator[str]:
    """Those of the answer's choices that are a whole one: neither cut by their length or a stop string, nor calls."""
    for choice in answer["choices"]:
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        if choice["finish_reason"] == "stop" and not isinstance(choice["stop_reason"], str) and text is not None:
            yield text


@schemathesis.check
def answers_keep_to_their_form(context: CheckContext, response: Response, case: Case[Any]) -> None:
    """What ends by itself is JSON by the schema that the request gives, which is one of SCHEMAS."""
    body = case.body
    streamed = not response.headers.get("content-type", [""])[0].startswith("application/json")
    if response.status_code != 200 or streamed or not isinstance(body, dict) or body.get("echo"):
        return
    match body:
        case {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}} if schema in SCHEMAS:
            for text in _texts(response.json()):
                jsonschema_rs.validate(schema, json.loads(text))
        case {"response_format": {"type": "json_object"}}:
            assert all(isinstance(json.loads(text), dict) for text in _texts(response.json()))


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
