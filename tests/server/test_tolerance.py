"""What clients send beside what they mean: off values, nulls, extras of other servers, and fields of their own."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from furiosa_llm import LLM
from furiosa_llm.server.requests import ChatMessage
from tests.server.conftest import NAME

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHAT: dict[str, Any] = {
    "model": NAME,
    "messages": [{"role": "user", "content": "x"}],
    "max_tokens": 1,
    "temperature": 0,
}
TEXT: dict[str, Any] = {"model": NAME, "prompt": "x y z", "max_tokens": 2, "temperature": 0}


def post(url: str, path: str, body: dict[str, Any]) -> httpx.Response:
    response = httpx.post(f"{url}/v1/{path}", json=body)
    assert response.status_code == 200, response.text
    return response


@pytest.mark.parametrize(
    "extra",
    [
        {"top_k": 0},
        {"top_p": 0, "temperature": 1},
        {"top_logprobs": 0, "logprobs": False},
        {"reasoning_effort": "none"},
        {"verbosity": "low", "prediction": {"type": "content", "content": "x"}},
        {"tools": [], "tool_choice": "auto"},
        {"tools": [TOOL], "tool_choice": "none", "functions": None},
        {"repetition_penalty": 2.5},
        {"n": 2},
        {"top_a": 0, "typical_p": 1, "repeat_penalty": 1.0, "mirostat": 0, "options": {}, "num_beams": 1},
        {"return_tokens_as_token_ids": False, "do_sample": True, "images": [], "grammar": ""},
        {"messages": [{"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, "a"]}]},
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": ["object", "null"]}}}],
            "tool_choice": "required",
        },
        {"stream": True, "stream_options": {"include_usage": None, "unknown": 1}},
        {"add_generation_prompt": None, "continue_final_message": None, "chat_template_kwargs": None},
        {"response_format": {"type": "json_object", "schema": {"type": "object"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}, "strict": None}}},
        {"priority": 3, "min_tokens": 0, "skip_special_tokens": False, "documents": [{"title": "t", "text": "x"}]},
        {"messages": [{"role": "user", "content": ["a", {"type": "input_text", "text": "b", "cache_control": {}}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "refusal": "no"}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{**CALL, "extra_content": {}}], "id": 1}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]},
        {
            "messages": [
                {"role": "assistant", "content": "x", "reasoning_content": "y", "annotations": [], "audio": None}
            ]
        },
    ],
)
def test_harmless_forms_of_chats(url: str, extra: dict[str, Any]) -> None:
    assert "x-furiosa-ignored" not in post(url, "chat/completions", {**CHAT, **extra}).headers


def test_thoughts_among_the_parts_of_a_message_are_reasoning(url: str) -> None:
    def tokens(message: dict[str, Any]) -> Any:
        return httpx.post(f"{url}/tokenize", json={"messages": [message]}).json()["tokens"]

    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}, {"type": "reasoning", "text": "!"}]
    assert tokens({"role": "assistant", "content": parts}) == tokens({"role": "assistant", "content": "a"})
    message = ChatMessage.model_validate({"role": "assistant", "content": parts})
    assert (message.reasoning_content, message.content and len(message.content)) == ("hm!", 1)


def test_what_is_not_known_and_changes_nothing_is_named_in_a_header(url: str) -> None:
    response = post(url, "completions", {**TEXT, "request_id": "1", "é\n": {}, "nothing": None, " ": 1, "": 0})
    assert response.headers["x-furiosa-ignored"] == "request_id; \\xe9\\n;  ;"
    assert response.json()["choices"] == post(url, "completions", TEXT).json()["choices"]


@pytest.mark.parametrize("stream", [False, True])
def test_more_tokens_than_there_is_room_for_are_cut_to_what_there_is(url: str, stream: bool) -> None:
    prompts = [[1] * 510, [1] * 509]
    body = {**TEXT, "prompt": prompts, "max_tokens": 10**6, "ignore_eos": True, "stream": stream}
    response = post(url, "completions", body)
    assert response.headers["x-furiosa-max-tokens"] == "2; 3"
    if not stream:
        assert response.json()["usage"]["completion_tokens"] == 5


def test_usage_in_every_chunk(url: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, body in (("completions", TEXT), ("chat/completions", CHAT)):
        text = post(url, path, {**body, "stream": True, "stream_options": options, "ignore_eos": True}).text
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts[-1] == counts[-2] == body["max_tokens"]
        assert counts == sorted(counts)
        assert all(chunk["usage"]["prompt_tokens"] for chunk in chunks)


def test_the_tokens_themselves(url: str) -> None:
    wanted = {"return_token_ids": True, "prompt_logprobs": 1, "ignore_eos": True}
    [choice] = post(url, "completions", {**TEXT, **wanted}).json()["choices"]
    chat = post(url, "chat/completions", {**CHAT, **wanted}).json()
    assert len(choice["token_ids"]) == 2
    assert len(chat["choices"][0]["token_ids"]) == 1
    for found in (choice, chat):
        assert len(found["prompt_token_ids"]) == len(found["prompt_logprobs"])
        assert found["prompt_logprobs"][0] is None
        tokens = zip(found["prompt_token_ids"][1:], found["prompt_logprobs"][1:], strict=True)
        assert all(str(token) in at and at[str(token)]["rank"] >= 1 for token, at in tokens)
    for path, body in (("completions", TEXT), ("chat/completions", CHAT)):
        text = post(url, path, {**body, "return_token_ids": True, "ignore_eos": True, "stream": True}).text
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        whole = choice if path == "completions" else chat["choices"][0]
        streamed = [token for chunk in chunks for one in chunk["choices"] for token in one.get("token_ids") or ()]
        assert streamed == whole["token_ids"]


def test_the_end_of_a_prompt_is_kept(url: str) -> None:
    wanted = {"return_token_ids": True, "prompt": list(range(5, 15))}
    for count, kept in ((3, [12, 13, 14]), (-1, wanted["prompt"]), (100, wanted["prompt"])):
        [choice] = post(url, "completions", {**TEXT, **wanted, "truncate_prompt_tokens": count}).json()["choices"]
        assert choice["prompt_token_ids"] == kept
    body = {**TEXT, "prompt": [[1] * 600], "return_token_ids": True, "truncate_prompt_tokens": -1}
    [choice] = post(url, "completions", body).json()["choices"]
    assert len(choice["prompt_token_ids"]) == 511
    assert (
        len(post(url, "chat/completions", {**CHAT, **wanted, "truncate_prompt_tokens": 2}).json()["prompt_token_ids"])
        == 2
    )


@pytest.mark.parametrize(
    ("guided", "expected"),
    [
        ({"guided_choice": ["yes"]}, "yes"),
        ({"guided_regex": "ab"}, "ab"),
        ({"guided_grammar": 'start: "xy"'}, "xy"),
        ({"guided_json": {"const": 12}}, "12"),
        ({"guided_json": '{"const": [1, 2]}', "guided_whitespace_pattern": "_"}, "[1_,_2]"),
    ],
)
def test_forms_by_vllm_s_older_fields(url: str, guided: dict[str, Any], expected: str) -> None:
    body = {**CHAT, **guided, "max_tokens": 60, "guided_decoding_backend": "x", "logit_bias": {"64": 5}}
    [choice] = post(url, "chat/completions", body).json()["choices"]
    assert choice["message"]["content"].replace("_", "") == expected.replace("_", "")
    assert choice["finish_reason"] == "stop"


def test_only_allowed_tools_may_be_called(url: str) -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": {"type": "wrong"}}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"function": {"name": "f"}}]}}
    tool = {"type": "function", "function": {"name": "f"}}
    body = {**CHAT, "tools": [tool, other], "tool_choice": choice, "max_tokens": 60, "parallel_tool_calls": False}
    [answer] = post(url, "chat/completions", body).json()["choices"]
    [call] = answer["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": "{}"}


def test_what_of_a_schema_is_not_enforced_is_named_in_a_header(url: str) -> None:
    schema = {"type": "array", "items": {"enum": [1]}, "uniqueItems": True, "maxItems": 2}
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"not": {"required": ["é"]}, "maxProperties": 0}},
    }
    shaped = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    called = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    for extra, what in (
        (shaped, 'response_format.json_schema.schema: Unimplemented keys: ["uniqueItems"]'),
        (called, 'tools.0.function.parameters: Unimplemented keys: ["not"]'),
    ):
        response = post(url, "chat/completions", {**CHAT, **extra, "max_tokens": 60})
        assert response.headers["x-furiosa-dropped"] == what
    strict = {"type": "json_schema", "json_schema": {"schema": schema, "strict": True}}
    refused = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "response_format": strict})
    assert refused.status_code == 400
    assert "uniqueItems" in refused.json()["error"]["message"]


def test_log_probabilities_of_parts_of_characters(url: str, llm: LLM) -> None:
    text = "a€😀b"
    tokens = llm.tokenizer.encode(text)
    assert len(tokens) > len(text)
    body = {**TEXT, "prompt": tokens, "max_tokens": 0, "echo": True, "logprobs": 0}
    [choice] = post(url, "completions", body).json()["choices"]
    whole = text.encode()
    parts = [llm.tokenizer.bytes_of(token, llm.tokenizer.decode_each([token])[0]) for token in tokens]
    assert b"".join(parts) == whole
    begins = [sum(map(len, parts[:at])) for at in range(len(parts))]
    assert choice["logprobs"]["text_offset"] == [len(whole[:begin].decode(errors="ignore")) for begin in begins]
    for stream in (False, True):
        forced = {"allowed_token_ids": [tokens[1]], "logprobs": True, "top_logprobs": 1, "stream": stream}
        answer = post(url, "chat/completions", {**CHAT, **forced}).text
        chunks = [json.loads(line.removeprefix("data: ")) for line in answer.splitlines() if "logprob" in line]
        [found] = [
            one for chunk in chunks for at in chunk["choices"] for one in (at["logprobs"] or {}).get("content", ())
        ]
        assert found["bytes"] == list(parts[1])
