"""Ranks of a lane as one node: the same bits as apart, rule by rule, and what keeps them apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from furiosa_llm.runtime.artifact.layout import Leaf, Mesh, Prod
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.execution.binding import BoundProgram
from furiosa_llm.runtime.execution.driver import Crew
from furiosa_llm.runtime.execution.ort import SessionSettings
from furiosa_llm.runtime.execution.sessions import create_sessions
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.program.lanes import Lanes, alike_inputs, lanes_of, shard_axes
from furiosa_llm.runtime.program.segments import cut_program, size_names
from furiosa_llm.runtime.program.stacking import Shards, _cover
from furiosa_llm.runtime.runners.batch import Batch, Copy, Decode, Piece, Prefill, Row
from furiosa_llm.runtime.runners.local_runner import Host
from tests.support.runtime.models import LlamaSize, llama
from tests.support.runtime.spmd import Spmd

pytestmark = pytest.mark.kernels

Array = npt.NDArray[Any]
RANKS = 4
HIDDEN, INNER = 64, 128
ALL = (0, 1)
MESH = Mesh((2, 2))


def laid(artifact: Artifact, count: int = 1, *, stacks: bool = True) -> Lanes:
    manifest = artifact.manifest
    program = cut_program(artifact.program, manifest.collectives, size_names(manifest))
    return lanes_of(
        program,
        manifest.mesh,
        count,
        shard_axes=shard_axes(manifest),
        inputs=alike_inputs(manifest),
        states=manifest.states if stacks else None,
    )


def run(artifact: Artifact, lanes: Lanes, x: Array) -> list[Array]:
    """The output of every rank."""
    sessions = create_sessions(artifact, lanes, SessionSettings(), threads=1)
    with closing(Crew(len(lanes.ranks))) as crew:
        bound = BoundProgram(lanes, sessions, crew)
        bound.resize({"batch": len(x)})
        bound.bind_shared("x", x)
        bound.run()
        return [bound.array(rank, "y").copy() for rank in range(lanes.mesh.size)]


def steps(artifact: Artifact, threads: int, *, separate: bool) -> list[Array]:
    """The logits of a prompt, of its copy's next token beside its own, and of one token more."""
    batches: list[Batch] = [
        Prefill(
            group=0, copies=(), pieces=(Piece(sequence_id=0, slot=0, start=0, tokens=tuple(range(9)), logits="all"),)
        ),
        Decode(
            group=0,
            copies=(Copy(source=0, target=1, length=9),),
            rows=tuple(Row(sequence_id=slot, start=9, token=3 + slot) for slot in range(2)),
        ),
        Decode(group=0, copies=(), rows=(Row(sequence_id=0, start=10, token=4),)),
    ]
    with (
        Host(artifact, choose_stages(artifact, pipeline_parallel_size=1), threads=threads, separate=separate) as host,
        closing(host.runner(slots_per_group=2)) as runner,
    ):
        return [runner.submit(batch).result().copy() for batch in batches]


def operators(lanes: Lanes, lane: int = 0) -> Counter[str]:
    """What a lane has of ops, without those of constants."""
    found = [node for section in lanes.sections if (one := section.segments[lane]) is not None for node in one.nodes]
    return Counter(node.op_type for node in found if node.op_type not in ("Constant", "Concat"))


def check(program: Spmd, folder: Path, expected: Mapping[str, int], apart: Mapping[str, int]) -> Lanes:
    """That stacking leaves the ops `expected` of those `apart`, and every bit, for one row and for several."""
    artifact = open_artifact(program.write(folder))
    lanes = laid(artifact)
    assert operators(lanes) == expected
    assert operators(laid(artifact, stacks=False)) == apart
    for rows in (1, 2, 5, 33):
        x = np.random.default_rng(rows).standard_normal((rows, 1, HIDDEN), dtype=np.float32)
        parts = [run(artifact, laid(artifact, count, stacks=False), x) for count in (1, RANKS)]
        for count in (1, 2, 3):
            parts.append(run(artifact, laid(artifact, count), x))
        assert all(np.array_equal(one, other) for part in parts for one, other in zip(part, parts[0], strict=True))
    return lanes


def begun(inner: int = INNER) -> tuple[Spmd, np.random.Generator]:
    """A program with the input `x`, and what draws its weights."""
    program = Spmd(MESH)
    program.input("x", ["batch", 1, HIDDEN])
    return program, np.random.default_rng(inner)


def weight(program: Spmd, rng: np.random.Generator, name: str, rows: int | Leaf, columns: int | Leaf) -> str:
    sizes = [one if isinstance(one, int) else one.size for one in (rows, columns)]
    return program.weight(name, rng.standard_normal(sizes, dtype=np.float32) / 8, rows, columns)


