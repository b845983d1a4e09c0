"""The rest of what the openai client can do: asynchronous, raw answers, retries, and what it sends by default."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from furiosa_llm import LLM, SamplingParams
from furiosa_llm.server.settings import ServerSettings
from tests.server.conftest import NAME, TIMEOUT, connected, error_of, load, metric, serving, wait_for

MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 8}


def test_the_asynchronous_client(url: str, llm: LLM) -> None:
    async def use() -> tuple[list[str], str, str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT) as client:
            texts = ["hello", "the quick brown fox", "x"]
            answers = await asyncio.gather(*(client.completions.create(prompt=text, **GREEDY) for text in texts))
            stream = await client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            [model] = [one.id async for one in client.models.list()]
            return [answer.choices[0].text for answer in answers], "".join(pieces), model

    texts, chat, model = asyncio.run(use())
    params = SamplingParams(temperature=0.0, max_tokens=8)
    assert texts == [one.outputs[0].text for one in llm.generate(["hello", "the quick brown fox", "x"], params)]
    assert chat == llm.chat(MESSAGES, params)[0].outputs[0].text
    assert model == NAME


def test_an_asynchronous_stream_that_is_left_ends_the_request(url: str) -> None:
    before = metric(url, "generation_tokens_total")

    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.completions.create(
                model=NAME, prompt="x", max_tokens=500, n=32, stream=True, extra_body={"ignore_eos": True}
            )
            async with stream:
                await anext(aiter(stream))

    asyncio.run(leave())
    wait_for(lambda: metric(url, "num_requests_running") + metric(url, "num_requests_waiting") == 0)
    assert metric(url, "generation_tokens_total") - before < 500 * 32


def test_raw_and_streamed_answers(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(prompt="hello", **GREEDY)
    assert raw.status_code == 200
    assert len(raw.headers["x-request-id"]) == 32
    parsed = raw.parse()
    assert parsed._request_id == raw.headers["x-request-id"]
    with client.completions.with_streaming_response.create(prompt="hello", **GREEDY) as answer:
        assert '"text_completion"' in answer.read().decode()
    with client.chat.completions.with_streaming_response.create(messages=MESSAGES, stream=True, **GREEDY) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert list(answer.iter_lines())[-2] == "data: [DONE]"


def test_the_helper_that_adds_a_stream_up(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY).choices[0].message.content
    assert whole is not None
    with client.chat.completions.stream(messages=MESSAGES, stop=whole[4:7], **GREEDY) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert kinds == {"chunk", "content.delta", "content.done"}
    assert final.choices[0].message.content == whole.partition(whole[4:7])[0]
    assert final.choices[0].finish_reason == "stop"


def test_the_client_comes_back_when_it_was_told_to(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    with serving(load(artifact), ServerSettings(max_concurrency=1)) as url, connected(url) as client:
        body = {"model": NAME, "prompt": "x", "max_tokens": 500, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as busy:
            lines = busy.iter_lines()
            next(lines)

            def leave(seconds: float) -> None:
                waits.append(seconds)
                busy.close()
                wait_for(lambda: metric(url, "num_requests_running") == 0)

            monkeypatch.setattr("time.sleep", leave)
            with pytest.raises(openai.RateLimitError):
                client.completions.create(prompt="hello", **GREEDY)
            answer = client.with_options(max_retries=4).completions.create(prompt="hello", **GREEDY)
    assert answer.choices[0].text
    assert waits[0] == 1.0  # as Retry-After has it


def test_an_answer_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=MESSAGES, **GREEDY).choices[0].message
    for message in (answer, answer.model_dump()):
        messages: list[Any] = [*MESSAGES, message, {"role": "user", "content": "and?"}]
        again = client.chat.completions.create(messages=messages, **GREEDY)
        assert again.choices[0].message.content is not None


NULLS = (
    *("n", "seed", "stop", "top_p", "stream", "user", "logprobs", "logit_bias", "presence_penalty", "stream_options"),
    "frequency_penalty",
)
CHAT_NULLS = (
    *("audio", "function_call", "functions", "modalities", "moderation", "prediction", "reasoning_effort", "tools"),
    *("tool_choice", "verbosity", "web_search_options", "store", "metadata", "top_logprobs", "response_format"),
    *("parallel_tool_calls", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "service_tier"),
    *("safety_identifier", "max_completion_tokens"),
)


@pytest.mark.parametrize(
    ("path", "body", "names"),
    [
        ("completions", {"prompt": "x"}, (*NULLS, "best_of", "echo", "suffix")),
        ("chat/completions", {"messages": MESSAGES}, (*NULLS, *CHAT_NULLS)),
    ],
    ids=["completions", "chats"],
)
def test_what_is_null_is_not_there(url: str, path: str, body: dict[str, Any], names: tuple[str, ...]) -> None:
    answers = [
        httpx.post(f"{url}/v1/{path}", json={**GREEDY, **body, **extra}).json()["choices"]
        for extra in ({}, dict.fromkeys(names))
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("audio", {"voice": "x", "format": "wav"}),
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("moderation", {"model": "x"}),
        ("web_search_options", {}),
    ],
)
def test_what_openai_has_and_this_server_has_not(url: str, name: str, value: Any) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", json={**GREEDY, "messages": MESSAGES, name: value})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, name)
    assert error["message"].startswith(f"{name}: not supported: ")
    assert error["message"].endswith("; leave it out")


def test_every_field_of_the_clients_is_known() -> None:
    from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as Chat
    from openai.types.completion_create_params import CompletionCreateParamsStreaming as Completion
    from openai.types.embedding_create_params import EmbeddingCreateParams

    from furiosa_llm.server.encoder_requests import EmbeddingRequest
    from furiosa_llm.server.requests import ChatCompletionRequest, CompletionRequest

    for theirs, ours in (
        (Chat, ChatCompletionRequest),
        (Completion, CompletionRequest),
        (EmbeddingCreateParams, EmbeddingRequest),
    ):
        assert theirs.__required_keys__ | theirs.__optional_keys__ <= set(ours.model_fields)
