"""`furiosa-llm verify`: exit codes, what is shown, and what is recorded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from furiosa_llm.cli import verify as command
from furiosa_llm.runtime import open_artifact
from furiosa_llm.runtime.artifact.manifest import RECORD_NAME
from furiosa_llm.runtime.artifact.tools.record import RecordError, read_verification
from tests.cli.conftest import OPTIMUM, Cli
from tests.support.tampering import alter_tensor, flip_bit

SHORT = ("--max-tokens", 2, "--prompt", "hello")


@pytest.fixture
def artifact(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "artifact")
    return tmp_path / "artifact"


def test_structure_and_proof_need_nothing(artifact: Path, cli: Cli) -> None:
    result = cli("verify", artifact)
    assert result.code == 0
    assert "proof: program and manifest alone show that the ranks compute one unsplit model" in result.out
    assert "\nverified\n" in result.out
    record = read_verification(artifact)
    assert record is not None
    assert record.passed
    assert [check.name for check in record.checks] == ["structure", "proof", "weights"]
    open_artifact(artifact, full=True)  # the record is no part of it


def test_full_shows_every_check_and_every_output(artifact: Path, cli: Cli) -> None:
    result = cli("verify", artifact, "--full", *SHORT)
    assert result.code == 0, result.out
    for name in ("structure", "proof", "weights", "originals", "padding", "stitched", "executor", "tokens"):
        assert f"\n{name}: " in result.out
    for shown in (
        "all ranks in one graph",
        "prefill",
        "decode",
        "chunk",
        "present.1.value",
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


def test_no_record(artifact: Path, cli: Cli) -> None:
    result = cli("verify", artifact, "--no-record")
    assert result.code == 0
    assert not (artifact / RECORD_NAME).exists()
    assert "recorded" not in result.out


def test_results_are_shown_before_a_record_fails(artifact: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    (artifact / RECORD_NAME).mkdir()  # which no file can replace
    result = cli("verify", artifact)
    assert result.code == 1
    assert "\nverified\n" in result.out
    assert result.err.startswith("error: ")
    assert "--no-record" in result.err

    def read_only(folder: Path, _: object) -> Path:
        raise RecordError(f"{folder} cannot be written")

    monkeypatch.setattr(command, "write_verification", read_only)
    assert cli("verify", artifact, "--no-record").code == 0
    assert cli("verify", artifact).code == 1


def test_no_artifact(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "no artifact at" in refused("verify", tmp_path / "none")
    assert "it has no manifest.json" in refused("verify", tmp_path)
    assert list(tmp_path.iterdir()) == []
