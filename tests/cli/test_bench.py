"""`furiosa-llm bench` on a small artifact."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from furiosa_llm.bench import sweep
from furiosa_llm.bench.load import Observed, run_load
from furiosa_llm.simulate.this_machine import device_text
from tests.cli.conftest import Cli
from tests.simulate.conftest import small_machine
from tests.support.artifacts import artifact_of

SMALL = ("--num-requests", 6, "--input-len", 5, "--output-len", 4, "--num-warmups", 1)


def _report(cli: Cli, *arguments: object) -> dict[str, Any]:
    result = cli("bench", *arguments, "--json")
    assert result.code == 0, result.err
    report: dict[str, Any] = json.loads(result.out)
    return report


def test_offline_throughput(cli: Cli, built: Path) -> None:
    report = _report(cli, built, *SMALL)
    [run] = report["runs"]
    assert (run["completed"], run["failed"], run["input_tokens"], run["output_tokens"]) == (6, 0, 30, 24)
    assert (run["tensor_parallel_size"], run["request_rate"], run["concurrency"]) == (4, "inf", None)
    assert run["max_concurrency"] == 6
    assert run["output_throughput"] == pytest.approx(24 / run["duration"])
    assert 0 < run["ttft"]["p50"] <= run["e2el"]["p50"] <= 1000 * run["duration"]
    assert report["workload"]["num_requests"] == 6
    assert report["machine"]["cores"] >= 1


def test_sweeps_are_measured_in_every_combination(cli: Cli, built: Path) -> None:
    report = _report(cli, built, *SMALL, "-pp", "1,2", "-dp", "1,2", "--request-rate", "inf,500", "--concurrency", "2")
    runs = report["runs"]
    sizes = [(run["pipeline_parallel_size"], run["data_parallel_size"], run["request_rate"]) for run in runs]
    assert sizes == [(pp, dp, rate) for pp in (1, 2) for dp in (1, 2) for rate in ("inf", 500)]
    assert all(run["completed"] == 6 and run["max_concurrency"] <= 2 for run in runs)


def test_goodput(cli: Cli, built: Path) -> None:
    [run] = _report(cli, built, *SMALL, "--goodput", "ttft:600000", "--goodput", "e2el:600000")["runs"]
    assert run["goodput"] == run["request_throughput"]
    [run] = _report(cli, built, *SMALL, "--goodput", "ttft:0.000001")["runs"]
    assert run["goodput"] == 0


def test_a_dataset(cli: Cli, built: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt_token_ids": [5, 6, 7], "max_tokens": 2}\n{"prompt_token_ids": [8]}\n')
    [run] = _report(cli, built, "--dataset", data, "--output-len", 3, "--ignore-eos", "--num-requests", 3)["runs"]
    assert (run["completed"], run["input_tokens"], run["output_tokens"]) == (3, 7, 7)


def test_tables_and_plots(cli: Cli, built: Path, tmp_path: Path) -> None:
    result = cli("bench", built, *SMALL, "--plot", tmp_path / "a.png", "--plot", tmp_path / "a.html")
    assert result.code == 0
    for word in ("throughput", "TTFT", "TPOT", "ITL", "E2EL", "p99", "1: tp 4 pp 1 dp 1, all at once"):
        assert word in result.out
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert "<svg" in (tmp_path / "a.html").read_text("utf-8")


def test_requests_that_failed_are_said_at_the_end(cli: Cli, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any, **options: Any) -> Observed:
        observed = run_load(*arguments, **options)
        observed.records[0].error = "lost"
        return observed

    monkeypatch.setattr(sweep, "run_load", failing)
    result = cli("bench", built, *SMALL)
    assert result.code == 1
    assert "error: 1 requests failed, and are in no figure but 'failed'" in result.err
    assert "1: tp 4" in result.out  # the tables are there all the same


def test_a_disk_that_is_full(cli: Cli, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("furiosa_llm.bench.plots.plot", full)
    result = cli("bench", built, *SMALL, "--progress", "--plot", tmp_path / "a.png")
    assert "\nrunning requests" in result.err
    assert result.code == 1
    assert "error: the figures cannot be written: [Errno 28] No space left on device" in result.err
    assert "Traceback" not in result.err
    assert "1: tp 4" in result.out  # the tables are there all the same


def test_files_are_not_touched_before_there_are_figures(
    built: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    old, new = tmp_path / "old.svg", tmp_path / "new.png"
    old.write_text("<svg/>")
    refused("bench", built, "--plot", old, "--plot", new, "-pp", 40)
    assert old.read_text() == "<svg/>"
    assert not new.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--input-len", 600), "a prompt of 600 tokens and a completion of 32 do not fit the 512 tokens"),
        (("--plot", "a.gif"), "found the suffix '.gif', expected one of .png"),
        (("--plot", "missing/a.png"), "missing does not exist; make it"),
        (("--plot", "/proc/a.png"), "/proc/a.png cannot be written: No such file or directory; give another file"),
        (("-pp", "1,40"), "pp=40, but the artifact has"),
        (("--dataset", "no.jsonl"), "no.jsonl cannot be read"),
        (("--dataset", "no.jsonl", "--input-len", 4), "--dataset has prompts of its own; leave out --input-len"),
    ],
)
def test_what_is_refused_before_anything_runs(
    built: Path, refused: Callable[..., str], options: tuple[object, ...], message: str
) -> None:
    assert message in refused("bench", built, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--concurrency", "0"), "'0' is not a list of positive numbers, for instance 1,2,4"),
        (("--request-rate", "1,x"), "'1,x' is not a list of positive numbers"),
        (("--request-rate", "nan"), "'nan' is not a list of positive numbers"),
        (("--goodput", "itl:5"), "'itl:5' is not a limit in ms of one of ttft, tpot, e2el"),
        (("--goodput", "ttft:x"), "'ttft:x' is not a limit in ms"),
    ],
)
def test_options_of_no_sense(cli: Cli, built: Path, options: tuple[object, ...], message: str) -> None:
    result = cli("bench", built, *options)
    assert result.code == 2
    assert message in result.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "tiny-bert-optimum",
            "does not generate, which is what bench measures; `furiosa-mlperf bert-offline`",
        ),
        ("tiny-t5-optimum", "is an encoder-decoder, which runs without an engine: it is not measured here"),
    ],
)
def test_what_has_no_engine(refused: Callable[..., str], model: str, message: str) -> None:
    assert message in refused("bench", artifact_of(model))


def test_predictions_are_shown_beside(cli: Cli, built: Path, tmp_path: Path) -> None:
    file = tmp_path / "here.toml"
    file.write_text(device_text(small_machine(len(os.sched_getaffinity(0)))))
    arguments = ("--device", file, "--request-rate", "inf,500")
    report = _report(cli, built, *SMALL, *arguments)
    for run in report["runs"]:
        found = run["predicted"]
        assert found.keys() == {"ttft", "tpot", "e2el", "output_throughput"}
        assert found["tpot"]["measured"] == run["tpot"]["mean"]
        assert found["tpot"]["error"] == pytest.approx(found["tpot"]["predicted"] / run["tpot"]["mean"] - 1)
    result = cli("bench", built, *SMALL, *arguments, "--concurrency", 2)
    assert result.code == 0, result.err
    assert result.out.count("TPOT, ms") == 1  # arrivals by chance with a limit are not predicted


@pytest.mark.parametrize(
    ("device", "message"),
    [("rngd", "rngd is a card, and this runs on cores"), ("other", "was measured on 999 cores, and this runs on")],
)
def test_a_device_that_is_not_this_machine_is_refused(
    cli: Cli, built: Path, tmp_path: Path, device: str, message: str
) -> None:
    (tmp_path / "other.toml").write_text(device_text(small_machine(999)))
    result = cli("bench", built, *SMALL, "--device", tmp_path / "other.toml" if device == "other" else device)
    assert result.code == 1
    assert message in " ".join(result.err.split())
