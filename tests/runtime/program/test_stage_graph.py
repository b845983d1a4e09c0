"""Programs cut into stages: what each receives, sends, computes anew and keeps, on hand-made graphs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest

from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.errors import UnsupportedError
from furiosa_llm.runtime.program.stage_graph import RECOMPUTED_NBYTES, StageGraph, cut_stages
from tests.support.runtime.models import LlamaSize, llama
from tests.support.runtime.spmd import Spmd

MESH = Mesh((2,))
WIDTH = 8


class Named(Protocol):
    """Any of ONNX's messages that have a name."""

    name: str


def cut(artifact: Artifact, starts: Sequence[str | None]) -> tuple[StageGraph, ...]:
    manifest = artifact.manifest
    return cut_stages(
        artifact.program,
        starts,
        collectives=manifest.collectives,
        states=manifest.states,
        tensors=artifact.tensors,
    )


def ops(stage: StageGraph) -> Counter[str]:
    return Counter(node.op_type for node in stage.model.graph.node)


def names(values: Iterable[Named]) -> list[str]:
    return [value.name for value in values]


def looked_up(rows: int) -> Spmd:
    """A table with `rows` rows that is looked up at the beginning, and read before and behind a collective."""
    program = Spmd(MESH)
    program.input("ids", ["batch"], dtype="INT64")
    program.weight("table", np.arange(rows * WIDTH, dtype=np.float32).reshape(rows, WIDTH))
    program.node("Gather", ["table", "ids"], "row")
    program.declare("row", ["batch", WIDTH])
    program.node("Neg", ["row"], "part")
    program.all_reduce("part", "sum", (0,), ["batch", WIDTH])
    program.node("Add", ["row", "sum"], "y")
    program.output("y", ["batch", WIDTH])
    return program


def written(program: Spmd, folder: Path) -> Artifact:
    return open_artifact(program.write(folder))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return written(llama(MESH, LlamaSize(layers=3)), tmp_path_factory.mktemp("llama"))


def test_one_stage_is_the_program(decoder: Artifact) -> None:
    (stage,) = cut(decoder, [None])
    assert list(stage.model.graph.node) == list(decoder.program.graph.node)
    assert names(stage.model.graph.input) == names(decoder.program.graph.input)
    assert names(stage.model.graph.output) == names(decoder.program.graph.output)
    assert (stage.received, stage.sent) == ({}, ())
    assert stage.states == decoder.manifest.states
    assert stage.collectives == decoder.manifest.collectives


def test_a_layer_for_each_stage(decoder: Artifact) -> None:
    first, second, third = cut(decoder, [None, "layer0.mlp.sum", "layer1.mlp.sum"])
    assert [stage.index for stage in (first, second, third)] == [0, 1, 2]
    assert first.received == {}
    assert second.received == {"a0.sum": 0, "layer0.mlp.sum": 0}
    assert third.received == {"a1.sum": 1, "layer1.mlp.sum": 1}
    assert first.sent == ("a0.sum", "layer0.mlp.sum")
    assert second.sent == ("a1.sum", "layer1.mlp.sum")
    assert third.sent == ()
    assert [names(stage.model.graph.output) for stage in (first, third)] == [
        ["present.0.key", "present.0.value", "a0.sum", "layer0.mlp.sum"],
        ["logits", "present.2.key", "present.2.value"],
    ]
    for layer, stage in enumerate((first, second, third)):
        assert [state.input for state in stage.states] == [f"past.{layer}.key", f"past.{layer}.value"]
        given = [name for name in names(stage.model.graph.input) if name not in stage.received]
        # Masks are made anew from their input; token ids are read where the embedding is.
        assert given == (["input_ids"] if layer == 0 else []) + [
            "attention_mask",
            f"past.{layer}.key",
            f"past.{layer}.value",
        ]
        assert ops(stage)["GroupQueryAttention"] == ops(stage)["ReduceSum"] == 1
        assert ops(stage)["AllReduce"] == 2
        assert [one.kind for one in stage.collectives] == ["AllReduce"] * 2 + ["AllGather"] * (layer == 2)
    own = decoder.manifest.collectives
    assert first.collectives + second.collectives + third.collectives == own


