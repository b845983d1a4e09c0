"""Answers of a wanted form through the openai client: formats, grammars and forced calls, of a model that babbles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from llguidance import LLParserLimits
from pydantic import BaseModel, Field

from furiosa_llm.runtime.tokens import grammar
from furiosa_llm.server.settings import ServerSettings
from tests.server.conftest import NAME, connected, error_of, load, serving
from tests.support.tiers import tiered

MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]
CHAT: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "max_tokens": 200, "temperature": 2.0, "seed": 3}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Seoul"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
NOW: Any = {"type": "function", "function": {"name": "now"}}
NAMED: Any = {"type": "function", "function": {"name": "weather"}}
BEGIN, END, EOS = 1000, 96, 2
"""The tokens of `<tool_call>`, of `}` and of the end."""

PARSERS: list[str | None] = [None, "hermes", "llama3_json"]


class Forecast(BaseModel):
    """What the client makes a schema of, and an answer into."""

    city: Literal["Oslo", "Seoul"]
    days: list[Literal["sun", "rain"]] = Field(max_length=3)
    wind: int | None


@pytest.fixture(scope="module")
def tokenizer(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a token that begins a call, and a chat template that says that there are tools in a few tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(zoo / NAME / "tokenizer_config.json", folder)
    written = json.loads((zoo / NAME / "tokenizer.json").read_text())
    old = next(token for token, number in written["model"]["vocab"].items() if number == BEGIN)
    written["model"]["merges"] = [pair for pair in written["model"]["merges"] if old not in ("".join(pair), *pair)]
    del written["model"]["vocab"][old]
    written["model"]["vocab"]["<tool_call>"] = BEGIN
    (folder / "tokenizer.json").write_text(json.dumps(written))
    (folder / "chat_template.jinja").write_text(
        "{{ tools | length if tools }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    )
    return folder


@pytest.fixture(scope="module", params=tiered(PARSERS, PARSERS[:2]))
def parsing(request: pytest.FixtureRequest, artifact: Path, tokenizer: Path) -> Iterator[openai.OpenAI]:
    """A client of a server with each of the parsers of calls, and with none."""
    settings = ServerSettings(tool_call_parser=request.param)
    with serving(load(artifact, tokenizer=tokenizer), settings) as url, connected(url) as client:
        yield client


@pytest.fixture(scope="module")
def strict(artifact: Path, tokenizer: Path) -> Iterator[openai.OpenAI]:
    settings = ServerSettings(tool_call_parser="hermes")
    with serving(load(artifact, tokenizer=tokenizer), settings) as url, connected(url) as client:
        yield client


def content_of(answer: Any) -> str:
    [choice] = answer.choices
    assert choice.finish_reason == "stop"
    return str(choice.message.content)


def is_call(function: Any) -> bool:
    """Whether a call is one of WEATHER or NOW."""
    arguments = json.loads(function.arguments)
    if function.name == "now":
        return bool(arguments == {})
    return function.name == "weather" and arguments["city"] in ("Oslo", "Seoul") and 1 <= arguments["days"] <= 9


def test_a_pydantic_model(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.parse(**{**CHAT, "seed": seed}, response_format=Forecast)
        [choice] = answer.choices
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Forecast)
        assert choice.message.content is not None
        assert Forecast.model_validate_json(choice.message.content) == choice.message.parsed


def test_a_pydantic_model_streaming(client: openai.OpenAI) -> None:
    whole = client.chat.completions.parse(**CHAT, response_format=Forecast).choices[0].message.parsed
    with client.chat.completions.stream(**CHAT, response_format=Forecast) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"content.delta", "content.done"} <= kinds
    assert final.choices[0].message.parsed == whole


def test_several_answers_have_the_form_each(client: openai.OpenAI) -> None:
    asked = {**CHAT, "n": 3, "frequency_penalty": 0.5, "logit_bias": {"5": 3}}
    answers = [
        choice.message.parsed for choice in client.chat.completions.parse(**asked, response_format=Forecast).choices
    ]
    assert all(isinstance(answer, Forecast) for answer in answers)
    assert len({str(answer) for answer in answers}) > 1


@pytest.mark.parametrize("schema", [CITY, None])
def test_formats(client: openai.OpenAI, schema: dict[str, Any] | None) -> None:
    named = {"name": "city", "description": "where", "strict": True} | ({} if schema is None else {"schema": schema})
    form: Any = {"type": "json_schema", "json_schema": named}
    asked = {**CHAT, "temperature": 0.7, "logit_bias": {str(END): 9}}
    found = json.loads(content_of(client.chat.completions.create(**asked, response_format=form)))
    assert isinstance(found, dict)
    if schema is not None:
        assert found["city"] in ("Oslo", "Seoul")


def test_any_object(client: openai.OpenAI) -> None:
    asked = {**CHAT, "temperature": 0.7, "logit_bias": {str(END): 9}}
    answer = client.chat.completions.create(**asked, response_format={"type": "json_object"})
    assert isinstance(json.loads(content_of(answer)), dict)


def test_text_is_no_constraint(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(**{**CHAT, "max_tokens": 8})
    text = client.chat.completions.create(**{**CHAT, "max_tokens": 8}, response_format={"type": "text"})
    assert text.choices[0].message.content == plain.choices[0].message.content


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ({"choice": ["yes", "no"]}, {"yes", "no"}),
        ({"regex": "a{3}"}, {"aaa"}),
        ({"grammar": 'root ::= "x" | "y"'}, {"x", "y"}),
        ({"json": {"const": {"a": 1}}, "disable_any_whitespace": True}, {'{"a":1}'}),
        ({"json": '{"const": 3}'}, {"3"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_other_forms(client: openai.OpenAI, given: dict[str, Any], texts: set[str], stream: bool) -> None:
    extra = {"structured_outputs": given}
    asked: dict[str, Any] = {"model": NAME, "prompt": ["a", "b"], "max_tokens": 30, "temperature": 2.0}
    found: dict[int, str] = {}
    if stream:
        for chunk in client.completions.create(**asked, extra_body=extra, stream=True):
            [part] = chunk.choices
            found[part.index] = found.get(part.index, "") + part.text
    else:
        found = {choice.index: choice.text for choice in client.completions.create(**asked, extra_body=extra).choices}
    assert set(found) == {0, 1}
    assert set(found.values()) <= texts
    assert content_of(client.chat.completions.create(**CHAT, extra_body=extra)) in texts


def test_completions_have_formats_too(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    asked: dict[str, Any] = {
        "model": NAME,
        "prompt": "hello",
        "max_tokens": 200,
        "extra_body": {"response_format": form},
    }
    [choice] = client.completions.create(**asked).choices
    assert set(json.loads(choice.text)) == {"city", "days"}


@pytest.mark.parametrize("parallel", [True, False])
def test_a_call_is_required(parsing: openai.OpenAI, parallel: bool) -> None:
    counts = set()
    for seed in range(2):
        asked: dict[str, Any] = {**CHAT, "seed": seed, "tools": [WEATHER, NOW], "tool_choice": "required"}
        asked["logit_bias"] = {str(EOS): 9}
        [choice] = parsing.chat.completions.create(**asked, parallel_tool_calls=parallel).choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        calls: list[Any] = choice.message.tool_calls or []
        assert all(is_call(call.function) for call in calls)
        counts.add(len(calls))
    assert 0 not in counts
    assert parallel or counts == {1}


def test_a_named_call(parsing: openai.OpenAI) -> None:
    asked: dict[str, Any] = {**CHAT, "tools": [NOW, WEATHER], "tool_choice": NAMED}
    [choice] = parsing.chat.completions.create(**asked).choices
    assert (choice.finish_reason, choice.message.content) == ("stop", None)
    [call] = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "weather"
    assert is_call(call.function)


@pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")])
def test_forced_calls_streaming(parsing: openai.OpenAI, choice: Any, reason: str) -> None:
    asked: dict[str, Any] = {**CHAT, "tools": [WEATHER, NOW], "tool_choice": choice, "logit_bias": {str(EOS): 9}}
    whole = parsing.chat.completions.create(**asked).choices[0].message.tool_calls or []
    chunks = [chunk.choices[0] for chunk in parsing.chat.completions.create(**asked, stream=True)]
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert [call.index for call in calls if call.id] == list(range(len(whole)))
    assert len(calls) > len(whole)  # they come in pieces
    for number, one in enumerate(whole):
        assert one.type == "function"
        pieces = [call.function for call in calls if call.index == number and call.function]
        assert [piece.name for piece in pieces if piece.name] == [one.function.name]
        streamed = "".join(piece.arguments or "" for piece in pieces)
        assert json.loads(streamed) == json.loads(one.function.arguments)
    assert "".join(chunk.delta.content or "" for chunk in chunks) == ""
    assert chunks[-1].finish_reason == reason


def test_a_tool_of_pydantic(strict: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Forecast, name="forecast")
    answer = strict.chat.completions.parse(**CHAT, tools=[tool], tool_choice="required", parallel_tool_calls=False)
    [call] = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Forecast)


def test_a_format_beside_tools_is_for_answers_without_calls(strict: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "one", "schema": {"const": {"a": 1}}}}
    kinds = set()
    for seed in range(12):
        asked: dict[str, Any] = {**CHAT, "seed": seed, "tools": [NOW], "parallel_tool_calls": False}
        [choice] = strict.chat.completions.create(**asked, response_format=form).choices
        if choice.message.tool_calls:
            [call] = choice.message.tool_calls
            assert is_call(call.function)
            kinds.add("call")
        else:
            assert json.loads(choice.message.content or "") == {"a": 1}
            kinds.add("text")
    assert kinds == {"call", "text"}


def test_strict_tools_may_be_called_only_as_their_schema_says(strict: openai.OpenAI) -> None:
    """The token that begins a call is made likely: what follows is a call only if the tool is strict."""
    tool: Any = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    asked: dict[str, Any] = {**CHAT, "max_tokens": 150, "parallel_tool_calls": False, "logit_bias": {str(BEGIN): 100}}
    [choice] = strict.chat.completions.create(**asked, tools=[NOW, tool]).choices
    [call] = choice.message.tool_calls or []
    assert is_call(call.function)
    [choice] = strict.chat.completions.create(**asked, tools=[NOW, WEATHER]).choices
    assert choice.message.tool_calls is None
    [choice] = strict.chat.completions.create(**{**asked, "logit_bias": {}}, tools=[NOW, tool]).choices
    assert choice.message.content  # no call is forced


def test_a_format_beside_tools_whose_calls_are_plain_json(artifact: Path, tokenizer: Path) -> None:
    asked = {**CHAT, "tools": [NOW], "response_format": {"type": "json_object"}}
    with serving(load(artifact, tokenizer=tokenizer), ServerSettings(tool_call_parser="llama3_json")) as url:
        response = httpx.post(f"{url}/v1/chat/completions", json=asked)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, "response_format")
    assert "by the way its model writes calls" in error["message"]


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "foo"}, "strict": True}}},
            "response_format",
            "response_format.json_schema.schema cannot be compiled: Invalid type: foo",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format", "go together"),
        ({"response_format": {"type": "json_object", "json_schema": {"name": "x"}}}, "response_format", "go together"),
        ({"response_format": {"type": "xml"}}, "response_format", "'json_schema'"),
        ({"structured_outputs": {}}, "structured_outputs", "found nothing, expected one of"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "structured_outputs.regex cannot be compiled"),
        ({"structured_outputs": {"xml": 1}}, "structured_outputs", "found nothing, expected one of"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            None,
            "structured_outputs and response_format exclude each other",
        ),
    ],
)
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_refusals(url: str, path: str, change: dict[str, Any], param: str | None, message: str) -> None:
    prompt = {"messages": MESSAGES} if path.startswith("chat") else {"prompt": "a"}
    response = httpx.post(f"{url}/v1/{path}", json={"model": NAME, "max_tokens": 4, **prompt, **change})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param)
    assert message in error["message"]


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice", "only allowed when tools are given"),
        ({"tools": [NOW], "tool_choice": NAMED}, "tool_choice", "names 'weather', which is not among the tools"),
        (
            {"tools": [NOW], "tool_choice": "required", "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "structured_outputs and tools exclude each other",
        ),
        (
            {
                "tools": [NOW, {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}],
                "tool_choice": "required",
            },
            "tools.1.function.parameters",
            "found type 'array', but arguments are an object",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}, "strict": True}}],
                "tool_choice": "required",
            },
            "tools.0.function.parameters",
            'tools.0.function.parameters cannot be compiled: Unimplemented keys: ["not"]',
        ),
    ],
)
def test_refusals_of_tools(url: str, change: dict[str, Any], param: str, message: str) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", json={"model": NAME, "messages": MESSAGES, **change})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param)
    assert message in error["message"]


@pytest.fixture(scope="module")
def unreadable(artifact: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose model has a tokenizer that does not say which bytes its tokens are."""
    folder = tmp_path_factory.mktemp("unreadable") / "tokenizer"
    shutil.copytree(tokenizer, folder)
    written = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**written, "decoder": {"type": "Fuse"}}))
    with serving(load(artifact, tokenizer=folder), ServerSettings(tool_call_parser="hermes")) as url:
        yield url


