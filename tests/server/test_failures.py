"""A replica that fails while it streams: those it hits are told, in the stream or by a status, and it comes back."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from furiosa_llm.runtime.errors import ExecutionError
from furiosa_llm.server.events import events_of
from furiosa_llm.server.settings import ServerSettings
from tests.server.conftest import NAME, connected, error_of, listen, load, metric, serving, wait_for
from tests.support.tiers import tiered


def kill_the_worker() -> None:
    children = [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    [worker] = [
        pid for pid in children if b"furiosa_llm.runtime.runners.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(int(worker), signal.SIGKILL)


@pytest.mark.parametrize(
    "kind", tiered(["completion", "chat", "responses", "messages"], ["chat", "responses", "messages"])
)
def test_a_failure_is_an_event_of_the_stream(artifact: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with serving(load(artifact, workers=1), ServerSettings()) as url, connected(url) as client:
        listen(caplog)
        stream: Iterator[Any]
        forever = {"ignore_eos": True}
        if kind in ("responses", "messages"):
            fail_in_the_newer_protocols(url, kind)
            return
        if kind == "chat":
            messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "x"}]
            stream = iter(
                client.chat.completions.create(model=NAME, messages=messages, stream=True, extra_body=forever)
            )
        else:
            stream = iter(
                client.completions.create(model=NAME, prompt="x", max_tokens=500, stream=True, extra_body=forever)
            )
        next(stream)
        kill_the_worker()
        with pytest.raises(openai.APIError, match="replica 0 failed while it had the request"):
            list(stream)
        assert re.search("request [0-9a-f]{32} failed: .*replica 0 failed while it had the request", caplog.text)
        assert client.completions.create(model=NAME, prompt="x", max_tokens=2).choices[0].text


def fail_in_the_newer_protocols(url: str, kind: str) -> None:
    """What ends such a stream is an event of the protocol's own."""
    body: dict[str, Any] = {"model": NAME, "stream": True}
    if kind == "responses":
        body |= {"input": "x", "max_output_tokens": 500}
    else:
        body |= {"messages": [{"role": "user", "content": "x"}], "max_tokens": 500}
    with httpx.stream("POST", f"{url}/v1/{kind}", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        kill_the_worker()
        name, data = [line for line in lines if line][-2:]
    found = json.loads(data.removeprefix("data: "))
    assert name == f"event: {found['type']}"
    assert found["type"] == ("response.failed" if kind == "responses" else "error")
    error = found["response"]["error"] if kind == "responses" else found["error"]
    assert "replica 0 failed while it had the request" in error["message"]
    if kind == "responses":
        assert (found["response"]["status"], error["code"]) == ("failed", "server_error")
    else:
        assert error["type"] == "api_error"


def test_nothing_follows_the_event_of_a_failure() -> None:
    async def outputs() -> AsyncGenerator[int, None]:
        yield 1
        raise ExecutionError("it broke")

    async def events() -> list[bytes]:
        found = outputs()
        return [one async for one in events_of(found, await anext(found), lambda number: b"%d" % number, lambda: b"2")]

    first, second = asyncio.run(events())
    assert first == b"1"
    assert b"it broke" in second


def test_a_failure_is_a_status_of_what_is_not_streamed(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    body = {"model": NAME, "prompt": "x", "max_tokens": 500, "n": 16, "ignore_eos": True}
    answers: list[httpx.Response] = []
    with serving(load(artifact, workers=1), ServerSettings()) as url:
        listen(caplog)
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60))
        )
        thread.start()
        wait_for(lambda: metric(url, "generation_tokens_total") > 0)
        kill_the_worker()
        thread.join()
        assert answers[0].status_code == 500
        assert f"request {answers[0].headers['x-request-id']} failed: " in caplog.text
        assert "replica 0 failed" in error_of(answers[0])["message"]
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)  # not while its replica is built anew
        assert httpx.post(f"{url}/v1/completions", json={**body, "n": 1}, timeout=60).status_code == 200


@pytest.mark.slow
def test_a_failure_in_the_middle_of_a_constrained_answer(artifact: Path) -> None:
    """The next one gets the same grammar, which is kept, from its beginning."""
    messages: list[Any] = [{"role": "user", "content": "x"}]
    body: dict[str, Any] = {"model": NAME, "messages": messages, "temperature": 2.0}
    long: Any = {"structured_outputs": {"regex": "[a-c]{400}"}}
    short: Any = {"structured_outputs": {"regex": "[a-c]{5}"}}
    with serving(load(artifact, workers=1), ServerSettings()) as url, connected(url) as client:
        stream = iter(client.chat.completions.create(**body, stream=True, extra_body=long))
        begun = [next(stream).choices[0].delta.content for _ in range(3)]
        kill_the_worker()
        with pytest.raises(openai.APIError, match="replica 0 failed while it had the request"):
            begun += [chunk.choices[0].delta.content for chunk in stream]
        assert re.fullmatch("[a-c]+", "".join(piece or "" for piece in begun))
        for wanted, pattern in ((short, "[a-c]{5}"), (long, "[a-c]{400}")):
            [choice] = client.chat.completions.create(**body, extra_body=wanted).choices
            assert choice.finish_reason == "stop"
            assert re.fullmatch(pattern, choice.message.content or "")
