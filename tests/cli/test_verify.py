"""`furiosa-llm verify`: exit codes, what is shown, and what is recorded."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from furiosa_llm.runtime import open_artifact
from furiosa_llm.runtime.artifact.manifest import RECORD_NAME
from furiosa_llm.runtime.artifact.tools.record import RecordError, read_verification
from furiosa_llm.runtime.artifact.tools.unbuild import unbuild
from furiosa_llm.runtime.errors import StepTimeoutError
from tests.cli.conftest import OPTIMUM, Cli
from tests.support.artifacts import ZOO
from tests.support.tampering import alter_tensor, flip_bit, reseal

SHORT = ("--max-tokens", 2, "--prompt", "hello", "--max-length", 32)


@pytest.fixture
def artifact(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "artifact")
    return tmp_path / "artifact"


def test_structure_and_proof_need_nothing(artifact: Path, cli: Cli) -> None:
    result = cli("verify", artifact)
    assert result.code == 0
    assert "proof: program and manifest alone show that the ranks compute one unsplit model" in result.out
    assert "\nverified: static proof that the ranks compute one model; program and manifest compared with" in result.out
    assert "no output was compared\n" in result.out
    record = read_verification(artifact)
    assert record is not None
    assert record.passed
    assert [check.name for check in record.checks] == ["structure", "proof", "lowering", "weights"]
    open_artifact(artifact, full=True)  # the record is no part of it


def test_full_shows_every_check_and_every_output(artifact: Path, cli: Cli) -> None:
    result = cli("verify", artifact, "--full", "--verbose", "--progress", *SHORT)
    assert result.code == 0, result.out
    for doing in ("proving the program", "reading all weights", "comparing outputs with the model's"):
        assert f"\n{doing}" in result.err
    for name in (
        *("structure", "proof", "lowering", "weights", "originals", "padding"),
        *("stitched", "executor", "tokens", "engine"),
    ):
        assert f"\n{name}: " in result.out
    for shown in (
        "ranks in one graph",
        "prefill 2x9",
        "decode 1x1 behind 31",
        "chunk",
        "decode from a moved slot",
        "the unsplit model put back together from this artifact, at",
        "'hello': 2 greedy tokens",
    ):
        assert shown in result.out
    assert "FAILED" not in result.out


def test_a_damaged_artifact_is_shown_and_recorded(artifact: Path, cli: Cli) -> None:
    assert cli("verify", artifact).code == 0
    alter_tensor(artifact, "onnx::MatMul_733", flip_bit)
    result = cli("verify", artifact)
    assert result.code == 1
    assert "weights: FAILED" in result.out
    assert "stored tensor 'onnx::MatMul_733': found sha256" in result.out
    assert "NOT verified" in result.out
    record = read_verification(artifact)
    assert record is not None
    assert not record.passed
    (artifact / "program.onnx").unlink()
    result = cli("verify", artifact)
    assert (result.code, "program.onnx is missing" in result.out) == (1, True)
    record = read_verification(artifact)
    assert record is not None
    assert [(check.name, check.passed) for check in record.checks] == [("structure", False)]


def test_another_model(artifact: Path, zoo: Path, tmp_path: Path, cli: Cli, refused: Callable[..., str]) -> None:
    model = onnx.load(zoo / OPTIMUM / "model.onnx")
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    largest.raw_data = bytes(len(largest.raw_data))
    onnx.save(model, tmp_path / "model.onnx")
    result = cli("verify", artifact, "--against", tmp_path / "model.onnx", *SHORT)
    assert result.code == 1
    assert f"initializer '{largest.name}' of the model is of sha256" in result.out
    assert "executor: FAILED" in result.out
    message = refused("verify", artifact, "--against", zoo / "tiny-bert-optimum" / "model.onnx", "--no-record")
    assert "give the model that the artifact was built from" in message
    assert "does not exist" in refused("verify", artifact, "--against", tmp_path / "none.onnx")


def test_a_tolerance_that_cannot_be_kept(artifact: Path, zoo: Path, cli: Cli) -> None:
    model = zoo / OPTIMUM / "model.onnx"
    result = cli("verify", artifact, "--against", model, "--tolerance", 0, "--threads", 1, *SHORT)
    assert result.code == 1
    assert "tolerance 0)" in result.out
    assert cli("verify", artifact, "--tolerance", -1).code == 2
    assert cli("verify", artifact, "--threads", 0).code == 2


def test_json(artifact: Path, cli: Cli) -> None:
    result = cli("verify", artifact, "--full", "--json", *SHORT)
    assert result.code == 0
    found = json.loads(result.out)
    record = read_verification(artifact)
    assert record is not None
    assert found["record"] == json.loads(json.dumps(record.to_json()))
    assert (found["passed"], found["words"]) == (True, record.words)
    assert found["recorded"] == str(artifact / RECORD_NAME)
    assert {error["case"] for error in found["comparison"]["executor"]} >= {"prefill 2x9"}
    assert found["comparison"]["tokens"][0]["first_difference"] is None


def test_the_summary_has_a_line_for_each_check(artifact: Path, cli: Cli) -> None:
    result = cli("verify", artifact)
    record = read_verification(artifact)
    assert record is not None
    names = [line.partition(":")[0] for line in result.out.splitlines()]
    assert names == [*(check.name for check in record.checks), "verified", f"recorded in {artifact / RECORD_NAME}"]


def test_a_read_only_artifact_is_verified(artifact: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    result = cli("verify", artifact)
    assert result.code == 0
    assert "\nverified: " in result.out
    assert "recorded in" not in result.out
    assert result.err.startswith("note: nothing was recorded: ")
    assert "Read-only file system" in result.err
    alter_tensor(artifact, "onnx::MatMul_733", flip_bit)
    assert cli("verify", artifact).code == 1


def test_no_record(artifact: Path, cli: Cli) -> None:
    result = cli("verify", artifact, "--no-record")
    assert result.code == 0
    assert not (artifact / RECORD_NAME).exists()
    assert "recorded" not in result.out


def test_results_are_shown_before_a_record_fails(artifact: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    (artifact / RECORD_NAME).mkdir()  # which no file can replace
    result = cli("verify", artifact)
    assert result.code == 1
    assert "\nverified: " in result.out
    assert result.err.startswith("error: ")
    assert "--no-record" in result.err

    def read_only(folder: Path, _: object) -> Path:
        raise RecordError(f"{folder} cannot be written")

    monkeypatch.setattr("furiosa_llm.runtime.artifact.tools.record.write_verification", read_only)
    assert cli("verify", artifact, "--no-record").code == 0
    assert cli("verify", artifact).code == 1


def test_no_artifact(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "no artifact at" in refused("verify", tmp_path / "none")
    assert "it has no manifest.json" in refused("verify", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_can_be_repeated(artifact: Path, cli: Cli) -> None:
    alter = onnx.load_model(artifact / "program.onnx", load_external_data=False)
    next(node for node in alter.graph.node if node.op_type == "Sigmoid").op_type = "Tanh"
    (artifact / "program.onnx").write_bytes(alter.SerializeToString())
    reseal(artifact)
    failed = cli("verify", artifact, "--full", *SHORT)
    assert failed.code == 1
    found = re.search(r"repeat it with --seed (\d+)\n", failed.out)
    assert found is not None
    record = read_verification(artifact)
    assert record is not None
    assert record.compared is not None
    assert record.compared.seed == int(found[1])
    assert "repeat it with" not in cli("verify", artifact, "--no-record").out
    again = cli("verify", artifact, "--full", "--seed", found[1], *SHORT)
    assert [line for line in again.out.splitlines() if "prefill" in line] == [
        line for line in failed.out.splitlines() if "prefill" in line
    ]


def test_a_time_limit(artifact: Path, cli: Cli) -> None:
    """It holds for the digests of the weights, too: a file without contents may be longer than any disk."""
    result = cli("verify", artifact, "--full", "--time-limit", 0, *SHORT)
    assert result.code == 3
    for check in (
        "weights: not checked in time (",
        "originals: not checked in time (",
        "padding: not checked in time (",
    ):
        assert check in result.out
    assert "stitched" not in result.out
    assert "\ncould not be checked in time, and nothing is recorded; verify it again where less runs" in result.out
    assert "NOT verified" not in result.out
    assert not (artifact / RECORD_NAME).exists()
    assert "the verification took longer than its limit of 0 s; give a longer --time-limit (time_limit=)" in result.out
    assert cli("verify", artifact, "--time-limit", -1).code == 2


def test_a_time_limit_that_ends_the_comparison(artifact: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def late(*arguments: Any, **options: Any) -> Any:
        now[0] = 5.0
        return unbuild(*arguments, **options)

    monkeypatch.setattr("furiosa_llm.verification.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("furiosa_llm.verification.unbuild", late)
    assert cli("verify", artifact, "--full", "--time-limit", 5, *SHORT).code == 0
    now[0] = 0.0
    result = cli("verify", artifact, "--full", "--time-limit", 4, *SHORT)
    assert result.code == 3
    assert "padding: padding is zero (" in result.out
    assert "stitched: not checked in time (0 outputs" in result.out


def test_a_step_that_takes_too_long_is_no_difference(artifact: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object, step_timeout: float, **__: object) -> None:
        raise StepTimeoutError(f"not done within {step_timeout:g} s")

    monkeypatch.setattr("furiosa_llm.verification.Subject", slow)
    model = ZOO / OPTIMUM / "model.onnx"
    for given in (("--full",), ("--against", model)):
        result = cli("verify", artifact, *given, "--step-timeout", 0.5, "--json")
        assert result.code == 3
        found = json.loads(result.out)
        assert (found["passed"], found["undecided"], found["recorded"]) == (False, True, None)
        assert "not done within 0.5 s" in found["record"]["checks"]["stitched"]["faults"][0]
    alter_tensor(artifact, next(iter(open_artifact(artifact).tensors)), flip_bit)
    found = json.loads(cli("verify", artifact, "--against", model, "--step-timeout", 0.5, "--json").out)
    assert (found["passed"], found["undecided"]) == (False, False)
    assert found["recorded"] is not None
