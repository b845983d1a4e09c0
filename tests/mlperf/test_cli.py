"""`furiosa-mlperf` as a person runs it: in processes of their own where LoadGen reads its mlperf.conf."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from furiosa_llm import EngineArgs, FuriosaLLMError, __version__
from furiosa_llm.mlperf.benchmarks import BENCHMARKS
from furiosa_llm.mlperf.cli import cli
from furiosa_llm.runtime.artifact.errors import OutputFileError
from furiosa_llm.runtime.errors import InputError, UnsupportedError
from tests.mlperf.conftest import MAX_OUTPUT_TOKENS

SMOKE = Path(__file__).resolve().parents[2] / "fixtures" / "mlperf" / "smoke.conf"
MAIN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
from furiosa_llm.mlperf.cli import main
main()
"""
COMMAND = [sys.executable, "-c", MAIN]
TIMEOUT = 120.0


@contextlib.contextmanager
def start(arguments: Sequence[object]) -> Iterator[subprocess.Popen[str]]:
    """A process of the command; a test that fails does not wait for it."""
    command = [*COMMAND, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def settings_of(folder: Path) -> dict[str, Any]:
    lines = (folder / "mlperf_log_detail.txt").read_text().splitlines()
    entries = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]
    return {entry["key"]: entry["value"] for entry in entries}


def refusal(arguments: Sequence[object]) -> BaseException | None:
    return CliRunner().invoke(cli, list(map(str, arguments))).exception


@pytest.mark.slow
def test_a_server_run_has_loadgens_own_settings_and_those_of_the_user(artifact: Path, tmp_path: Path) -> None:
    options = ["--user-conf", SMOKE, "--count", 8, "--max-output-tokens", MAX_OUTPUT_TOKENS]
    with start(["llama-3.1-server", *options, artifact, tmp_path / "logs"]) as process:
        output, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    assert "SUT name : Llama 3.1 SUT\nScenario : Server\nMode     : PerformanceOnly\n" in output
    found = settings_of(tmp_path / "logs")
    assert found["requested_server_ttft_latency"] == 2_000_000_000
    assert found["requested_server_tpot_latency"] == 100_000_000
    assert found["effective_min_duration_ms"] == 500
    assert found["qsl_reported_total_count"] == 8
    assert output == (tmp_path / "logs" / "furiosa_summary.txt").read_text() + "\n"


@pytest.mark.slow
def test_a_submission_measures_and_scores_into_the_folders_of_a_submission(
    encoder_artifact: Path, tmp_path: Path
) -> None:
    options = ["--user-conf", SMOKE, "--count", 8, "--test-mode", "submission"]
    with start(["bert-offline", *options, encoder_artifact, tmp_path]) as process:
        output, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    performance, accuracy = tmp_path / "performance" / "run_1", tmp_path / "accuracy"
    assert settings_of(performance)["effective_test_mode"] == "PerformanceOnly"
    assert settings_of(accuracy)["effective_test_mode"] == "AccuracyOnly"
    assert len(json.loads((accuracy / "mlperf_log_accuracy.json").read_text())) == 8
    assert "'exact_match': " in (accuracy / "accuracy.txt").read_text()
    assert output.count("SUT name : BERT SUT") == 2


