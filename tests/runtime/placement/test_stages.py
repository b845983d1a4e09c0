"""Stages: what a block costs by hand arithmetic, cuts compared with all cuts there are, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.runtime.artifact.layout import Leaf, Mesh
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.errors import TopologyError
from furiosa_llm.runtime.placement.block_reads import read_blocks
from furiosa_llm.runtime.placement.stages import balance, choose_stages
from furiosa_llm.runtime.program.stage_graph import RECOMPUTED_NBYTES
from tests.support.runtime.blocks import llama_blocks, with_blocks
from tests.support.runtime.models import LlamaSize, mlp
from tests.support.runtime.spmd import Spmd

MESH = Mesh((2, 2))
SIZE = LlamaSize(layers=5)
TP = 4
NORM = SIZE.hidden * 4
LAYER = (
    SIZE.hidden * (SIZE.heads + 2 * SIZE.kv_heads) * SIZE.head
    + SIZE.heads * SIZE.head * SIZE.hidden
    + 3 * SIZE.hidden * SIZE.inner
) * 4 // TP + 2 * NORM
"""What a layer reads: packed QKV, output, gate, up and down of one rank, and two whole norms."""
HEAD = SIZE.hidden * SIZE.vocab * 4 // TP
EMBEDDING = SIZE.vocab * SIZE.hidden * 4
ROTARY = 2 * SIZE.max_length * (SIZE.head // 2) * 4


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return llama_blocks(MESH, SIZE, tmp_path_factory.mktemp("llama"))


# The norm before the first layer is in the first block; that behind the last layer's sum is in the last, with the head;
# every layer has the norm of its own middle, and the one behind the layer before it.
COSTS = [LAYER, LAYER, LAYER, LAYER, LAYER + NORM + HEAD]


def test_what_a_decoded_token_reads(artifact: Artifact) -> None:
    assert [sum(block.decoded.values()) for block in read_blocks(artifact)] == COSTS


def test_tables_cost_nothing_and_take_memory(artifact: Artifact) -> None:
    (stage,) = choose_stages(artifact)
    assert (stage.first_block, stage.num_blocks) == (0, 5)
    assert (stage.first_node, stage.stop_node) == (0, len(artifact.program.graph.node))
    assert stage.cost_nbytes == sum(COSTS)
    assert stage.weight_nbytes == sum(COSTS) + EMBEDDING + ROTARY


def test_stages_cover_the_program_and_are_balanced(artifact: Artifact) -> None:
    first, second = choose_stages(artifact, pipeline_parallel_size=2)
    starts = [block.first_node for block in artifact.manifest.blocks]
    assert (first.index, first.first_block, first.num_blocks) == (0, 0, 3)
    assert (second.index, second.first_block, second.num_blocks) == (1, 3, 2)
    assert (first.first_node, first.stop_node) == (0, starts[3])
    assert (second.first_node, second.stop_node) == (starts[3], len(artifact.program.graph.node))
    assert (first.cost_nbytes, second.cost_nbytes) == (sum(COSTS[:3]), sum(COSTS[3:]))
    # Rotary tables are read in both stages, the embedding in the first only.
    assert first.weight_nbytes == sum(COSTS[:3]) + EMBEDDING + ROTARY
    assert second.weight_nbytes == sum(COSTS[3:]) + ROTARY


def test_blocks_counted_out(artifact: Artifact) -> None:
    stages = choose_stages(artifact, num_blocks_per_pp_stage=[1, 3, 1])
    assert [(stage.first_block, stage.num_blocks) for stage in stages] == [(0, 1), (1, 3), (4, 1)]
    assert [stage.cost_nbytes for stage in stages] == [COSTS[0], sum(COSTS[1:4]), COSTS[4]]


def test_an_artifact_without_blocks_is_one_stage(tmp_path: Path) -> None:
    artifact = open_artifact(mlp(MESH).write(tmp_path / "mlp"))
    (stage,) = choose_stages(artifact, pipeline_parallel_size=1)
    assert (stage.num_blocks, stage.stop_node) == (1, len(artifact.program.graph.node))
    assert stage.cost_nbytes == stage.weight_nbytes == 2 * 8 * 24 * 4 // TP


@pytest.mark.parametrize(
    ("pipeline", "counts", "message"),
    [
        (0, None, "pipeline_parallel_size must be at least 1, got 0"),
        (6, None, "pp=6, but the artifact has 5 blocks"),
        (2, (2, 3), "Only one of `pipeline_parallel_size` or `num_blocks_per_pp_stage` should be given as input"),
        (None, (2, 2), r"num_blocks_per_pp_stage \[2, 2\] has 4 blocks in all, but the artifact has 5"),
        (None, (2, 3, 1), r"has 6 blocks in all, but the artifact has 5; give numbers that add up to 5"),
        (None, (5, 0), r"one positive number for each stage, got \[5, 0\]"),
        (None, (6, -1), r"one positive number for each stage, got \[6, -1\]"),
        (None, (), r"one positive number for each stage, got \[\]"),
    ],
)
def test_refused(artifact: Artifact, pipeline: int | None, counts: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        choose_stages(artifact, pipeline_parallel_size=pipeline, num_blocks_per_pp_stage=counts)


def test_one_block_has_one_stage(tmp_path: Path) -> None:
    artifact = open_artifact(mlp(MESH).write(tmp_path / "mlp"))
    with pytest.raises(TopologyError, match=r"pp=2, but the artifact is one block: .*; use pp=1"):
        choose_stages(artifact, pipeline_parallel_size=2)


# -- cuts ----------------------------------------------------------------------------------------------------------


def all_cuts(count: int, stages: int) -> Iterator[tuple[int, ...]]:
    for inner in itertools.combinations(range(1, count), stages - 1):
        yield tuple(stop - start for start, stop in itertools.pairwise((0, *inner, count)))


def merit(costs: list[int], counts: tuple[int, ...]) -> tuple[int, int, int]:
    edges = [0, *itertools.accumulate(counts)]
    sums = [sum(costs[start:stop]) for start, stop in itertools.pairwise(edges)]
    return max(sums), sum(s * s for s in sums), sum(n * n for n in counts)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.integers(1, 9))
def test_no_cut_is_better(costs: list[int], stages: int) -> None:
    stages = min(stages, len(costs))
    found = balance(costs, stages)
    assert len(found) == stages
    assert min(found) >= 1
    assert sum(found) == len(costs)
    assert merit(costs, found) == min(merit(costs, cut) for cut in all_cuts(len(costs), stages))


@pytest.mark.parametrize(
    ("costs", "stages", "counts"),
    [
        ([1] * 8, 4, (2, 2, 2, 2)),
        ([1] * 6 + [6], 2, (6, 1)),
        ([9, 1, 1, 1, 1, 1], 3, (1, 2, 3)),  # 9 is the largest anyhow: the others share evenly
        ([1, 1, 1, 3, 5], 3, (3, 1, 1)),  # 3, 3, 5, though 2, 4, 5 are nearer in blocks
        ([0, 0, 0, 0], 2, (2, 2)),
        ([1] * 128, 32, (4,) * 32),
    ],
)
def test_known_cuts(costs: list[int], stages: int, counts: tuple[int, ...]) -> None:
    assert balance(costs, stages) == counts


# -- what a block reads --------------------------------------------------------------------------------------------


def two_blocks(folder: Path, *, table: int = 16) -> Artifact:
    """An embedding tied to the head, tables that both blocks need, experts, and tensors whose shapes alone are read."""
    program = Spmd(Mesh((4,)))
    program.input("ids", ["batch", "sequence"], "token_ids", "INT64")
    program.weight("embed", np.zeros((16, 8), np.float32), 16, Leaf(8, (0,)))
    program.weight("positions", np.zeros((table, 8), np.float32))
    program.weight("lengths", np.zeros((4, 8), np.float32))
    program.weight("matrix", np.zeros((8, 8), np.float32), 8, Leaf(8, (0,)))
    program.weight("shape_only", np.zeros((3, 8), np.float32))
    program.weight("routed", np.zeros((8, 2, 4), np.float32), Leaf(8, (0,)), 2, 4)
    program.weight("per_expert", np.zeros((8, 5), np.float32), 8, 5)
    program.node("Transpose", ["embed"], "head")  # follows from an initializer: read where the head is
    program.node("Gather", ["embed", "ids"], "x0")
    program.node("Gather", ["positions", "ids"], "rotary")
    program.node("Gather", ["lengths", "ids"], "measured")
    program.node("MatMul", ["x0", "matrix"], "h0")
    start = len(program.nodes) + 1
    program.all_reduce("h0", "s0", (0,), ["batch", "sequence", 8])
    program.node("Add", ["s0", "rotary"], "x1")
    program.node("Shape", ["shape_only"], "three")
    program.node("Shape", ["measured"], "four")
    program.node("Reshape", ["s0", "three"], "s1")
    program.node("Reshape", ["s1", "four"], "s2")
    program.node("Gather", ["matrix", "s0"], "chosen")  # rows that depend on what is computed: all may be read
    program.node("MoE", ["x1", "s0", "routed", "", "per_expert"], "m", domain="com.microsoft", k=2)
    program.node("MatMul", ["m", "head"], "y")
    program.node("Gather", ["embed", "ids"], "again")
    program.output("y", ["batch", "sequence", 16])
    return with_blocks(program, folder, [0, start], [["s0"]])


def test_a_tied_embedding_costs_where_it_is_a_matrix(tmp_path: Path) -> None:
    first, second = read_blocks(two_blocks(tmp_path / "tied"))
    assert first.decoded == {"embed": 0, "positions": 0, "lengths": 0, "matrix": 8 * 2 * 4}
    assert first.kept.keys() == {"embed", "positions", "lengths", "matrix"}
    assert second.decoded == {
        "embed": 16 * 2 * 4,
        "matrix": 8 * 2 * 4,
        "routed": 2 * 2 * 4 * 4 // 4,  # two of eight experts, which four ranks share
        "per_expert": 2 * 5 * 4,
    }
    assert second.kept.keys() == {"embed", "positions", "matrix", "routed", "per_expert"}


def test_large_tables_are_not_kept_for_computing_again(tmp_path: Path) -> None:
    rows = RECOMPUTED_NBYTES // (8 * 4)
    for table, kept in ((rows, True), (rows + 1, False)):
        _, second = read_blocks(two_blocks(tmp_path / str(table), table=table))
        assert ("positions" in second.kept) is kept
