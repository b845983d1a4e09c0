"""`/v1/responses` and `/v1/messages`: the same answers as those of chats, in other shapes."""

from __future__ import annotations

import asyncio
import contextvars
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from furiosa_llm.server.blocks import BlockAnswer, Blocks
from furiosa_llm.server.errors import FOR_ANTHROPIC, ApiError, error_event
from furiosa_llm.server.events import named_event
from furiosa_llm.server.response_store import MAX_NBYTES, ResponseStore
from furiosa_llm.server.responses_api import _messages
from furiosa_llm.server.settings import ServerSettings
from furiosa_llm.server.tools import CallPiece, Found
from tests.server.conftest import CALL, NAME, connected, error_of, load, metric, serving, wait_for

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION: dict[str, Any] = {"type": "function", "name": "weather", "parameters": SCHEMA}
TOOL = {"name": "weather", "input_schema": SCHEMA}
ASKED: dict[str, Any] = {"model": NAME, "temperature": 0, "max_output_tokens": 6}


@pytest.fixture(scope="module")
def talking(artifact: Path, talking_tokenizer: Path) -> Iterator[str]:
    settings = ServerSettings(tool_call_parser="hermes", max_stored_responses=2)
    with serving(load(artifact, tokenizer=talking_tokenizer), settings) as url:
        yield url


def test_a_response_is_what_a_chat_answers(client: openai.OpenAI) -> None:
    made = client.responses.create(input="hello", instructions="Be short.", **ASKED)
    messages: list[Any] = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hello"}]
    chat = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=6)
    assert made.output_text == chat.choices[0].message.content
    assert made.usage is not None
    assert chat.usage is not None
    assert (made.usage.input_tokens, made.usage.output_tokens) == (chat.usage.prompt_tokens, 6)
    assert (made.status, made.incomplete_details and made.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    assert made.instructions == "Be short."


def test_a_stream_adds_up_to_the_response(client: openai.OpenAI) -> None:
    whole = client.responses.create(input="hello", **ASKED)
    events: list[Any] = list(client.responses.create(input="hello", stream=True, **ASKED))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert [event.type for event in events[-4:]] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert whole.usage is not None
    assert events[-1].response.usage.total_tokens == whole.usage.total_tokens


def test_a_conversation_goes_on_until_it_is_forgotten(url: str, client: openai.OpenAI) -> None:
    first = client.responses.create(input="hello", **ASKED)
    again = client.responses.create(input="and?", previous_response_id=first.id, **ASKED)
    spelled: Any = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": [{"type": "output_text", "text": first.output_text}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "and?"}]},
    ]
    assert again.output_text == client.responses.create(input=spelled, store=False, **ASKED).output_text
    assert client.responses.retrieve(first.id).output == first.output
    assert client.responses.cancel(first.id).id == first.id
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match=r"no response 'resp_.*' is kept") as error:
        client.responses.create(input="and?", previous_response_id=first.id, **ASKED)
    assert error.value.param == "previous_response_id"
    unkept = client.responses.create(input="hello", store=False, **ASKED)
    for method in ("get", "delete"):
        assert error_of(httpx.request(method, f"{url}/v1/responses/{unkept.id}"))["code"] == "response_not_found"


def test_what_is_kept_has_a_limit() -> None:
    store = ResponseStore(2)
    for number in range(4):
        store.keep({"id": str(number)}, [])
    assert [number for number in range(4) if str(number) in store._kept] == [2, 3]
    store.keep({"id": "large"}, [{"content": "x" * (MAX_NBYTES - 17)}])
    assert list(store._kept) == ["large"]
    store.forget("large")
    assert store._nbytes == 0
    ResponseStore(0).keep({"id": "x"}, [])
    message = {"content": "said"}
    store.keep({"id": "begun"}, [message])
    store.keep({"id": "goes on", "previous_response_id": "begun"}, [message, message])
    assert store._nbytes == 3 * len(json.dumps([message]))  # of which what was kept before is not written again


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_responses_and_their_results(talking: str, stream: bool) -> None:
    extra = {"allowed_token_ids": [CALL]}
    tools: list[Any] = [FUNCTION]
    begin: Any = {"role": "user", "content": "x"}
    asked: dict[str, Any] = {"model": NAME, "input": "x", "tools": [*tools, {"type": "web_search"}]}
    with connected(talking) as client:
        forced = {
            **asked,
            "tool_choice": {"type": "function", "name": "weather"},
            "max_output_tokens": 80,
            "temperature": 0,
        }
        if stream:
            events: list[Any] = list(client.responses.create(stream=True, **forced))
            answer = events[-1].response
            pieces = [one.delta for one in events if one.type == "response.function_call_arguments.delta"]
            assert "".join(pieces) == answer.output[0].arguments
        else:
            answer = client.responses.create(**forced)
        [call] = answer.output
        assert (call.type, call.name) == ("function_call", "weather")
        assert isinstance(json.loads(call.arguments), dict)
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        again = client.responses.create(
            model=NAME, input=[result], previous_response_id=answer.id, tools=tools, max_output_tokens=1
        )
        spelled = client.responses.create(
            model=NAME,
            input=[begin, call.to_dict(), result],
            tools=tools,
            max_output_tokens=1,
        )
        assert again.usage is not None
        assert spelled.usage is not None
        assert again.usage.input_tokens == spelled.usage.input_tokens
    response = httpx.post(f"{talking}/v1/responses", json={**asked, **extra, "max_output_tokens": 1})
    assert response.headers["x-furiosa-ignored"].split("; ") == ["allowed_token_ids", "tools.1"]


