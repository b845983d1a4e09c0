"""A replica that fails while it streams: those it hits are told, in the stream or by a status, and it comes back."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import openai
import pytest

from furiosa_llm.server.settings import ServerSettings
from tests.server.conftest import NAME, connected, error_of, load, serving


def kill_the_worker() -> None:
    children = [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    [worker] = [pid for pid in children if b"furiosa_llm.runtime.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(worker), signal.SIGKILL)


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_a_failure_is_an_event_of_the_stream(artifact: Path, kind: str) -> None:
    with serving(load(artifact, workers=1), ServerSettings()) as url, connected(url) as client:
        forever = {"ignore_eos": True}
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
        assert client.completions.create(model=NAME, prompt="x", max_tokens=2).choices[0].text


def test_a_failure_before_the_first_token_is_a_status(artifact: Path) -> None:
    with serving(load(artifact, workers=1), ServerSettings()) as url:
        kill_the_worker()
        statuses = set()
        for stream in (True, False):
            body = {"model": NAME, "prompt": "x", "max_tokens": 2, "stream": stream}
            response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            statuses.add(response.status_code)
            if response.status_code == 500:
                assert "replica 0 failed" in error_of(response)["message"]
        assert statuses == {200, 500}  # the first one found out, the second one had another worker
        assert httpx.get(f"{url}/health").status_code == 200
