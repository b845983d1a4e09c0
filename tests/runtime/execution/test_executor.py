"""Running artifacts on tensors: the same results as the unsplit model, whatever the mesh and the threads."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from onnx import ModelProto

from furiosa_llm.runtime import Executor, open_artifact
from furiosa_llm.runtime.artifact.layout import Leaf, Mesh
from furiosa_llm.runtime.errors import ExecutionError, InputError
from furiosa_llm.runtime.execution.collectives import run_operations
from furiosa_llm.runtime.execution.exchange import Exchanger
from furiosa_llm.runtime.program.lanes import Exchange, Part
from furiosa_llm.runtime.program.segments import CollectiveCall
from tests.runtime.program.test_segments import two_columns
from tests.support.runtime.models import LlamaSize, llama, mlp
from tests.support.runtime.spmd import Spmd

Array = npt.NDArray[Any]
ONE = Mesh((1,))
MESHES = [Mesh((2,)), Mesh((2, 2)), Mesh((2, 2, 2)), Mesh((3,))]


def plain(model: ModelProto, inputs: dict[str, Array]) -> dict[str, Array]:
    """What onnxruntime alone gives for an unsplit model."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in model.graph.output]
    return dict(zip(names, session.run(names, inputs), strict=True))


def random(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def step_inputs(size: LlamaSize, token_ids: Array, past: dict[str, Array] | None = None) -> dict[str, Array]:
    batch, sequence = token_ids.shape
    inputs: dict[str, Array] = {"input_ids": token_ids}
    length = 0
    for layer in range(size.layers):
        for kind in ("key", "value"):
            empty = np.zeros((batch, size.kv_heads, 0, size.head), dtype=np.float32)
            state = past[f"present.{layer}.{kind}"] if past else empty
            inputs[f"past.{layer}.{kind}"] = state
            length = state.shape[2]
    return inputs | {"attention_mask": np.ones((batch, length + sequence), dtype=np.int64)}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("mapped", [False, True])
def test_an_mlp_on_any_mesh(mesh: Mesh, mapped: bool, tmp_path: Path) -> None:
    x = random(5, 8)
    expected = plain(mlp(ONE).model(), {"x": x})["y"]
    with Executor(open_artifact(mlp(mesh).write(tmp_path)), threads=2, mapped=mapped) as executor:
        for rows in (5, 1, 3, 5):
            found = executor.run({"x": x[:rows]})["y"]
            np.testing.assert_allclose(found, expected[:rows], atol=1e-5)


@pytest.mark.parametrize("mesh", [Mesh((2,)), Mesh((2, 2)), Mesh((2, 2, 2))], ids=str)
def test_a_decoder_in_prefill_and_decode(mesh: Mesh, tmp_path: Path) -> None:
    size = LlamaSize()
    reference = llama(ONE, size).model()
    token_ids = np.random.default_rng(0).integers(0, size.vocab, (2, 9))
    prefill = plain(reference, step_inputs(size, token_ids))
    decode = plain(reference, step_inputs(size, token_ids[:, :1], prefill))
    with Executor(open_artifact(llama(mesh, size).write(tmp_path)), threads=2) as executor:
        for inputs, expected in (
            (step_inputs(size, token_ids), prefill),
            (step_inputs(size, token_ids[:, :1], prefill), decode),
        ):
            found = executor.run(inputs)
            assert found.keys() == expected.keys()
            for name, array in expected.items():
                np.testing.assert_allclose(found[name], array, atol=1e-5, err_msg=name)


def test_results_are_the_same_bits_for_any_number_of_threads(tmp_path: Path) -> None:
    artifact = open_artifact(mlp(Mesh((2, 2, 2)), hidden=512, inner=64).write(tmp_path))
    # Two rows are summed by every thread for itself, 500 are split between the threads.
    for rows in (2, 500):
        x = random(rows, 512)
        results = []
        for threads in (1, 2, 3, 4, 8):
            with Executor(artifact, threads=threads) as executor:
                assert executor.threads == threads
                results.append(executor.run({"x": x})["y"])
        assert all(np.array_equal(results[0], other) for other in results[1:])


def subset_reduce(mesh: Mesh) -> Spmd:
    """Rows over axis 1 and columns over axis 0: each AllReduce is over two of four ranks, and a gather joins them."""
    rng = np.random.default_rng(0)
    program = Spmd(mesh)
    inner, outer = (Leaf(12, (1,)), Leaf(10, (0,))) if mesh.size > 1 else (Leaf(12), Leaf(10))
    program.input("x", ["batch", 6])
    program.weight("A", rng.standard_normal((6, 12), dtype=np.float32), 6, inner)
    program.weight("B", rng.standard_normal((12, 10), dtype=np.float32), inner, outer)
    program.node("MatMul", ["x", "A"], "h")
    program.node("MatMul", ["h", "B"], "p")
    local = 10 // mesh.parts(outer.axes)
    program.all_reduce("p", "s", (1,), ["batch", local])
    program.all_gather("s", "y", (0,), 1, ["batch", local])
    program.output("y", ["batch", 10])
    return program


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_collectives_over_some_axes(threads: int, tmp_path: Path) -> None:
    x = random(3, 6)
    expected = plain(subset_reduce(ONE).model(), {"x": x})["y"]
    artifact = open_artifact(subset_reduce(Mesh((2, 2))).write(tmp_path))
    with Executor(artifact, threads=threads) as executor:
        np.testing.assert_allclose(executor.run({"x": x})["y"], expected, atol=1e-5)


def gather(mesh: Mesh, dim: int, *, used: bool) -> Spmd:
    """The columns of `x A` joined along `dim`; `used`: what is gathered is read by a node as well."""
    axes = (0, 1) if mesh.size > 1 else ()
    program = Spmd(mesh)
    program.input("x", ["batch", 4])
    program.weight("A", random(4, 8), 4, Leaf(8, axes))
    program.node("MatMul", ["x", "A"], "part")
    local = 8 // mesh.parts(axes)
    program.all_gather("part", "whole", axes, dim, ["batch", local])
    program.node("Neg", ["whole"], "y")
    program.output("y", [f"batch*{mesh.parts(axes)}", local] if dim == 0 else ["batch", 8])
    if used:
        program.node("Identity", ["part"], "again")
        program.node("ReduceSum", ["again"], "z", keepdims=0)
        program.output("z", [])
    return program


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("used", [False, True])
def test_gathers_with_and_without_a_copy(rows: int, threads: int, used: bool, tmp_path: Path) -> None:
    mesh = Mesh((2, 2))
    x = random(rows, 4)
    columns = -(x @ random(4, 8))
    with Executor(open_artifact(gather(mesh, 1, used=used).write(tmp_path / "1")), threads=threads) as executor:
        found = executor.run({"x": x})
        np.testing.assert_allclose(found["y"], columns, atol=1e-5)
    with Executor(open_artifact(gather(mesh, 0, used=used).write(tmp_path / "0")), threads=threads) as executor:
        found = executor.run({"x": x})
        np.testing.assert_allclose(found["y"], np.concatenate(np.split(columns, 4, axis=1)), atol=1e-5)


def test_independent_collectives(tmp_path: Path) -> None:
    x = random(3, 8)
    expected = plain(two_columns(ONE).model(), {"x": x})["y"]
    with Executor(open_artifact(two_columns().write(tmp_path)), threads=2) as executor:
        np.testing.assert_allclose(executor.run({"x": x})["y"], expected, atol=1e-5)


def unknown_shape(mesh: Mesh, shape: list[int | str] | None) -> Spmd:
    """The rows of `x` that are above zero in their first column, through an MLP: how many there are, the data says."""
    program = Spmd(mesh)
    axes = (0,) if mesh.size > 1 else ()
    program.input("x", ["batch", 8])
    program.constant("zero", np.zeros((), dtype=np.float32))
    program.constant("first", np.array(0, dtype=np.int64))
    program.weight("A", random(8, 6), 8, Leaf(6, axes))
    program.weight("B", random(6, 8, seed=2), Leaf(6, axes), 8)
    program.node("Gather", ["x", "first"], "column", axis=1)
    program.node("Greater", ["column", "zero"], "chosen")
    program.node("Compress", ["x", "chosen"], "rows", axis=0)
    program.node("MatMul", ["rows", "A"], "h")
    program.node("MatMul", ["h", "B"], "p")
    program.all_reduce("p", "s", axes, ["chosen", 8])
    program.declare("rows", shape)
    program.declare("p", shape)
    program.declare("s", shape)
    program.node("Add", ["s", "rows"], "t")
    program.declare("t", shape)
    program.all_gather("t", "u", axes, 0, ["chosen", 8])
    program.declare("t", shape)
    program.declare("u", shape)
    program.node("Identity", ["u"], "y")
    program.output("y", ["many", 8])
    return program


@pytest.mark.parametrize("shape", [None, ["chosen", 8]], ids=["none", "named"])
@pytest.mark.parametrize("threads", [1, 2])
def test_shapes_that_only_the_data_tells(shape: list[int | str] | None, threads: int, tmp_path: Path) -> None:
    artifact = open_artifact(unknown_shape(Mesh((2,)), shape).write(tmp_path))
    with Executor(artifact, threads=threads) as executor:
        for seed, rows in ((1, 7), (2, 7), (3, 2)):
            x = random(rows, 8, seed=seed)
            chosen = x[x[:, 0] > 0]
            expected = chosen @ random(8, 6) @ random(6, 8, seed=2) + chosen
            found = executor.run({"x": x})["y"]
            np.testing.assert_allclose(found, np.concatenate([expected, expected]), atol=1e-5)


def test_split_states_are_cut_and_joined_without_padding(tmp_path: Path) -> None:
    program = Spmd(Mesh((2, 2)))
    heads = Leaf(3, (0, 1))
    program.weight("unused", np.zeros((1,), dtype=np.float32))
    program.input("past", ["batch", heads, "past", 2], "state")
    program.input("new", ["batch", heads, "sequence", 2], "state")
    program.node("Identity", ["new"], "copy")
    program.node("Concat", ["past", "new"], "present", axis=2)
    program.output("present", ["batch", heads, "past + sequence", 2], "state")
    program.output("copy", ["batch", heads, "sequence", 2], "state")
    program.state("past", "present", 2, "append")
    program.state("new", "copy", 2, "append")
    program.node("Neg", ["unused"], "negated")
    past, new = random(2, 3, 5, 2), random(2, 3, 1, 2)
    with Executor(open_artifact(program.write(tmp_path)), threads=2) as executor:
        found = executor.run({"past": past, "new": new})
    assert np.array_equal(found["present"], np.concatenate([past, new], axis=2))
    assert np.array_equal(found["copy"], new)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"missing \['x'\], unknown \[\]; the model takes \['x'\]"),
        ({"x": random(1, 8), "z": random(1)}, r"missing \[\], unknown \['z'\]"),
        ({"x": random(1, 8).astype(np.float64)}, "input 'x': found float64, expected float32"),
        ({"x": random(1, 7)}, "input 'x', dimension 1: found 7, expected 8"),
        ({"x": random(8)}, r"input 'x': found shape \[8\], expected 2 dimensions"),
    ],
)
def test_wrong_inputs_are_refused(inputs: dict[str, Array], message: str, tmp_path: Path) -> None:
    with (
        Executor(open_artifact(mlp(Mesh((2,))).write(tmp_path)), threads=1) as executor,
        pytest.raises(InputError, match=message),
    ):
        executor.run(inputs)


