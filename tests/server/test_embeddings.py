"""`/v1/embeddings` through the openai client: the vectors are those of the encoder."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from furiosa_llm import LLM
from furiosa_llm.runtime.encoder import Encoder
from furiosa_llm.runtime.errors import ExecutionError
from furiosa_llm.server.embedder import Embedder
from furiosa_llm.server.settings import ServerSettings
from tests.server.conftest import connected, error_of, load, metric, serving

NAME = "tiny-bert-optimum"
TEXTS = ["hello", "the quick brown fox", "x"]


@pytest.fixture(scope="module")
def url(encoder_artifact: Path) -> Iterator[str]:
    with serving(load(encoder_artifact), ServerSettings()) as base:
        yield base


@pytest.fixture(scope="module")
def vectors(encoder_artifact: Path) -> list[Any]:
    with Encoder.load_artifact(encoder_artifact) as encoder:
        return [one.outputs.data for one in encoder.encode(TEXTS)]


@pytest.fixture
def model(url: str) -> Iterator[tuple[openai.OpenAI, str]]:
    with connected(url) as client:
        yield client, client.models.list().data[0].id


def test_vectors(model: tuple[openai.OpenAI, str], vectors: list[Any]) -> None:
    client, name = model
    for form in ("float", None):  # None: the client asks for base64, and decodes it
        extra: dict[str, Any] = {} if form is None else {"encoding_format": form}
        answer = client.embeddings.create(model=name, input=TEXTS, **extra)
        assert [one.index for one in answer.data] == [0, 1, 2]
        for one, expected in zip(answer.data, vectors, strict=True):
            np.testing.assert_array_equal(np.asarray(one.embedding, np.float32), expected)
    single = client.embeddings.create(model=name, input=TEXTS[1])
    np.testing.assert_array_equal(np.asarray(single.data[0].embedding, np.float32), vectors[1])


def test_token_ids_and_usage(model: tuple[openai.OpenAI, str], url: str) -> None:
    client, name = model
    token_ids = httpx.post(f"{url}/tokenize", json={"prompt": TEXTS[1]}).json()["tokens"]
    by_ids = client.embeddings.create(model=name, input=[token_ids, token_ids])
    by_text = client.embeddings.create(model=name, input=TEXTS[1])
    assert [one.embedding for one in by_ids.data] == [by_text.data[0].embedding] * 2
    assert (by_ids.usage.prompt_tokens, by_ids.usage.total_tokens) == (2 * len(token_ids),) * 2


def test_truncation(model: tuple[openai.OpenAI, str]) -> None:
    client, name = model
    cut = client.embeddings.create(model=name, input=TEXTS[1], extra_body={"truncate_prompt_tokens": 2})
    assert cut.usage.prompt_tokens == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": []}, "input is empty"),
        ({"input": ""}, "the prompt has no tokens"),
        ({"input": [[99999]]}, "the model's tokens are 0 to"),
        ({"input": "x " * 5000}, "the model takes at most"),
        ({"input": {"a": 1}}, "input"),
        ({"dimensions": 3}, "which cannot be cut"),
        ({"encoding_format": "int8"}, "'float' or 'base64'"),
    ],
)
def test_refusals(url: str, model: tuple[openai.OpenAI, str], change: dict[str, Any], message: str) -> None:
    response = httpx.post(f"{url}/v1/embeddings", json={"model": model[1], "input": "x", **change})
    assert message in error_of(response)["message"]
    assert response.status_code == 400


def test_an_encoder_generates_nothing(model: tuple[openai.OpenAI, str]) -> None:
    client, name = model
    with pytest.raises(openai.BadRequestError, match="generates nothing; use /v1/embeddings"):
        client.completions.create(model=name, prompt="x")
    with pytest.raises(openai.BadRequestError, match="generates nothing; use /v1/embeddings"):
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "x"}])


def test_it_is_well_and_counts(url: str) -> None:
    assert httpx.get(f"{url}/health").status_code == 200
    assert "furiosa_llm_prompt_tokens_total" in httpx.get(f"{url}/metrics").text


def test_the_artifact_is_opened_once(encoder_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(*_: object, **__: object) -> None:
        raise AssertionError("the artifact is opened a second time")

    monkeypatch.setattr("furiosa_llm.runtime.encoder.open_artifact", again)
    load(encoder_artifact).close()
    with LLM.load_artifact(encoder_artifact) as llm:
        assert len(llm.embed("x")) == 1


def test_what_the_model_cannot_give_is_refused_before_it_runs(encoder_artifact: Path, vectors: list[Any]) -> None:
    with serving(load(encoder_artifact), ServerSettings()) as url:
        name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        asked = {"model": name, "input": "x", "dimensions": 3}
        assert httpx.post(f"{url}/v1/embeddings", json=asked).status_code == 400
        assert metric(url, "request_received_total") == 0
        asked["dimensions"] = len(vectors[0])
        assert httpx.post(f"{url}/v1/embeddings", json=asked).status_code == 200


def test_closing_does_not_wait_for_all_texts_of_a_request(
    encoder_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(encoder_artifact)
    assert isinstance(model.kind, Embedder)
    encoder, runs = model.kind.encoder, threading.Semaphore(0)
    run = encoder._executor.run

    def counted(inputs: Any) -> Any:
        runs.release()
        return run(inputs)

    monkeypatch.setattr(encoder._executor, "run", counted)

    async def embed_and_close() -> None:
        assert isinstance(model.kind, Embedder)
        asked = asyncio.create_task(model.kind.vectors([[5] * (1 + index % 400) for index in range(4000)]))
        await asyncio.to_thread(runs.acquire)
        await asyncio.to_thread(model.close)
        with pytest.raises(ExecutionError, match=r"the executor (is|was) closed"):
            await asked

    asyncio.run(embed_and_close())
    begun = 1 + sum(runs.acquire(blocking=False) for _ in range(4000))
    assert begun < 400  # of as many as there are lengths


def test_texts_of_one_length_run_together_whoever_sent_them(
    encoder_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(encoder_artifact)
    assert isinstance(model.kind, Embedder)
    embedder, sizes, first = model.kind, [], threading.Event()
    run = embedder.encoder.vectors

    def held(rows: Any) -> Any:
        sizes.append((len(rows), len(rows[0])))
        first.wait(60)
        return run(rows)

    requests = [[[7, 8, 9], [5] * 7], [[9] * 5], [[4, 5, 6]], [[6] * 5, [1, 2, 3]]]

    async def ask() -> list[list[Any]]:
        asked = [asyncio.create_task(embedder.vectors(rows)) for rows in ([[3]], *requests)]
        gone = asyncio.create_task(embedder.vectors([[2, 2, 2]]))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        first.set()
        return (await asyncio.gather(*asked))[1:]

    with monkeypatch.context() as patch:
        patch.setattr(embedder.encoder, "vectors", held)
        found = asyncio.run(ask())
    assert sizes == [(1, 1), (3, 3), (1, 7), (2, 5)]
    for rows, vectors in zip(requests, found, strict=True):
        for row, vector in zip(rows, vectors, strict=True):
            np.testing.assert_array_equal(vector, run([row])[0])
    model.close()


def test_a_request_that_fails_takes_no_other_with_it(encoder_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(encoder_artifact)
    assert isinstance(model.kind, Embedder)
    embedder, run = model.kind, model.kind.encoder.vectors

    def failing(rows: Any) -> Any:
        if len(rows[0]) == 2:
            raise ExecutionError("no")
        return run(rows)

    async def ask() -> list[Any]:
        asked = (embedder.vectors([[1, 2], [3]]), embedder.vectors([[4, 5, 6]]))
        return list(await asyncio.gather(*asked, return_exceptions=True))

    with monkeypatch.context() as patch:
        patch.setattr(embedder.encoder, "vectors", failing)
        failed, vectors = asyncio.run(ask())
    assert isinstance(failed, ExecutionError)
    np.testing.assert_array_equal(vectors[0], run([[4, 5, 6]])[0])
    model.close()


def test_a_long_text_is_cut_like_a_short_one(model: tuple[openai.OpenAI, str]) -> None:
    client, name = model
    cut = {"truncate_prompt_tokens": 4}
    [long] = client.embeddings.create(model=name, input="the cat " * 2000, extra_body=cut).data
    [short] = client.embeddings.create(model=name, input="the cat " * 20, extra_body=cut).data
    assert long.embedding == short.embedding
