"""`/v1/chat/completions` through the openai client, with tools among them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from furiosa_llm import LLM, SamplingParams
from furiosa_llm.server.settings import ServerSettings
from tests.server.conftest import CALL, NAME, OTHER_CALL, SAID, connected, error_of, load, serving

MESSAGES: list[Any] = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hello"}]
GREEDY: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "temperature": 0, "max_tokens": 8}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def talking(artifact: Path, talking_tokenizer: Path) -> Iterator[str]:
    """A server whose model says what is asked of it: one of SPOKEN for each allowed token."""
    settings = ServerSettings(tool_call_parser="hermes", response_role="robot")
    with serving(load(artifact, tokenizer=talking_tokenizer), settings) as url:
        yield url


def say(*token_ids: int, **others: Any) -> dict[str, Any]:
    """A request whose answer is one of the tokens, then the end."""
    extra = {"allowed_token_ids": list(token_ids), **others.pop("extra_body", {})}
    return {"model": NAME, "messages": MESSAGES, "max_tokens": 1, "extra_body": extra, "tools": TOOLS, **others}


def test_an_answer(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.chat.completions.create(**GREEDY)
    [expected] = llm.chat(MESSAGES, SamplingParams(temperature=0.0, max_tokens=8))
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.outputs[0].text)
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chat-")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(expected.prompt_token_ids), 8)


def test_a_stream(client: openai.OpenAI, llm: LLM) -> None:
    asked = {**GREEDY, "temperature": 0.7, "seed": 5, "n": 2}
    *chunks, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    [expected] = llm.chat(MESSAGES, SamplingParams(temperature=0.7, seed=5, n=2, max_tokens=8))
    for index in range(2):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert (mine[0].delta.role, mine[0].delta.content) == ("assistant", "")
        assert "".join(one.delta.content or "" for one in mine) == expected.outputs[index].text
        assert [one.finish_reason for one in mine] == [None] * (len(mine) - 1) + ["length"]
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(expected.prompt_token_ids), 16)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: openai.OpenAI, llm: LLM, stream: bool) -> None:
    asked = {**GREEDY, "temperature": 1.5, "seed": 4, "logprobs": True, "top_logprobs": 3}
    if stream:
        choices: list[Any] = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    else:
        choices = client.chat.completions.create(**asked).choices
    found = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    [expected] = llm.chat(MESSAGES, SamplingParams(temperature=1.5, seed=4, max_tokens=8, logprobs=3))
    [completion] = expected.outputs
    assert completion.logprobs is not None
    assert len(found) == 8
    assert any(len(at) == 4 for at in completion.logprobs)  # a token that is not among the likeliest
    for entry, token, at in zip(found, completion.token_ids, completion.logprobs, strict=True):
        assert entry.logprob == pytest.approx(at[token].logprob, rel=1e-6)
        assert bytes(entry.bytes).decode(errors="replace") == entry.token == at[token].decoded_token
        likeliest = sorted(at.values(), key=lambda one: one.rank)[:3]
        assert [top.token for top in entry.top_logprobs] == [one.decoded_token for one in likeliest]


def test_the_newer_name_of_the_limit_goes_first(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**{**GREEDY, "max_tokens": 8}, max_completion_tokens=3)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_no_limit_is_that_of_the_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=NAME, messages=MESSAGES, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.total_tokens == 512


def test_parts_of_text_are_one_text(client: openai.OpenAI) -> None:
    parts: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    whole: list[Any] = [{"role": "user", "content": "a\nb"}]
    one, other = (client.chat.completions.create(**{**GREEDY, "messages": m}) for m in (parts, whole))
    assert one.choices[0].message.content == other.choices[0].message.content


def test_the_final_message_goes_on(client: openai.OpenAI, llm: LLM) -> None:
    messages: list[Any] = [*MESSAGES, {"role": "assistant", "content": "Well"}]
    extra = {"continue_final_message": True}
    answer = client.chat.completions.create(**{**GREEDY, "messages": messages}, extra_body=extra)
    params = SamplingParams(temperature=0.0, max_tokens=8)
    [expected] = llm.chat(messages, params, add_generation_prompt=False, continue_final_message=True)
    assert answer.choices[0].message.content == expected.outputs[0].text


def test_a_call_of_a_tool(talking: str) -> None:
    with connected(talking) as client:
        [choice] = client.chat.completions.create(**say(CALL, stop=["never"])).choices
    assert choice.finish_reason == "length"  # it was the limit that ended it
    assert choice.message.role == "robot"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Seoul"})


def test_an_answer_that_ends_with_a_call_says_so(talking: str) -> None:
    extra = {"stop_token_ids": [SAID], "include_stop_str_in_output": True}
    asked = say(CALL, SAID, max_tokens=60, seed=1, extra_body=extra)
    with connected(talking) as client:
        [choice] = client.chat.completions.create(**asked, logit_bias={str(SAID): -4}).choices
        chunks = [
            c.choices[0] for c in client.chat.completions.create(**asked, logit_bias={str(SAID): -4}, stream=True)
        ]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls
    assert choice.message.content == "Let me see."
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert [call.index for call in calls] == list(range(len(choice.message.tool_calls)))
    functions = [call.function for call in calls if call.function]
    assert {(one.name, one.arguments) for one in functions} == {("weather", '{"city": "Seoul"}')}
    assert len({call.id for call in calls}) == len(calls)
    assert "".join(chunk.delta.content or "" for chunk in chunks).strip() == "Let me see."
    assert chunks[-1].finish_reason == "tool_calls"


def test_parallel_calls_can_be_switched_off(talking: str) -> None:
    with connected(talking) as client:
        for parallel, count in ((True, 3), (False, 1)):
            [choice] = client.chat.completions.create(**say(CALL, max_tokens=3), parallel_tool_calls=parallel).choices
            assert len(choice.message.tool_calls or ()) == count


def test_a_call_of_what_was_not_offered_is_text(talking: str) -> None:
    extra = {"stop_token_ids": [OTHER_CALL], "include_stop_str_in_output": True}
    with connected(talking) as client:
        [choice] = client.chat.completions.create(**say(OTHER_CALL, extra_body=extra)).choices
    assert choice.finish_reason == "stop"
    assert choice.message.tool_calls is None
    assert choice.message.content == '<tool_call>{"name": "delete", "arguments": {}}</tool_call>'


def test_nothing_is_looked_for_if_no_tool_is_to_be_called(talking: str) -> None:
    with connected(talking) as client:
        [choice] = client.chat.completions.create(**say(CALL), tool_choice="none").choices
    assert choice.message.tool_calls is None
    assert choice.message.content is not None
    assert choice.message.content.startswith("<tool_call>")


def prompt_of(url: str, **body: Any) -> str:
    tokens = httpx.post(f"{url}/tokenize", json=body).json()["tokens"]
    return str(httpx.post(f"{url}/detokenize", json={"tokens": tokens}).json()["prompt"])


def test_the_template_sees_tools_calls_and_variables(talking: str) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
    ]
    found = prompt_of(talking, messages=messages, tools=TOOLS, chat_template_kwargs={"note": "N.B. ", "name": "x"})
    shown = json.dumps([{**call, "function": {"name": "weather", "arguments": {}}}])  # an object, no text of one
    assert found == (f"{json.dumps(TOOLS)}N.B. user: hello\nassistant: {shown}\ntool: rain\nassistant: ")
    assert prompt_of(talking, messages=messages[:1], add_generation_prompt=False) == "user: hello\n"


def test_the_servers_template_goes_before_the_models(artifact: Path) -> None:
    with serving(load(artifact), ServerSettings(chat_template="{{ messages[0].content }}!")) as url:
        assert prompt_of(url, messages=MESSAGES) == "Be short.!"


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"tools": TOOLS}, "tools", "--enable-auto-tool-choice"),
        ({"tool_choice": "required"}, "tool_choice", "only allowed when tools are given"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"chat_template_kwargs": {"tools": [], "x": 1}}, "chat_template_kwargs", "cannot hold tools"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "'text'"),
    ],
)
def test_refusals(url: str, change: dict[str, Any], param: str | None, message: str) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", json={**GREEDY, **change})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param)
    assert message in error["message"]
