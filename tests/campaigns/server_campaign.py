"""Hostile and honest clients of the real command: `python -m tests.campaigns.server_campaign --count 1000`.

Honest clients stream greedy completions all the while, and compare each with what the model gives without a server.
Meanwhile clients go at random moments, send bytes that are no requests, send more than is taken, and send a byte now
and then. In the end the server has to live, no request may be left in the engine, no file may be left open, memory may
not have grown beyond a bound, the log may hold no error, and the server has to end with 0. Ends with status 1 if any
of that was not so.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from furiosa_llm import LLM, ArtifactBuilder, SamplingParams
from tests.campaigns.server_attacks import Attack, Target, disconnect, giant, malformed, slow
from tests.support.server.process import Process, started

ZOO = Path(__file__).parents[2] / "fixtures" / "zoo" / "tiny-llama-optimum"
MAX_GROWTH = 64.0
"""MiB that the server may have in the end beyond what it had after a tenth of the attacks."""
_HONEST = 8
_LENGTH = 120
_PROMPTS = ("Hello", "A fjord is", "The capital of Korea is", "x", "1, 2, 3, 4,", "Once upon a time", "No", "ä ö ü")
_SETTLING = 120.0
_AT_ONCE: Mapping[Attack, int] = {disconnect: 16, malformed: 16, giant: 4, slow: 500}
"""Clients of each kind at a time."""


@dataclass(slots=True, kw_only=True)
class Result:
    """What a campaign found.

    attacks: how many of each kind there were.
    honest: completions that honest clients got, all of them compared.
    growth: of the server's memory, in MiB.
    problems: what went wrong.
    """

    attacks: Counter[str] = field(default_factory=Counter)
    honest: int = 0
    growth: float = 0.0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def expected_of(artifact: Path) -> dict[str, tuple[str, int]]:
    """For each prompt the text that follows, and its number of tokens, without a server."""
    params = SamplingParams(temperature=0.0, max_tokens=_LENGTH, ignore_eos=True)
    with LLM.load_artifact(artifact) as llm:
        outputs = [llm.generate(prompt, params).outputs[0] for prompt in _PROMPTS]
    return {prompt: (one.text, len(one.token_ids)) for prompt, one in zip(_PROMPTS, outputs, strict=True)}


class Campaign:
    """One run against a server."""

    def __init__(self, server: Process, model: str, expected: Mapping[str, tuple[str, int]], *, seed: int) -> None:
        self.result = Result()
        self._server = server
        self._expected = expected
        self._rng = random.Random(seed)
        address = httpx.URL(server.url)
        assert address.port is not None
        self._target = Target(host=address.host, port=address.port, model=model)

    async def run(self, count: int) -> None:
        """`count` attacks of each kind, after a tenth as many that warm the server up.

        As many giant bodies come at a time as in the rest: what the server keeps of its greatest load is no growth.
        """
        began = time.monotonic()
        files, memory = self._open_files(), 0.0
        warming = min(count, max(2 * _AT_ONCE[giant], count // 10))
        for numbers in (range(warming), range(warming, count)):
            stop = asyncio.Event()
            honest = [asyncio.create_task(self._be_honest(stop)) for _ in range(_HONEST)]
            await asyncio.gather(*(self._attack(kind, numbers) for kind in _AT_ONCE))
            stop.set()
            await asyncio.gather(*honest)
            await asyncio.to_thread(self._settle, files)
            self.result.growth = self._resident_mib() - memory
            memory = self._resident_mib()
        self.result.seconds = time.monotonic() - began
        if self.result.growth > MAX_GROWTH:
            self._problem(f"memory has grown by {self.result.growth:.0f} MiB, expected at most {MAX_GROWTH:g}")

    async def _attack(self, kind: Attack, numbers: Sequence[int]) -> None:
        waiting = iter(numbers)

        async def client() -> None:
            for number in waiting:
                problem = await kind(self._target, self._rng, number)
                self.result.attacks[kind.__name__] += 1
                if problem is not None:
                    self._problem(f"{kind.__name__}: {problem}")

        await asyncio.gather(*(client() for _ in range(min(_AT_ONCE[kind], len(numbers)))))

    async def _be_honest(self, stop: asyncio.Event) -> None:
        async with httpx.AsyncClient(base_url=self._server.url, timeout=_SETTLING) as client:
            while not stop.is_set():
                prompt = self._rng.choice(list(self._expected))
                found = await self._stream(client, prompt)
                self.result.honest += 1
                if found != self._expected[prompt]:
                    self._problem(f"{prompt!r} gave {found}, expected {self._expected[prompt]}")

    async def _stream(self, client: httpx.AsyncClient, prompt: str) -> tuple[str, int]:
        body = {
            "model": self._target.model,
            "prompt": prompt,
            "max_tokens": _LENGTH,
            "ignore_eos": True,
            "temperature": 0,
            "add_special_tokens": False,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        chunks: list[dict[str, Any]] = []
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    chunks.append(json.loads(line.removeprefix("data: ")))
        text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
        return text, chunks[-1]["usage"]["completion_tokens"]

    # -- what is left ------------------------------------------------------------------------------------------

    def _settle(self, files: int) -> None:
        """Waits until the engine is idle, its requests are counted, and no more files are open than there were."""
        deadline = time.monotonic() + _SETTLING
        while not self._is_idle() or self._open_files() > files:
            if time.monotonic() > deadline:
                self._problem(f"{self._open_files()} files are open, {files} were; of requests {self._metrics()}")
                return
            time.sleep(0.1)

    def _is_idle(self) -> bool:
        found = self._metrics()
        ended = sum(found[f"request_{end}_total"] for end in ("success", "cancelled", "failure"))
        return found["num_requests_running"] + found["num_requests_waiting"] == 0 and (
            found["request_received_total"] == ended
        )

    def _metrics(self) -> dict[str, float]:
        text = httpx.get(f"{self._server.url}/metrics", timeout=_SETTLING).text
        return {name: float(value) for name, value in re.findall(r"^furiosa_llm_(\w+)\{[^}]*\} (\S+)$", text, re.M)}

    def _open_files(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self._server.process.pid}/fd").iterdir())

    def _resident_mib(self) -> float:
        status = Path(f"/proc/{self._server.process.pid}/status").read_text()
        found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.M)
        assert found
        return int(found[1]) / 1024

    def _problem(self, problem: str) -> None:
        self.result.problems.append(problem)


def campaign(artifact: Path, *, count: int, seed: int) -> Result:
    """Runs one against a server of `artifact`."""
    expected = expected_of(artifact)
    model = json.loads((artifact / "manifest.json").read_text())["model"]["name"]
    with started(artifact, "--disable-uvicorn-access-log", "--disable-log-stats") as server:
        run = Campaign(server, model, expected, seed=seed)
        asyncio.run(run.run(count))
        server.process.send_signal(signal.SIGTERM)
        code = server.wait()
    problems = run.result.problems
    if code:
        problems.append(f"the server ended with {code}")
    errors = [line for line in server.output.splitlines() if re.search("Traceback|ERROR|CRITICAL|Exception", line)]
    problems += [f"in the log: {line}" for line in itertools.islice(errors, 5)]
    return run.result


@contextmanager
def given_or_built(artifact: Path | None) -> Iterator[Path]:
    """`artifact`, or a small one that is there for as long as the block runs."""
    with tempfile.TemporaryDirectory() as folder:
        if artifact is None:
            artifact = Path(folder) / "artifact"
            ArtifactBuilder(ZOO / "model.onnx", tensor_parallel_size=4).build(artifact)
        yield artifact


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Hostile clients beside honest ones, against the real command.")
    parser.add_argument("--count", type=int, default=1000, help="attacks of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--artifact", type=Path, default=None, help="by default a small one is made")
    arguments = parser.parse_args()
    with given_or_built(arguments.artifact) as artifact:
        result = campaign(artifact, count=arguments.count, seed=arguments.seed)
    for name, number in result.attacks.items():
        sys.stdout.write(f"{name:12} {number:6}\n")
    sys.stdout.write(
        f"{'honest':12} {result.honest:6} completions, each as without a server\n"
        f"{result.seconds:.0f} s, memory {result.growth:+.1f} MiB (at most {MAX_GROWTH:g}): "
        f"{len(result.problems)} problems\n"
    )
    for problem in result.problems[:20]:
        sys.stdout.write(f"  {problem:.600}\n")
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
