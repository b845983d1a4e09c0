"""`furiosa-llm inspect`: one screen for people, one object for programs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from furiosa_llm.runtime import open_artifact
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN
from furiosa_llm.runtime.artifact.manifest import RECORD_NAME
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.artifact.tools.inspection import inspect_artifact
from furiosa_llm.runtime.runners.batch import Companions
from furiosa_llm.runtime.runners.batch_invariance import BatchInvariance, KernelDifference, probe_batch_invariance
from tests.cli.conftest import Cli
from tests.support.artifacts import artifact_of
from tests.support.tampering import edit_manifest


@pytest.fixture
def artifact(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "artifact")
    return tmp_path / "artifact"


def lines(text: str) -> dict[str, str]:
    """The table's rows, put together again."""
    rows: dict[str, str] = {}
    key = ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("│")]
        if len(cells) == 4:
            key = cells[1] or key
            rows[key] = f"{rows.get(key, '')} {cells[2]}".strip()
    return rows


def test_one_screen(artifact: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = cli("inspect", artifact)
    assert result.code == 0
    assert len(result.out.splitlines()) <= 45
    assert max(map(len, result.out.splitlines())) <= 80
    assert result.out.startswith("tiny-llama-optimum: decoder, over 4 PEs [2, 2]")
    rows = lines(result.out)
    assert rows["limits"] == "512 tokens, vocabulary of 1024, ends at 2"
    assert rows["weights per PE"] == "231 kB of 894 kB (25.9%), nothing replicated"
    assert rows["state per PE"] == "256 B per token, 131 kB at the limit"
    assert rows["collectives"] == ("5 AllReduce over 4 PEs, 1.3 kB a token; 1 AllGather over 4 PEs, 4.1 kB a token")
    assert "feed-forward, 176 over 4 PEs (2x)" in rows["split"]
    assert rows["attention"] == "2 fused, 0 left as they are"
    assert rows["block"].startswith("block.0: 142 nodes, 3 collectives, 116 kB of weights per PE")
    assert rows["manifest"].startswith(f"digest {inspect_artifact(artifact).digest[:16]}...")
    assert rows["verification"] == "none; run `furiosa-llm verify`"


def test_padding_and_what_is_replicated(cli: Cli) -> None:
    rows = lines(cli("inspect", artifact_of("tiny-llama-9-3-optimum")).out)
    assert "of them padding" in rows["stored, all PEs"]
    assert "padded to 4" in rows["split"]


def test_all_of_it_as_json(artifact: Path, cli: Cli) -> None:
    assert cli("verify", artifact).code == 0
    result = cli("inspect", artifact, "--json")
    assert result.code == 0
    found = json.loads(result.out)
    assert found == json.loads(json.dumps(inspect_artifact(artifact).to_json()))
    assert list(found) == [
        *("digest", "model", "mesh", "num_nodes", "weights", "state", "float32", "collectives", "splits", "replicated"),
        *("refused", "notes", "attention", "blocks", "inputs", "outputs", "states", "files", "provenance"),
        "verification",
    ]
    assert found["provenance"]["options"]["tensor_parallel_size"] == 4
    assert found["verification"]["status"] == "passed"
    assert [split["role"] for split in found["splits"]][:2] == ["vocabulary", "output"]


def test_alike_blocks_are_one_line(artifact: Path, cli: Cli) -> None:
    """Every node before the first collective is a block of its own."""
    nodes = open_artifact(artifact).program.graph.node
    count = next(position for position, node in enumerate(nodes) if node.domain == COLLECTIVE_DOMAIN)
    assert count > 3

    def many(manifest: dict[str, Any]) -> None:
        block = {"weight_nbytes": 5000, "crossing": []}
        manifest["blocks"] = [
            {"name": f"block.{i}", "first_node": i, "collectives": 0 if i < count else 6, **block}
            for i in range(count + 1)
        ]
        manifest["plan"]["choices"] *= 4

    edit_manifest(artifact, many)
    rows = lines(cli("inspect", artifact).out)
    assert rows["blocks"] == (
        f"block.0 .. block.{count - 1}, {count} alike: 1 node, 0 collectives, 5.0 kB of weights per PE"
    )
    assert rows["block"].startswith(f"block.{count}: {len(nodes) - count} nodes, 6 collectives")
    assert "12 more; --json has all" in rows["split"]


def test_verification(artifact: Path, cli: Cli) -> None:
    assert cli("verify", artifact).code == 0
    assert lines(cli("inspect", artifact).out)["verification"] == (
        "verification.json, which nobody signs, says passed: static proof that the ranks compute one model; program "
        "and manifest compared with source.onnx lowered again; weights compared with their digests; no output was "
        "compared"
    )
    record = json.loads((artifact / RECORD_NAME).read_bytes())
    del record["checks"]["weights"]
    (artifact / RECORD_NAME).write_text(json.dumps(record))
    assert lines(cli("inspect", artifact).out)["verification"] == (
        "verification.json, which nobody signs, says passed: static proof that the ranks compute one model; program "
        "and manifest compared with source.onnx lowered again; weights were not read; no output was compared"
    )
    record["checks"]["proof"] |= {"passed": False, "faults": ["a collective is missing"]}
    record["passed"] = False
    (artifact / RECORD_NAME).write_text(json.dumps(record))
    assert lines(cli("inspect", artifact).out)["verification"] == "FAILED: proof; a collective is missing"
    record["manifest_digest"] = "ab" * 32
    (artifact / RECORD_NAME).write_text(json.dumps(record))
    assert (
        "vouches for another manifest, abababababababab..., not for"
        in lines(cli("inspect", artifact).out)["verification"]
    )
    (artifact / RECORD_NAME).write_text("{}")
    result = cli("inspect", artifact)
    assert result.code == 0
    assert lines(result.out)["verification"].startswith("unreadable: verification.json $: found an object without it")


def test_names_cannot_steer_the_terminal(artifact: Path, cli: Cli) -> None:
    edit_manifest(artifact, lambda manifest: manifest["model"].update(name="\x1b[2J[bold]x\n"))
    result = cli("inspect", artifact)
    assert "\x1b" not in result.out
    assert result.out.startswith("\\u001b[2J[bold]x\\n: decoder")


def test_the_kernels_of_this_machine(artifact: Path, cli: Cli) -> None:
    found = json.loads(cli("inspect", artifact, "--this-machine", "--json").out)["this_machine"]
    assert found.keys() == {"differences", "companions", "chunks", "unprobed", "invariant"}
    assert "this_machine" not in json.loads(cli("inspect", artifact, "--json").out)
    rows = lines(cli("inspect", artifact, "--this-machine").out)
    assert rows["bits here"] == str(probe_batch_invariance(open_artifact(artifact)))
    assert rows["chunks here"].startswith("a prompt that is cut is computed ")
    assert ("remedy" in rows) == (not found["invariant"])


def test_what_differs_is_named(artifact: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    difference = KernelDifference(op="MatMul", node="q", nodes=2, rows=(1,), relative=2.5e-7)
    probed = BatchInvariance(differences=(difference,), companions=Companions(lone=True), chunks=False, unprobed=())
    asked: list[bool] = []

    def probe(_: Artifact, *, mapped: bool) -> BatchInvariance:
        asked.append(mapped)
        return probed

    monkeypatch.setattr("furiosa_llm.runtime.runners.batch_invariance.probe_batch_invariance", probe)
    rows = lines(cli("inspect", artifact, "--this-machine", "--mapped").out)
    assert rows["bits here"] == str(probed)
    assert rows["differs"] == "MatMul, 2 nodes, most in q: rows 1"
    assert rows["remedy"] == "batch_invariant=True, --batch-invariant"
    assert "prefix caching may change last bits" in rows["chunks here"]
    assert asked == [True]


def test_models_without_batches_are_not_probed(
    artifact: Path, encoder_artifact: Path, refused: Callable[..., str]
) -> None:
    assert "--mapped goes with --this-machine" in refused("inspect", artifact, "--mapped")
    assert "is an encoder, which runs one request at a time" in refused("inspect", encoder_artifact, "--this-machine")


def test_what_is_no_artifact(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "it has no manifest.json" in refused("inspect", tmp_path)
    assert "no artifact at" in refused("inspect", tmp_path / "none", "--json")


def test_every_key_is_documented(artifact: Path, cli: Cli) -> None:
    text = (Path(__file__).parents[2] / "docs" / "artifact-tools.md").read_text()
    section = text[text.index("## inspect") : text.index("## unbuild")]
    found = json.loads(cli("inspect", artifact, "--json").out)
    named = {*found, *found["weights"], *found["state"], *found["collectives"][0], *found["blocks"][0]}
    assert {key for key in named | {"status", "detail", "checks", "faults"} if f"`{key}`" not in section} == set()
