"""An engine in a process of its own, asked over pipes; whatever goes wrong there is one error here."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from benchmarks.memory import peak_nbytes
from benchmarks.peers.protocol import Generation, Loaded, Tokens

_FIELD_OF_SESSION = 3
"""In /proc/PID/stat, counted from behind the command's name: state, parent, group, session."""
_ENDED = "Z"
"""The state of a process that nobody has waited for yet."""
_ENDING_SECONDS = 20.0
_ERROR = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception): ")
"""How the last line of a traceback begins; libraries may say more when they end."""


class WorkerError(Exception):
    """An engine's process gave no answer; the message is why, in one line."""


class Worker:
    """The process of one engine, and those that it starts: a session of their own.

    Args:
        command: the program; it runs in `folder`, and its standard error goes into the file `log`.
        limit: seconds within which it must answer.
        environment: variables beside those of this process.
    """

    def __init__(
        self, command: Sequence[str], *, folder: Path, log: Path, limit: float, environment: Mapping[str, str]
    ) -> None:
        self._log = log
        self._limit = limit
        self._buffer = b""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def load(self, prompt: Sequence[int]) -> Loaded:
        """Has it load its model, and make a token behind `prompt`; raises WorkerError."""
        return Loaded(**self._ask({"do": "load", "prompt": list(prompt)}))

    def generate(self, prompts: Tokens, count: int) -> Generation:
        """See `Engine.generate`; raises WorkerError, also if it gives more tokens or fewer."""
        found = Generation(**self._ask({"do": "generate", "prompts": prompts, "count": count}))
        sizes = [len(tokens) for tokens in found.tokens]
        if sizes != [count] * len(prompts):
            raise WorkerError(f"gave {sizes} tokens, {count} for each of {len(prompts)} prompts were asked for")
        return found

    def peak_nbytes(self) -> int:
        """The greatest resident memory of its processes so far, each at its own time; shared pages count in each."""
        return sum(peak_nbytes(process) for process in processes_of(self._process.pid))

    def close(self) -> None:
        """Ends it: by the end of its input, or by force with all that it has started. May be called more than once."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._process.stdout.closed:
            return
        try:
            self._process.stdin.close()
            self._process.wait(timeout=_ENDING_SECONDS)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        for process in processes_of(self._process.pid):
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(process, signal.SIGKILL)
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        line = self._read_line(request["do"])
        try:
            answer = json.loads(line)
        except json.JSONDecodeError as error:
            raise WorkerError(f"answered {line[:80]!r}, which is no JSON") from error
        assert isinstance(answer, dict)
        return answer

    def _read_line(self, what: str) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + self._limit
        while b"\n" not in self._buffer:
            readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                self._process.kill()
                raise WorkerError(f"gave no answer to {what!r} within {self._limit:g} s")
            received = os.read(descriptor, 1 << 16)
            if not received:
                raise self._ended()
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _ended(self) -> WorkerError:
        """Its process has closed its end: why, by the last error in its log."""
        try:
            code: int | None = self._process.wait(timeout=_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if _ERROR.match(line)]
        return WorkerError(_reason(code, (errors or lines or [""])[-1]))


def processes_of(session: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and _session_of(folder) == session:
            found.append(int(folder.name))
    return found


def _session_of(folder: Path) -> int | None:
    try:
        stat = (folder / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return None
    fields = stat.rpartition(")")[2].split()
    return int(fields[_FIELD_OF_SESSION]) if fields[0] != _ENDED else None


def _reason(code: int | None, last: str) -> str:
    if last.startswith("ModuleNotFoundError: "):
        return f"not installed ({last.removeprefix('ModuleNotFoundError: ')})"
    how = f"by signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
    return f"its process ended {how}: {last[:200]}" if last else f"its process ended {how}"
