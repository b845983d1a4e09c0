"""Requests to two replicas of two stages over the hosts of a Ray cluster: prints what became of them.

A program of its own, on the head's host: Ray reads the environment as it is imported. Prints a line once it has
loaded, runs until its standard input ends, and prints a report as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from furiosa_llm.runtime.engine.engine_args import EngineArgs
from furiosa_llm.runtime.errors import ReplicaError, WorkerError
from furiosa_llm.runtime.llm_engine import LLMEngine
from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams

PARAMS = SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True)
PROMPTS = [[3 + number, *range(1, 3 + 5 * number)] for number in range(8)]
AT_ONCE = 8
_PER_SECOND = 4.0
_OF_RAY = Counter({"socket:[N]": 1})
"""What Ray 2.60 leaves behind by itself after `ray.init`, an actor and `ray.shutdown`; without the actor nothing."""


class Load:
    """Requests with the tokens that they have to get, and what they got."""

    def __init__(self, engine: LLMEngine, expected: list[list[int]]) -> None:
        self._engine = engine
        self._expected = expected
        self._began: dict[str, float] = {}
        self._ended: set[str] = set()
        self.wrong: list[str] = []
        self.errors: Counter[str] = Counter()
        self.answered = 0
        self.longest = 0.0

    @property
    def asked(self) -> int:
        """How many requests were sent."""
        return len(self._began)

    @property
    def unanswered(self) -> int:
        """How many of them have no answer."""
        return self.asked - len(self._ended)

    def ask(self) -> None:
        """Sends one more."""
        number = len(self._began)
        self._began[str(number)] = time.monotonic()
        self._engine.add_request(str(number), {"prompt_token_ids": PROMPTS[number % len(PROMPTS)]}, PARAMS)

    def step(self) -> None:
        """Takes what there is."""
        for output in self._engine.step():
            if output.finished:
                self._take(output)

    def _take(self, output: RequestOutput) -> None:
        name = output.request_id
        if name in self._ended:
            self.wrong.append(f"{name} is answered twice")
        self._ended.add(name)
        self.longest = max(self.longest, time.monotonic() - self._began[name])
        expected = self._expected[int(name) % len(PROMPTS)]
        tokens = list(output.outputs[0].token_ids) if output.outputs else []
        if output.error is None:
            self.answered += 1
            if tokens != expected:
                self.wrong.append(f"{name} has other tokens")
            return
        cause = output.error.__cause__
        self.errors[type(cause).__name__] += 1
        named = re.search(r"stage \d on \S+", str(output.error)) is not None
        if not (isinstance(output.error, ReplicaError) and isinstance(cause, WorkerError) and named):
            self.wrong.append(f"{name}: {output.error!r}")
        if tokens != expected[: len(tokens)]:
            self.wrong.append(f"{name} had other tokens until its error")


def run(args: EngineArgs, expected: list[list[int]], ended: Callable[[], bool]) -> dict[str, Any]:
    """The report of an engine under load, until that has ended."""
    with LLMEngine.from_engine_args(args) as engine:
        load = Load(engine, expected)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        started = time.monotonic()
        while (runs := not ended()) or load.unanswered:
            due = load.asked < (time.monotonic() - started) * _PER_SECOND and load.unanswered < AT_ONCE
            if runs and due:
                load.ask()
            elif load.unanswered:
                load.step()
            else:
                time.sleep(0.01)
        report = {"asked": load.asked, "answered": load.answered, "errors": load.errors, "wrong": load.wrong}
        restarts = [replica.counts.restarts for replica in engine.core.replicas]
    return {**report, "longest": load.longest, "restarts": restarts}


def soon() -> Callable[[], bool]:
    """Whether a second has gone by."""
    until = time.monotonic() + 1.0
    return lambda: time.monotonic() > until


def _open_files() -> list[str]:
    """What this process has open."""
    gc.collect()  # an engine that was closed is in cycles
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.append(re.sub(r"\d+", "N", str(entry.readlink())))
        except OSError:  # the folder itself
            continue
    return sorted(found)


def _await_end(ended: threading.Event) -> None:
    sys.stdin.read()
    ended.set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--address", required=True)
    parser.add_argument("--cache", required=True)
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s")
    with LLMEngine.from_engine_args(EngineArgs(options.artifact, threads=1)) as engine:
        for number, prompt in enumerate(PROMPTS):
            engine.add_request(str(number), {"prompt_token_ids": prompt}, PARAMS)
        last: dict[str, list[int]] = {}
        while engine.has_unfinished_requests():
            last.update({one.request_id: list(one.outputs[0].token_ids) for one in engine.step() if one.finished})
    expected = [last[str(number)] for number in range(len(PROMPTS))]
    args = EngineArgs(
        options.artifact,
        devices="npu:0,npu:1,npu:2,npu:3",
        pipeline_parallel_size=2,
        data_parallel_size=2,
        max_batch_size=4,
        distributed_executor_backend="ray",
        ray_address=options.address,
        placement_timeout=60,
        artifact_cache=options.cache,
    )
    run(args, expected, soon())  # what Ray opens once stays open
    before = Counter(_open_files())
    ended = threading.Event()
    threading.Thread(target=_await_end, args=(ended,), daemon=True).start()
    report = run(args, expected, ended.is_set)
    left = Counter(_open_files()) - before - _OF_RAY
    again = run(args, expected, soon())  # the cards are free
    report["wrong"] += again["wrong"]
    sys.stdout.write(f"{json.dumps({**report, 'left open': left})}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
