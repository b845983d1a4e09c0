"""Hostile texts: what they cost stays in processes beside the server, within limits."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from furiosa_llm.runtime.errors import InputError
from furiosa_llm.runtime.tokens.lean_process import lean_process
from furiosa_llm.server import text_processes
from furiosa_llm.server.body_reading import MAX_NUMBERS, MAX_VALUES, read_body
from furiosa_llm.server.requests import ChatMessage
from furiosa_llm.server.settings import ServerSettings
from furiosa_llm.server.text_child import HEAD, Setup
from furiosa_llm.server.text_processes import TextWork
from tests.campaigns.server_hostile import TEMPLATE, kinds
from tests.server.conftest import NAME, error_of, load, serving, wait_for

LIMITS: dict[str, Any] = {"chat_template": TEMPLATE, "text_max_nbytes": 2**28}
MESSAGES = [{"role": "user", "content": "hi"}]


SETUP = pickle.dumps(Setup(tokenizer=None, config={}, chat_templates=None, seconds=5.0, nbytes=2**28))
WORK = pickle.dumps(("read", (b"{}",), {}))


@pytest.mark.parametrize(
    ("sent", "reads"),
    [
        (b"", True),
        (HEAD.pack(len(SETUP)) + SETUP[:9], True),
        (b"".join(HEAD.pack(len(one)) + one for one in (SETUP, WORK, WORK)), False),
    ],
    ids=["nothing", "a part of the setup", "work whose answer nobody reads"],
)
def test_a_child_whose_parent_is_killed_says_nothing(sent: bytes, reads: bool) -> None:
    ours, theirs = socket.socketpair()
    with theirs, lean_process("furiosa_llm.server.text_child", stdin=theirs, stderr=subprocess.PIPE) as child:
        theirs.close()
        ours.sendall(sent)
        if reads:
            ours.shutdown(socket.SHUT_WR)
        ours.close()
        assert child.stderr is not None
        assert child.stderr.read() == b""
    assert child.returncode == 0


@pytest.fixture(scope="module")
def led_astray(artifact: Path) -> Iterator[str]:
    """A server whose chat template does what requests tell it to."""
    with serving(load(artifact), ServerSettings(**LIMITS, text_timeout=2.0)) as url:
        yield url


def chat(url: str, mode: str = "") -> httpx.Response:
    body = {"model": NAME, "messages": MESSAGES, "max_tokens": 1, "chat_template_kwargs": {"mode": mode}}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def test_an_endless_template_ends_and_stops_nobody(led_astray: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(chat, led_astray, "loops")
        asked = 0
        while not answer.done():
            httpx.get(f"{led_astray}/health").raise_for_status()
            asked += 1
    assert asked > 2
    assert answer.result().status_code == 400
    assert error_of(answer.result())["message"] == (
        "the chat template takes more than 2 s, which is the limit (--text-timeout)"
    )
    assert chat(led_astray).status_code == 200


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("range", "OverflowError: Range too big"),
        ("list", "MemoryError"),
        ("output", "MemoryError"),
        ("macro", "RecursionError"),
        ("zero", "ZeroDivisionError"),
    ],
)
def test_faults_of_templates_are_refusals(led_astray: str, mode: str, message: str) -> None:
    answer = chat(led_astray, mode)
    assert answer.status_code == 400
    assert message in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("messages", "messages: found "),
        ("parts", "messages with the parts of their content: found "),
        ("tools", "tools: found "),
        ("deep tools", "more than 100 levels deep"),
        ("logit_bias", "logit_bias: found "),
        ("metadata", "an object of the body: found "),
        ("stop", "the values of the body: found "),
        ("token ids", "input context length is 511 tokens"),
        ("prompts of token ids", "the values of the body: found "),
        ("deep lists", "more than 100 levels deep"),
        ("a long number", "not valid JSON: Exceeds the limit"),
        ("not UTF-8", "not valid JSON: 'utf-8' codec"),
        ("malformed parts", "messages.0.content.0.type: Input should be 'text'"),
        ("escapes", "input context length is 511 tokens"),
        ("a long message", "input context length is 511 tokens"),
    ],
)
def test_hostile_requests_are_refused_with_the_reason(led_astray: str, kind: str, message: str) -> None:
    path, body = kinds(2**18)[kind]()
    content = body.replace("MODEL", NAME, 1).encode("utf-8", "surrogateescape")
    answer = httpx.post(led_astray + path, content=content, headers={"Content-Type": "application/json"}, timeout=60)
    assert answer.status_code == 400
    assert message in error_of(answer)["message"]


@pytest.mark.parametrize("number", ["1.0", '{"a":1}'])
def test_numbers_that_take_long_to_validate_are_values(number: str) -> None:
    """A list of integers is validated at once, each of its entries in some nanoseconds."""
    assert len(read_body(b"[" + b",".join([b"1"] * MAX_NUMBERS) + b"]")) == MAX_NUMBERS
    with pytest.raises(InputError, match=f"the values of the body: found .* at most {MAX_VALUES} are taken"):
        read_body(b"[" + b",".join([number.encode()] * MAX_VALUES) + b"]")


def test_thoughts_are_not_compared_with_what_is_said() -> None:
    """That would take the product of their numbers."""

    class Part(dict[str, str]):
        def __eq__(self, other: object) -> bool:
            raise AssertionError

    said = [Part(type="text", text=str(i)) for i in range(2)]
    message = ChatMessage.model_validate({"role": "user", "content": [Part(type="thinking", thinking="hm"), *said]})
    assert message.reasoning_content == "hm"
    assert isinstance(message.content, list)
    assert [part.text for part in message.content] == ["0", "1"]


def test_a_process_that_was_killed_is_followed_by_another(led_astray: str) -> None:
    assert chat(led_astray).status_code == 200
    for pid in children():
        os.kill(pid, signal.SIGKILL)
    assert chat(led_astray).status_code == 200
    long = {"prompt": "a b " * 5000}
    answer = httpx.post(f"{led_astray}/tokenize", json=long, timeout=60)
    assert answer.json()["count"] > 5000


def children() -> list[int]:
    """The processes of the servers' texts that this process has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            mine = parent == os.getpid() and b"text_child" in (folder / "cmdline").read_bytes()
        except OSError:
            continue
        found += [int(folder.name)] * mine
    return found