def test_thoughts_go_back_to_the_answer_that_they_led_to() -> None:
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    told: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        *(
            thought,
            call,
            {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "y"}]},
        ),
        *({"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]}, thought),
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
        *({"type": "reasoning", "summary": [], "encrypted_content": "z"}, {"role": "user", "content": "b"}),
    ]
    made = _messages(told)
    assert [message["role"] for message in made] == ["user", "assistant", "tool", "assistant", "user"]
    assert [message.get("reasoning_content") for message in made] == [None, "hm", None, "sohm", None]


def test_forms_and_refusals_of_responses(url: str, client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "x", "schema": {"const": 12}, "strict": True}}
    assert client.responses.create(**{**ASKED, "max_output_tokens": 60}, input="x", text=form).output_text == "12"
    for change, param in (
        ({"input": [{"type": "image"}]}, "input"),
        ({"background": True, "store": False}, "background"),
        ({"background": True, "stream": True}, "background"),
        ({"conversation": "x"}, "conversation"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "messages"),
        ({"max_output_tokens": 0}, "max_tokens"),
    ):
        response = httpx.post(f"{url}/v1/responses", json={**ASKED, "input": "x", **change})
        assert response.status_code == 400
        assert error_of(response)["param"] == param


def test_responses_in_the_background(url: str, client: openai.OpenAI) -> None:
    whole = client.responses.create(input="hello", **ASKED)
    begun = client.responses.create(input="hello", background=True, **ASKED)
    assert (begun.status, begun.background, begun.output) == ("in_progress", True, [])
    wait_for(lambda: client.responses.retrieve(begun.id).status != "in_progress")
    made = client.responses.retrieve(begun.id)
    assert (made.status, made.output_text) == (whole.status, whole.output_text)
    assert client.responses.cancel(begun.id).status == whole.status
    again = client.responses.create(input="and?", previous_response_id=begun.id, **ASKED)
    assert again.output_text

    long = client.responses.create(input="hello", background=True, **{**ASKED, "max_output_tokens": 400})
    with pytest.raises(openai.BadRequestError, match="is in_progress, and cannot be gone on with"):
        client.responses.create(input="and?", previous_response_id=long.id, **ASKED)
    assert client.responses.cancel(long.id).status == "cancelled"
    assert client.responses.retrieve(long.id).status == "cancelled"
    wait_for(lambda: metric(url, "num_requests_running") == 0)
    dropped = client.responses.create(input="hello", background=True, **{**ASKED, "max_output_tokens": 400})
    client.responses.delete(dropped.id)
    wait_for(lambda: metric(url, "num_requests_running") == 0)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(dropped.id)
    # What is wrong is told at once, or else with the response.
    with pytest.raises(openai.NotFoundError):
        client.responses.create(input="x", background=True, **{**ASKED, "model": "other"})
    failed = client.responses.create(input="x " * 600, background=True, **ASKED)
    wait_for(lambda: client.responses.retrieve(failed.id).status == "failed")
    error = client.responses.retrieve(failed.id).error
    assert error is not None
    assert str(error.code) == "context_length_exceeded"


