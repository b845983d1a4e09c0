"""Ends of processes at random moments of a generation: `python -m tests.campaigns.process_ends --ends 200`.

Processes generate in each of the ways of `ended_process` and end in each of its ways: by an exception, `sys.exit`,
`os._exit`, the end of the program while a thread generates, a signal from outside, in a fork, and as `pytest -x` does
behind a test that failed. Each has to end with its own status, soon, with nothing of an abort on its standard error,
and to leave no process behind. What did not is shown, and the campaign ends with status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.campaigns.ended_process import RUNS
from tests.support.artifacts import artifact_of

SIGNALS: Mapping[str, signal.Signals] = {
    "interrupt": signal.SIGINT,
    "caught": signal.SIGINT,
    "terminate": signal.SIGTERM,
    "kill": signal.SIGKILL,
}
"""Ends that come from outside."""
STATUS: Mapping[str, int] = {
    "exception": 1,
    "leave": 7,
    "at_once": 9,
    "fall_off": 0,
    "fork_and_leave": 0,
    "interrupt": -signal.SIGINT,
    "caught": 0,
    "terminate": -signal.SIGTERM,
    "kill": -signal.SIGKILL,
}
"""How a process ends that has no model."""
PYTEST_STATUS: Mapping[str, int] = {"exception": 1, "interrupt": 2}
"""The same of pytest: a test that failed, a run that was interrupted."""
SOON = 10.0
"""Seconds from the moment to the end, at most; a busy machine is slow."""
_BOUND = 60.0
_LATEST = 0.4
"""Seconds after the first tokens, at most, until the end comes."""
_BAD_WORDS = ("terminate called", "Fatal Python error", "Segmentation", "Aborted", "core dumped", "leaked")
_TEST = """
import signal, threading, time
import pytest
from furiosa_llm import LLM
from tests.campaigns.ended_process import generate_for_ever

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it

@pytest.fixture(scope="session")
def llm():
    return LLM.load_artifact({artifact!r})

def test_one(llm):
    llm.generate("x")
    threading.Thread(target=generate_for_ever, args=(llm,), daemon=True).start()
    print("ready", flush=True)
    time.sleep({seconds} if {fails} else 60)
    assert not llm

def test_two(llm):
    time.sleep(60)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """A process that is to end: how it generates, how it ends, and when."""

    run: str
    end: str
    seconds: float

    @property
    def status(self) -> int:
        """What it has to end with."""
        return (PYTEST_STATUS if self.run == "pytest" else STATUS)[self.end]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What became of one: the seconds from the moment to its end, and what was wrong, or ""."""

    seconds: float
    problem: str


def is_possible(run: str, end: str) -> bool:
    """Whether it can end so: a main thread that generates does not fall off its end, nor is a `steps` gone on with."""
    if run == "pytest":
        return end in PYTEST_STATUS
    has_thread = run in ("thread", "processes_thread")
    return (end != "fall_off" or has_thread) and (end != "caught" or run == "generate")


WAYS: Sequence[tuple[str, str]] = [(run, end) for run in (*RUNS, "pytest") for end in STATUS if is_possible(run, end)]


def command_of(end: End, artifact: Path, folder: Path) -> list[str]:
    """The process."""
    if end.run != "pytest":
        return [
            sys.executable,
            "-m",
            "tests.campaigns.ended_process",
            str(artifact),
            end.run,
            end.end,
            str(end.seconds),
        ]
    test = folder / "test_it.py"
    test.write_text(_TEST.format(artifact=str(artifact), seconds=end.seconds, fails=end.end == "exception"))
    return [sys.executable, "-m", "pytest", "-x", "-q", "-s", "-p", "no:cacheprovider", "-c", os.devnull, str(test)]


def carry_out(end: End, artifact: Path, folder: Path) -> Ended:
    """Starts it, ends it, and looks at what is left."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command_of(end, artifact, folder), stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        ) as process,
    ):
        assert process.stdout is not None
        try:
            ready = any("ready" in line for line in process.stdout)
            moment = time.monotonic() + end.seconds
            if end.end in SIGNALS:
                time.sleep(end.seconds)
                process.send_signal(SIGNALS[end.end])
            problem = _wait(process, end.status) if ready else f"it never began, and ended with {process.wait(_BOUND)}"
            took = time.monotonic() - moment
            left = _left_of(process.pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        errors.seek(0)
        said = errors.read()
    problem = problem or (f"these processes are left: {left}" if left else "")
    problem = problem or next((f"it says {word!r}" for word in _BAD_WORDS if word in said), "")
    if took > SOON and not problem:
        problem = f"it took {took:.1f} s to end"
    return Ended(seconds=took, problem=f"{end}: {problem}\n{said[-2000:]}" if problem else "")


def _wait(process: subprocess.Popen[str], expected: int) -> str:
    """What was wrong with its end, or ""."""
    try:
        status = process.wait(_BOUND)
    except subprocess.TimeoutExpired:
        return f"it hangs: it has not ended after {_BOUND:.0f} s"
    return "" if status == expected else f"it ended with {status}, expected {expected}"


def _left_of(session: int) -> list[str]:
    """The processes of a session that are there still, after a moment in which they may end."""
    deadline = time.monotonic() + SOON
    while (left := _processes_of(session)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _processes_of(session: int) -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = stat.read_text().rpartition(")")
            state, _, _, of = rest.split()[:4]
            if int(of) == session and state != "Z":
                found.append(name)
    return found


def run(ends: int, seed: int) -> list[Ended]:
    """So many ends, each way in turn, at random moments."""
    draw, artifact = random.Random(seed), artifact_of("tiny-llama-optimum")
    found = []
    with tempfile.TemporaryDirectory() as made:
        for number in range(ends):
            way = WAYS[number % len(WAYS)]
            end = End(run=way[0], end=way[1], seconds=round(draw.uniform(0.0, _LATEST), 4))
            found.append(carry_out(end, artifact, Path(made)))
            if found[-1].problem:
                sys.stdout.write(f"{found[-1].problem}\n")
                sys.stdout.flush()
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="End processes at random moments of a generation.")
    parser.add_argument("--ends", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = run(arguments.ends, arguments.seed)
    problems = sum(bool(one.problem) for one in found)
    slowest = max(one.seconds for one in found)
    sys.stdout.write(f"{len(found)} ends in {len(WAYS)} ways: {problems} wrong; the slowest took {slowest:.2f} s\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