def test_ctrl_c_in_a_server_run_ends_with_130_and_whole_lines(artifact: Path, tmp_path: Path) -> None:
    conf = tmp_path / "user.conf"
    conf.write_text("*.Server.target_qps = 20\n*.Server.min_duration = 600000\n")
    options = ["--user-conf", conf, "--count", 8, "--max-output-tokens", MAX_OUTPUT_TOKENS]
    with start(["llama-3.1-server", *options, artifact, tmp_path / "logs"]) as process:
        deadline = time.monotonic() + TIMEOUT
        log = tmp_path / "logs" / "mlperf_log_detail.txt"
        while not (log.exists() and "generated_query_count" in log.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert "error: interrupted: " in errors
    assert "Traceback" not in errors
    assert "Result is : INVALID\n  Interrupted after " in output
    assert settings_of(tmp_path / "logs")["effective_min_duration_ms"] == 600_000  # every line is whole
    assert log.read_text().endswith("\n")


def test_every_benchmark_has_its_subcommand_and_help() -> None:
    names = {one.command for one in BENCHMARKS}
    assert {"bert-offline", "gpt-j-server", "llama-2-offline", "llama-3.1-server"} < names
    assert len(names) == 8
    for arguments in (["help", "llama-3.1-server"], ["llama-3.1-server", "-h"]):
        shown = CliRunner().invoke(cli, arguments)
        assert shown.exit_code == 0
        assert "[OPTIONS] ARTIFACT LOG_DIR" in shown.output
        assert "model key llama3_1-8b" in " ".join(shown.output.split())
    overview = CliRunner().invoke(cli, ["help"]).output
    for one in BENCHMARKS:
        model = "an encoder" if one.task == "encoder" else "a decoder"
        assert f"  {one.command:17}  Run {model} in the {one.scenario} scenario.\n" in overview
    assert "Run ARTIFACT, an encoder, in" in CliRunner().invoke(cli, ["help", "bert-server"]).output
    assert CliRunner().invoke(cli, ["help", "resnet-offline"]).exit_code == 2
    assert CliRunner().invoke(cli, ["-V"]).output == f"furiosa-mlperf {__version__}\n"


@pytest.mark.parametrize("command", ["llama-3.1-offline", "llama-2-server", "gpt-j-offline"])
def test_an_encoder_is_refused_where_tokens_are_generated(command: str, encoder_artifact: Path, tmp_path: Path) -> None:
    error = refusal([command, encoder_artifact, tmp_path])
    assert isinstance(error, UnsupportedError)
    assert "runs decoders, but" in str(error)
    assert "is of the task 'encoder'; give another artifact, or use bert-offline" in str(error)


def test_a_decoder_is_refused_where_texts_are_encoded(artifact: Path, tmp_path: Path) -> None:
    error = refusal(["bert-server", artifact, tmp_path])
    assert isinstance(error, UnsupportedError)
    assert "bert-server runs encoders, but" in str(error)
    assert "is of the task 'decoder'" in str(error)


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        (["--max-output-tokens", 8], UnsupportedError, "--max-output-tokens: an encoder generates no tokens"),
        (["-dp", 2], UnsupportedError, "an encoder runs as one replica"),
    ],
)
def test_what_an_encoder_does_not_have_is_refused(
    options: list[object], kind: type[FuriosaLLMError], said: str, encoder_artifact: Path, tmp_path: Path
) -> None:
    error = refusal(["bert-offline", *options, encoder_artifact, tmp_path])
    assert isinstance(error, kind)
    assert said in str(error)


def test_bad_files_and_folders_are_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    conf, empty = tmp_path / "user.conf", tmp_path / "empty.jsonl"
    conf.write_text("*.Server.target_pqs = 4\n")
    empty.write_text("\n")
    nowhere = tmp_path / "no-artifact"
    error = refusal(["gpt-j-server", "--user-conf", conf, nowhere, tmp_path])
    assert isinstance(error, InputError)
    assert "line 1: LoadGen knows no setting 'target_pqs'" in str(error)
    error = refusal(["gpt-j-server", "--dataset", empty, nowhere, tmp_path])
    assert isinstance(error, InputError)
    assert "has no samples" in str(error)
    error = refusal(["gpt-j-server", nowhere, conf])
    assert isinstance(error, OutputFileError)
    assert f"LOG_DIR: {conf} cannot be written" in str(error)


def test_a_sample_without_room_for_its_completion_is_named(artifact: Path, tmp_path: Path) -> None:
    error = refusal(["llama-3.1-offline", "--max-output-tokens", 100_000, artifact, tmp_path])
    assert isinstance(error, InputError)
    assert "decoder.jsonl, line 1:" in str(error)
    assert "and 100000 for the completion, but the model has room for" in str(error)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("furiosa_llm.mlperf.cli.find_spec", lambda name: None if name == "rouge_score" else found(name))
    error = refusal(["bert-offline", tmp_path, tmp_path])
    assert isinstance(error, UnsupportedError)
    assert "needs rouge-score, which is not installed; run: pip install 'furiosa-llm-onnx[mlperf]'" in str(error)


def test_nothing_is_cached_between_samples(monkeypatch: pytest.MonkeyPatch, artifact: Path, tmp_path: Path) -> None:
    seen: list[EngineArgs] = []

    def refuse(args: EngineArgs, *_: object, **__: object) -> None:
        seen.append(args)
        raise UnsupportedError("far enough")

    monkeypatch.setattr("furiosa_llm.mlperf.run.load_model", refuse)
    options = ["--spare-blocks-ratio", 0.25, "--compute", "float32"]
    assert str(refusal(["gpt-j-offline", *options, artifact, tmp_path])) == "far enough"
    [args] = seen
    assert args.enable_prefix_caching is False
    assert (args.spare_blocks_ratio, args.compute) == (0.25, "float32")
