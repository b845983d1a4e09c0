"""Runs a benchmark in the modes that were asked for, and leaves logs, summaries and scores in the log folder."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlperf_loadgen

from furiosa_llm.dataset import read_dataset
from furiosa_llm.mlperf.benchmarks import Benchmark, default_dataset
from furiosa_llm.mlperf.errors import RunError, RunInterruptedError
from furiosa_llm.mlperf.loadgen import Mode, make_settings, run_test
from furiosa_llm.mlperf.model import Model, load_model
from furiosa_llm.mlperf.scoring import read_answers
from furiosa_llm.mlperf.summary import interrupted, summarise, write_latencies
from furiosa_llm.mlperf.sut import SystemUnderTest
from furiosa_llm.mlperf.user_conf import check_user_conf
from furiosa_llm.runtime.artifact.errors import OutputFileError
from furiosa_llm.runtime.engine.engine_args import EngineArgs

Say = Callable[[str], None]
TestMode = Literal["performance-only", "accuracy-only", "submission"]

_SECONDS_BETWEEN_LINES = 10.0
_SWITCH_SECONDS = 0.0005
"""LoadGen's thread has to get Python's lock from the engine's; the default of 5 ms would be seen in its latencies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What to run."""

    benchmark: Benchmark
    """The subcommand."""
    artifact: Path
    """Folder of the model."""
    log_dir: Path
    """Where logs go; of a submission, into folders in it."""
    test_mode: TestMode
    """Which of LoadGen's modes to run."""
    user_conf: Path | None
    """Settings for LoadGen in place of its own; None for its own alone."""
    dataset: Path | None
    """A file of JSON Lines; None for the one that comes with the package."""
    count: int | None
    """How many of its first samples to use; None for all."""
    max_output_tokens: int | None
    """The most tokens of a completion; None for the benchmark's own number."""
    engine: Mapping[str, Any]
    """Options of `EngineArgs`."""


def run(options: RunOptions, *, summary: Say, progress: Say) -> None:
    """Runs it; `summary` gets the summaries, and `progress` lines for who waits.

    Raises RunError if samples failed, RunInterruptedError on Ctrl-C, OutputFileError for a folder that cannot be
    written, and what `check_user_conf`, `make_settings`, `read_dataset` and `load_model` do.
    """
    benchmark = options.benchmark
    samples = read_dataset(options.dataset or default_dataset(benchmark.task), options.count)
    folders = _folders(options)
    for folder in folders.values():
        _make_writable(folder)
    if options.user_conf is not None:
        check_user_conf(options.user_conf)
    # Answers that are kept from one sample to the next would be no measurement: LoadGen repeats samples.
    args = EngineArgs(options.artifact, **options.engine, enable_prefix_caching=False)
    interval = sys.getswitchinterval()
    with load_model(args, benchmark, samples, max_output_tokens=options.max_output_tokens) as model:
        settings = make_settings(benchmark, options.user_conf)
        sys.setswitchinterval(_SWITCH_SECONDS)
        try:
            for mode, folder in folders.items():
                run_mode(benchmark, mode, folder, model, len(samples), settings, summary=summary, progress=progress)
        finally:
            sys.setswitchinterval(interval)


def run_mode(
    benchmark: Benchmark,
    mode: Mode,
    folder: Path,
    model: Model,
    num_samples: int,
    settings: mlperf_loadgen.TestSettings,
    *,
    summary: Say,
    progress: Say,
) -> None:
    """Runs one mode on a loaded model, with its logs in `folder`; raises what `run` does of it."""
    progress(f"{benchmark.command}, {mode.value}: {num_samples} samples, logs in {folder}")
    first_tokens = settings.use_token_latencies and benchmark.scenario == "Server"
    system = model.system(first_tokens=first_tokens)
    try:
        run_test(
            system,
            name=benchmark.sut_name,
            num_samples=num_samples,
            settings=settings,
            mode=mode,
            folder=folder,
            look=_Watch(system, progress).look,
        )
    except RunInterruptedError:
        summary(interrupted(benchmark, mode, folder, sum(not one.failed for one in list(system.finished))))
        raise
    finally:
        system.close()
    write_latencies(folder, system.finished)
    scores = None
    if mode is Mode.ACCURACY and not system.failures:
        scores = model.score(read_answers(folder))
        # The form that MLPerf's checkers of submissions look for: a Python mapping.
        rounded = {name: round(value, 4) for name, value in scores.items()}
        (folder / "accuracy.txt").write_text(f"{rounded}\n", encoding="utf-8")
    summary(summarise(benchmark, mode, folder, scores=scores, failures=system.failures))
    if system.failures:
        raise RunError(
            f"the engine failed {len(system.failures)} samples, so that the result is INVALID; the first error: "
            f"{system.failures[0]}"
        ) from system.failures[0]


class _Watch:
    """Says now and then how many samples are done."""

    def __init__(self, system: SystemUnderTest, progress: Say) -> None:
        self._system, self._progress = system, progress
        self._started = self._last_line = time.monotonic()

    def look(self) -> None:
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._progress(f"{now - self._started:.0f} s: {len(self._system.finished)} samples done")


def _folders(options: RunOptions) -> dict[Mode, Path]:
    """The folder of each mode; of a submission, where MLPerf's checkers look."""
    if options.test_mode == "performance-only":
        return {Mode.PERFORMANCE: options.log_dir}
    if options.test_mode == "accuracy-only":
        return {Mode.ACCURACY: options.log_dir}
    return {
        Mode.PERFORMANCE: options.log_dir / "performance" / "run_1",
        Mode.ACCURACY: options.log_dir / "accuracy",
    }


def _make_writable(folder: Path) -> None:
    """LoadGen only prints a line when it cannot open its logs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputFileError(f"LOG_DIR: {folder} cannot be written: {error}; give another folder") from error