def ended(program: Spmd, rng: np.random.Generator, value: str, inner: int = INNER) -> Spmd:
    """A product of `value` with row shards, whose parts are added."""
    weight(program, rng, "down", Leaf(inner, ALL), HIDDEN)
    program.node("MatMul", [value, "down"], "part")
    program.all_reduce("part", "y", ALL, ["batch", 1, HIDDEN])
    program.output("y", ["batch", 1, HIDDEN])
    return program


def quantised(program: Spmd, rng: np.random.Generator, name: str, columns: int, **settings: int) -> str:
    """A weight of columns of 4 bits in blocks of 32."""
    blocks = HIDDEN // 32
    packed = rng.integers(0, 256, (columns, blocks, 16), dtype=np.uint8)
    program.weight(f"{name}.q", packed, Leaf(columns, ALL), blocks, 16)
    program.weight(f"{name}.s", rng.random((columns, blocks), dtype=np.float32) / 32, Leaf(columns, ALL), blocks)
    program.node(
        "MatMulNBits",
        ["x", f"{name}.q", f"{name}.s"],
        name,
        domain="com.microsoft",
        K=HIDDEN,
        N=columns // RANKS,
        bits=4,
        block_size=32,
        **settings,
    )
    return name


def test_columns_elements_and_activations(tmp_path: Path) -> None:
    program, rng = begun()
    columns = Leaf(INNER, ALL)
    for name in ("gate", "up"):
        program.node("MatMul", ["x", weight(program, rng, f"{name}.w", HIDDEN, columns)], name)
    program.weight("bias", rng.standard_normal(INNER, dtype=np.float32), columns)
    program.constant("half", np.array(0.5, dtype=np.float32))
    program.weight("crossed", rng.standard_normal(INNER, dtype=np.float32), Leaf(INNER, (1, 0)))
    program.node("Add", ["gate", "bias"], "biased")
    program.node("Add", ["biased", "crossed"], "shifted")
    program.node("Mul", ["shifted", "half"], "scaled")
    program.node("Sigmoid", ["scaled"], "sigmoid")
    program.node("Mul", ["sigmoid", "up"], "h")
    apart = {"MatMul": 12, "Add": 11, "Mul": 8, "Sigmoid": 4}
    lanes = check(
        ended(program, rng, "h"), tmp_path, {"MatMul": 6, "Add": 5, "Mul": 2, "Sigmoid": 1, "Split": 1}, apart
    )
    [first, *_] = [section.segments[0] for section in lanes.sections]
    assert first is not None
    assert first.initializers["0-3/bias/-1/32x4"] == Shards(name="bias", rank=0, count=4)


def test_an_activation_of_odd_width_stays_apart(tmp_path: Path) -> None:
    """What is left behind whole vectors is computed by other instructions."""
    program, rng = begun()
    program.node("MatMul", ["x", weight(program, rng, "w", HIDDEN, Leaf(36, ALL))], "up")
    program.node("Sigmoid", ["up"], "h")
    apart = {"MatMul": 8, "Sigmoid": 4, "Add": 3}
    check(ended(program, rng, "h", 36), tmp_path, {"MatMul": 5, "Split": 1, "Sigmoid": 4, "Add": 3}, apart)


def test_a_large_matrix_stays_apart(tmp_path: Path) -> None:
    """It would be in memory twice while a session is made."""
    program, rng = begun()
    columns = 4 * INNER * (1 << 20) // (4 * 4 * HIDDEN * INNER)
    program.node("MatMul", ["x", weight(program, rng, "w", HIDDEN, Leaf(columns, ALL))], "fits")
    program.node("MatMul", ["x", weight(program, rng, "v", HIDDEN, Leaf(2 * columns, ALL))], "up")
    program.node("ReduceSum", ["fits"], "sum", keepdims=1)
    program.node("Mul", ["up", "sum"], "h")
    lanes = laid(open_artifact(ended(program, rng, "h", 2 * columns).write(tmp_path)))
    assert operators(lanes)["MatMul"] == 1 + 2 * RANKS


@pytest.mark.parametrize(("kv_heads", "nodes"), [(4, RANKS), (2, 1)])
def test_a_large_matrix_is_stacked_where_ranks_share_columns(kv_heads: int, nodes: int, tmp_path: Path) -> None:
    """It is then less than what the ranks have apart."""
    size = LlamaSize(layers=1, heads=4, kv_heads=kv_heads, head=768)
    lanes = laid(open_artifact(llama(MESH, size).write(tmp_path)))
    assert operators(lanes)["GroupQueryAttention"] == nodes


