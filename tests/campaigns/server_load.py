"""Many streams for minutes, each compared with the offline answer: `python -m tests.campaigns.server_load`.

The load is locust's, which lies in an environment of its own (`--locust`). Meanwhile the server's memory is sampled:
over the second half of the time it may not grow faster than a bound. Ends with status 1 if a stream failed, gave other
tokens, or memory grew.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.parity import PROMPTS
from furiosa_llm import LLM, SamplingParams
from tests.support.server.process import started

SLOPE = 4.0
"""MiB by which the server's memory may grow in a minute."""
LOCUSTFILE = Path(__file__).parents[2] / "scripts" / "locustfile.py"
_TOKENS = 64
_SLACK = 120
"""Seconds that the last streams may take."""


def write_expected(artifact: Path, file: Path) -> None:
    """Writes what the locustfile compares with."""
    params = SamplingParams(temperature=0.0, max_tokens=_TOKENS, ignore_eos=True)
    with LLM.load_artifact(artifact) as llm:
        outputs = llm.generate(list(PROMPTS), params)
    model = json.loads((artifact / "manifest.json").read_text())["model"]["name"]
    expected = {prompt: output.outputs[0].text for prompt, output in zip(PROMPTS, outputs, strict=True)}
    file.write_text(json.dumps({"model": model, "max_tokens": _TOKENS, "expected": expected}))


class MemoryWatch:
    """Samples a process's resident memory, in MiB, once a second."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.samples: list[tuple[float, float]] = []

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            found = re.search(r"^VmRSS:\s+(\d+) kB$", self._status.read_text(), re.M)
            if found:
                self.samples.append((time.monotonic(), int(found[1]) / 1024))


def slope_of(samples: Sequence[tuple[float, float]]) -> float:
    """MiB per minute, over the second half of `samples`."""
    seconds, sizes = np.array(samples[len(samples) // 2 :]).T
    return 60.0 * float(np.polyfit(seconds, sizes, 1)[0])


def load(artifact: Path, locust: Path, *, streams: int, seconds: int) -> list[str]:
    """Runs the load, and prints what it found; returns the problems."""
    with tempfile.TemporaryDirectory() as folder:
        expected = Path(folder) / "expected.json"
        write_expected(artifact, expected)
        with started(artifact, "--disable-uvicorn-access-log") as server:
            command = [locust, "--locustfile", LOCUSTFILE, "--headless", "--only-summary", "--host", server.url]
            command += ["--users", streams, "--spawn-rate", streams, "--run-time", f"{seconds}s"]
            command += ["--stop-timeout", _SLACK]
            with MemoryWatch(server.process.pid) as memory:
                environment = {**os.environ, "EXPECTED": str(expected)}
                run = subprocess.run([*map(str, command)], env=environment, check=False)
            server.process.send_signal(signal.SIGTERM)
            code = server.wait()
    problems = []
    if run.returncode:
        problems.append(f"locust ended with {run.returncode}: streams failed, or gave other tokens")
    if code:
        problems.append(f"the server ended with {code}")
    if re.search("Traceback|ERROR", server.output):
        problems.append(f"errors in the log: {server.output[-2000:]}")
    slope = slope_of(memory.samples)
    if slope > SLOPE:
        problems.append(f"memory grows by {slope:.1f} MiB a minute, expected at most {SLOPE:g}")
    sizes = [size for _, size in memory.samples]
    sys.stdout.write(f"memory {sizes[0]:.0f} to {sizes[-1]:.0f} MiB, {slope:+.2f} MiB a minute\n")
    return problems


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Many streams for minutes, each compared with the offline answer.")
    parser.add_argument("--artifact", type=Path, default=None, help="by default SmolLM2 in fp32 for 4 PEs is built")
    parser.add_argument("--locust", type=Path, required=True, help="the program")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=int, default=180)
    arguments = parser.parse_args()
    folder = arguments.artifact
    if folder is None:
        from benchmarks.artifacts import artifact

        folder = artifact("genai-fp32", 4).folder
    problems = load(folder, arguments.locust, streams=arguments.streams, seconds=arguments.seconds)
    sys.stdout.write(f"{len(problems)} problems\n")
    for problem in problems:
        sys.stdout.write(f"  {problem}\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
