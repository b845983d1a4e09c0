"""Other weights by an artifact's plan: the bytes of a fresh build, and graphs that differ are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

from furiosa_llm.builder import ArtifactBuilder, PlanError, build_by_plan_of, read_tactics
from furiosa_llm.builder.plan.search import Planner
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.manifest import seal
from furiosa_llm.runtime.artifact.reader import open_artifact
from tests.builder.write.test_streaming import digests
from tests.conftest import Built
from tests.support.tiers import tiered

ZOO = ("tiny-llama-optimum", "tiny-phi3-optimum", "tiny-qwen3-optimum", "tiny-llama-genai-int4-qdq")


def tuned(path: Path, target: Path) -> Path:
    """The model at `path` with other weights and other notes, and what lies beside it."""
    shutil.copytree(path.parent, target)
    proto = onnx.load(path)
    random = np.random.default_rng(7)
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.size > 1:
            changed = array + random.standard_normal(array.shape).astype(np.float32) * np.float32(0.01)
            tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
    proto.doc_string = "tuned"
    proto.producer_version = "another"
    proto.graph.node[0].doc_string = "line 7 of another script"
    onnx.save(proto, target / "model.onnx")
    return target / "model.onnx"


@pytest.mark.parametrize("name", tiered(ZOO, ["tiny-llama-genai-int4-qdq"]))
def test_the_bytes_are_those_of_a_fresh_build(
    name: str, zoo: Path, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, before = built(name, 8)
    model = tuned(zoo / name / "model.onnx", tmp_path / "tuned")
    ArtifactBuilder(model, tensor_parallel_size=8).build(tmp_path / "fresh")

    def refuse(_: Planner) -> None:
        raise AssertionError("planned again")

    monkeypatch.setattr(Planner, "decide", refuse)
    report = build_by_plan_of(before.folder, model, tmp_path / "reused")
    assert digests(tmp_path / "reused") == digests(tmp_path / "fresh")
    assert digests(tmp_path / "reused") != digests(before.folder)
    assert report.faults == ()
    assert report.collectives == built(name, 8)[0].collectives


def test_a_plan_that_the_planner_would_not_make(zoo: Path, tmp_path: Path) -> None:
    """Tactics are in the assignment already."""
    (tmp_path / "t.toml").write_text('[[tactic]]\nrole = "feed-forward"\nlayers = [0]\nplace = 2')
    path = zoo / "tiny-llama-optimum" / "model.onnx"
    ArtifactBuilder(path, tactics=read_tactics(tmp_path / "t.toml")).build(tmp_path / "a")
    model = tuned(path, tmp_path / "tuned")
    build_by_plan_of(tmp_path / "a", model, tmp_path / "b")
    found = [open_artifact(tmp_path / name).manifest for name in "ab"]
    assert [t.layout for t in found[0].tensors] == [t.layout for t in found[1].tensors]
    assert found[0].plan == found[1].plan


def rename(model: ModelProto) -> None:
    model.graph.node[3].name = "renamed"


def wider(model: ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 2)
    tensor.CopyFrom(numpy_helper.from_array(np.zeros((tensor.dims[0], tensor.dims[1] + 1), np.float32), tensor.name))


def halved(model: ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 2)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))


def more(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "surplus"))


def fewer(model: ModelProto) -> None:
    model.graph.initializer.pop(0)


def other_attribute(model: ModelProto) -> None:
    node = next(n for n in model.graph.node if n.op_type == "Softmax")
    node.attribute[0].i = 0


def other_interface(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "rows"


def appended(model: ModelProto) -> None:
    model.graph.node.append(onnx.helper.make_node("Identity", [model.graph.output[0].name], ["again"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, r"found node 'renamed' \(\w+\), expected '.*' \(\w+\) as it is there"),
        (wider, r"found FLOAT \[\d+, \d+\] for initializer '.*', expected FLOAT \[\d+, \d+\]"),
        (halved, r"found FLOAT16 \[\d+, \d+\] for initializer '.*', expected FLOAT \["),
        (more, r"found an initializer 'surplus', FLOAT \[3\], expected none of that name"),
        (fewer, r"found no initializer '.*', expected \w+ \["),
        (other_attribute, r"found node '.*' \(Softmax\), expected"),
        (other_interface, r"found other inputs, outputs, functions or operator set versions, expected the same"),
        (appended, r"found \d+ nodes, expected \d+"),
    ],
)
def test_another_graph_is_refused(
    change: Callable[[ModelProto], None], message: str, zoo: Path, built: Built, tmp_path: Path
) -> None:
    _, before = built("tiny-llama-optimum", 4)
    proto = onnx.load(zoo / "tiny-llama-optimum" / "model.onnx")
    change(proto)
    (tmp_path / "m").mkdir()
    onnx.save(proto, tmp_path / "m" / "model.onnx")
    with pytest.raises(PlanError, match=f"not the one that the plan was made for: {message}"):
        build_by_plan_of(before.folder, tmp_path / "m" / "model.onnx", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_other_numbers_that_may_steer_shapes_are_refused(zoo: Path, built: Built, tmp_path: Path) -> None:
    name = "tiny-llama-dynamo-tf5"
    _, before = built(name, 4)
    proto = onnx.load(zoo / name / "model.onnx")
    tensor = next(t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT64)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 1, tensor.name))
    (tmp_path / "m").mkdir()
    onnx.save(proto, tmp_path / "m" / "model.onnx")
    message = r"found other elements of initializer '.*', expected the same, for they may steer shapes"
    with pytest.raises(PlanError, match=message):
        build_by_plan_of(before.folder, tmp_path / "m" / "model.onnx", tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.pop("assignment"), r"\$\.plan: found an object without it, expected the key 'assignment'"),
        (
            lambda plan: plan["assignment"][0].update(value="x"),
            r"assignment\[0\]\.value: found \"x\", expected the",
        ),
        (lambda plan: plan["assignment"][0].update(leaf=9), r"assignment\[0\]\.leaf: found number 9 of size \d+"),
        (lambda plan: plan["assignment"][0].update(size=1), r"assignment\[0\]\.leaf: found number \d+ of size 1"),
        (lambda plan: plan["assignment"][0].update(axes=[7]), r"assignment\[0\]\.axes: found \[7\], expected distinct"),
        (lambda plan: plan["assignment"][0].update(dim=9), r"assignment\[0\]\.leaf: found number"),
    ],
)
def test_an_assignment_that_is_none(
    change: Callable[[dict[str, list[dict[str, object]]]], object],
    message: str,
    zoo: Path,
    built: Built,
    tmp_path: Path,
) -> None:
    _, before = built("tiny-llama-optimum", 4)
    shutil.copytree(before.folder, tmp_path / "a")
    document = json.loads((tmp_path / "a" / "manifest.json").read_bytes())
    change(document["plan"])
    (tmp_path / "a" / "manifest.json").write_bytes(seal(document))
    with pytest.raises(ArtifactError, match=message):
        build_by_plan_of(tmp_path / "a", zoo / "tiny-llama-optimum" / "model.onnx", tmp_path / "b")
