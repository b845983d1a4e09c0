"""`/v1/completions` of an encoder-decoder: what the model generates by itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from furiosa_llm import SamplingParams
from furiosa_llm.runtime.seq2seq import Seq2Seq
from furiosa_llm.server.encoder_decoder import EncoderDecoder
from furiosa_llm.server.settings import ServerSettings
from tests.server.conftest import connected, error_of, load, metric, serving, wait_for
from tests.support.artifacts import artifact_of

PROMPT = [5, 6, 7, 1]


@pytest.fixture(scope="module")
def built() -> Path:
    return artifact_of("tiny-t5-optimum")


@pytest.fixture(scope="module")
def tokenizer(zoo: Path) -> Path:
    """Of another model, which knows as many tokens."""
    return zoo / "tiny-llama-optimum"


@pytest.fixture(scope="module")
def served(built: Path, tokenizer: Path) -> Iterator[tuple[str, EncoderDecoder]]:
    model = load(built, tokenizer=tokenizer)
    assert isinstance(model.kind, EncoderDecoder)
    with serving(model, ServerSettings()) as url:
        yield url, model.kind


@pytest.fixture(scope="module")
def alone(built: Path, tokenizer: Path) -> Iterator[Seq2Seq]:
    with Seq2Seq.load_artifact(built, tokenizer=tokenizer) as model:
        yield model


@pytest.fixture
def client(served: tuple[str, EncoderDecoder]) -> Iterator[openai.OpenAI]:
    with connected(served[0]) as made:
        yield made


ASKED: dict[str, Any] = {"model": "tiny-t5-optimum", "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def test_completions_are_the_model_s(client: openai.OpenAI, alone: Seq2Seq) -> None:
    [expected] = alone.generate(PROMPT, GREEDY)
    answer = client.completions.create(**ASKED)
    assert answer.choices[0].text == expected.outputs[0].text
    assert answer.choices[0].finish_reason == expected.outputs[0].finish_reason
    assert answer.usage is not None
    counts = (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    assert counts == (len(PROMPT), len(expected.outputs[0].token_ids))
    chunks = list(client.completions.create(stream=True, **ASKED))
    assert len(chunks) > 2
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.outputs[0].text
    text: dict[str, Any] = {**ASKED, "prompt": "the quick brown fox"}
    [of_text] = alone.generate("the quick brown fox", GREEDY)
    assert client.completions.create(**text).choices[0].text == of_text.outputs[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_several_of_each_prompt_with_logprobs(client: openai.OpenAI, alone: Seq2Seq, stream: bool) -> None:
    prompts = [PROMPT, [9, 8, 1]]
    params = SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=6, logprobs=2)
    expected = [one for output in alone.generate(prompts, params) for one in output.outputs]
    asked: dict[str, Any] = {**ASKED, "prompt": prompts, "n": 2, "temperature": 1.0, "seed": 3, "max_tokens": 6}
    asked |= {"logprobs": 2, "extra_body": {"return_token_ids": True}}
    if stream:
        chunks = list(client.completions.create(stream=True, **asked))
        choices = [chunk.choices[0] for chunk in chunks]
    else:
        choices = client.completions.create(**asked).choices
    tokens: list[list[int]] = [[] for _ in expected]
    logprobs: list[list[float]] = [[] for _ in expected]
    for choice in choices:
        tokens[choice.index] += choice.token_ids
        assert choice.logprobs is not None
        logprobs[choice.index] += choice.logprobs.token_logprobs or []
    assert tokens == [one.token_ids for one in expected]
    for found, one in zip(logprobs, expected, strict=True):
        assert one.logprobs is not None
        assert found == [place[token].logprob for place, token in zip(one.logprobs, one.token_ids, strict=True)]


def test_stops(client: openai.OpenAI, alone: Seq2Seq) -> None:
    [output] = alone.generate(PROMPT, GREEDY)
    stop = output.outputs[0].token_ids[2]
    answer = client.completions.create(extra_body={"stop_token_ids": [stop]}, **ASKED).choices[0]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("completions", {"echo": True}, "echo: the model does not go on with its prompt"),
        ("completions", {"prompt_logprobs": 1}, "prompt_logprobs: an encoder gives no logits of its prompt"),
        ("completions", {"prompt": [99999]}, "the model's tokens are 0 to 1023"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "is an encoder-decoder, and holds no"),
        ("embeddings", {"input": "x"}, "generates and makes no embeddings"),
        ("rerank", {"query": "x", "documents": ["y"]}, "generates and makes no embeddings"),
    ],
)
def test_refusals(served: tuple[str, EncoderDecoder], path: str, change: dict[str, Any], message: str) -> None:
    response = httpx.post(f"{served[0]}/v1/{path}", json={**ASKED, **change})
    assert response.status_code == 400
    assert message in error_of(response)["message"]


def test_requests_at_the_same_time(served: tuple[str, EncoderDecoder], client: openai.OpenAI, alone: Seq2Seq) -> None:
    prompts = [[3 + index, 40, 1] for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: client.completions.create(**{**ASKED, "prompt": prompt}), prompts))
    expected = alone.generate(prompts, GREEDY)
    assert [one.choices[0].text for one in answers] == [one.outputs[0].text for one in expected]
    machine = httpx.get(f"{served[0]}/machine").json()
    assert (machine["task"], machine["replicas"][0]["running"]) == ("encoder-decoder", 0)
    assert machine["stages"][0]["batches"] > 0
    assert machine["cards"][0]["pes"][0]["weights_nbytes"] > 0
    assert metric(served[0], "generation_tokens_total") > 0


def test_a_client_that_goes_ends_its_request(
    served: tuple[str, EncoderDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, kind = served
    steps, stream_outputs = threading.Semaphore(0), kind.model.stream_outputs
    ended = threading.Event()

    def counted(*given: Any) -> Any:
        try:
            for output in stream_outputs(*given):
                steps.release()
                yield output
        finally:
            ended.set()

    monkeypatch.setattr(kind.model, "stream_outputs", counted)
    body = {**ASKED, "max_tokens": 10_000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
        next(response.iter_bytes())
    assert ended.wait(30)
    wait_for(lambda: kind.machine().replicas[0].usage.running == 0)
    assert sum(steps.acquire(blocking=False) for _ in range(10_000)) < 5000
