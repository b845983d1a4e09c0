"""What a build and a load take."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator

from benchmarks.artifacts import BuiltArtifact, artifact, run_measured
from benchmarks.bars import Bar
from furiosa_llm.runtime.artifact.reader import open_artifact

_ROUNDS = 5
_FIRST_TOKEN = """
import sys, time
from furiosa_llm import LLM, SamplingParams
started = time.monotonic()
with LLM.load_artifact(sys.argv[1], mapped=sys.argv[2] == "mapped") as llm:
    next(llm.stream_outputs("The capital of France is", SamplingParams(temperature=0.0, max_tokens=2)))
    print(time.monotonic() - started)
"""


def bars() -> Iterator[Bar]:
    """Build time and memory, stored bytes, and time from load to first token (warm page cache)."""
    for shape in ("genai-fp32", "optimum-fp32"):
        built = artifact(shape, 8)
        gigabytes = built.build.peak_rss_nbytes / 1e9
        yield Bar(what=f"build of {shape} at tp 8", figure=built.build.seconds, limit=30, unit=" s")
        yield Bar(what=f"build of {shape} at tp 8: peak memory", figure=gigabytes, limit=1.0, unit=" GB")
    for size in (4, 8):
        for shape in ("genai-fp32", "optimum-fp32"):
            yield _stored(shape, size)
        for mode, limit in (("packed", 3.0 if size == 4 else 5.0), ("mapped", 2.5)):
            yield _first_token(artifact("genai-fp32", size), size, mode, limit)


def _stored(shape: str, size: int) -> Bar:
    built = artifact(shape, size)
    manifest = open_artifact(built.folder, full=False).manifest
    stored = sum(entry.nbytes for entry in manifest.files)
    padding = json.loads((built.folder / "manifest.json").read_text())["plan"]["padding_nbytes"]
    original = sum(file.stat().st_size for file in built.model.parent.glob("model.onnx*"))
    beside = f"with padding {stored / original:.4f}, padding {padding / 1e6:.1f} MB"
    what = f"{shape} tp {size}: artifact bytes without declared padding / model bytes"
    return Bar(what=what, figure=(stored - padding) / original, limit=1.02, beside=beside)


def _first_token(built: BuiltArtifact, size: int, mode: str, limit: float) -> Bar:
    """Seconds in a new process, imports left out."""
    command = [sys.executable, "-c", _FIRST_TOKEN, str(built.folder), mode]
    times = [float(run_measured(command).output) for _ in range(_ROUNDS)]
    beside = f"{_ROUNDS} processes, {min(times):.2f} to {max(times):.2f}"
    what = f"genai-fp32 tp {size}: load to first token, {mode}"
    return Bar(what=what, figure=statistics.median(times), limit=limit, unit=" s", beside=beside)
