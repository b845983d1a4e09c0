"""The summary of a run, in the vendor's shape: LoadGen's own words, and what LoadGen cannot know."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from furiosa_llm.mlperf.benchmarks import Benchmark
from furiosa_llm.mlperf.loadgen import Mode
from furiosa_llm.mlperf.scoring import Scores
from furiosa_llm.mlperf.sut import Query
from furiosa_llm.runtime.artifact.steering import ESCAPES

SUMMARY = "furiosa_summary.txt"
LATENCIES = "furiosa_latencies.json"
_LOADGENS = "mlperf_log_summary.txt"
_VALID, _INVALID = "Result is : VALID", "Result is : INVALID"
_RULE = "=" * 48


def summarise(
    benchmark: Benchmark, mode: Mode, folder: Path, *, scores: Scores | None, failures: Sequence[BaseException]
) -> str:
    """The text of the summary, written to `folder` too. A run with failures is INVALID, whatever LoadGen says."""
    if mode is Mode.PERFORMANCE:
        text = _head((folder / _LOADGENS).read_text("utf-8"))
    else:
        text = _of_accuracy(benchmark, scores or {})
    if failures:
        text = text.replace(_VALID, _INVALID)
        text += f"Engine failures : {len(failures)}, the first: {' '.join(str(failures[0]).split())}\n"
    write_summary(folder, text)
    return text


def interrupted(benchmark: Benchmark, mode: Mode, folder: Path, done: int) -> str:
    """The summary of a run that Ctrl-C ended."""
    text = _title("MLPerf Results Summary", benchmark, mode) + f"{_INVALID}\n  Interrupted after {done} samples\n"
    write_summary(folder, text)
    return text


def write_summary(folder: Path, text: str) -> None:
    """Writes our summary next to LoadGen's."""
    (folder / SUMMARY).write_text(text.translate(ESCAPES), encoding="utf-8")


def write_latencies(folder: Path, finished: Sequence[Query]) -> None:
    """The latencies by the engine's own clock, to compare LoadGen's with: from when LoadGen gave a sample."""
    done = [one for one in finished if not one.failed]
    latencies = {
        "samples": len(done),
        "tokens": sum(one.tokens for one in done),
        "latency_ns": _distribution([one.done - one.issued for one in done]),
        "first_token_latency_ns": _distribution([one.first - one.issued for one in done if one.first]),
    }
    (folder / LATENCIES).write_text(json.dumps(latencies, indent=1) + "\n", encoding="utf-8")


def _distribution(values: Sequence[int]) -> dict[str, int]:
    """Mean and percentiles as LoadGen computes them: the value at the place `count * percentile` of the sorted ones."""
    if not values:
        return {}
    ordered = sorted(values)
    percentiles = {f"p{share}": ordered[len(ordered) * share // 100] for share in (50, 90, 99)}
    return {"mean": int(np.mean(ordered)), "min": ordered[0], "max": ordered[-1], **percentiles}


def _head(text: str) -> str:
    """LoadGen's summary as far as its result; statistics and parameters follow."""
    lines = text.splitlines()
    end = next((number for number, line in enumerate(lines) if line == "Additional Stats"), len(lines) + 1)
    return "\n".join(lines[: end - 1]).rstrip() + "\n"


def _of_accuracy(benchmark: Benchmark, scores: Scores) -> str:
    lines = [f"{name} : {value:.4f}" for name, value in scores.items()]
    return _title("Accuracy Results Summary", benchmark, Mode.ACCURACY) + "\n".join(lines) + "\n"


def _title(title: str, benchmark: Benchmark, mode: Mode) -> str:
    return (
        f"{_RULE}\n{title}\n{_RULE}\nSUT name : {benchmark.sut_name}\nScenario : {benchmark.scenario}\n"
        f"Mode     : {mode.value}\n"
    )
