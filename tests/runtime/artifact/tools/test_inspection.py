"""What an artifact is said to hold, against figures that were worked out by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.manifest import RECORD_NAME
from furiosa_llm.runtime.artifact.tools.inspection import (
    Attention,
    BlockSummary,
    CollectiveSummary,
    Refusal,
    Split,
    alike,
    inspect_artifact,
)
from furiosa_llm.runtime.artifact.tools.record import Check, Verification, write_verification
from tests.support.runtime.models import LlamaSize, llama, mlp
from tests.support.runtime.spmd import WEIGHTS, file_entry
from tests.support.tampering import edit_manifest

MESH = Mesh((2, 2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return mlp(MESH, hidden=8, inner=30).write(tmp_path / "artifact")


def test_memory_and_collectives(folder: Path) -> None:
    """A is 8 x 30 and B 30 x 8 over four ranks: 8 columns and rows on each, 32 in all, of which 2 are padding."""
    found = inspect_artifact(folder)
    weights = found.weights
    assert weights.pe_nbytes == weights.split_nbytes == 2 * (8 * 8 * 4)
    assert weights.replicated_nbytes == 0
    assert weights.stored_nbytes == 2 * (8 * 32 * 4)
    assert weights.padding_nbytes == 2 * (8 * 2 * 4)
    assert weights.original_nbytes == 2 * (8 * 30 * 4)
    assert found.collectives == (CollectiveSummary(kind="AllReduce", axes=(0, 1), count=1, nbytes_per_token=8 * 4),)
    assert (found.mesh, found.num_nodes) == ((2, 2), 5)
    assert (found.state.nbytes_per_token, found.state.nbytes_at_limit) == (0, 0)
    assert found.digest == json.loads((folder / "manifest.json").read_bytes())["digest"]
    assert [file.path for file in found.files] == ["program.onnx", "source.onnx", WEIGHTS]


def test_states_and_what_is_replicated(tmp_path: Path) -> None:
    """Two layers of keys and values, 8 heads of 16 over four ranks, and an AllGather of a logits quarter."""
    size = LlamaSize(vocab=160, max_length=64)
    found = inspect_artifact(llama(MESH, size).write(tmp_path / "artifact"))
    assert found.state.nbytes_per_token == 2 * 2 * (8 // 4) * 16 * 4
    assert found.state.nbytes_at_limit == 64 * found.state.nbytes_per_token
    kinds = {group.kind: group for group in found.collectives}
    assert (kinds["AllReduce"].count, kinds["AllReduce"].nbytes_per_token) == (4, 4 * 64 * 4)
    assert (kinds["AllGather"].count, kinds["AllGather"].nbytes_per_token) == (1, 160 * 4)
    largest = found.replicated[0]
    assert (largest.name, largest.shape, largest.nbytes) == ("embed", (160, 64), 160 * 64 * 4)
    assert largest.readers == ("Gather",)
    assert found.weights.replicated_nbytes == sum(tensor.nbytes for tensor in found.replicated)
    by_name = {tensor.name: tensor for tensor in found.replicated}
    assert by_name["cos"].readers == ("GroupQueryAttention",)
    assert [tensor.nbytes for tensor in found.replicated] == sorted((t.nbytes for t in found.replicated), reverse=True)


def test_no_limit_is_known(tmp_path: Path) -> None:
    program = llama(MESH, LlamaSize(layers=1))
    program.max_sequence_length = None
    found = inspect_artifact(program.write(tmp_path / "artifact"))
    assert found.state.nbytes_at_limit is None


def test_aliases_count_once(folder: Path) -> None:
    before = inspect_artifact(folder).weights.original_nbytes
    source = onnx.load_model(folder / "source.onnx", load_external_data=False)
    source.graph.initializer.append(source.graph.initializer[0])
    source.graph.initializer[-1].name = "alias"
    (folder / "source.onnx").write_bytes(source.SerializeToString())

    def alias(manifest: dict[str, Any]) -> None:
        manifest["initializers"].append(manifest["initializers"][0] | {"name": "alias"})
        entry = next(entry for entry in manifest["files"] if entry["path"] == "source.onnx")
        found = file_entry(folder / "source.onnx")
        entry |= {"nbytes": found.nbytes, "sha256": found.sha256}

    edit_manifest(folder, alias)
    assert inspect_artifact(folder).weights.original_nbytes == before


def test_blocks(folder: Path) -> None:
    blocks = [
        {"name": f"block.{i}", "first_node": i, "collectives": count, "weight_nbytes": nbytes, "crossing": []}
        for i, (count, nbytes) in enumerate([(0, 7), (0, 9), (0, 9), (1, 9)])
    ]
    edit_manifest(folder, lambda manifest: manifest.update(blocks=blocks))
    found = inspect_artifact(folder).blocks
    assert [block.nodes for block in found] == [1, 1, 1, 2]
    assert [[block.name for block in run] for run in alike(found)] == [["block.0"], ["block.1", "block.2"], ["block.3"]]
    assert alike([]) == []
    one = BlockSummary(name="a", nodes=1, collectives=1, weight_nbytes=1)
    assert [len(run) for run in alike([one, dataclasses.replace(one, name="b", collectives=2)])] == [1, 1]


# -- the plan, which may be any object -----------------------------------------------------------------------------

CHOICE = {"role": "heads", "size": 9, "count": 2, "axes": [0], "parts": 2, "padded_size": 10, "where": "w", "more": 1}


def test_the_plan(folder: Path) -> None:
    plan = {
        "choices": [CHOICE],
        "refused": [{"size": 3, "where": "w", "axes": [], "reason": "because"}],
        "notes": ["one"],
        "attention": {"fused": 2, "left": ["x"]},
    }
    edit_manifest(folder, lambda manifest: manifest.update(plan=plan))
    found = inspect_artifact(folder)
    assert found.splits == (Split(role="heads", size=9, count=2, axes=(0,), parts=2, padded_size=10, where="w"),)
    assert found.refused == (Refusal(size=3, where="w", axes=(), reason="because"),)
    assert (found.notes, found.attention) == (("one",), Attention(fused=2, left=("x",)))


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"choices": 1, "refused": {}, "notes": "text", "attention": []},
        {"choices": [1, CHOICE | {"size": True}, CHOICE | {"axes": [None]}, {"role": "heads"}], "notes": [1]},
        {"refused": [{"size": 3, "where": "w", "axes": "0", "reason": "r"}], "attention": {"fused": "2", "left": []}},
    ],
)
def test_a_plan_of_another_form_is_left_out(plan: dict[str, Any], folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(plan=plan))
    found = inspect_artifact(folder)
    assert (found.splits, found.refused, found.notes, found.attention) == ((), (), (), None)


# -- verification --------------------------------------------------------------------------------------------------


def record(digest: str, *faults: str) -> Verification:
    checks = (Check(name="structure", checked=1), Check(name="weights", checked=3, faults=faults))
    return Verification(manifest_digest=digest, tool="t", libraries={}, checks=checks)


def test_what_the_record_says(folder: Path) -> None:
    assert inspect_artifact(folder).verification.status == "none"
    digest = inspect_artifact(folder).digest
    write_verification(folder, record(digest))
    passed = inspect_artifact(folder).verification
    assert (passed.status, passed.checks) == ("passed", {"structure": True, "weights": True})
    write_verification(folder, record(digest, "a bit is wrong"))
    failed = inspect_artifact(folder).verification
    assert (failed.status, failed.faults) == ("failed", ("a bit is wrong",))
    assert failed.checks == {"structure": True, "weights": False}


def test_a_record_of_another_manifest_says_nothing(folder: Path) -> None:
    write_verification(folder, record(inspect_artifact(folder).digest))
    edit_manifest(folder, lambda manifest: manifest["provenance"].update(tool="other"))
    found = inspect_artifact(folder).verification
    assert found.status == "another manifest"
    assert found.detail != inspect_artifact(folder).digest
    assert found.checks == {}


def test_an_unreadable_record_does_not_matter(folder: Path) -> None:
    (folder / RECORD_NAME).write_bytes(b"{")
    found = inspect_artifact(folder).verification
    assert found.status == "unreadable"
    assert found.detail.startswith("verification.json is not whole UTF-8 JSON")


# -- as JSON -------------------------------------------------------------------------------------------------------


def test_as_json(folder: Path) -> None:
    found = inspect_artifact(folder)
    document = json.loads(json.dumps(found.to_json()))
    assert list(document) == [field.name for field in dataclasses.fields(found)]
    assert document["weights"]["padding_nbytes"] == found.weights.padding_nbytes
    assert document["inputs"][0]["layout"] == [None, 8]
    assert document["collectives"] == [{"kind": "AllReduce", "axes": [0, 1], "count": 1, "nbytes_per_token": 32}]
    assert document["verification"] == {"status": "none", "detail": "", "checks": {}, "faults": [], "words": ""}


def test_weights_are_not_read_but_the_structure_is_checked(folder: Path) -> None:
    data = np.fromfile(folder / WEIGHTS, dtype=np.uint8)
    data[-1] ^= 1
    data.tofile(folder / WEIGHTS)
    inspect_artifact(folder)
    data[:-1].tofile(folder / WEIGHTS)
    with pytest.raises(ArtifactError, match=f"{WEIGHTS}: found {len(data) - 1} bytes"):
        inspect_artifact(folder)