def test_what_fails_in_the_background(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {**ASKED, "max_output_tokens": 400, "background": True}

    async def hang(_: object) -> None:
        await asyncio.sleep(600)

    async def break_down(_: object) -> None:
        raise OSError("broken")

    with serving(load(artifact), ServerSettings(request_timeout=2.0)) as url, connected(url) as client:
        for wrong, code in ((hang, "request_timeout"), (break_down, "server_error")):
            with monkeypatch.context() as patch:
                patch.setattr(BlockAnswer, "finished", wrong)
                begun = client.responses.create(input="hello", **asked)
                wait_for(lambda: client.responses.retrieve(begun.id).status == "failed")  # noqa: B023 - waited for here
            error = client.responses.retrieve(begun.id).error
            assert error is not None
            assert str(error.code) == code
        # The server ends with what runs.
        assert client.responses.create(input="hello", **asked).status == "in_progress"


def test_methods_of_a_path_with_several(url: str) -> None:
    refused = httpx.put(f"{url}/v1/responses/x")
    assert (refused.status_code, refused.headers["allow"]) == (405, "DELETE, GET, HEAD")


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def test_messages_are_what_a_chat_answers(url: str, client: openai.OpenAI) -> None:
    body = {"model": NAME, "max_tokens": 6, "temperature": 0, "system": [{"type": "text", "text": "Be short."}]}
    body["messages"] = [{"role": "user", "content": [{"type": "text", "text": "hello", "cache_control": {}}]}]
    made = httpx.post(f"{url}/v1/messages", json=body, headers={"anthropic-version": "2023-06-01"}).json()
    messages: list[Any] = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hello"}]
    chat = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=6)
    assert made["content"] == [{"type": "text", "text": chat.choices[0].message.content}]
    assert (made["stop_reason"], made["usage"]["output_tokens"]) == ("max_tokens", 6)
    events = events_of(httpx.post(f"{url}/v1/messages", json={**body, "stream": True}).text)
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert (
        "".join(one["delta"]["text"] for one in events if one["type"] == "content_block_delta")
        == made["content"][0]["text"]
    )
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"
    assert events[-2]["usage"]["output_tokens"] == 6


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_messages_and_their_results(talking: str, stream: bool) -> None:
    body = {"model": NAME, "max_tokens": 80, "temperature": 0, "tools": [TOOL], "stream": stream}
    asked: list[Any] = [{"role": "user", "content": "x"}]
    response = httpx.post(
        f"{talking}/v1/messages",
        json={**body, "messages": asked, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
    )
    if stream:
        events = events_of(response.text)
        begin = next(event for event in events if event["type"] == "content_block_start")["content_block"]
        pieces = [
            one["delta"]["partial_json"] for one in events if one["type"] == "content_block_delta" and one["index"] == 0
        ]
        call = {**begin, "input": json.loads("".join(pieces))}
    else:
        call = response.json()["content"][0]
        assert response.json()["stop_reason"] in ("tool_use", "max_tokens")
    assert (call["type"], call["name"]) == ("tool_use", "weather")
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "sunny"}]}
    thought = {"type": "thinking", "thinking": "hm", "signature": ""}
    asked += [
        {"role": "assistant", "content": [thought, call]},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
    ]
    again = httpx.post(f"{talking}/v1/messages", json={**body, "stream": False, "messages": asked, "max_tokens": 1})
    assert again.status_code == 200, again.text
    refused = httpx.post(
        f"{talking}/v1/messages", json={**body, "messages": [{"role": "user", "content": [{"type": "image"}]}]}
    )
    assert refused_by_anthropic(refused) == (400, "invalid_request_error")


def test_tools_and_forms_of_messages(talking: str, url: str) -> None:
    asked: dict[str, Any] = {"model": NAME, "max_tokens": 60, "messages": [{"role": "user", "content": "x"}]}
    tools = [{"type": "web_search_20250305", "name": "web_search"}, TOOL, {"type": "custom", **TOOL, "name": "other"}]
    response = httpx.post(f"{talking}/v1/messages", json={**asked, "tools": tools, "max_tokens": 1})
    assert response.headers["x-furiosa-ignored"] == "tools.0"
    form = {"format": {"type": "json_schema", "schema": {"const": 12}}, "effort": "low"}
    response = httpx.post(f"{url}/v1/messages", json={**asked, "output_config": form})
    assert response.json()["content"] == [{"type": "text", "text": "12"}]
    changes: list[dict[str, Any]] = [
        {"output_config": {"format": {"type": "grammar"}}},
        {"messages": [{"role": "user", "content": ["a text that is no block"]}]},
        {"tools": [{"input_schema": {}}]},
    ]
    for change in changes:
        response = httpx.post(f"{talking}/v1/messages", json={**asked, **change})
        assert refused_by_anthropic(response) == (400, "invalid_request_error")


