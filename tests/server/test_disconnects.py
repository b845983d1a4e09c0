"""Clients that go take their requests with them, and leave those of others alone."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from furiosa_llm import LLM, SamplingParams
from furiosa_llm.server.settings import ServerSettings
from tests.server.conftest import NAME, TIMEOUT, listen, load, metric, serving, wait_for
from tests.support.tiers import tiered

LENGTH, WIDTH = 500, 32
LONG: dict[str, Any] = {"model": NAME, "prompt": "x", "max_tokens": LENGTH, "n": WIDTH, "ignore_eos": True}
CHAT: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "n": WIDTH, "ignore_eos": True}
SEVERAL = {**LONG, "prompt": ["x", "y"], "n": WIDTH // 2}


def idle(url: str) -> bool:
    return metric(url, "num_requests_running") == metric(url, "num_requests_waiting") == 0


REQUESTS = {
    "completion": ("completions", LONG, 1),
    "chat": ("chat/completions", CHAT, 1),
    "several": ("completions", SEVERAL, 2),
}
"""The path, the body, and how many requests of the engine it makes."""


@pytest.mark.parametrize(
    ("kind", "stream"),
    tiered(itertools.product(REQUESTS, [True, False]), [("completion", True), ("chat", False), ("several", False)]),
)
def test_a_client_that_goes_aborts_its_request(
    artifact: Path, kind: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path, body, failures = REQUESTS[kind]
    with serving(load(artifact), ServerSettings()) as url:
        listen(caplog)
        if stream:
            with httpx.stream("POST", f"{url}/v1/{path}", json={**body, "stream": True}) as answer:
                next(answer.iter_lines())
        else:
            connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=TIMEOUT)
            headers = {"Content-Type": "application/json"}
            connection.request("POST", f"/v1/{path}", body=json.dumps(body), headers=headers)
            wait_for(lambda: metric(url, "generation_tokens_total") > 0)
            connection.close()
        wait_for(lambda: idle(url))
        wait_for(lambda: metric(url, "request_cancelled_total") == failures)
        tokens = metric(url, "generation_tokens_total")
        assert tokens < LENGTH * WIDTH / 2
        assert metric(url, "request_success_total") == 0
        httpx.post(f"{url}/v1/completions", json={**LONG, "max_tokens": 2, "n": 1}).raise_for_status()
        assert metric(url, "generation_tokens_total") == tokens + 2  # nothing else was still running
    assert [record.message for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


def test_a_client_that_goes_leaves_others_alone(url: str, llm: LLM) -> None:
    expected = llm.generate("hello", SamplingParams(temperature=0.0, max_tokens=200)).outputs[0].text
    body = {"model": NAME, "prompt": "hello", "temperature": 0, "max_tokens": 200}
    texts: list[str] = []

    def complete() -> None:
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        texts.append(response.json()["choices"][0]["text"])

    threads = [threading.Thread(target=complete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "n": 2, "stream": True}) as answer:
            next(answer.iter_lines())
    for thread in threads:
        thread.join()
    assert texts == [expected] * 4
    wait_for(lambda: idle(url))


def test_a_client_that_takes_nothing_is_given_up(artifact: Path) -> None:
    # Twenty log probabilities for each token fill every buffer between the two.
    body = {**LONG, "stream": True, "logprobs": 20}
    with serving(load(artifact), ServerSettings(send_timeout=0.2)) as url:
        with httpx.stream("POST", f"{url}/v1/completions", json=body):
            wait_for(lambda: metric(url, "request_cancelled_total") == 1)
            wait_for(lambda: idle(url))
        assert httpx.get(f"{url}/health").status_code == 200
