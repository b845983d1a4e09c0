"""Ranks side by side in one graph: what is computed once, in which order is added, and the same bits on any lanes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from furiosa_llm.runtime.artifact.layout import Leaf, Mesh
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.execution.binding import BoundProgram
from furiosa_llm.runtime.execution.driver import Crew
from furiosa_llm.runtime.execution.exchange import SPLIT_NBYTES
from furiosa_llm.runtime.execution.ort import SessionSettings
from furiosa_llm.runtime.execution.sessions import create_sessions
from furiosa_llm.runtime.program.joined import joined
from furiosa_llm.runtime.program.lanes import Lanes, alike_inputs, lanes_of, shard_axes
from furiosa_llm.runtime.program.segments import cut_program, size_names
from tests.support.runtime.models import LlamaSize, llama
from tests.support.runtime.spmd import Spmd

pytestmark = pytest.mark.kernels

Array = npt.NDArray[Any]
MESHES = [Mesh((2,)), Mesh((3,)), Mesh((2, 2)), Mesh((2, 2, 2))]
NUMPY: dict[str, Any] = {
    "FLOAT": np.float32,
    "DOUBLE": np.float64,
    "FLOAT16": np.float16,
    "BFLOAT16": ml_dtypes.bfloat16,
    "INT32": np.int32,
    "INT64": np.int64,
    "INT8": np.int8,
    "UINT16": np.uint16,
}
WIDTH = 6


def laid(artifact: Artifact, count: int) -> Lanes:
    manifest = artifact.manifest
    program = cut_program(artifact.program, manifest.collectives, size_names(manifest))
    return lanes_of(program, manifest.mesh, count, shard_axes=shard_axes(manifest), inputs=alike_inputs(manifest))


def run(artifact: Artifact, count: int, inputs: dict[str, Array], names: Sequence[str] = ("y",)) -> list[list[Array]]:
    """The values `names` of every rank, run on `count` lanes and as many threads; of one lane also joined."""
    lanes = laid(artifact, count)
    found = run_lanes(artifact, lanes, inputs, names)
    whole = joined(lanes)
    if whole is not lanes:
        assert count == 1
        assert [len(whole.sections), whole.sections[0].exchanges] == [1, ()]
        for ours, theirs in zip(run_lanes(artifact, whole, inputs, names), found, strict=True):
            assert all(map(same_bits, ours, theirs))
    return found


def same_bits(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def run_lanes(artifact: Artifact, lanes: Lanes, inputs: dict[str, Array], names: Sequence[str]) -> list[list[Array]]:
    """The values `names` of every rank, run on as many threads as lanes."""
    sessions = create_sessions(artifact, lanes, SessionSettings(), threads=1)
    with closing(Crew(len(lanes.ranks))) as crew:
        bound = BoundProgram(lanes, sessions, crew)
        bound.resize({"batch": next(iter(inputs.values())).shape[0]})
        for name, array in inputs.items():
            bound.bind_shared(name, array)
        bound.run()
        return [[bound.array(rank, name).copy() for name in names] for rank in range(lanes.mesh.size)]


def with_dtype(program: Spmd, dtype: str) -> Spmd:
    """`program` with collectives of another type than FLOAT."""
    program.collectives = [dataclasses.replace(one, dtype=dtype) for one in program.collectives]
    return program


def summed(mesh: Mesh, axes: Sequence[int], dtype: str = "FLOAT") -> Spmd:
    """Every rank multiplies `x` by numbers of its own; the products are added over `axes`."""
    every = tuple(range(len(mesh.shape)))
    program = Spmd(mesh)
    program.input("x", ["batch", WIDTH])
    rng = np.random.default_rng(3)
    program.weight("w", rng.standard_normal(WIDTH * mesh.size, dtype=np.float32) * 9, Leaf(WIDTH * mesh.size, every))
    program.node("Mul", ["x", "w"], "product")
    program.node("Cast", ["product"], "part", to=TensorProto.DataType.Value(dtype))
    program.all_reduce("part", "sum", axes, ["batch", WIDTH])
    program.declare("part", ["batch", WIDTH], dtype)
    program.declare("sum", ["batch", WIDTH], dtype)
    program.node("Identity", ["sum"], "y")
    program.output("y", ["batch", WIDTH], dtype=dtype)
    return with_dtype(program, dtype)


def tree(parts: Sequence[Array]) -> Array:
    """Neighbours added in pairs, then neighbouring pairs, and so on."""
    while len(parts) > 1:
        parts = [parts[i] + parts[i + 1] if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)]
    return parts[0]


def expected_sums(program: Spmd, axes: Sequence[int], dtype: str, x: Array) -> list[Array]:
    """By rank what the AllReduce gives: partial sums of sixteen bits are added in 32 and rounded once."""
    mesh = program.mesh
    kind = NUMPY[dtype]
    parts = [(x * program.weights["w"].local(mesh, rank)).astype(kind) for rank in range(mesh.size)]
    if dtype in ("FLOAT16", "BFLOAT16"):
        parts = [part.astype(np.float32) for part in parts]
    sums: dict[int, Array] = {}
    for group in mesh.groups(tuple(axes)):
        total = tree([parts[rank] for rank in group]).astype(kind)
        sums.update(dict.fromkeys(group, total))
    return [sums[rank] for rank in range(mesh.size)]


@st.composite
def sums(draw: st.DrawFn) -> tuple[Mesh, tuple[int, ...], str, int, int]:
    mesh = draw(st.sampled_from(MESHES))
    axes = draw(st.sets(st.sampled_from(range(len(mesh.shape))), min_size=1))
    lanes = draw(st.integers(1, mesh.size))
    return mesh, tuple(sorted(axes)), draw(st.sampled_from(sorted(NUMPY))), lanes, draw(st.integers(1, 5))


@given(case=sums())
@settings(max_examples=60, deadline=None)
def test_partial_sums_are_added_as_a_tree(
    case: tuple[Mesh, tuple[int, ...], str, int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    mesh, axes, dtype, count, batch = case
    program = summed(mesh, axes, dtype)
    artifact = open_artifact(program.write(tmp_path_factory.mktemp("sum")))
    x = (1 + np.random.default_rng(batch).random((batch, WIDTH), dtype=np.float32)) * np.float32(1.37)
    found = [own[0] for own in run(artifact, count, {"x": x})]
    for rank, total in enumerate(expected_sums(program, axes, dtype, x)):
        assert found[rank].dtype == total.dtype
        assert np.array_equal(found[rank], total), f"rank {rank}"


@pytest.mark.parametrize(("dtype", "sections"), [("FLOAT", 1), ("BFLOAT16", 1), ("INT8", 2)])
def test_one_lane_is_one_section_where_onnxruntime_adds_the_type(dtype: str, sections: int, tmp_path: Path) -> None:
    artifact = open_artifact(summed(Mesh((2, 2)), (0, 1), dtype).write(tmp_path))
    assert len(joined(laid(artifact, 1)).sections) == sections
    assert len(joined(laid(artifact, 2)).sections) == 2


@pytest.mark.parametrize("count", [1, 2])
def test_each_section_keeps_what_it_makes_of_constants(count: int, tmp_path: Path) -> None:
    """A node of constants that two sections read is there twice, and has two names."""
    program = summed(Mesh((2,)), (0,))
    program.nodes.insert(0, helper.make_node("Neg", ["w"], ["negative"], name="negate"))
    program.nodes[1].input[1] = "negative"
    program.nodes[-1].CopyFrom(helper.make_node("Mul", ["sum", "negative"], ["y"]))
    x = np.random.default_rng(2).random((3, WIDTH), dtype=np.float32)
    weights = [program.weights["w"].local(program.mesh, rank) for rank in range(2)]
    artifact = open_artifact(program.write(tmp_path))
    for rank, [y] in enumerate(run(artifact, count, {"x": x})):
        assert np.array_equal(y, (x * -weights[0] + x * -weights[1]) * -weights[rank])
    [segment] = joined(laid(artifact, 1)).sections[0].segments
    assert segment is not None
    assert [node.name for node in segment.nodes if node.op_type == "Neg"] == [
        *("section0/0/negate", "section0/1/negate"),
        *("section1/0/negate", "section1/1/negate"),
    ]


def test_the_tree_is_another_sum_than_one_after_another() -> None:
    program = summed(Mesh((2, 2, 2)), (0, 1, 2))
    x = np.random.default_rng(0).random((5, WIDTH), dtype=np.float32)
    parts = [x * program.weights["w"].local(program.mesh, rank) for rank in range(8)]
    in_turn = parts[0]
    for part in parts[1:]:
        in_turn = in_turn + part
    assert not np.array_equal(tree(parts), in_turn)


@pytest.mark.parametrize("dtype", ["FLOAT", "BFLOAT16"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_large_sums_that_lanes_share(count: int, dtype: str, tmp_path: Path) -> None:
    program = summed(Mesh((2, 2)), (0, 1), dtype)
    batch = SPLIT_NBYTES // (WIDTH * 4 * 2)
    x = np.random.default_rng(1).random((batch, WIDTH), dtype=np.float32)
    found = run(open_artifact(program.write(tmp_path)), count, {"x": x})
    assert all(np.array_equal(own[0], found[0][0]) for own in found)
    assert np.array_equal(found[0][0], expected_sums(program, (0, 1), dtype, x)[0])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_parts_are_gathered_in_the_order_of_ranks(dim: int, count: int, tmp_path: Path) -> None:
    mesh = Mesh((2, 2))
    program = summed(mesh, (0, 1))
    del program.nodes[2:], program.outputs[:], program.collectives[:]
    program.all_gather("part", "whole", (1,), dim, ["batch", WIDTH])
    program.node("Neg", ["whole"], "y")
    program.output("y", ["batch*2", WIDTH] if dim == 0 else ["batch", 2 * WIDTH])
    x = np.random.default_rng(2).random((3, WIDTH), dtype=np.float32)
    found = run(open_artifact(program.write(tmp_path)), count, {"x": x})
    parts = [x * program.weights["w"].local(mesh, rank) for rank in range(4)]
    for rank in range(4):
        pair = parts[rank // 2 * 2 : rank // 2 * 2 + 2]
        assert np.array_equal(found[rank][0], -np.concatenate(pair, axis=dim))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_collectives_of_inputs_and_of_collectives(count: int, tmp_path: Path) -> None:
    program = Spmd(Mesh((2, 2)))
    program.input("x", ["batch", WIDTH])
    program.all_reduce("x", "twice", (1,), ["batch", WIDTH])
    program.all_reduce("twice", "four", (0,), ["batch", WIDTH])
    program.all_gather("x", "gathered", (0,), 1, ["batch", WIDTH])
    program.all_gather("gathered", "more", (1,), 1, ["batch", 2 * WIDTH])
    program.node("Neg", ["more"], "negative")
    program.output("four", ["batch", WIDTH])
    program.output("negative", ["batch", 4 * WIDTH])
    x = np.random.default_rng(2).random((3, WIDTH), dtype=np.float32)
    found = run(open_artifact(program.write(tmp_path)), count, {"x": x}, ("four", "negative"))
    for four, negative in found:
        assert np.array_equal(four, 4 * x)
        assert np.array_equal(negative, -np.concatenate([x] * 4, axis=1))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_collectives_of_one_value(count: int, tmp_path: Path) -> None:
    """No segment writes it into the place of one result, because others are made of it too."""
    mesh = Mesh((2, 2))
    program = summed(mesh, (0, 1))
    program.all_gather("part", "column", (0,), 0, ["batch", WIDTH])
    program.all_gather("part", "row", (1,), 0, ["batch", WIDTH])
    program.output("column", ["batch*2", WIDTH])
    program.output("row", ["batch*2", WIDTH])
    x = np.random.default_rng(2).random((3, WIDTH), dtype=np.float32)
    parts = [x * program.weights["w"].local(mesh, rank) for rank in range(4)]
    found = run(open_artifact(program.write(tmp_path)), count, {"x": x}, ("y", "column", "row"))
    for rank, (total, column, row) in enumerate(found):
        assert np.array_equal(total, tree(parts))
        assert np.array_equal(column, np.concatenate([parts[rank % 2], parts[rank % 2 + 2]]))
        assert np.array_equal(row, np.concatenate(parts[rank // 2 * 2 : rank // 2 * 2 + 2]))


def branching(initializer: str) -> Spmd:
    """Each rank adds its own weight where the sum of `x` is positive, and what `initializer` names where it is not."""

    def branch(name: str, nodes: Sequence[Any], constants: dict[str, Array] | None = None, result: str = "") -> Any:
        inner = helper.make_graph(
            nodes, name, [], [helper.make_tensor_value_info(result or f"{name}.out", TensorProto.FLOAT, None)]
        )
        inner.initializer.extend(numpy_helper.from_array(array, key) for key, array in (constants or {}).items())
        return inner

    program = summed(Mesh((2, 2)), (0, 1))
    del program.nodes[1:], program.outputs[:], program.collectives[:]
    program.constant("zero", np.array(0, dtype=np.float32))
    program.node("ReduceSum", ["x"], "total", keepdims=0)
    program.node("Greater", ["total", "zero"], "positive")
    program.node(
        "If",
        ["positive"],
        "chosen",
        then_branch=branch("then", [helper.make_node("Add", ["product", "w"], ["then.out"])]),
        else_branch=branch("else", [], {initializer: np.full((1, WIDTH), 7, dtype=np.float32)}, initializer),
    )
    program.node("Expand", ["chosen", "shape"], "part")
    program.node("Shape", ["x"], "shape")
    program.nodes[-2:] = [program.nodes[-1], program.nodes[-2]]
    program.all_reduce("part", "sum", (0, 1), ["batch", WIDTH])
    program.node("Identity", ["sum"], "y")
    program.output("y", ["batch", WIDTH])
    return program


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("initializer", ["sevens", "chosen"])
def test_graphs_in_nodes_read_what_is_their_ranks(initializer: str, count: int, tmp_path: Path) -> None:
    """Also a graph with a value of its own that has the name of one outside of it."""
    program = branching(initializer)
    artifact = open_artifact(program.write(tmp_path))
    x = np.random.default_rng(2).random((3, WIDTH), dtype=np.float32)
    weights = [program.weights["w"].local(program.mesh, rank) for rank in range(4)]
    assert all(np.array_equal(own[0], tree([x * w + w for w in weights])) for own in run(artifact, count, {"x": x}))
    assert all(np.array_equal(own[0], np.full_like(x, 28)) for own in run(artifact, count, {"x": -x}))


def operators(lanes: Lanes, lane: int) -> Counter[str]:
    segments = [section.segments[lane] for section in lanes.sections]
    return Counter(node.op_type for segment in segments if segment is not None for node in segment.nodes)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_what_is_alike_is_computed_once_per_lane(count: int, tmp_path: Path) -> None:
    size = LlamaSize(layers=3)
    program = llama(Mesh((2, 2)), size)
    whole = Counter(node.op_type for node in program.nodes)
    lanes = laid(open_artifact(program.write(tmp_path)), count)
    own = 4 // count
    for lane in range(count):
        found = operators(lanes, lane)
        for alike in (
            "SkipSimplifiedLayerNormalization",
            "SimplifiedLayerNormalization",
            "Gather",
            "ReduceSum",
            "Cast",
        ):
            assert found[alike] == whole[alike] > 0, alike
        for ranked in ("GroupQueryAttention", "MatMul", "Sigmoid", "Mul"):
            assert found[ranked] == whole[ranked] * own > 0, ranked
        # A lane adds up its own ranks' parts; between lanes they are added outside of the graphs.
        assert found["Add"] == whole["AllReduce"] * (own - 1)
    assert {len(operators(lanes, lane)) for lane in range(count)} == {len(operators(lanes, 0))}


def test_what_some_ranks_share_is_computed_once_for_them(tmp_path: Path) -> None:
    """A weight split over one axis of two: ranks that differ on the other one alone have it alike, and what follows."""
    program = Spmd(Mesh((2, 2)))
    program.input("x", ["batch", WIDTH])
    program.weight("w", np.arange(2 * WIDTH, dtype=np.float32), Leaf(2 * WIDTH, (0,)))
    program.weight("v", np.arange(2 * WIDTH, dtype=np.float32), Leaf(2 * WIDTH, (1,)))
    program.node("Mul", ["x", "w"], "by_row")
    program.node("Mul", ["x", "v"], "by_column")
    program.node("Neg", ["by_row"], "minus")
    program.node("Sub", ["minus", "by_column"], "part")
    program.all_reduce("part", "y", (0, 1), ["batch", WIDTH])
    program.output("y", ["batch", WIDTH])
    artifact = open_artifact(program.write(tmp_path))
    assert operators(laid(artifact, 1), 0) == {"Mul": 4, "Neg": 2, "Sub": 4, "Add": 3}
    assert operators(laid(artifact, 2), 1) == {"Mul": 3, "Neg": 1, "Sub": 2, "Add": 1}
    lanes = laid(artifact, 2)
    assert lanes.ranks == ((0, 1), (2, 3))
    assert [lanes.name(rank, "by_row") for rank in range(4)] == ["0/by_row", "0/by_row", "2/by_row", "2/by_row"]
    assert [lanes.name(rank, "by_column") for rank in range(4)] == ["0/by_column", "1/by_column"] * 2
    assert [lanes.lane_of(rank) for rank in range(4)] == [0, 0, 1, 1]
