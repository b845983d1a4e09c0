"""The longest time for which a command says nothing to a terminal, on SmolLM2 and on full-size graphs."""

from __future__ import annotations

import os
import pty
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.artifacts import artifact
from benchmarks.bars import Bar

GRAPHS = Path("fixtures/graphs")
FULL_SIZE = (
    "llama-3.1-405b-genai-bf16-cuda",
    "llama-3.1-70b-dynamo-op21-bf16",
    "mixtral-8x7b-dynamo-op21-bf16",
    "qwen3-30b-a3b-dynamo-op21-bf16",
)
_SIMULATED = ("--device", "rngd", "--cards", "8", "--search", "--concurrency", "16")
_LIMIT = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """Seconds: the longest between two words, from the last word to the end, and all of it."""

    silence: float
    end: float
    whole: float


def bars() -> Iterator[Bar]:
    """Every command that works for a second or more."""
    for name in FULL_SIZE:
        yield _bar(f"plan {name}", ["plan", GRAPHS / name])
    yield _bar(f"simulate --search {FULL_SIZE[1]}", ["simulate", GRAPHS / FULL_SIZE[1], *_SIMULATED])
    built = artifact("genai-fp32", 4)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        commands: list[Sequence[str | Path]] = [
            ["build", "-tp", "4", built.model.parent, folder / "built"],
            ["inspect", built.folder],
            ["topology", built.folder],
            ["generate", built.folder, "--prompt", "The sea is", "--max-tokens", "16"],
            ["verify", folder / "built"],
            ["verify", folder / "built", "--against", built.model, "--max-tokens", "8"],
            ["bench", built.folder, "--num-requests", "8", "--input-len", "32", "--output-len", "16"],
            ["reshard", "-tp", "8", built.folder, folder / "resharded"],
            ["unbuild", built.folder, folder / "model.onnx"],
        ]
        for command in commands:
            yield _bar(f"{command[0]}{' --against' * ('--against' in command)} SmolLM2", command)


def _bar(what: str, arguments: Sequence[str | Path]) -> Bar:
    heard = listen(arguments)
    beside = f"{heard.end:.2f} s behind the last word, {heard.whole:.1f} s in all"
    return Bar(what=what, figure=max(heard.silence, heard.end), limit=_LIMIT, unit=" s", beside=beside)


def listen(arguments: Sequence[str | Path]) -> Heard:
    """What a terminal hears of `furiosa-llm` with these arguments; raises ChildProcessError if it fails."""
    started = last = time.monotonic()
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-m", "furiosa_llm", *map(str, arguments)])
    silence, said = 0.0, b""
    try:
        while said_now := os.read(terminal, 1 << 16):
            now = time.monotonic()
            silence, last = max(silence, now - last), now
            said = (said + said_now)[-2000:]
    except OSError:  # how a terminal ends whose other side is closed
        pass
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    if status:
        raise ChildProcessError(f"{arguments}: status {status}\n{said.decode(errors='replace')}")
    ended = time.monotonic()
    return Heard(silence=silence, end=ended - last, whole=ended - started)
