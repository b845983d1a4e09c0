"""`furiosa-llm serve`: a process that starts, says what it runs, drains on SIGTERM, and refuses what makes no sense."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import openai
import pytest
from fastapi import FastAPI

from furiosa_llm.cli import serve as command
from furiosa_llm.cli.refused_options import REFUSED, REFUSED_FLAGS
from furiosa_llm.cli.serve import show_batch_invariance
from furiosa_llm.runtime.async_engine import AsyncLLMEngine
from furiosa_llm.runtime.runners.batch import NO_COMPANIONS, Companions
from furiosa_llm.runtime.runners.batch_invariance import BatchInvariance, KernelDifference
from furiosa_llm.server.model import Decoder
from furiosa_llm.server.run import make_server
from furiosa_llm.server.settings import ServerSettings
from tests.cli.conftest import Cli
from tests.server.conftest import wait_for
from tests.support.artifacts import artifact_of
from tests.support.server.process import MAIN, TIMEOUT, Process, started

NAME = "tiny-llama-optimum"

Refused = Callable[..., str]


def body(max_tokens: int, **others: Any) -> dict[str, Any]:
    return {"model": NAME, "prompt": "x", "max_tokens": max_tokens, "ignore_eos": True, **others}


def test_it_says_what_it_runs_and_ends_when_told(built: Path) -> None:
    with started(built, "-tp", 4, "-pp", 2, "-dp", 2, "--devices", "npu:0,npu:1", "--max-model-len", 64) as server:
        assert f"{NAME}: tp 4 x pp 2 x dp 2 = 16 PEs on npu:0,npu:1" in server.output
        for words in (
            "replica 1, stage 1",
            "one PE of each stage, for 16 sequences of 64 tokens",
            "memory of the cards",
            "Bits on this machine: ",
        ):
            assert words in server.output
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            assert client.completions.create(model=NAME, prompt="x", max_tokens=2).choices
            with pytest.raises(openai.BadRequestError, match="maximum input context length is 63 tokens"):
                client.completions.create(model=NAME, prompt="x " * 64, max_tokens=64)
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 0
    assert "Traceback" not in server.output
    assert "POST /v1/completions" in server.output


@pytest.mark.parametrize(
    ("companions", "enabled", "end"),
    [
        (NO_COMPANIONS, False, "a row has the same bits alone and in every batch."),
        (Companions(lone=True), False, "; --batch-invariant would keep it the same."),
        (Companions(lone=True), True, "; --batch-invariant keeps it the same."),
        (None, False, "(by 2.5e-07 of its largest element)."),
    ],
)
def test_what_the_kernels_give_is_said(
    companions: Companions | None, enabled: bool, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    difference = KernelDifference(op="MatMul", node="q", nodes=2, rows=(1,), relative=2.5e-7)
    differences = () if companions == NO_COMPANIONS else (difference,)
    probed = BatchInvariance(differences=differences, companions=companions, chunks=True, unprobed=())
    engine = cast(AsyncLLMEngine, None)
    show_batch_invariance(Decoder(engine=engine, probe=lambda: probed, batch_invariant=enabled))
    said = capsys.readouterr().out
    assert said.startswith("Bits on this machine: a row ")
    assert said.endswith(f"{end}\n")


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait(built: Path) -> None:
    with started(built, "--max-model-len", 512, "--shutdown-timeout", 600) as server:
        wanted = body(500, n=16, stream=True)
        with httpx.stream("POST", f"{server.url}/v1/completions", json=wanted, timeout=TIMEOUT) as stream:
            events = stream.iter_lines()
            next(events)
            server.process.send_signal(signal.SIGINT)
            wait_for(lambda: "Waiting for connections to close" in server.output)
            server.process.send_signal(signal.SIGINT)
            last = [line for line in events if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
        assert server.wait() == 0
    assert "Traceback" not in server.output


def answers_of(server: Process, bodies: list[dict[str, Any]]) -> tuple[list[threading.Thread], list[httpx.Response]]:
    """Sends all of them at once; the answers are there when the threads have ended."""
    answers: list[httpx.Response] = []

    def send(one: dict[str, Any]) -> None:
        answers.append(httpx.post(f"{server.url}/v1/completions", json=one, timeout=TIMEOUT))

    threads = [threading.Thread(target=send, args=(one,)) for one in bodies]
    for thread in threads:
        thread.start()
    return threads, answers


def wait_for_running(server: Process, sequences: int) -> None:
    while True:
        seen = httpx.get(f"{server.url}/metrics").text
        counts = re.findall(r"num_requests_(?:running|waiting)\{.*\} (\d+)", seen)
        if sum(map(int, counts)) >= sequences:
            return


@pytest.mark.slow
def test_requests_end_before_the_server_does(built: Path) -> None:
    bodies = [*[body(500, stream=True)] * 16, body(500, n=4)]
    with started(built) as server:
        threads, answers = answers_of(server, bodies)
        wait_for_running(server, 20)
        server.process.send_signal(signal.SIGTERM)
        while "Shutting down" not in server.output:
            assert server.process.poll() is None
        for _ in range(3):  # the first connection may still be in the queue of those that are not accepted
            with pytest.raises(httpx.TransportError):
                httpx.post(f"{server.url}/v1/completions", json=body(1))
        assert server.wait() == 0
        for thread in threads:
            thread.join(TIMEOUT)
    streams = [answer.text for answer in answers if answer.headers["content-type"].startswith("text/event-stream")]
    assert [text.endswith("data: [DONE]\n\n") for text in streams] == [True] * 16
    assert [text.count('"finish_reason":"length"') for text in streams] == [1] * 16
    [whole] = [answer.json() for answer in answers if answer.headers["content-type"] == "application/json"]
    assert whole["usage"]["completion_tokens"] == 2000
    assert "Traceback" not in server.output


@pytest.mark.slow
def test_requests_that_take_too_long_are_cut(built: Path) -> None:
    bodies = [*[body(500, n=32, stream=True)] * 16, body(500, n=128)]
    with started(built, "--shutdown-timeout", 1, "--max-batch-size", 16) as server:
        threads, answers = answers_of(server, bodies)
        wait_for_running(server, 16 * 32 + 128)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        for thread in threads:
            thread.join(TIMEOUT)
    assert len(answers) == 17
    # Those whose first token is out have a status; the others can still be given one.
    streams = [answer.text for answer in answers if answer.status_code == 200]
    refused = [answer.json() for answer in answers if answer.status_code == 503]
    assert streams
    assert refused
    assert len(streams) + len(refused) == 17
    last = [json.loads(text.rstrip().rpartition("\n\n")[2].removeprefix("data: ")) for text in streams]
    assert {answer["error"]["code"] for answer in (*last, *refused)} == {"stopping"}
    assert "Traceback" not in server.output


@pytest.mark.slow
def test_it_ends_although_nobody_reads_its_log(built: Path) -> None:
    """The log's pipe is full, and whoever writes to it waits: the thread of the requests, for one."""
    with unread_server(built, "--shutdown-timeout", 1) as (process, url):
        unanswered = 0
        for _ in range(1000):
            try:
                httpx.get(f"{url}/health?{'x' * 4000}", timeout=0.5)
                unanswered = 0
            except httpx.ReadTimeout:
                unanswered += 1
            if unanswered == 3:  # one or two a busy machine may leave so long, too
                break
        assert unanswered == 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(1 + 1 + 1) == 0, "a second more than docs/limits.md says, for a busy machine"


