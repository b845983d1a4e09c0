"""What has no CPU kernel here is known before anything is written: asked of onnxruntime, and said."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from furiosa_llm.builder import ArtifactBuilder, UnsupportedModelError, plan_model, reshard
from furiosa_llm.builder.lower import kernels
from furiosa_llm.builder.lower.kernels import MissingKernel, described, missing_kernels
from furiosa_llm.cli.main import cli
from furiosa_llm.runtime.artifact.reader import open_artifact
from tests.support.builder.exported import exported
from tests.support.builder.graphs import model as written
from tests.support.float32 import narrowed

ZOO = Path(__file__).parents[3] / "fixtures" / "zoo"


def missing(model: Path) -> tuple[MissingKernel, ...]:
    return plan_model(model, tensor_parallel_sizes=(4,)).missing_kernels


@pytest.fixture
def doubles(tmp_path: Path) -> Path:
    """A model with an op that has a kernel for float32 alone, computed in float64."""
    weights = {"w": np.ones((8, 8))}
    proto = written("double[batch, 8] past_x", "double[batch, 8] y", "a = MatMul(past_x, w) y = Erf(a)", weights)
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def registered(op: str, dtype: str) -> bool:
    """Whether onnxruntime's registry has a CPU kernel of the op for the type of its first type constraint."""
    name = f"tensor({dtype.lower()})"
    return any(
        name in kernel.type_constraints.get("T", kernel.type_constraints.get("T1", ()))
        for kernel in ort.get_all_opkernel_def()
        if kernel.op_name == op and kernel.provider == "CPUExecutionProvider"
    )


def test_a_session_finds_what_the_registry_says(tmp_path: Path) -> None:
    found = missing(exported("mobius-bf16", tmp_path))
    assert {one.op for one in found} >= {"MatMul", "Mul", "Where"}
    for one in found:
        assert not registered(one.op, "bfloat16"), one
        assert one.in_float32
    assert [one.op for one in missing(exported("nvfp4", tmp_path))] == ["DequantizeLinear"]


@pytest.mark.parametrize("name", ["tiny-llama-genai-fp16-cuda", "tiny-llama-genai-int4", "tiny-bert-optimum"])
def test_nothing_is_missing_of_what_runs(name: str) -> None:
    """onnxruntime casts float16 by itself, and has no kernel for most of its ops."""
    assert missing(ZOO / name / "model.onnx") == ()


def test_a_type_that_an_op_does_not_have(tmp_path: Path) -> None:
    """bfloat16 is no type of Sin before opset 22: a session refuses the model, and float32 would do."""
    proto = narrowed(written("float[batch, 8] past_x", "float[batch, 8] y", "y = Sin(past_x)"))
    onnx.save(proto, tmp_path / "model.onnx")
    assert missing(tmp_path / "model.onnx") == (MissingKernel(op="Sin", types=("BFLOAT16",), count=1, in_float32=True),)


def test_kinds_are_asked_once(tmp_path: Path) -> None:
    model = exported("nvfp4", tmp_path)
    [build] = plan_model(model, tensor_parallel_sizes=(4,)).builds
    before = kernels._has_kernel.cache_info().misses
    assert missing_kernels(build)
    assert kernels._has_kernel.cache_info().misses == before


def test_a_build_says_it_before_it_writes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said: list[str] = []

    def progress(stage: str, _: int, __: int) -> None:
        if stage == "write" and not said:
            said.append(caplog.text)

    model = exported("mobius-bf16", tmp_path)
    with caplog.at_level(logging.WARNING):
        report = ArtifactBuilder(model).build(tmp_path / "artifact", progress=progress)
    [line] = said
    assert "no CPU kernels here for" in line
    assert "MatMul of BFLOAT16 (15 nodes)" in line
    assert "runs with --compute float32" in line
    assert report.missing_kernels == missing(model)
    assert report.float32 is not None
    assert report.float32.weight_nbytes > 1.9 * report.weight_nbytes


def test_what_float32_does_not_help_is_refused(doubles: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"no CPU kernels here for Erf of DOUBLE \(1 nodes\).*--allow-no-ker"
    ):
        ArtifactBuilder(doubles).build(tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()
    report = ArtifactBuilder(doubles).build(tmp_path / "artifact", allow_no_kernel=True)
    assert [(one.op, one.in_float32) for one in report.missing_kernels] == [("Erf", False)]
    assert reshard(tmp_path / "artifact", tmp_path / "other", tensor_parallel_size=8).missing_kernels
    assert open_artifact(tmp_path / "other").manifest.mesh.size == 8


@pytest.mark.parametrize("option", ["--allow-no-kernel", "--plan-only"])
def test_command_lines(option: str, doubles: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["build", str(doubles), str(tmp_path / "artifact")])
    assert (result.exit_code, "--allow-no-kernel" in str(result.exception)) == (1, True)
    result = CliRunner().invoke(cli, ["build", str(doubles), str(tmp_path / "artifact"), option])
    assert result.exit_code == 0, result.output
    assert "Erf of DOUBLE (1 nodes)" in result.output
    result = CliRunner().invoke(cli, ["plan", str(doubles)])
    assert "no CPU kernels here for Erf of DOUBLE (1 nodes)." in result.output


def test_many_are_counted() -> None:
    many = [MissingKernel(op=f"Op{i}", types=("BFLOAT16",), count=1, in_float32=True) for i in range(11)]
    assert "Op7 of BFLOAT16 (1 nodes) and 3 more: the artifact runs with" in described(many)