def test_quantised_columns_and_sums_of_blocks(tmp_path: Path) -> None:
    program, rng = begun()
    quantised(program, rng, "up", INNER, accuracy_level=4)
    program.constant("blocks", np.array([0, 0, 2, 16], dtype=np.int64))
    program.constant("last", np.array([-1], dtype=np.int64))
    program.node("Reshape", ["up", "blocks"], "grouped")
    program.node("ReduceSum", ["grouped", "last"], "sums", keepdims=0)
    apart = {"MatMulNBits": 4, "Reshape": 4, "ReduceSum": 4, "MatMul": 4, "Add": 3}
    found = {"MatMulNBits": 1, "Reshape": 1, "ReduceSum": 1, "Split": 1, "MatMul": 4, "Add": 3}
    check(ended(program, rng, "sums", 2 * RANKS), tmp_path, found, apart)


@pytest.mark.parametrize(("columns", "rows", "nodes"), [(24, 64, 4), (64, 256, 4), (64, 128, 1), (80, 256, 1)])
def test_quantised_columns_that_a_kernel_would_take_in_other_groups(
    columns: int, rows: int, nodes: int, tmp_path: Path
) -> None:
    """Stacked only in whole groups, and where as many columns as there are then are added up in the same strides."""
    program, rng = begun()
    quantised(program, rng, "up", columns * RANKS, accuracy_level=4)
    program.nodes[-1].attribute[0].i = rows
    assert program.nodes[-1].attribute[0].name == "K"
    lanes = laid(open_artifact(ended(program, rng, "up", columns * RANKS).write(tmp_path)))
    assert operators(lanes)["MatMulNBits"] == nodes


def test_what_leaves_and_what_is_no_stored_weight_stays_apart(tmp_path: Path) -> None:
    """A part that is sent is the rank's own, a weight that is computed may be fused with its product."""
    program, rng = begun()
    program.node("Neg", [weight(program, rng, "w", HIDDEN, Leaf(INNER, ALL))], "minus")
    program.node("MatMul", ["x", "minus"], "up")
    program.node("MatMul", ["x", weight(program, rng, "v", HIDDEN, Leaf(HIDDEN * RANKS, ALL))], "sent")
    program.all_reduce("sent", "sum", ALL, ["batch", 1, HIDDEN])
    program.node("Neg", ["sum"], "unread")
    program.output("unread", ["batch", 1, HIDDEN])
    apart = {"Neg": 5, "MatMul": 12, "Add": 6}
    check(ended(program, rng, "up"), tmp_path, apart, apart)


def test_shards_that_some_ranks_share_are_there_for_each(tmp_path: Path) -> None:
    """The columns are those of two weights, one split over two ranks alone: nothing of it is one window of the file."""
    program, rng = begun()
    weight(program, rng, "a", HIDDEN, Leaf(64, ALL))
    weight(program, rng, "b", HIDDEN, Leaf(32, (0,)))
    program.node("Concat", ["a", "b"], "ab", axis=1)
    program.node("MatMul", ["x", "ab"], "up")
    program.node("Relu", ["up"], "h")
    apart = {"MatMul": 8, "Relu": 4, "Add": 3}
    program.weight("down", rng.standard_normal((128, HIDDEN), dtype=np.float32), Prod((Leaf(4, ALL), Leaf(32))), HIDDEN)
    program.node("MatMul", ["h", "down"], "part")
    program.all_reduce("part", "y", ALL, ["batch", 1, HIDDEN])
    program.output("y", ["batch", 1, HIDDEN])
    check(program, tmp_path, {"MatMul": 5, "Relu": 1, "Split": 1, "Add": 3}, apart)


def test_heads_and_their_caches(tmp_path: Path) -> None:
    artifact = open_artifact(llama(MESH, LlamaSize(layers=2)).write(tmp_path))
    lanes = laid(artifact, 2)
    found = operators(lanes)
    assert found["GroupQueryAttention"] == 2
    assert operators(laid(artifact, 2, stacks=False))["GroupQueryAttention"] == 4
    assert lanes.name(2, "past.0.key") == lanes.name(3, "past.0.key") == "2-3/past.0.key"
    assert lanes.name(3, "present.1.value") == "2-3/present.1.value"
    assert lanes.types["2-3/past.0.key"].shape == ("batch", 4, "past", 16)
    assert lanes.stacked[3, "past.0.key"] == (2, 3)
    assert not laid(artifact, 4).stacked


