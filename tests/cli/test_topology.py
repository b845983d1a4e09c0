"""`furiosa-llm topology`: a drawing for people, an object for programs, and refusals that say what would do."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from furiosa_llm.runtime import open_artifact
from furiosa_llm.runtime.artifact.card import PE_NBYTES
from furiosa_llm.runtime.engine import launch
from furiosa_llm.runtime.placement.block_reads import read_blocks
from furiosa_llm.runtime.placement.capacity import card_memory, check_weights, stage_memory
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.placement.topology import make_topology
from furiosa_llm.runtime.placement.workload import Workload
from tests.cli.conftest import Cli
from tests.support.artifacts import artifact_of
from tests.support.runtime.stages import FixedCluster

TIED = "tiny-llama-tied-genai-int4-shared"


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows, headers left out."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


def shown(cli: Cli, *arguments: object) -> Any:
    result = cli("topology", *arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_the_drawing(built: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = cli("topology", built, "--devices", "npu:0,npu:1", "-pp", 2)
    assert result.code == 0
    assert max(map(len, result.out.splitlines())) <= 80
    assert result.out.startswith("tiny-llama-optimum: tp 4 x pp 2 x dp 2 = 16 PEs on npu:0,npu:1\n")
    assert rows(result.out) == [
        ["npu:0", "replica 0, stage 0", "replica 1, stage 0"],
        ["", "ranks 0-3", "ranks 0-3"],
        ["npu:1", "replica 0, stage 1", "replica 1, stage 1"],
        ["", "ranks 0-3", "ranks 0-3"],
        ["0", "0", "50.2 kB (30%)", "-", "116 kB", "65.5 kB", "950 kB"],
        ["1", "1", "116 kB (70%)", "256 B", "116 kB", "65.5 kB", "2.4 MB"],
        ["npu:0", "8", "463 kB", "524 kB", "7.6 MB", "48.0 GB", "48.0 GB", "6.0 GB"],
        ["npu:1", "8", "463 kB", "524 kB", "19.1 MB", "48.0 GB", "48.0 GB", "6.0 GB"],
    ]
    assert "for 1 sequence of 512 tokens" in result.out
    assert "It fits: each replica has room for" in result.out


def test_the_hosts_of_cards(built: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FixedCluster([])
    monkeypatch.setattr(launch, "open_cluster", lambda topology, args: cluster)
    given = (built, "--devices", "npu:1,npu:3", "-pp", 2, "--ray-address", "auto")
    drawn = rows(cli("topology", *given).out)
    assert [row[0] for row in drawn[:4]] == ["npu:1", "host1", "npu:3", "host3"]
    assert {(one["pe"], one["host"]) for one in shown(cli, *given)["pes"]} == {
        (f"npu:{card}:{pe}", f"host{card}") for card in (1, 3) for pe in range(8)
    }
    assert cluster.closed


def test_the_machine_that_is_needed(built: Path, cli: Cli) -> None:
    found = rows(cli("topology", built).out)
    assert found[0] == ["npu:0", "replica 0, stage 0", "-"]
    assert found[2][:2] == ["0", "0-1"]
    assert shown(cli, built)["devices"] == "npu:0:0-3"
    assert shown(cli, built, "-dp", 3)["devices"] == "npu:0,npu:1:0-3"


def test_the_object(built: Path, cli: Cli) -> None:
    found = shown(cli, built, "--devices", "npu:2 , npu:0", "-pp", 2, "--max-batch-size", 4, "--max-model-len", 100)
    artifact, workload = open_artifact(built), Workload(max_batch_size=4, max_model_len=100)
    placed = make_topology(4, pipeline_parallel_size=2, devices="npu:0,npu:2")
    stages = choose_stages(artifact, pipeline_parallel_size=2)
    memory = stage_memory(artifact, stages, workload)
    assert [found[f"{kind}_parallel_size"] for kind in ("tensor", "pipeline", "data")] == [4, 2, 2]
    assert found["devices"] == "npu:0,npu:2"
    assert {one["pe"]: (one["replica"], one["stage"], one["rank"]) for one in found["pes"]} == {
        str(pe): (replica, stage, rank)
        for replica, groups in enumerate(placed.replicas)
        for stage, group in enumerate(groups)
        for rank, pe in enumerate(group)
    }
    assert found["workload"] == {"max_batch_size": 4, "max_model_len": 100, "prefill_chunk_size": 256}
    assert [one["weight_nbytes"] for one in found["stages"]] == [stage.weight_nbytes for stage in stages]
    assert [one["kv_nbytes_per_token"] for one in found["stages"]] == [128, 128]
    assert [one["crossing"] for one in found["stages"]] == [[], ["/model/layers.1/input_layernorm/Cast_output_0"]]
    cards = card_memory(placed, memory, workload)
    assert [one["free_nbytes"] for one in found["cards"]] == [card.free_nbytes for card in cards]
    assert found["pe_nbytes"] == PE_NBYTES
    assert found["fits"] is True
    assert found["fault"] is None
    spared = 8 * PE_NBYTES - cards[1].weight_nbytes - cards[1].activation_nbytes
    assert found["kv_tokens"] == spared // (2 * 4 * 128)


def test_blocks_counted_out(cli: Cli) -> None:
    """An encoder of seven blocks, which keeps no cache."""
    bert = artifact_of("tiny-bert-optimum")
    found = shown(cli, bert, "--num-blocks-per-pp-stage", "1, 4,2")
    assert [(one["first_block"], one["num_blocks"]) for one in found["stages"]] == [(0, 1), (1, 4), (5, 2)]
    assert found["kv_tokens"] is None
    text = cli("topology", bert, "-pp", 3).out
    assert "The model keeps no KV cache." in text
    assert [row[1] for row in rows(text)[-6:-3]] == ["0-2", "3-5", "6"]


def test_a_tied_embedding_is_kept_in_two_stages(cli: Cli) -> None:
    tied = artifact_of(TIED)
    artifact = open_artifact(tied)
    whole, halves = shown(cli, tied), shown(cli, tied, "-pp", 2)
    (table,) = {
        name
        for node in artifact.program.graph.node
        if node.op_type == "GatherBlockQuantized"
        for name in node.input
        if name in artifact.tensors
    }  # the scales; the codes are reshaped first
    kept = [one["weight_nbytes"] for one in halves["stages"]]
    assert sum(kept) > whole["stages"][0]["weight_nbytes"]
    assert halves["stages"][1]["cost_nbytes"] > halves["stages"][0]["cost_nbytes"]
    assert table in read_blocks(artifact)[1].kept
    assert sum(one["cost_nbytes"] for one in halves["stages"]) == whole["stages"][0]["cost_nbytes"]


def test_what_does_not_fit_is_said(built: Path, cli: Cli) -> None:
    result = cli("topology", built, "--max-batch-size", 50_000)
    assert result.code == 0
    assert "It does not fit: each replica has room for " in result.out
    assert "and 25,600,000 are wanted" in result.out
    assert shown(cli, built, "--max-batch-size", 50_000)["fits"] is False
    activations = cli("topology", built, "--max-batch-size", 1_000_000)
    assert "It does not fit: npu:0 is to hold 926 kB of weights and " in activations.out


def test_what_would_fit_is_said(built: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    small = functools.partial(check_weights, pe_nbytes=150_000)
    monkeypatch.setattr("furiosa_llm.runtime.placement.capacity.check_weights", small)
    result = cli("topology", built)
    assert result.code == 0
    assert "which is 326 kB more than their 600 kB; use pp=2, which fits." in result.out
    found = shown(cli, built)
    assert found["fits"] is False
    assert found["fault"].endswith("use pp=2, which fits")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--devices", "npu:0,npu:1,npu:2,npu:3", "-pp", 2, "-dp", 2),
            "4 x 2 x 2 = 16, but npu:0,npu:1,npu:2,npu:3 have 32 PEs: use dp=4, or --devices npu:0,npu:1",
        ),
        (("--devices", "npu:0", "-pp", 2), "Cannot form a proper pp group"),
        (("--devices", "npu1"), "Invalid device string: 'npu1'"),
        (("--devices", "npu:0,npu:0:1"), "npu:0:1 is given twice, by 'npu:0' and 'npu:0:1'"),
        (("--tensor-parallel-size", 8), "tensor_parallel_size=8, but"),
        (("-pp", 3), "pp=3, but the artifact has 2 blocks"),
        (("-pp", 2, "--num-blocks-per-pp-stage", "1,1"), "Only one of `pipeline_parallel_size`"),
        (("--num-blocks-per-pp-stage", "1,2"), "has 3 blocks in all, but the artifact has 2"),
        (("--max-model-len", 513), "--max-model-len 513 is more than the model's limit of 512 tokens"),
    ],
)
def test_refusals(arguments: tuple[object, ...], message: str, built: Path, refused: Callable[..., str]) -> None:
    assert message in refused("topology", built, *arguments)


def test_allow_subset(built: Path, cli: Cli) -> None:
    found = shown(cli, built, "--devices", "npu:0,npu:1,npu:2,npu:3", "-pp", 2, "-dp", 2, "--allow-subset")
    assert found["devices"] == "npu:0,npu:1"


@pytest.mark.parametrize("counts", ["", "1,", "a", "0,2", "1;1", "²"])
def test_block_counts_that_are_none(counts: str, built: Path, cli: Cli) -> None:
    result = cli("topology", built, "--num-blocks-per-pp-stage", counts)
    assert result.code == 2
    assert f"must be a list of integers such as 10,20, got {counts}" in result.err


@pytest.mark.parametrize("option", ["-pp", "-dp", "--max-batch-size", "--max-model-len"])
def test_sizes_are_positive(option: str, built: Path, cli: Cli) -> None:
    result = cli("topology", built, option, 0)
    assert result.code == 2
    assert "must be an integer of at least 1, got 0" in result.err