@contextmanager
def unread_server(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server, and where it listens; what it says after that is not read."""
    command = [sys.executable, "-uc", MAIN, "serve", *map(str, arguments), "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, next(filter(None, map(listening_at, process.stdout)))
        finally:
            process.kill()


@pytest.mark.slow
def test_a_disk_that_fills_up_while_it_serves(built: Path, tmp_path: Path) -> None:
    """No file grows any more, that of the log neither: the answers are the same, and so is the end."""
    log = tmp_path / "log"
    command = [sys.executable, "-uc", MAIN, "serve", str(built), "--host", "127.0.0.1", "--port", "0"]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            wait_for(lambda: listening_at(log.read_text()) is not None)
            url = listening_at(log.read_text())
            before = httpx.post(f"{url}/v1/completions", json=body(4, temperature=0)).json()["choices"]
            nbytes = log.stat().st_size
            for number in (process.pid, *children(process.pid)):
                resource.prlimit(number, resource.RLIMIT_FSIZE, (0, 0))
            for _ in range(3):
                assert httpx.post(f"{url}/v1/completions", json=body(4, temperature=0)).json()["choices"] == before
            assert httpx.post(f"{url}/v1/completions", json={"prompt": 0.5}).status_code == 400
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT) == 0
        finally:
            process.kill()
    assert log.stat().st_size == nbytes


def listening_at(said: str) -> str | None:
    """The address in what a server says."""
    found = re.search(r"running on (http://127\.0\.0\.1:\d+) ", said)
    return None if found is None else found.group(1)


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    found = Path("/proc", str(process), "task").glob("*/children")
    return [int(number) for path in found for number in path.read_text().split()]


def test_what_is_logged_stays_on_one_line() -> None:
    make_server(FastAPI(), ServerSettings(), host="127.0.0.1", port=0)
    [handler] = logging.getLogger("furiosa_llm").handlers
    try:
        raise ValueError("a\nINFO:     forged")
    except ValueError:
        raised = sys.exc_info()
    record = logging.LogRecord("furiosa_llm", logging.ERROR, "", 1, "node %s", ("x\nINFO:     forged",), raised)
    shown = handler.format(record)
    assert shown.startswith("ERROR:    node x\\nINFO:     forged\n  Traceback")
    assert "\nINFO" not in shown


def test_the_time_that_requests_have_to_end_in() -> None:
    for asked, given in ((30.0, 30), (0.2, 1)):
        server = make_server(FastAPI(), ServerSettings(shutdown_timeout=asked), host="127.0.0.1", port=0)
        assert server.config.timeout_graceful_shutdown == given


@pytest.mark.parametrize("ends_process", [False, True])
def test_collections_pass_over_a_model_that_a_process_is_for(
    ends_process: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server(FastAPI(), ServerSettings(), host="127.0.0.1", port=0, ends_process=ends_process)
    frozen: list[bool] = []
    monkeypatch.setattr("furiosa_llm.server.run.gc.freeze", lambda: frozen.append(server.started))

    async def start_and_stop() -> None:
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        await server.startup()
        await server.shutdown()

    asyncio.run(start_and_stop())
    assert frozen == [True] * ends_process


def test_options_of_the_server_arrive(built: Path, tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.write_text("{{ messages[0].content }}?")
    (tmp_path / "keys").write_text("k2 with spaces\r\n\n  k3\n")
    options: list[object] = ["--api-key", "k1", "--api-key-file", tmp_path / "keys"]
    options += ["--served-model-name", "a", "--served-model-name", "b"]
    options += ["--chat-template", template, "--response-role", "bot", "--allowed-origins", '["https://a.example"]']
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--max-concurrency", 2]
    options += ["--max-body-nbytes", 3000, "--enable-payload-logging", "--disable-uvicorn-access-log"]
    with started(built, *options) as server, httpx.Client(base_url=server.url) as client:
        for key, status in (("k0", 401), ("k1", 200), ("k2", 401), ("k2 with spaces", 200), ("k3", 200)):
            assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == status
        client.headers = httpx.Headers({"Authorization": "Bearer k3", "Origin": "https://a.example"})
        models = client.get("/v1/models")
        assert [one["id"] for one in models.json()["data"]] == ["a", "b"]
        assert models.headers["access-control-allow-origin"] == "https://a.example"
        messages = [{"role": "user", "content": "private"}]
        tokens = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
        assert client.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "private?"}
        tool = {"type": "function", "function": {"name": "f"}}
        chat = {"model": "a", "messages": messages, "max_tokens": 1}
        answer = client.post("/v1/chat/completions", json={**chat, "tools": [tool]}).json()
        assert answer["choices"][0]["message"]["role"] == "bot"
        assert client.post("/v1/chat/completions", json={**chat, "n": 3}).status_code == 400
        assert client.post("/tokenize", json={"prompt": "x" * 3000}).status_code == 413
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    assert 'POST /tokenize: {"messages":' in server.output
    assert "POST /v1/models" not in server.output
    assert not re.search("k[0-3]", server.output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-tp", 8), "tensor_parallel_size=8, but "),
        (("--enable-auto-tool-choice",), "--enable-auto-tool-choice and --tool-call-parser go together"),
        (("--tool-call-parser", "hermes"), "--enable-auto-tool-choice and --tool-call-parser go together"),
        (("--chat-template", "/nowhere"), "Error in reading chat template file: "),
        (("--api-key", ""), "an API key is empty"),
        (("--served-model-name", "\udcff"), r"'\udcff' is not UTF-8, and cannot be sent in an answer; give another"),
        (("--api-key-file", "/nowhere"), "--api-key-file: /nowhere cannot be read"),
        (("--api-key-file", "/dev/null"), "--api-key-file: /dev/null has no keys"),
        (("--max-model-len", 4096), "larger than the model's max number of positions: 4096 > 512"),
        (("--host", "256.0.0.1"), "cannot listen on 256.0.0.1 port 8000"),
        (("-pp", 40), "pp=40, but the artifact has"),
    ],
)
def test_what_does_not_go(built: Path, refused: Refused, options: tuple[object, ...], message: str) -> None:
    assert message in refused("serve", built, *options)


def test_a_port_that_is_taken(built: Path, refused: Refused) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refused("serve", built, "--host", "127.0.0.1", "--port", port)
    assert f"cannot listen on 127.0.0.1 port {port}" in message
    assert "give another --host or --port" in message


@pytest.mark.parametrize("value", ["*", "{}", "[1]", "["])
def test_origins_are_a_json_list(built: Path, cli: Cli, value: str) -> None:
    result = cli("serve", built, "--allowed-origins", value)
    assert result.code == 2
    assert "is not a JSON list" in result.err


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [(name, ["1"], reason) for names, reason in REFUSED.items() for name in names]
    + [(name, [], reason) for names, reason in REFUSED_FLAGS.items() for name in names],
)
def test_the_vendors_options_that_mean_nothing_here(
    built: Path, refused: Refused, name: str, values: list[str], reason: str
) -> None:
    message = refused("serve", built, name, *values)
    assert name in message
    assert message.endswith(f"is not supported: {' '.join(reason.split())}; leave it out")


@pytest.mark.parametrize("option", ["--structured-outputs-backend", "--guided-decoding-backend"])
def test_the_library_behind_structured_outputs(built: Path, refused: Refused, cli: Cli, option: str) -> None:
    message = refused("serve", built, option, "xgrammar")
    assert message.endswith("answers are constrained by llguidance, which has the same formats; give guidance or auto")
    for name in ("auto", "guidance"):
        assert "cannot listen on" in refused("serve", built, option, name, "--host", "192.0.2.1")
    assert cli("serve", built, option, "outlines").code == 2


def test_the_extra_that_is_missing(built: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name != "uvicorn" else object())
    message = refused("serve", built)
    assert "serve needs fastapi, h11, prometheus_client, pydantic, which is not installed" in message
    assert "pip install 'furiosa-llm-onnx[serve]'" in message


def test_the_command_line_needs_none_of_it() -> None:
    program = (
        "import sys\n"
        "for name in ('fastapi', 'uvicorn', 'prometheus_client', 'starlette'): sys.modules[name] = None\n"
        "import furiosa_llm.cli.main\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_encoder_decoder_has_one_replica(refused: Refused) -> None:
    message = refused("serve", artifact_of("tiny-t5-optimum"), "--port", 0, "-dp", 2)
    assert "an encoder-decoder runs as one replica of one stage" in message