def test_tokens_of_messages_are_counted(talking: str) -> None:
    asked: dict[str, Any] = {"model": NAME, "system": "Be short.", "messages": [{"role": "user", "content": "hello"}]}
    counts = []
    for more in ({}, {"tools": [TOOL]}, {"tools": [TOOL], "tool_choice": {"type": "none"}}):
        counted = httpx.post(f"{talking}/v1/messages/count_tokens", json={**asked, **more})
        made = httpx.post(f"{talking}/v1/messages", json={**asked, **more, "max_tokens": 1}).json()["usage"]
        assert counted.json() == {"input_tokens": made["input_tokens"] + made["cache_read_input_tokens"]}
        counts.append(counted.json()["input_tokens"])
    assert counts[1] > counts[0] == counts[2]
    unknown = httpx.post(f"{talking}/v1/messages/count_tokens", json={**asked, "model": "other"})
    assert refused_by_anthropic(unknown) == (404, "not_found_error")


def refused_by_anthropic(response: httpx.Response) -> tuple[int, str]:
    """The status and the type of an answer of Anthropic's, whose shape is checked."""
    found = response.json()
    assert response.headers["content-type"] == "application/json"
    assert (list(found), found["type"]) == (["type", "error", "request_id"], "error")
    assert found["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    assert list(found["error"]) == ["type", "message"]
    assert found["error"]["message"]
    return response.status_code, found["error"]["type"]


def test_errors_of_messages_have_anthropic_s_shape(artifact: Path) -> None:
    asked: dict[str, Any] = {"model": NAME, "max_tokens": 60, "messages": [{"role": "user", "content": "x"}]}
    settings = ServerSettings(api_keys=["k"], max_body_nbytes=1000, max_concurrency=1)
    with serving(load(artifact), settings) as url, httpx.Client(base_url=url, headers={"x-api-key": "k"}) as client:
        path = "/v1/messages"
        held = client.stream("POST", path, json={**asked, "max_tokens": 400, "stream": True})
        with held as running:
            events = running.iter_lines()
            next(events)
            assert refused_by_anthropic(client.post(path, json=asked)) == (429, "rate_limit_error")
        for answer, expected in (
            (client.post(path, json=asked, headers={"x-api-key": "other"}), (401, "authentication_error")),
            (client.post(path, json={**asked, "model": "other"}), (404, "not_found_error")),
            (client.post(f"{path}/batches", json=asked), (404, "not_found_error")),
            (client.get(path), (405, "invalid_request_error")),
            (client.post(path, json={**asked, "max_tokens": None}), (400, "invalid_request_error")),
            (client.post(path, json={**asked, "max_tokens": 0}), (400, "invalid_request_error")),
            (client.post(path, json={**asked, "mirostat": 1}), (400, "invalid_request_error")),
            (
                client.post(path, content=b"{", headers={"content-type": "application/json"}),
                (400, "invalid_request_error"),
            ),
            (client.post(path, content=b"{}"), (415, "invalid_request_error")),
            (client.post(path, content=b"", headers={"content-encoding": "br"}), (415, "invalid_request_error")),
            (client.post(path, json={**asked, "system": "x" * 1000}), (413, "request_too_large")),
        ):
            assert refused_by_anthropic(answer) == expected
        statuses = [client.get("/v1/models", headers={"x-api-key": key}).status_code for key in ("k", "other")]
        assert statuses == [200, 401]
        assert error_of(client.get("/v1/models", headers={"x-api-key": "other"}))["code"] == "invalid_api_key"


def test_a_stream_of_messages_ends_with_anthropic_s_error() -> None:
    def told(status: int) -> bytes:
        FOR_ANTHROPIC.set(True)
        return error_event(ApiError(status, "no"))

    for status, kind in ((500, "api_error"), (503, "overloaded_error"), (504, "timeout_error")):
        expected = {"type": "error", "error": {"type": kind, "message": "no"}, "request_id": "-"}
        assert contextvars.copy_context().run(told, status) == named_event("error", expected)


def test_blocks() -> None:
    blocks = Blocks()
    given = [
        Found(reasoning="a"),
        Found(reasoning="b", content="\n"),
        Found(content="\nc"),
        Found(content="\n", calls=[CallPiece(index=0, id="1", name="f", arguments="{")]),
        Found(calls=[CallPiece(index=0, arguments="}")], content="\n"),
    ]
    changes = [(what, block.index, piece) for found in given for what, block, piece in blocks.take(found)]
    changes += [(what, block.index, piece) for what, block, piece in blocks.end()]
    assert [(block.kind, block.text) for block in blocks.all] == [
        ("thought", "ab"),
        ("text", "\n\nc\n"),
        ("call", "{}"),
    ]
    for index, block in enumerate(blocks.all):
        own = [change for change in changes if change[1] == index]
        assert (own[0][0], own[-1][0]) == ("begin", "end")
        assert "".join(piece for _, _, piece in own) == block.text
    assert [what for what, _, _ in Blocks().end()] == ["begin", "end"]
