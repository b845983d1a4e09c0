"""LoadGen's settings and its test, which runs on a thread of its own so that Ctrl-C reaches this process."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from enum import Enum
from pathlib import Path

import mlperf_loadgen

from furiosa_llm.mlperf.benchmarks import Benchmark
from furiosa_llm.mlperf.errors import RunError, RunInterruptedError
from furiosa_llm.mlperf.sut import SystemUnderTest
from furiosa_llm.runtime.errors import InputError

THREAD_NAME = "loadgen"
_OWN_CONFIGURATION, _AND_USER_CONFIGURATION = 0, 1
_SECONDS_TO_STOP = {"Offline": 60.0, "Server": 3.0}
"""In Offline LoadGen ends when the last sample is given up; in Server it has flushed its log by then."""

_SECONDS_BETWEEN_LOOKS = 0.2

_configured = threading.Event()


class Mode(Enum):
    """What a run is for; the values are LoadGen's names."""

    PERFORMANCE = "PerformanceOnly"
    ACCURACY = "AccuracyOnly"


def make_settings(benchmark: Benchmark, user_conf: Path | None) -> mlperf_loadgen.TestSettings:
    """LoadGen's settings for the benchmark's key and scenario, replaced by a user.conf's.

    Raises InputError for a user.conf that LoadGen cannot read, and RunError the second time in a process: LoadGen reads
    its own mlperf.conf only once in each.
    """
    if _configured.is_set():
        raise RunError("LoadGen reads its mlperf.conf once in a process; start another process for another benchmark")
    _configured.set()
    settings = mlperf_loadgen.TestSettings()
    settings.scenario = getattr(mlperf_loadgen.TestScenario, benchmark.scenario)
    kind = _OWN_CONFIGURATION if user_conf is None else _AND_USER_CONFIGURATION
    status = settings.FromConfig("" if user_conf is None else str(user_conf), benchmark.key, benchmark.scenario, kind)
    if status != 0:
        raise InputError(f"--user-conf: LoadGen cannot read {user_conf} (status {status}); docs/mlperf.md has the form")
    return settings


def run_test(
    sut: SystemUnderTest,
    *,
    name: str,
    num_samples: int,
    settings: mlperf_loadgen.TestSettings,
    mode: Mode,
    folder: Path,
    look: Callable[[], None] = lambda: None,
) -> None:
    """Runs LoadGen's test on `sut`; its logs are in `folder` then. `look` is called a few times a second.

    On Ctrl-C everything that runs is given up. In Offline LoadGen ends then as after any run; in Server it would go on
    with its schedule, and is left behind: its detailed log is whole, and its summary is empty. Raises
    RunInterruptedError then, and RunError for what LoadGen calls an error.
    """
    settings.mode = getattr(mlperf_loadgen.TestMode, mode.value)
    system = mlperf_loadgen.ConstructQDL(sut.issue, lambda: None, lambda: name)  # the only one with a name
    library = mlperf_loadgen.ConstructQSL(num_samples, num_samples, lambda _: None, lambda _: None)
    thread = threading.Thread(
        target=mlperf_loadgen.StartTestWithLogSettings,
        args=(system, library, settings, _log_settings(folder), "audit.config"),
        name=THREAD_NAME,
        daemon=True,
    )
    try:
        thread.start()
        while thread.is_alive():
            thread.join(_SECONDS_BETWEEN_LOOKS)
            look()
    except KeyboardInterrupt:
        sut.stop()
        thread.join(_SECONDS_TO_STOP[settings.scenario.name])
        raise RunInterruptedError(
            f"interrupted: {sum(not one.failed for one in list(sut.finished))} samples were done, the rest was given "
            f"up; LoadGen's detailed log is in {folder}"
        ) from None
    mlperf_loadgen.DestroyQSL(library)
    _check_log(folder / "mlperf_log_detail.txt")


def _log_settings(folder: Path) -> mlperf_loadgen.LogSettings:
    output = mlperf_loadgen.LogOutputSettings()
    output.outdir = str(folder)
    output.copy_summary_to_stdout = False
    settings = mlperf_loadgen.LogSettings()
    settings.log_output = output
    settings.enable_trace = False
    return settings


def _check_log(detail: Path) -> None:
    """Raises RunError if LoadGen did not write its log, or noted an error in it that makes the run worthless."""
    try:
        lines = detail.read_text("utf-8").splitlines()
    except OSError as error:
        raise RunError(f"LoadGen wrote no log: {error}") from error
    entries = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines if line.startswith(":::MLLOG ")]
    errors = [entry for entry in entries if entry["metadata"]["is_error"]]
    # Too few queries, or too short a run, are in the summary as the reason of an INVALID result.
    serious = [entry for entry in errors if "Ending early" not in str(entry["value"])]
    if serious:
        raise RunError(
            f"LoadGen noted {len(serious)} errors, the first: {str(serious[0]['value'])[:300]}; see {detail}"
        )
