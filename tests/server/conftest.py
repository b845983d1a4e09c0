"""Real servers on free ports: uvicorn in a thread, or the command in a process of its own."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from furiosa_llm import LLM, EngineArgs
from furiosa_llm.server.app import make_app
from furiosa_llm.server.model import ServedModel, load_served, open_served
from furiosa_llm.server.run import make_server
from furiosa_llm.server.settings import ServerSettings
from tests.support.artifacts import artifact_of

NAME = "tiny-llama-optimum"
TIMEOUT = 60.0


@contextlib.contextmanager
def serving(model: ServedModel, settings: ServerSettings, routes: Callable[[Any], None] | None = None) -> Iterator[str]:
    """The base URL of a server, which is drained at the end; `routes` may add some to its application."""
    app = make_app(model, settings)
    if routes is not None:
        routes(app)
    server = make_server(app, settings, host="127.0.0.1", port=0, log_level="warning")
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started or not thread.is_alive())
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(TIMEOUT)
    assert not thread.is_alive()


def load(artifact: Path, **options: Any) -> ServedModel:
    args = EngineArgs(artifact, **options)
    opened, plan = open_served(args)
    return load_served(args, opened, plan, None, 1)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@contextlib.contextmanager
def connected(url: str, api_key: str = "none") -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0, timeout=TIMEOUT) as client:
        yield client


def listen(caplog: pytest.LogCaptureFixture) -> None:
    """Catches everything that a server logs which runs already, and has set up its logging."""
    for name in ("furiosa_llm", "uvicorn", "uvicorn.access"):
        logging.getLogger(name).propagate = True
        caplog.set_level(logging.DEBUG, name)


def metric(url: str, name: str) -> float:
    """The value of a metric that has one series."""
    [line] = [one for one in httpx.get(f"{url}/metrics").text.splitlines() if one.startswith(f"furiosa_llm_{name}{{")]
    return float(line.rpartition(" ")[2])


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer, whose shape is checked: it is the same for all."""
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["message"]
    assert error["type"] == ("server_error" if response.status_code >= 500 else "invalid_request_error")
    return error


@pytest.fixture(scope="session")
def artifact() -> Path:
    return artifact_of(NAME)


@pytest.fixture(scope="session")
def llm(artifact: Path) -> Iterator[LLM]:
    """The same model without a server, to compare with."""
    with LLM.load_artifact(artifact) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def url(artifact: Path) -> Iterator[str]:
    with serving(load(artifact), ServerSettings()) as base:
        yield base


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with connected(url) as made:
        yield made


@pytest.fixture(scope="session")
def talking_tokenizer(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of which two tokens are a whole call each, one is text, and that puts <s> before a text."""
    folder = tmp_path_factory.mktemp("talking")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(zoo / NAME / name, folder)
    written = json.loads((folder / "tokenizer.json").read_text())
    for token_id, text in SPOKEN.items():
        old = next(token for token, number in written["model"]["vocab"].items() if number == token_id)
        written["model"]["merges"] = [pair for pair in written["model"]["merges"] if old not in ("".join(pair), *pair)]
        del written["model"]["vocab"][old]
        written["model"]["vocab"][text.replace(" ", "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}")] = token_id
    written["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(written))
    (folder / "chat_template.jinja").write_text(
        "{% if tools %}{{ tools | tojson }}{% endif %}{{ note }}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return folder


CALL, OTHER_CALL, SAID = 1000, 1001, 1002
SPOKEN = {
    CALL: '<tool_call>{"name": "weather", "arguments": {"city": "Seoul"}}</tool_call>',
    OTHER_CALL: '<tool_call>{"name": "delete", "arguments": {}}</tool_call>',
    SAID: "Let me see.",
}