def test_sizes_that_disagree_are_refused(tmp_path: Path) -> None:
    size = LlamaSize(layers=1)
    inputs = step_inputs(size, np.zeros((1, 3), dtype=np.int64))
    inputs["past.0.key"] = np.zeros((2, size.kv_heads, 0, size.head), dtype=np.float32)
    with (
        Executor(open_artifact(llama(Mesh((2,)), size).write(tmp_path)), threads=1) as executor,
        pytest.raises(InputError, match=r"input 'past\.0\.key', dimension 0: found 2, expected 1"),
    ):
        executor.run(inputs)


def test_no_threads_are_refused(tmp_path: Path) -> None:
    artifact = open_artifact(mlp(Mesh((2,))).write(tmp_path))
    with pytest.raises(InputError, match="threads must be an integer of at least 1, got 0"):
        Executor(artifact, threads=0)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_failing_segment_is_named_and_the_executor_goes_on(threads: int, tmp_path: Path) -> None:
    program = mlp(Mesh((2, 2)))
    program.input("index", ["one"], dtype="INT64")
    program.node("Gather", ["sum", "index"], "row", axis=0)
    program.output("row", ["one", 8])
    x = random(3, 8)
    with Executor(open_artifact(program.write(tmp_path)), threads=threads) as executor:
        for _ in range(5):
            with pytest.raises(ExecutionError, match=r"segment 1 failed on ranks? \d[ to\d]*: .*out of data bounds"):
                executor.run({"x": x, "index": np.array([7])})
        found = executor.run({"x": x, "index": np.array([2])})
        assert np.array_equal(found["row"][0], found["y"][2])


