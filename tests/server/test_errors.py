"""Whatever goes wrong, the answer has one shape and the status that clients expect."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from furiosa_llm.runtime.engine.replica import Replica
from furiosa_llm.runtime.errors import InputError, ReplicaError
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer
from furiosa_llm.server.errors import ApiError, api_error
from furiosa_llm.server.middleware import BodyLimits
from furiosa_llm.server.settings import ServerSettings
from tests.server.conftest import NAME, connected, error_of, listen, load, metric, serving, wait_for

COMPLETION: dict[str, Any] = {"model": NAME, "prompt": "hello", "temperature": 0, "max_tokens": 4}
KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def strict(artifact: Path) -> Iterator[str]:
    """A server with keys, and with limits that a test can exceed."""
    settings = ServerSettings(
        api_keys=KEYS, max_body_nbytes=2000, max_concurrency=4, body_timeout=0.3, allowed_origins=["https://a.example"]
    )
    with serving(load(artifact), settings) as url:
        yield url


def keyed(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEYS[0]}"})


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"prompt": None}, "prompt", "prompt: Field required"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, None, "the prompt has no tokens"),
        ({"prompt": [4000]}, None, "the model's tokens are 0 to 1023"),
        ({"prompt": "\ud800"}, None, "Unicode characters only"),
        ({"prompt": ["a", 1]}, "prompt", "Input should be"),
        ({"max_tokens": "4"}, "max_tokens", "valid integer"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0."),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"temperature": -1}, "temperature", "temperature must be non-negative, got -1"),
        ({"temperature": 1e999}, "temperature", "finite"),
        ({"top_p": 1.5}, "top_p", "top_p must be in [0, 1], got 1.5"),
        ({"n": 1000, "temperature": 1}, "n", "n must be at most 128"),
        ({"best_of": 2, "temperature": 1, "stream": True}, None, "leave out stream or best_of"),
        ({"logprobs": 21}, "logprobs", "in [0, 20]"),
        ({"use_beam_search": True}, None, "beam search"),
        ({"stop": [""]}, "stop", "empty string"),
        ({"seed": 1.5}, "seed", "seed"),
        ({"top_k": 2**53}, "top_k", "less than or equal to 9007199254740991"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed when stream is true"),
        ({"max_token": 4}, "max_token", "argument supplied: max_token (did you mean max_tokens?)"),
        ({"do_sample": False}, "do_sample", "this server does not have it"),
        ({"typical_p": 0.5}, "typical_p", "this server does not have it"),
        ({"mirostat": 2}, "mirostat", "argument supplied: mirostat (this server does not have it; leave it out)"),
        ({f"unknown {number}": 1 for number in range(33)}, "unknown 0", "33 fields are not known, at most 32"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1, or at least 1"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "leave out stream"),
        ({"guided_regex": "(", "user": "x"}, "guided_regex", "guided_regex"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_json", "expected one of"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias"),
    ],
)
def test_bad_requests(url: str, change: dict[str, Any], param: str | None, message: str) -> None:
    # As json.dumps writes it: NaN and halves of surrogate pairs are sent, too.
    body = json.dumps({**COMPLETION, **change})
    response = httpx.post(f"{url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    error = error_of(response)
    assert response.status_code == 400
    assert message in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
         "messages.1.content.0.type: Input should be 'text'"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text"}]},
         "messages.1.content.1.text: Field required"),
        ({"role": "user", "content": 5}, "messages.1.content: Input should be a valid string"),
        ({"content": "x"}, "messages.1.role: Field required"),
        ("x", "messages.1: Input should be"),
    ],
)  # fmt: skip
def test_a_message_that_is_none_is_named(url: str, message: Any, said: str) -> None:
    asked = {"model": NAME, "messages": [{"role": "user", "content": "x"}, message]}
    response = httpx.post(f"{url}/v1/chat/completions", json=asked)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, "messages")
    assert said in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b'{"model": 1e', b"[" * 100_000, b"9" * 5000])
def test_bodies_that_are_no_requests(url: str, body: bytes) -> None:
    response = httpx.post(f"{url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    error_of(response)
    assert response.status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/nowhere", 404, "GET /nowhere: Not Found"),
        ("GET", "/docs", 404, "Not Found"),
        ("GET", "/v1/completions", 405, "Method Not Allowed"),
        ("DELETE", "/health", 405, "Method Not Allowed"),
        ("GET", "/v1/models/other", 404, "The model 'other' does not exist"),
    ],
)
def test_what_is_not_there(url: str, method: str, path: str, status: int, message: str) -> None:
    response = httpx.request(method, f"{url}{path}")
    assert message in error_of(response)["message"]
    assert response.status_code == status
    if status == 405:
        assert response.headers["allow"]


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"]
)
def test_other_types_than_json(url: str, path: str, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    response = httpx.post(f"{url}{path}", content=json.dumps(COMPLETION).encode(), headers=headers)
    assert "expected application/json" in error_of(response)["message"]
    assert response.status_code == 415


def test_a_charset_may_stand_behind_the_type(url: str) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    response = httpx.post(f"{url}/v1/completions", content=json.dumps(COMPLETION).encode(), headers=headers)
    assert response.status_code == 200


def test_the_clients_own_errors(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError, match="The model 'gpt-5' does not exist") as missing:
        client.completions.create(model="gpt-5", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="maximum input context length is 511 tokens") as long:
        client.completions.create(model=NAME, prompt=[1] * 600)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
        client.embeddings.create(model=NAME, input="x")


def test_the_clients_time_out_ends_the_request(client: openai.OpenAI, url: str) -> None:
    before = metric(url, "generation_tokens_total")
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).completions.create(
            model=NAME, prompt="x", max_tokens=500, n=32, extra_body={"ignore_eos": True}
        )
    wait_for(lambda: metric(url, "num_requests_running") + metric(url, "num_requests_waiting") == 0)
    assert metric(url, "generation_tokens_total") - before < 8000
    assert client.completions.create(model=NAME, prompt="x", max_tokens=1).choices


def test_keys(strict: str) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": KEYS[0]},
        {"Authorization": f"Basic {KEYS[0]}"},
        {"Authorization": "Bearer"},
    ):
        response = httpx.get(f"{strict}/v1/models", headers=headers)
        assert error_of(response)["code"] == "invalid_api_key"
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
    for key in KEYS:
        assert httpx.get(f"{strict}/v1/models", headers={"Authorization": f"bearer {key}"}).status_code == 200
        with connected(strict, api_key=key) as client:
            assert client.models.list().data[0].id == NAME
    with connected(strict, api_key="first-kez") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    assert [httpx.get(f"{strict}{path}").status_code for path in ("/health", "/version", "/metrics")] == [200] * 3
    assert httpx.post(f"{strict}/tokenize", json={"prompt": "x"}).status_code == 401


def test_keys_are_in_no_log(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = ServerSettings(api_keys=["my-secret-key"], payload_logging=True)
    with serving(load(artifact), settings) as url:
        listen(caplog)
        with connected(url, api_key="my-secret-key") as client:
            client.completions.create(model=NAME, prompt="a private text", max_tokens=1)
        httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer wrong-secret-key"})
    assert "a private text" in caplog.text
    assert "secret-key" not in caplog.text
    assert "secret" not in repr(settings)


def test_bodies_are_one_line_of_the_log_each(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(load(artifact), ServerSettings(payload_logging=True)) as url:
        listen(caplog)
        headers = {"Content-Type": "application/json"}
        content = '{"prompt":\r\n"fjörd"}\x1b[2J\u009b\u2028forged'.encode()
        request = httpx.Request("GET", f"{url}/v1/models/%1Bx", headers=headers, content=content)
        with httpx.Client() as client:
            assert client.send(request).status_code == 404
    [line] = [one.getMessage() for one in caplog.records if one.name == "furiosa_llm.server.payloads"]
    assert line == r'GET /v1/models/\x1bx: {"prompt":\r\n"fjörd"}\x1b[2J\x9b\u2028forged'


def test_keys_that_no_header_can_hold() -> None:
    for key in ("", " ", "ä", "a\nb"):
        with pytest.raises(InputError, match="an API key is empty, or holds what a header cannot"):
            ServerSettings(api_keys=[key])
    for key in (" a", "a "):
        with pytest.raises(InputError, match="an API key begins or ends with a space"):
            ServerSettings(api_keys=[key])


@pytest.mark.parametrize("name", ["max_body_nbytes", "max_concurrency", "body_timeout", "send_timeout"])
def test_limits_are_positive(name: str) -> None:
    expected = "a positive number" if name.endswith("timeout") else "an integer of at least 1"
    with pytest.raises(InputError, match=f"{name} must be {expected}, got 0"):
        ServerSettings(**{name: 0})  # type: ignore[arg-type]


def test_bodies_that_are_too_large(strict: str) -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(4):
            yield b"x" * 1000

    headers = {"Content-Type": "application/json"}
    with keyed(strict) as client:
        for content in (b" " * 2001, pieces()):
            response = client.post("/v1/completions", content=content, headers=headers)
            assert "larger than the 2000 bytes" in error_of(response)["message"]
            assert response.status_code == 413
        exact = json.dumps(COMPLETION).ljust(2000).encode()
        assert client.post("/v1/completions", content=exact, headers=headers).status_code == 200


def test_every_piece_of_a_body_counts() -> None:
    pieces = [{"type": "http.request", "body": bytes(700), "more_body": more} for more in (True, True, False)]

    async def receive() -> dict[str, Any]:
        return pieces.pop(0)

    async def read(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass

    async def send(message: Any) -> None:
        raise AssertionError(message)

    limited = BodyLimits(read, max_nbytes=2000, timeout=5)
    with pytest.raises(ApiError, match="larger than the 2000 bytes"):
        asyncio.run(limited({"type": "http", "headers": []}, receive, send))


def test_bodies_that_do_not_arrive(strict: str) -> None:
    host, _, port = strict.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
            f"Authorization: Bearer {KEYS[0]}\r\n\r\n{{".encode()
        )
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the body did not arrive within 0.3 s" in answer


def test_the_queue_has_a_limit(strict: str) -> None:
    long = {"model": NAME, "prompt": "x", "max_tokens": 500, "n": 3, "ignore_eos": True, "logprobs": 20}
    with keyed(strict) as client:
        with client.stream("POST", "/v1/completions", json={**long, "stream": True}) as stream:
            lines = stream.iter_lines()  # kept, since the connection is closed with it
            next(lines)
            response = client.post("/v1/completions", json={**COMPLETION, "prompt": ["a", "b"]})
            assert error_of(response)["code"] == "rate_limit_exceeded"
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
            assert client.post("/v1/completions", json=COMPLETION).status_code == 200  # one fits beside three
        wait_for(lambda: client.post("/v1/completions", json={**long, "n": 4, "max_tokens": 1}).status_code == 200)
        response = client.post("/v1/completions", json={**COMPLETION, "prompt": ["a"] * 5})
        assert "takes 4 at once; divide it" in error_of(response)["message"]
        assert response.status_code == 400


def test_prompts_that_are_too_many_are_not_encoded(strict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Tokenizer, "encode")
    with keyed(strict) as client:
        assert client.post("/v1/completions", json={**COMPLETION, "prompt": ["a"] * 5}).status_code == 400
        assert client.post("/v1/completions", json={**COMPLETION, "prompt": ["a"] * 4}).status_code == 500


def test_other_origins(strict: str, url: str) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
        preflight = httpx.options(f"{strict}/v1/completions", headers={"Origin": origin, **asked})
        assert (preflight.headers.get("access-control-allow-origin") == origin) is allowed
        refused = httpx.get(f"{strict}/v1/models", headers={"Origin": origin})
        assert refused.status_code == 401
        assert (refused.headers.get("access-control-allow-origin") == origin) is allowed
    answer = httpx.get(f"{url}/v1/models", headers={"Origin": "https://any.example"})
    assert answer.headers["access-control-allow-origin"] == "*"


def test_a_failure_of_the_server_itself(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> None:
        raise RuntimeError("a secret of the machine")

    with serving(load(artifact), ServerSettings(), lambda app: app.add_api_route("/broken{_}", broken)) as url:
        listen(caplog)
        response = httpx.get(f"{url}/broken%0Aforged")
        other = httpx.get(f"{url}/broken2")
    error = error_of(response)
    assert response.status_code == 500
    assert "secret" not in error["message"]
    assert "a secret of the machine" in caplog.text
    assert rf"request {response.headers['x-request-id']}: GET /broken\nforged failed" in caplog.text
    assert other.headers["x-request-id"] != response.headers["x-request-id"]


def test_an_engine_without_a_replica_and_a_dead_one(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(artifact)
    with serving(model, ServerSettings()) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        with monkeypatch.context() as patched:
            patched.setattr(Replica, "ready", property(lambda _: False))  # as one that waits for a host
            response = httpx.get(f"{url}/health")
            assert (response.status_code, error_of(response)["code"]) == (503, "not_ready")
        assert httpx.get(f"{url}/health").status_code == 200
        model.close()
        for response in (httpx.get(f"{url}/health"), httpx.post(f"{url}/v1/completions", json=COMPLETION)):
            assert error_of(response)["code"] == "engine_dead"
            assert response.status_code == 503


def test_what_the_engines_errors_mean() -> None:
    assert api_error(ReplicaError("x")).status_code == 500
    assert api_error(InputError("a\n  b")).info.message == "a b"