@pytest.mark.parametrize("packed", [True, False])
def test_key_heads_that_ranks_share_are_there_once(packed: bool, tmp_path: Path) -> None:
    size = LlamaSize(layers=1, heads=6, kv_heads=2, packed=packed)
    artifact = open_artifact(llama(MESH, size).write(tmp_path))
    for count, holders in ((1, (0, 2)), (2, (2,))):
        lanes = laid(artifact, count)
        segments = [section.segments[-1] for section in lanes.sections]
        [node] = [n for one in segments if one for n in one.nodes if n.op_type == "GroupQueryAttention"]
        settings = {attribute.name: attribute.i for attribute in node.attribute}
        assert (settings["num_heads"], settings["kv_num_heads"]) == (8 // count, 2 // count)
        assert lanes.stacked[3, "past.0.key"] == lanes.stacked[2, "past.0.key"] == holders
        name = lanes.name(3, "past.0.key")
        assert node.input[3] == name
        assert lanes.types[name].shape == ("batch", len(holders), "past", 16)


@pytest.mark.parametrize(
    ("mesh", "heads", "kv_heads", "packed"),
    [
        (MESH, 3, 3, True),  # the last rank has none
        (MESH, 6, 2, True),  # two ranks share each key head
        (MESH, 6, 2, False),
        (MESH, 6, 3, True),  # two ranks share two, whose queries are not one behind another: each has its own
        (MESH, 6, 3, False),
        (MESH, 4, 1, False),  # all share one
        (Mesh((2, 2, 2)), 9, 3, True),
    ],
)
def test_steps_of_a_decoder(mesh: Mesh, heads: int, kv_heads: int, packed: bool, tmp_path: Path) -> None:
    size = LlamaSize(layers=1, heads=heads, kv_heads=kv_heads, packed=packed)
    artifact = open_artifact(llama(mesh, size).write(tmp_path))
    expected = steps(artifact, 1, separate=True)
    for threads in (1, 2, 3):
        found = steps(artifact, threads, separate=False)
        assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("packed", [True, False])
def test_several_key_heads_that_ranks_share_are_there_for_each_or_stay_apart(packed: bool, tmp_path: Path) -> None:
    """The queries of the first would have to be one behind another, and are beside those of the second."""
    program = llama(MESH, LlamaSize(layers=1, heads=6, kv_heads=3, packed=packed))
    lanes = laid(open_artifact(program.write(tmp_path)))
    assert operators(lanes)["GroupQueryAttention"] == (1 if packed else 4)


def test_key_heads_that_are_not_the_same_on_ranks_whose_states_are_stay_apart(tmp_path: Path) -> None:
    program = llama(MESH, LlamaSize(layers=1, heads=6, kv_heads=2))
    array = np.ones((HIDDEN, 64), dtype=np.float32)
    program.weight("layer0.attention.k", array, HIDDEN, Prod((Leaf(4, ALL), Leaf(16))))
    assert operators(laid(open_artifact(program.write(tmp_path))))["GroupQueryAttention"] == 4


def test_packed_heads_in_pieces_that_nobody_takes_are_put_together(tmp_path: Path) -> None:
    """Attention that cannot be stacked, for its bias is another one on each rank, gets its rank's own part."""
    program = llama(MESH, LlamaSize(layers=1))
    attention = next(node for node in program.nodes if node.op_type == "GroupQueryAttention")
    attention.input.extend(["", program.weight("bias", np.zeros((8, 1, 1), np.float32), Leaf(8, ALL), 1, 1)])
    lanes = laid(open_artifact(program.write(tmp_path)))
    found = operators(lanes)
    assert found["GroupQueryAttention"] == 4
    assert not lanes.stacked
    nodes = [node for section in lanes.sections if (one := section.segments[0]) is not None for node in one.nodes]
    packed = {node.output[0]: list(node.input) for node in nodes if node.op_type == "Concat" and len(node.input) == 3}
    names = [f"{rank}/layer0.attention.packed" for rank in range(RANKS)]
    assert [packed[name] for name in names] == [[f"{name}/{piece}" for piece in range(3)] for name in names]


@pytest.mark.parametrize(
    ("parts", "pieces", "cuts", "covers"),
    [
        ([8, 8], (8, 4, 4), [[8], [4, 4]], [[(0, 0)], [(1, 0)], [(1, 1)]]),
        ([16], (8, 4, 4), [[8, 4, 4]], [[(0, 0)], [(0, 1)], [(0, 2)]]),
        ([10, 6], (8, 8), [[8, 2], [6]], [[(0, 0)], [(0, 1), (1, 0)]]),
        ([16], (16,), [[16]], [[(0, 0)]]),
    ],
)
def test_pieces_across_parts(
    parts: list[int], pieces: tuple[int, ...], cuts: list[list[int]], covers: list[list[tuple[int, int]]]
) -> None:
    assert _cover(parts, pieces) == (cuts, covers)