def is_running(pid: int) -> bool:
    """Whether a process has computed for a while: for longer than it takes to start."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11]) > os.sysconf("SC_CLK_TCK")


def test_a_request_that_is_cut_ends_what_it_has_begun(artifact: Path) -> None:
    settings = ServerSettings(**LIMITS, text_timeout=600.0, request_timeout=1.0)
    with serving(load(artifact), settings) as url:
        assert chat(url, "loops").status_code == 504
        assert chat(url).status_code == 200


def test_a_server_stops_while_a_template_runs(artifact: Path) -> None:
    before = set(children())
    settings = ServerSettings(**LIMITS, text_timeout=600.0, shutdown_timeout=1.0)
    with ThreadPoolExecutor(1) as pool:
        with serving(load(artifact), settings) as url:
            before = set(children()) - before
            answer = pool.submit(chat, url, "loops")
            wait_for(lambda: any(is_running(pid) for pid in before))
            began = time.monotonic()
        assert time.monotonic() - began < 30
        assert answer.result().status_code == 503
    assert not set(children()) & before
    assert not [one for one in threading.enumerate() if one.name == "furiosa-tokenizer"]


def test_a_refused_body_is_gone_with_its_error() -> None:
    """No frame of the error's traceback has the error: that would keep the body until cycles are looked for."""

    async def read() -> Exception:
        text = TextWork(None, ServerSettings())
        await text.start()
        try:
            with pytest.raises(InputError) as raised:
                await text.read(b"[" + b"x" * 2**17)
            return raised.value
        finally:
            await text.close()

    error = asyncio.run(read())
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [frame for frame in frames if frame.f_code.co_filename == text_processes.__file__]
    assert ours
    assert not any(value is error for frame in ours for value in frame.f_locals.values())
