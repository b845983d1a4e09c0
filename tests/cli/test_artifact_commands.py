"""`unbuild` and `diff` on the command line: what they print, and their exit codes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from furiosa_llm import ArtifactBuilder
from furiosa_llm.cli.diff import _dim, _layouts
from tests.cli.conftest import Cli
from tests.support.artifacts import artifact_of


@pytest.fixture(scope="module")
def artifacts() -> dict[int, Path]:
    """Packed query, key and value over 4 and over 8 ranks."""
    return {size: artifact_of("tiny-phi3-optimum", size) for size in (4, 8)}


def test_unbuild(artifacts: dict[int, Path], tmp_path: Path, cli: Cli, zoo: Path) -> None:
    out = tmp_path / "new" / "m.onnx"
    result = cli("unbuild", artifacts[8], out)
    assert result.code == 0, result.err
    assert result.out.startswith(f"{out} and {out}.data: ")
    assert result.out.endswith("all as they were\n")
    expected, found = (onnx.load(path) for path in (zoo / "tiny-phi3-optimum" / "model.onnx", out))
    assert [i.raw_data for i in expected.graph.initializer] == [i.raw_data for i in found.graph.initializer]
    refused = cli("unbuild", artifacts[4], out)
    assert refused.code == 1
    assert refused.err.startswith(f"error: {out} exists already; give another output, or --force")
    assert cli("unbuild", artifacts[4], out, "--force").code == 0


def test_diff_of_the_same(artifacts: dict[int, Path], cli: Cli) -> None:
    result = cli("diff", artifacts[4], artifacts[4])
    assert result.code == 0
    assert result.out.startswith("the same artifact: ")
    document = json.loads(cli("diff", artifacts[4], artifacts[4], "--json").out)
    assert document["same"] is True


def test_diff_of_two_sizes(artifacts: dict[int, Path], cli: Cli, zoo: Path) -> None:
    result = cli("diff", artifacts[4], artifacts[8])
    assert result.code == 1
    assert "plan: mesh" in result.out
    assert "[2, 2, 2]" in result.out
    assert "1024/(0,1,2)" in result.out
    assert "weight:" not in result.out
    document = cli("diff", artifacts[4], artifacts[8], "--json")
    assert document.code == 1
    found = json.loads(document.out)
    text = (zoo.parents[1] / "docs" / "artifact-tools.md").read_text()
    documented = text[text.index("## diff") :]
    assert list(found) == re.findall(r"^\| `(\w+)` \|", documented, flags=re.MULTILINE)
    for section in ("graph", "plan", "weights", "files"):
        [row] = re.findall(rf"^\| `{section}` \|.*$", documented, flags=re.MULTILINE)
        assert [key for key in found[section] if f"`{key}`" not in row and f'"{key}"' not in row] == []
    assert found["plan"]["mesh"] == {"path": "mesh", "a": [2, 2], "b": [2, 2, 2]}


def test_layouts_for_people() -> None:
    heads = {"prod": [{"size": 2, "axes": [0]}, 16]}
    blocks = {"prefix": 176, "of": {"prod": [{"size": 6, "axes": [0, 1]}, 32]}}
    stored: list[dict[str, Any]] = [
        {"part": [1, 64, 128], "layout": [64, {"cat": [heads, 5]}]},
        {"part": None, "layout": [blocks]},
    ]
    text = "64..128 of dimension 1: [64, 2/(0)*16 + 5]\n[176 of (6/(0,1)*32)]"
    assert _layouts(stored) == text
    assert _layouts([]) == "in source.onnx"
    assert _dim({"prod": [{"cat": [heads, heads]}, 3]}) == "(2/(0)*16 + 2/(0)*16)*3"


def test_diff_of_other_weights(artifacts: dict[int, Path], tmp_path: Path, cli: Cli, zoo: Path) -> None:
    proto = onnx.load(zoo / "tiny-phi3-optimum" / "model.onnx")
    array = onnx.numpy_helper.to_array(proto.graph.initializer[0]).copy()
    array.flat[0] += 1
    proto.graph.initializer[0].raw_data = array.tobytes()
    onnx.save(proto, tmp_path / "model.onnx")
    ArtifactBuilder(tmp_path / "model.onnx").build(tmp_path / "artifact")
    result = cli("diff", artifacts[4], tmp_path / "artifact")
    assert result.code == 1
    assert f"weight: {proto.graph.initializer[0].name}" in result.out
    assert "1 element differ" in result.out


def test_diff_of_what_is_no_artifact(artifacts: dict[int, Path], tmp_path: Path, cli: Cli) -> None:
    result = cli("diff", artifacts[4], tmp_path)
    assert result.code == 2
    assert result.err.startswith(f"error: {tmp_path} is not an artifact")


@pytest.mark.parametrize("command", ["generate", "run"])
def test_altered_weights_are_refused_unless_told_otherwise(
    command: str, artifacts: dict[int, Path], tmp_path: Path, cli: Cli
) -> None:
    """Below 1 GB every byte is compared with its digest; both fail for want of something else after that."""
    shutil.copytree(artifacts[4], tmp_path / "a")
    weights = tmp_path / "a" / "weights-00001.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    np.savez(tmp_path / "in.npz")
    files = ("--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "o")
    rest = ("--prompt", "x") if command == "generate" else files
    assert "weights-00001.safetensors was altered" in cli(command, tmp_path / "a", *rest).err
    assert "was altered" not in cli(command, tmp_path / "a", *rest, "--no-full-verification").err