def test_a_segment_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    artifact = open_artifact(mlp(Mesh((2,))).write(tmp_path))
    program = ModelProto()
    program.CopyFrom(artifact.program)
    program.graph.node[1].op_type = "NoSuchOp"
    with pytest.raises(ExecutionError, match=r"no operator 'NoSuchOp' .* segment 0 of ranks? 0[ to\d]* of "):
        Executor(replace(artifact, program=program))


def test_threads_end_with_the_executor(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    artifact = open_artifact(mlp(Mesh((2, 2))).write(tmp_path))
    with Executor(artifact, threads=4) as executor:
        executor.run({"x": random(1, 8)})
        assert len(set(threading.enumerate()) - before) == 3
    assert set(threading.enumerate()) <= before
    with pytest.raises(ExecutionError, match="the executor is closed"):
        executor.run({"x": random(1, 8)})


def test_runs_from_several_threads_take_turns(tmp_path: Path) -> None:
    weights = random(4, 8)
    with Executor(open_artifact(gather(Mesh((2, 2)), 1, used=False).write(tmp_path)), threads=2) as executor:
        errors: list[float] = []

        def work(seed: int) -> None:
            for rows in range(1, 20):
                x = random(rows, 4, seed=seed + rows)
                errors.append(float(np.abs(executor.run({"x": x})["y"] + x @ weights).max()))

        workers = [threading.Thread(target=work, args=(seed,)) for seed in (100, 200)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert len(errors) == 38
    assert max(errors) < 1e-5


def test_a_large_sum_is_split_between_the_lanes() -> None:
    call = CollectiveCall(collective=mlp(Mesh((2,))).collectives[0], input="partial", output="sum")
    parts = Part(lane=0, name="0/partial"), Part(lane=1, name="1/partial")
    exchange = Exchange(call=call, total=parts, parts=(), out="0/sum", lanes=(0, 1))

    def late_barriers(rows: int) -> list[bool]:
        arrays = [{f"{lane}/partial": random(rows, 512, seed=lane)} for lane in range(2)]
        expected = arrays[0]["0/partial"] + arrays[1]["1/partial"]
        exchanger = Exchanger(
            arrays=arrays, allocate=lambda lane, name: np.empty_like(expected), movable=[frozenset(), frozenset()]
        )
        made = exchanger.make([exchange])
        for one in made:
            run_operations(one.after)
        assert all(np.array_equal(named["0/sum"], expected) for named in arrays)
        return [one.late_barrier for one in made]

    assert late_barriers(1) == [False, False]
    assert late_barriers(1000) == [True, True]