def test_every_stage_has_the_weights_that_it_reads(decoder: Artifact) -> None:
    stages = cut(decoder, [None, "layer1.mlp.sum"])
    held = [set(names(stage.model.graph.initializer)) for stage in stages]
    assert held[0] | held[1] == set(names(decoder.program.graph.initializer))
    # Rotary tables and what the lengths are made of; no weight of a layer.
    assert held[0] & held[1] == {"cos", "sin", "one", "length_axis"}
    assert {"embed", "layer0.attention.qkv", "layer1.mlp.down"} <= held[0] - held[1]
    assert {"head", "layer2.attention.qkv"} <= held[1] - held[0]


def residual(behind: Sequence[str], rows: int = 1) -> Spmd:
    """Two layers with a residual; the sum of the first is shifted by a table's row, and goes through ops `behind`."""
    program = Spmd(MESH)
    program.input("x", ["batch", WIDTH])
    program.weight("table", np.ones((rows, WIDTH), dtype=np.float32))
    program.constant("number", np.array([0], dtype=np.int64))
    program.node("Neg", ["x"], "part")
    program.all_reduce("part", "early", (0,), ["batch", WIDTH])
    program.node("Neg", ["early"], "second.part")
    program.all_reduce("second.part", "sum", (0,), ["batch", WIDTH])
    program.node("Gather", ["table", "number"], "row", axis=0)
    name = program.node("Add", ["sum", "row"], "shifted")
    for op in behind:
        name = program.declare(program.node(op, [name], f"{name}.{op}"), ["batch", WIDTH])
    program.node("Add", ["early", name], "residual")
    program.declare("residual", ["batch", WIDTH])
    program.node("Relu", ["residual"], "third.part")
    program.all_reduce("third.part", "third", (0,), ["batch", WIDTH])
    program.node("Add", ["third", "residual"], "y")
    program.output("y", ["batch", WIDTH])
    return program


@pytest.mark.parametrize("behind", [(), ("Relu",), ("Relu", "Tanh", "Sigmoid")])
def test_a_stage_begins_behind_the_addition_of_a_sum(behind: Sequence[str], tmp_path: Path) -> None:
    artifact = written(residual(behind), tmp_path)
    first, second = cut(artifact, [None, "sum"])
    assert (first.sent, second.received) == (("residual",), {"residual": 0})
    assert ops(first) == Counter({"Neg": 2, "AllReduce": 2, "Add": 2, "Gather": 1, **Counter(behind)})
    assert ops(second) == Counter({"Relu": 1, "AllReduce": 1, "Add": 1})
    assert first.collectives + second.collectives == artifact.manifest.collectives


