"""What the HTTP server costs beside the engine that it serves: processor time for each token, and time to the first."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.artifacts import artifact, run_measured
from benchmarks.bars import Bar
from benchmarks.parity import PROMPTS
from benchmarks.stepping import THREADS, alternate
from benchmarks.stream_client import connect, read_stream, request
from furiosa_llm import LLM, SamplingParams
from furiosa_llm.runtime.llm_engine import LLMEngine

_TOKENS = 64
_ROUNDS = 3
_FIRST_TOKENS = 50
_MAIN = "from furiosa_llm.cli.main import main; main()"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer:
    """A server in a process of its own."""

    url: str
    model: str
    pid: int

    def cpu_seconds(self) -> tuple[float, float]:
        """What the thread of the event loop has used of a processor, and what all others have together."""
        times = {
            int(task.name): int((task / "schedstat").read_text().split()[0]) / 1e9
            for task in Path(f"/proc/{self.pid}/task").iterdir()
        }
        loop = times.pop(self.pid)  # uvicorn runs on the main thread
        return loop, sum(times.values())


def bars() -> Iterator[Bar]:
    """For each model the server's share of processor time, the wall time, and the added time to the first token."""
    for name in ("genai-fp32", "int4"):
        yield from _of_model(artifact(name, 4).folder, f"{name} tp 4")


def _of_model(folder: Path, shown: str) -> Iterator[Bar]:
    with (
        _server(folder) as server,
        LLM.load_artifact(folder, threads=THREADS, max_batch_size=len(PROMPTS), enable_prefix_caching=False) as llm,
    ):
        yield from _streams(server, llm, shown)
        yield _first_token(server, llm, shown)


def _streams(server: RunningServer, llm: LLM, shown: str) -> Iterator[Bar]:
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=_TOKENS)
    clients: list[dict[str, float]] = []
    shares: list[tuple[float, float]] = []

    def served() -> float:
        loop, engine = server.cpu_seconds()
        command = [sys.executable, "-m", "benchmarks.stream_client", server.url, server.model, str(_TOKENS)]
        clients.append(json.loads(run_measured(command).output))
        loop_after, engine_after = server.cpu_seconds()
        shares.append((loop_after - loop, engine_after - engine))
        return clients[-1]["seconds"] * 1e3

    def offline() -> float:
        began = time.perf_counter()
        llm.generate(list(PROMPTS), params)
        return (time.perf_counter() - began) * 1e3

    times = alternate({"served": served, "offline": offline}, _ROUNDS)
    tokens = _TOKENS * len(PROMPTS)
    figures = [loop / engine for loop, engine in shares]
    loop, engine = (statistics.median(one) / tokens * 1e6 for one in zip(*shares, strict=True))
    beside = f"{loop:.0f} us of {engine:.0f} us a token; rounds {min(figures):.3f} to {max(figures):.3f}"
    what = f"{shown}: processor time of the server's event loop / of the engine, {len(PROMPTS)} streams"
    yield Bar(what=what, figure=statistics.median(figures), limit=0.1, beside=beside)
    ratio = statistics.median(a / b for a, b in zip(times["served"], times["offline"], strict=True))
    client = statistics.median(one["cpu_seconds"] for one in clients) / tokens * 1e6
    beside = (
        f"{tokens * 1e3 / statistics.median(times['served']):.0f} tokens/s; the client used {client:.0f} us a token"
    )
    yield Bar(what=f"{shown}: wall time of {len(PROMPTS)} streams / offline", figure=ratio, limit=None, beside=beside)


def _first_token(server: RunningServer, llm: LLM, shown: str) -> Bar:
    engine = LLMEngine.from_llm(llm)
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1)
    number = 0

    def offline() -> float:
        nonlocal number
        number += 1
        began = time.perf_counter()
        engine.add_request(f"first-{number}", PROMPTS[0], params)
        while not engine.step():
            pass
        return (time.perf_counter() - began) * 1e3

    with connect(server.url) as connection:
        asked = request(server.model, PROMPTS[0], 1)

        def served() -> float:
            began = time.perf_counter()
            connection.sendall(asked)
            answer = connection.recv(2**16)
            while b"data: {" not in answer:
                answer += connection.recv(2**16)
            took = (time.perf_counter() - began) * 1e3
            if b"data: [DONE]" not in answer:
                read_stream(connection)
            return took

        times = alternate({"served": served, "offline": offline}, _FIRST_TOKENS)
    added = statistics.median(a - b for a, b in zip(times["served"], times["offline"], strict=True))
    served_ms, offline_ms = (statistics.median(times[side]) for side in ("served", "offline"))
    beside = f"{served_ms:.1f} ms / {offline_ms:.1f} ms, median of {_FIRST_TOKENS} pairs"
    return Bar(what=f"{shown}: added time to the first token, idle", figure=added, limit=5, unit=" ms", beside=beside)


@contextmanager
def _server(folder: Path) -> Iterator[RunningServer]:
    command = [sys.executable, "-uc", _MAIN, "serve", str(folder), "--host", "127.0.0.1", "--port", "0"]
    command += ["--threads", str(THREADS), "--max-batch-size", str(len(PROMPTS)), "--no-enable-prefix-caching"]
    command += ["--disable-uvicorn-access-log", "--disable-log-stats"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said += line
                if found := re.search(r"Uvicorn running on (http://\S+)", line):
                    break
            else:
                raise RuntimeError(f"the server has not started: {said}")
            model = json.loads((folder / "manifest.json").read_text())["model"]["name"]
            yield RunningServer(url=found[1], model=model, pid=process.pid)
        finally:
            process.terminate()
