"""`furiosa-llm reshard` and `furiosa-llm build --reuse-plan`: what they write, and what they say of bad input."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.builder.write.test_streaming import digests
from tests.cli.conftest import Cli
from tests.support.artifacts import artifact_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resharded")
    for size in (4, 8):
        shutil.copytree(artifact_of("tiny-llama-optimum", size), folder / str(size))
    return folder


def test_reshard(folder: Path, tmp_path: Path, cli: Cli) -> None:
    result = cli("reshard", folder / "4", tmp_path / "out", "-tp", 8, "--workers", 1)
    assert result.code == 0
    assert "tensor parallel over 8 PEs" in " ".join(result.out.split())
    assert "Artifact Build Completed" in result.out + result.err
    assert digests(tmp_path / "out") == digests(folder / "8")
    result = cli("reshard", folder / "4", tmp_path / "out", "-tp", 8)
    assert result.code == 1
    assert "exists already; give another output, or --force (force=True) to replace it" in result.out + result.err
    result = cli("reshard", folder / "8", tmp_path / "out", "-tp", 4, "--force")
    assert result.code == 0
    assert digests(tmp_path / "out") == digests(folder / "4")


def test_reshard_of_what_is_no_artifact(tmp_path: Path, cli: Cli) -> None:
    result = cli("reshard", tmp_path, tmp_path / "out", "-tp", 8)
    assert result.code == 1
    assert "is not an artifact: it has no manifest.json" in result.out + result.err
    assert list(tmp_path.iterdir()) == []


def test_build_by_a_plan(folder: Path, zoo: Path, tmp_path: Path, cli: Cli) -> None:
    model = zoo / "tiny-llama-optimum" / "model.onnx"
    result = cli("build", model, tmp_path / "out", "--reuse-plan", folder / "8")
    assert result.code == 0, result.err
    assert digests(tmp_path / "out") == digests(folder / "8")


@pytest.mark.parametrize("option", [("-tp", 4), ("--max-padding", 2), ("--no-fuse-attention",), ("--dim", "n=3")])
def test_options_that_do_not_go_with_a_plan(
    option: tuple[object, ...],
    folder: Path,
    zoo: Path,
    tmp_path: Path,
    cli: Cli,
) -> None:
    model = zoo / "tiny-llama-optimum" / "model.onnx"
    arguments = ("build", model, tmp_path / "out", "--reuse-plan", folder / "8", *option)
    result = cli(*arguments)
    assert result.code == 2
    assert (
        "does not go with --reuse-plan, which takes the artifact's own options; leave it out" in result.out + result.err
    )
    assert list(tmp_path.iterdir()) == []
