"""All ranks in one graph: weights stay in their files, and every part of an output is compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest

from furiosa_llm.runtime.artifact.layout import Leaf, Mesh
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.execution.ort import ORT_ERRORS
from furiosa_llm.runtime.verification.stitching import SplitModel, stitch
from tests.support.runtime.models import mlp
from tests.support.runtime.spmd import Array, Spmd

MESH = Mesh((2, 2))


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """A multilayer perceptron whose 30 inner columns are 8 on each rank, two of them padding on the last."""
    return open_artifact(mlp(MESH, hidden=256, inner=30).write(tmp_path / "artifact"))


def inputs() -> dict[str, Array]:
    return {"x": np.random.default_rng(1).standard_normal((3, 256), dtype=np.float32)}


def expected(feeds: dict[str, Array]) -> Array:
    weights = mlp(Mesh((1,)), hidden=256, inner=30).weights
    result: Array = np.maximum(feeds["x"] @ weights["A"].array, 0) @ weights["B"].array
    return result


def test_every_rank_gives_the_unsplit_result(artifact: Artifact) -> None:
    split, feeds = SplitModel.of_artifact(artifact), inputs()
    found = split.run(split.session(), feeds)
    assert [part.shape for part in found["y"]] == [(3, 256)] * 4
    assert split.greatest_error(found, {"y": expected(feeds)})["y"] < 1e-5


def test_weights_stay_in_their_files(artifact: Artifact) -> None:
    """The model of all ranks holds no weight, and each rank's initializers lie where its windows are."""
    model = stitch(SplitModel.of_artifact(artifact))
    assert model.ByteSize() < 3_000 < 4 * 256 * 8 * 4 * 2
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in model.graph.initializer
    }
    assert len(places) == 8
    for rank in range(4):
        for name in ("A", "B"):
            window = artifact.window(name, rank)
            assert places[f"r{rank}/{name}"] == {
                "location": window.file,
                "offset": str(window.offset),
                "length": str(window.nbytes),
            }


def test_what_all_ranks_hold_is_there_once(tmp_path: Path) -> None:
    program = Spmd(MESH)
    program.input("x", ["batch", 4])
    program.weight("w", np.ones((4, 400), dtype=np.float32))
    program.weight("small", np.full((400,), 2, dtype=np.float32))
    program.constant("c", np.array(3, dtype=np.float32))
    program.node("MatMul", ["x", "w"], "a")
    program.node("Add", ["a", "small"], "b")
    program.node("Mul", ["b", "c"], "y")
    program.output("y", ["batch", 400])
    split = SplitModel.of_artifact(open_artifact(program.write(tmp_path / "artifact")))
    assert sorted(tensor.name for tensor in stitch(split).graph.initializer) == ["all/c", "all/small", "all/w"]
    found = split.run(split.session(), {"x": np.ones((2, 4), dtype=np.float32)})
    for part in found["y"]:
        np.testing.assert_array_equal(part, np.full((2, 400), 18, dtype=np.float32))


def test_groups_and_their_order(tmp_path: Path) -> None:
    """Sums over the first axis of a mesh, then a gathering over the second, of numbers that nothing can confuse."""
    program = Spmd(MESH)
    program.input("x", [1])
    program.weight("rank", 10.0 ** np.arange(4, dtype=np.float32), Leaf(4, (0, 1)))
    program.node("Add", ["x", "rank"], "mine")
    program.all_reduce("mine", "sum", (0,), [1])
    program.all_gather("sum", "y", (1,), 0, [1])
    program.output("y", [2])
    split = SplitModel.of_artifact(open_artifact(program.write(tmp_path / "artifact")))
    for part in split.run(split.session(), {"x": np.zeros(1, dtype=np.float32)})["y"]:
        np.testing.assert_array_equal(part, np.array([101, 1010], dtype=np.float32))


def test_parts_that_do_not_make_up_the_whole(artifact: Artifact) -> None:
    split = dataclasses.replace(SplitModel.of_artifact(artifact), outputs={"y": (Leaf(5, (0, 1)),)})
    whole = np.arange(5, dtype=np.float32)
    parts = [whole[:2], whole[2:4], np.array([4, 99], dtype=np.float32), np.array([99, 99], dtype=np.float32)]
    assert split.greatest_error({"y": parts}, {"y": whole}) == {"y": 0}  # what is padding may be anything
    wrong = [parts[0], parts[1], np.array([np.nan, 0], dtype=np.float32), parts[3]]
    assert split.greatest_error({"y": wrong}, {"y": whole}) == {"y": np.inf}
    off = [parts[0], parts[1] + 1, *parts[2:]]
    assert split.greatest_error({"y": off}, {"y": whole}) == {"y": 1 / 4}
    assert split.parts("y", [part[:1] for part in parts], whole) is None
    assert split.parts("y", [part.astype(np.float64) for part in parts], whole) is None
    assert split.parts("y", parts, np.arange(9, dtype=np.float32)) is None  # nobody has the ninth
    assert split.greatest_error({"y": parts}, {"y": np.arange(9, dtype=np.float32)}) == {"y": np.inf}


def test_a_program_that_does_not_run(artifact: Artifact) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(artifact.program)
    broken.graph.node[0].op_type = "NoSuchOp"
    split = SplitModel.of_artifact(dataclasses.replace(artifact, program=broken))
    with pytest.raises(ORT_ERRORS):
        split.session()