def test_a_stage_does_not_begin_behind_what_reads_much(tmp_path: Path) -> None:
    """A large tensor in front of the addition would move to the other stage with it."""
    program = residual((), rows=RECOMPUTED_NBYTES // 4 // WIDTH + 1)
    _, second = cut(written(program, tmp_path), [None, "sum"])
    assert second.received == {"early": 0, "sum": 0}


@pytest.mark.parametrize(
    ("rows", "again"), [(RECOMPUTED_NBYTES // 4 // WIDTH, True), (RECOMPUTED_NBYTES // 4 // WIDTH + 1, False)]
)
def test_rows_of_a_large_table_are_sent_and_of_a_small_one_looked_up_again(
    rows: int, again: bool, tmp_path: Path
) -> None:
    first, second = cut(written(looked_up(rows), tmp_path), [None, "sum"])
    assert second.received == ({"sum": 0} if again else {"row": 0, "sum": 0})
    assert first.sent == (("sum",) if again else ("row", "sum"))
    assert ops(second) == (Counter({"Gather": 1, "Add": 1}) if again else Counter({"Add": 1}))
    assert names(second.model.graph.input) == (["sum", "ids"] if again else ["row", "sum"])


def test_a_value_is_sent_past_a_stage(tmp_path: Path) -> None:
    program = looked_up(4)
    program.outputs.clear()
    program.nodes.pop()
    program.node("Relu", ["sum"], "kept")
    program.declare("kept", ["batch", WIDTH])
    program.all_reduce("kept", "again", (0,), ["batch", WIDTH])
    program.node("Neg", ["again"], "third.part")
    program.all_reduce("third.part", "third", (0,), ["batch", WIDTH])
    program.node("Add", ["third", "kept"], "y")
    program.output("y", ["batch", WIDTH])
    first, second, third = cut(written(program, tmp_path), [None, "again", "third"])
    assert first.sent == ("again", "kept")
    assert second.received == {"again": 0}
    assert third.received == {"kept": 0, "third": 1}


def windowed(folder: Path, *, shape_of: str = "past.1", sequence: str = "past") -> Artifact:
    """Two states, both cut before the first collective; behind it the second is read, and the size of `shape_of`."""
    program = Spmd(MESH)
    program.input("x", ["batch", WIDTH])
    for index in range(2):
        program.input(f"past.{index}", ["batch", "past" if index == 0 else sequence, WIDTH], "state")
    program.constant("from", np.array([0], dtype=np.int64))
    program.constant("to", np.array([-1], dtype=np.int64))
    program.constant("axis", np.array([1], dtype=np.int64))
    for index in range(2):
        program.node("Slice", [f"past.{index}", "from", "to", "axis"], f"window.{index}")
    program.node("Unsqueeze", ["x", "axis"], "row")
    program.node("Concat", ["window.0", "row"], "present.0", axis=1)
    program.node("Identity", ["x"], "part")
    program.all_reduce("part", "sum", (0,), ["batch", WIDTH])
    program.node("Unsqueeze", ["sum", "axis"], "second_row")
    program.node("Concat", ["window.1", "second_row"], "present.1", axis=1)
    program.node("Shape", [shape_of], "shape")
    program.node("Cast", ["shape"], "sizes", to=1)
    program.node("ReduceSum", ["sizes"], "size", keepdims=0)
    program.node("Mul", ["sum", "size"], "y")
    program.output("y", ["batch", WIDTH])
    for index in range(2):
        program.output(f"present.{index}", ["batch", "past" if index == 0 else sequence, WIDTH], "state")
        program.state(f"past.{index}", f"present.{index}", 1, "append")
    return written(program, folder)


def test_a_state_is_cut_where_it_is_kept(tmp_path: Path) -> None:
    first, second = cut(windowed(tmp_path), [None, "sum"])
    assert [state.input for state in first.states] == ["past.0"]
    assert [state.input for state in second.states] == ["past.1"]
    assert "past.1" not in names(first.model.graph.input)
    assert "past.0" not in names(second.model.graph.input)
    assert ops(first)["Slice"] == ops(second)["Slice"] == 1
    assert second.received == {"sum": 0}


def test_the_size_of_a_state_is_told_from_another_of_its_shape(tmp_path: Path) -> None:
    _, second = cut(windowed(tmp_path, shape_of="past.0"), [None, "sum"])
    (shape,) = [node for node in second.model.graph.node if node.op_type == "Shape"]
    assert list(shape.input) == ["past.1"]
    assert "past.0" not in names(second.model.graph.input)


def test_another_stages_state_is_refused(tmp_path: Path) -> None:
    artifact = windowed(tmp_path, shape_of="past.0", sequence="past*2")
    with pytest.raises(UnsupportedError, match=r"stage 1 reads 'past\.0', a state that another stage keeps"):
        cut(artifact, [None, "sum"])


def test_what_crosses_has_a_type(tmp_path: Path) -> None:
    artifact = written(looked_up(RECOMPUTED_NBYTES), tmp_path)
    program = type(artifact.program)()
    program.CopyFrom(artifact.program)
    kept = [value for value in program.graph.value_info if value.name != "row"]
    del program.graph.value_info[:]
    program.graph.value_info.extend(kept)
    with pytest.raises(ArtifactError, match="value_info has no type for 'row', which crosses between stages; rebuild"):
        cut(dataclasses.replace(artifact, program=program), [None, "sum"])
