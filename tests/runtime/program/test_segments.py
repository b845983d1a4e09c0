"""Cutting a program at its collectives: which node goes where, and what crosses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.layout import Leaf, Mesh
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.program.segments import Program, cut_program, program_part, size_names
from tests.support.runtime.models import mlp
from tests.support.runtime.spmd import Spmd

MESH = Mesh((2,))


def cut(program: Spmd, folder: Path) -> Program:
    artifact = open_artifact(program.write(folder))
    manifest = artifact.manifest
    return cut_program(artifact.program, manifest.collectives, size_names(manifest))


def ops(program: Program, index: int) -> list[str]:
    segment = program.sections[index].segment
    return [program.model.graph.node[position].op_type for position in segment.nodes] if segment else []


def two_columns(mesh: Mesh = MESH) -> Spmd:
    """`x A` and `x B`, each by rows: two AllReduces that do not wait for one another, and their sum."""
    rng = np.random.default_rng(0)
    program = Spmd(mesh)
    program.input("x", ["batch", 8])
    axes = (0,) if mesh.size > 1 else ()
    for name in "ab":
        program.weight(name, rng.standard_normal((8, 4), dtype=np.float32), 8, Leaf(4, axes))
        program.weight(f"{name}2", rng.standard_normal((4, 8), dtype=np.float32), Leaf(4, axes), 8)
        program.node("MatMul", ["x", name], f"{name}h")
        program.node("MatMul", [f"{name}h", f"{name}2"], f"{name}p")
        program.all_reduce(f"{name}p", f"{name}s", axes, ["batch", 8])
    program.node("Add", ["as", "bs"], "y")
    program.output("y", ["batch", 8])
    return program


def test_an_mlp_is_two_segments(tmp_path: Path) -> None:
    program = cut(mlp(MESH), tmp_path)
    assert [ops(program, index) for index in range(2)] == [["MatMul", "Relu", "MatMul"], ["Identity"]]
    first, second = (section.segment for section in program.sections)
    assert first is not None
    assert second is not None
    assert (first.inputs, first.outputs, first.initializers) == (("x",), ("partial",), ("A", "B"))
    assert (second.inputs, second.outputs, second.initializers) == (("sum",), ("y",), ())
    assert [call.output for call in program.sections[0].collectives] == ["sum"]


def test_independent_collectives_share_a_step(tmp_path: Path) -> None:
    program = cut(two_columns(), tmp_path)
    assert [[call.output for call in section.collectives] for section in program.sections] == [["as", "bs"], []]


def test_nodes_of_initializers_go_where_they_are_read(tmp_path: Path) -> None:
    program = mlp(MESH)
    program.constant("half", np.full((1,), 0.5, dtype=np.float32))
    folded = helper.make_node("Add", ["half", "half"], ["one"])
    program.nodes.insert(0, folded)
    program.nodes[2].input[0] = "scaled"
    program.nodes.insert(2, helper.make_node("Mul", ["h", "one"], ["scaled"]))
    program.nodes[-1].CopyFrom(helper.make_node("Mul", ["sum", "one"], ["y"]))
    cut_up = cut(program, tmp_path)
    assert ops(cut_up, 0) == ["Add", "MatMul", "Mul", "Relu", "MatMul"]
    assert ops(cut_up, 1) == ["Add", "Mul"]
    assert "one" not in cut_up.types


def test_a_collective_behind_a_collective_has_no_segment(tmp_path: Path) -> None:
    program = Spmd(MESH)
    program.input("x", ["batch", 4])
    program.weight("w", np.ones((4, 4), dtype=np.float32), 4, Leaf(4, (0,)))
    program.node("MatMul", ["x", "w"], "p")
    program.all_reduce("p", "s", (0,), ["batch", 2])
    program.all_gather("s", "y", (0,), 1, ["batch", 2])
    program.output("y", ["batch", 4])
    sections = cut(program, tmp_path).sections
    assert [section.segment is None for section in sections] == [False, True]
    assert [len(section.collectives) for section in sections] == [1, 1]


def test_what_a_branch_captures_crosses(tmp_path: Path) -> None:
    program = mlp(MESH)
    inner = helper.make_graph(
        [helper.make_node("Add", ["r_sum", "r_sum"], ["doubled"])],
        "branch",
        [],
        [helper.make_tensor_value_info("doubled", 1, None)],
    )
    program.constant("axis", np.array([1], dtype=np.int64))
    program.node("ReduceSum", ["r", "axis"], "r_sum")
    program.declare("r_sum", ["batch", 1])
    program.node("ReduceMax", ["sum"], "largest", keepdims=0)
    program.node("Greater", ["largest", "largest"], "never")
    program.node("If", ["never"], "z", then_branch=inner, else_branch=inner)
    program.output("z", ["batch", 1])
    cut_up = cut(program, tmp_path)
    second = cut_up.sections[1].segment
    assert second is not None
    assert set(second.inputs) == {"sum", "r_sum"}
    assert ops(cut_up, 1)[-1] == "If"


def test_a_crossing_value_without_a_type_is_refused(tmp_path: Path) -> None:
    program = mlp(MESH)
    program.constant("axis", np.array([1], dtype=np.int64))
    program.node("ReduceSum", ["r", "axis"], "untyped")
    program.node("Add", ["sum", "untyped"], "z")
    program.output("z", ["batch", 8])
    with pytest.raises(ArtifactError, match="value_info has no type for 'untyped', which crosses a collective"):
        cut(program, tmp_path)


def test_only_functions_in_use_are_kept(tmp_path: Path) -> None:
    artifact = open_artifact(mlp(MESH).write(tmp_path))
    opsets = [helper.make_opsetid("", 21)]
    inner = helper.make_function("local", "Inner", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], opsets)
    outer_node = helper.make_node("Inner", ["a"], ["b"], domain="local")
    outer = helper.make_function("local", "Outer", ["a"], ["b"], [outer_node], opsets)
    unused = helper.make_function("local", "Unused", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], opsets)
    artifact.program.functions.extend([inner, outer, unused])
    artifact.program.graph.node[1].CopyFrom(helper.make_node("Outer", ["h"], ["r"], domain="local"))
    program = cut_program(artifact.program, artifact.manifest.collectives, frozenset())
    nodes = artifact.program.graph.node
    kept = [
        program_part(program, [nodes[position] for position in section.segment.nodes]).functions
        for section in program.sections
        if section.segment
    ]
    assert [[function.name for function in functions] for functions in kept] == [["Outer", "Inner"], []]
