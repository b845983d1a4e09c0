"""What the command line takes before it does anything: processor time, which another process takes no part of."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence

from benchmarks.bars import Bar

_LIMIT = 0.3
_ROUNDS = 5
_COMMANDS = ("bench", "build", "inspect", "plan", "serve", "topology", "verify")


def bars() -> Iterator[Bar]:
    """Help, version and completions; the least of some rounds."""
    for arguments in (("--help",), ("--version",), *((name, "--help") for name in _COMMANDS)):
        yield _bar(f"furiosa-llm {' '.join(arguments)}", arguments, {})
    for words in ("furiosa-llm pl", "furiosa-llm plan --ba"):
        completing = {
            "_FURIOSA_LLM_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
        yield _bar(f"completion of `{words}`", (), completing)


def _bar(what: str, arguments: Sequence[str], env: dict[str, str]) -> Bar:
    figure = min(_processor_seconds(arguments, env) for _ in range(_ROUNDS))
    return Bar(what=what, figure=figure, limit=_LIMIT, unit=" s", beside="processor time")


def _processor_seconds(arguments: Sequence[str], env: dict[str, str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    program = "import sys; sys.argv[0] = 'furiosa-llm'; from furiosa_llm.cli.main import main; main()"
    subprocess.run(
        [sys.executable, "-c", program, *arguments], env={**os.environ, **env}, stdout=subprocess.DEVNULL, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