STRICT: Any = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
ANY_OBJECT: Any = {"type": "json_object"}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"response_format": ANY_OBJECT}, "response_format"),
        ({"response_format": ANY_OBJECT, "tools": [NOW], "tool_choice": "none"}, "response_format"),
        ({"structured_outputs": {"regex": "structured_outputs"}}, "structured_outputs"),
        ({"tools": [NOW], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [NOW, WEATHER], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [STRICT]}, "tools"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_is_said_of_the_field_that_was_sent(
    unreadable: str, change: dict[str, Any], param: str, stream: bool
) -> None:
    response = httpx.post(f"{unreadable}/v1/chat/completions", json={**CHAT, "stream": stream, **change})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param)
    assert error["message"].startswith(f"{param}: the tokens of this model's tokenizer are not known byte by byte")


def test_so_it_is_of_completions(unreadable: str) -> None:
    body = {"model": NAME, "prompt": ["a", "b"], "response_format": ANY_OBJECT}
    error = error_of(httpx.post(f"{unreadable}/v1/completions", json=body))
    assert error["param"] == "response_format"
    plain = httpx.post(f"{unreadable}/v1/completions", json={**body, "response_format": {"type": "text"}})
    assert plain.status_code == 200


@pytest.mark.parametrize(
    ("path", "prompt"), [("chat/completions", {"messages": MESSAGES}), ("completions", {"prompt": "a"})]
)
def test_a_form_that_grows_too_complex_ends_the_stream(
    url: str, monkeypatch: pytest.MonkeyPatch, path: str, prompt: dict[str, Any]
) -> None:
    monkeypatch.setattr(grammar, "_LIMITS", LLParserLimits(max_lexer_states=25, verbose_errors=False))
    schema = {"type": "string", "title": path, "pattern": "^[a-c]{20}x.*y.*z$"}  # titled, as grammars are kept
    asked = {"model": NAME, "max_tokens": 200, "temperature": 2.0, "seed": 3, "stream": True, **prompt}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    response = httpx.post(f"{url}/v1/{path}", json={**asked, "response_format": form})
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert len(events) > 1
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert (error["param"], error["type"]) == ("response_format", "invalid_request_error")
    assert "response_format cannot be followed any further: lexer error: too many states" in error["message"]
