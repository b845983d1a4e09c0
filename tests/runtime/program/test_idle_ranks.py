"""Ranks whose shards are padding: which partial sums are zero, what is left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from furiosa_llm.runtime.artifact.layout import Cat, Dim, Leaf, Mesh, Prefix, Prod, index_map
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.program.idle_ranks import _is_padding, padded_shards, zero_parts
from furiosa_llm.runtime.program.lanes import LaneSegment
from furiosa_llm.runtime.program.segments import cut_program, size_names
from furiosa_llm.runtime.runners.loaded_model import load_model
from tests.support.runtime.models import LlamaSize, llama
from tests.support.runtime.spmd import Spmd

pytestmark = pytest.mark.kernels

MESH = Mesh((2, 2))
ALL = (0, 1)
PADDED = Leaf(3, ALL)
"""Rank 3 has none of it."""


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Three heads on four ranks."""
    size = LlamaSize(layers=2, heads=3, kv_heads=3)
    return open_artifact(llama(MESH, size).write(tmp_path_factory.mktemp("decoder")))


def zeros_of(program: Spmd, folder: Path, padded: set[tuple[int, str]] | None = None) -> set[tuple[int, str]]:
    artifact = open_artifact(program.write(folder))
    manifest = artifact.manifest
    cut = cut_program(artifact.program, manifest.collectives, size_names(manifest))
    return set(zero_parts(cut, manifest.mesh, padded_shards(manifest) if padded is None else frozenset(padded)))


def products(*layouts: Dim | int) -> Spmd:
    """A program that adds up one product with each of so many weights, whose rows lie so."""
    program = Spmd(MESH)
    program.input("x", ["batch", 1])
    for index, layout in enumerate(layouts):
        program.weight(f"w{index}", np.ones((3, 8), dtype=np.float32), layout, 8)
        program.node("MatMul", ["x", f"w{index}"], f"p{index}")
        program.all_reduce(f"p{index}", f"y{index}", ALL, ["batch", 8])
    program.node("Sum", [f"y{index}" for index in range(len(layouts))], "y")
    program.output("y", ["batch", 8])
    return program


@pytest.mark.parametrize(
    "dim",
    [
        PADDED,
        Leaf(9, ALL),
        Leaf(8, (1,)),
        Prod((Leaf(3, (0,)), Leaf(3, (1,)), Leaf(4))),
        Cat((PADDED, Leaf(2, ALL))),
        Cat((PADDED, Leaf(5))),
        Prefix(90, Prod((Leaf(3, ALL), Leaf(32)))),
    ],
)
def test_a_shard_is_padding_where_the_index_map_has_nothing_else(dim: Dim) -> None:
    for rank in range(MESH.size):
        assert _is_padding(dim, MESH, rank) == bool((index_map(dim, MESH, rank) < 0).all())


def test_products_with_padding_are_zero(tmp_path: Path) -> None:
    assert zeros_of(products(PADDED, 3), tmp_path) == {(3, "p0")}


def test_what_is_zero_on_all_ranks_is_kept(tmp_path: Path) -> None:
    padded = {(rank, "w0") for rank in range(4)} | {(2, "w1")}
    assert zeros_of(products(PADDED, PADDED), tmp_path, padded) == {(2, "p1")}


@pytest.mark.parametrize(("op", "zero"), [("Add", False), ("Reshape", True), ("Relu", False)])
def test_what_follows_from_zeros(op: str, zero: bool, tmp_path: Path) -> None:
    """A sum is zero if all of it is; of other ops only those that are known to keep zeros."""
    program = products(PADDED, 3)
    program.constant("shape", np.array([0, 8], dtype=np.int64))
    operands = {"Add": ["p0", "p1"], "Reshape": ["p0", "shape"], "Relu": ["p0"]}[op]
    program.node(op, operands, "q")
    program.all_reduce("q", "z", ALL, ["batch", 8])
    program.output("z", ["batch", 8])
    assert ((3, "q") in zeros_of(program, tmp_path)) == zero


def test_quantised_weights_are_zero_by_their_scales_but_not_beside_a_bias(tmp_path: Path) -> None:
    program = Spmd(MESH)
    program.input("x", ["batch", 32])
    program.weight("q", np.ones((3, 1, 16), dtype=np.uint8), PADDED, 1, 16)
    program.weight("s", np.ones((3, 1), dtype=np.float32), PADDED, 1)
    program.weight("b", np.ones(3, dtype=np.float32), Leaf(3))
    for name, more in (("plain", []), ("biased", ["", "", "b"])):
        program.node(
            "MatMulNBits", ["x", "q", "s", *more], name, domain="com.microsoft", K=32, N=1, bits=4, block_size=32
        )
        program.all_reduce(name, f"{name}.sum", ALL, ["batch", 1])
        program.output(f"{name}.sum", ["batch", 1])
    assert zeros_of(program, tmp_path) == {(3, "plain")}
    assert zeros_of(program, tmp_path, {(3, "q")}) == set()


def segments(artifact: Artifact, lanes: int, *, separate: bool = False) -> list[list[LaneSegment | None]]:
    """By lane what it has in each section that has attention on some rank."""
    stages = choose_stages(artifact, pipeline_parallel_size=1)
    [program] = load_model(artifact, stages, lanes=lanes, threads=1, separate=separate).programs
    found = [section.segments for section in program.lanes.sections]
    return [[row[lane] for row in found] for lane in range(lanes)]


def ops(rows: list[LaneSegment | None]) -> list[str]:
    return [node.op_type for row in rows if row is not None for node in row.nodes]


def test_an_idle_rank_computes_no_attention_and_keeps_no_states(decoder: Artifact) -> None:
    [*busy, idle] = segments(decoder, 4)
    assert all("GroupQueryAttention" in ops(rows) for rows in busy)
    assert "GroupQueryAttention" not in ops(idle)
    assert not [name for row in idle if row is not None for name in row.inputs if "past" in name]
    [all_ranks] = segments(decoder, 1)
    heads = [n for row in all_ranks if row for n in row.nodes if n.op_type == "GroupQueryAttention"]
    assert [next(a.i for a in node.attribute if a.name == "num_heads") for node in heads] == [3, 3]
    [apart] = segments(decoder, 1, separate=True)
    assert ops(apart).count("GroupQueryAttention") == 8
