"""Programs that never end or take all memory, each loaded and asked in a process of its own: `make hostile-programs`.

Each has to end within ten seconds, with an error of ours if it is not done by then, and with at most 1 GB more than the
honest model takes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from furiosa_llm.runtime.artifact.layout import Mesh
from tests.support.runtime.endless import KINDS, make_endless
from tests.support.runtime.models import LlamaSize, llama

SECONDS, NBYTES = 10.0, 10**9
_HANGS = 60

_CHILD = """
import json, os, resource, sys, time
from furiosa_llm.runtime import LLM, SamplingParams
from furiosa_llm.runtime.artifact.errors import FuriosaLLMError

started, loaded, error = time.monotonic(), None, None
try:
    llm = LLM.load_artifact(sys.argv[1], threads=1, **json.loads(sys.argv[2]))
    loaded = time.monotonic() - started
    llm.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=1))
except FuriosaLLMError as raised:
    error = f"{type(raised).__name__}: {raised}"
seconds = time.monotonic() - started
nbytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "loaded": loaded, "nbytes": nbytes, "error": error}), flush=True)
os._exit(0)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a program did; `error` is None if it did what it was asked."""

    seconds: float
    nbytes: int
    error: str | None
    loaded: float | None = None

    def faults(self, honest: Outcome) -> list[str]:
        """What it should not have done."""
        found = [self.error] if self.error is not None and self.error.startswith("died") else []
        if self.loaded is not None and self.seconds - self.loaded > SECONDS:
            found.append(f"{self.seconds - self.loaded:.1f} s for a step")
        if (self.seconds if self.loaded is None else self.loaded) > SECONDS:
            found.append(f"{self.loaded or self.seconds:.1f} s to load")
        if self.nbytes - honest.nbytes > NBYTES:
            found.append(f"{(self.nbytes - honest.nbytes) / 1e9:.2f} GB more")
        return found


def ask(folder: Path, **options: Any) -> Outcome:
    """What the program in `folder` does when it is loaded with some options and asked for a token."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, str(folder), json.dumps(options)],
            capture_output=True,
            text=True,
            timeout=_HANGS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Outcome(seconds=_HANGS, nbytes=0, error=None)
    if done.returncode:
        return Outcome(seconds=0, nbytes=0, error=f"died with {done.returncode}: {done.stderr[-300:]}")
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


def honest_artifact(folder: Path) -> Path:
    """A little model of two PEs."""
    return llama(Mesh((2,)), LlamaSize(layers=1)).write(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """The number of programs that did what they should not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", action="append", choices=[*KINDS], help="only these")
    kinds = parser.parse_args(arguments).kind or [*KINDS]
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        model = honest_artifact(Path(place) / "honest")
        honest = ask(model)
        assert honest.error is None, honest
        for kind in kinds:
            folder = shutil.copytree(model, Path(place) / "hostile")
            make_endless(folder, kind)
            outcome = ask(folder)
            shutil.rmtree(folder)
            faults = outcome.faults(honest)
            failed += bool(faults)
            more = (outcome.nbytes - honest.nbytes) / 1e9
            verdict = f"FAILED {', '.join(faults)}" if faults else "ok"
            sys.stdout.write(
                f"{verdict:40} {kind:40} {outcome.seconds:5.1f} s {more:6.2f} GB  {outcome.error!s:.160}\n"
            )
            sys.stdout.flush()
    sys.stdout.write(f"{len(kinds)} kinds, {failed} failed\n")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
