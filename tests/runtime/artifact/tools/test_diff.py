"""`diff`: what is the same is not shown, and what differs is, with the right figures."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from furiosa_llm.builder import ArtifactBuilder
from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.files import Folder
from furiosa_llm.runtime.artifact.layout import Leaf, Mesh
from furiosa_llm.runtime.artifact.reader import Artifact, Window, open_artifact
from furiosa_llm.runtime.artifact.source import inline_bytes
from furiosa_llm.runtime.artifact.tools.diff import Change, Diff, PlanDiff, WeightsDiff, diff
from furiosa_llm.runtime.artifact.tools.differences import Difference, difference
from furiosa_llm.runtime.artifact.tools.graph_diff import GraphDiff, Names, NodeChange, compare_graphs
from furiosa_llm.runtime.artifact.tools.originals import Bytes
from tests.conftest import Built
from tests.support.builder.graphs import model, random
from tests.support.runtime.shards import Original, Shards, packed, write

NODES = "x = Gather(e, input_ids) a = MatMul(x, w) b = Add(a, small) y = MatMul(b, v)"
SHAPES = {"e": (64, 32), "w": (32, 32), "v": (32, 32), "small": (3,)}


def weights() -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    found = {name: random(*shape, seed=number) for number, (name, shape) in enumerate(SHAPES.items())}
    return found | {"small": found["small"][:1]}


def build(folder: Path, change: Callable[[onnx.ModelProto], object] = bool, **options: Any) -> Artifact:
    """The artifact of a small model, changed before it is built."""
    folder.mkdir()
    proto = model("int64[batch, sequence] input_ids", "float[batch, sequence, 32] y", NODES, weights())
    for number, node in enumerate(proto.graph.node):
        node.name = f"node{number}"
    change(proto)
    onnx.save(proto, folder / "m.onnx")
    ArtifactBuilder(folder / "m.onnx", **options).build(folder / "artifact")
    return open_artifact(folder / "artifact", full=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build(tmp_path_factory.mktemp("diff") / "base")


def found(base: Artifact, other: Artifact) -> Diff:
    """The diff, which must be the other way round if the artifacts are, and JSON."""
    result, reverse = diff(base, other), diff(other, base)
    assert reverse.digests == result.digests[::-1]
    assert reverse.weights.added == result.weights.removed
    assert reverse.files.added == result.files.removed
    assert json.loads(json.dumps(result.to_json()))["same"] == result.same
    return result


def initializer(proto: onnx.ModelProto, name: str) -> onnx.TensorProto:
    found: onnx.TensorProto = next(i for i in proto.graph.initializer if i.name == name)
    return found


def test_equal_builds_are_the_same(base: Artifact, tmp_path: Path) -> None:
    again = build(tmp_path / "again")
    result = found(base, again)
    assert result == Diff(digests=result.digests)
    assert result.same
    (again.folder / "source.onnx").unlink()
    assert diff(base, again) == result, "nothing but the digests is looked at"


def test_one_element_of_a_stored_weight(base: Artifact, tmp_path: Path) -> None:
    def change(proto: onnx.ModelProto) -> None:
        array = weights()["w"]
        array[5, 7] += np.float32(0.5)
        array[31, 31] -= np.float32(0.25)
        initializer(proto, "w").raw_data = array.tobytes()

    result = found(base, build(tmp_path / "b", change))
    altered = weights()["w"]
    altered[5, 7] += np.float32(0.5)
    exact = float(altered[5, 7].astype(np.float64) - weights()["w"][5, 7].astype(np.float64))
    [changed] = result.weights.changed
    assert (changed.name, changed.num_different, changed.greatest) == ("w", 2, exact)
    magnitude = max(np.abs(weights()["w"]).max(), np.abs(altered).max())
    assert changed.relative == pytest.approx(exact / float(magnitude))
    assert result.weights == WeightsDiff(changed=(changed,))
    assert [change.path for change in result.provenance] == ["source_sha256"]
    assert result.graph == GraphDiff()
    assert result.plan == PlanDiff()
    assert result.manifest == ("tensors",)
    assert not result.model


def test_an_initializer_that_is_not_stored(base: Artifact, tmp_path: Path) -> None:
    assert not next(entry for entry in base.manifest.initializers if entry.name == "small").stored

    def change(proto: onnx.ModelProto) -> None:
        initializer(proto, "small").raw_data = (weights()["small"] + np.float32(1)).tobytes()

    [changed] = found(base, build(tmp_path / "b", change)).weights.changed
    assert (changed.name, changed.num_different) == ("small", 1)
    assert changed.greatest == pytest.approx(1)


def test_only_what_differs_is_read(base: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(proto: onnx.ModelProto) -> None:
        initializer(proto, "v").raw_data = (weights()["v"] * 2).tobytes()

    other = build(tmp_path / "b", change)
    read: list[int] = []
    read_window = Artifact.read_window

    def counted(self: Artifact, window: Window) -> Bytes:
        read.append(window.nbytes)
        return read_window(self, window)

    monkeypatch.setattr(Artifact, "read_window", counted)
    [changed] = diff(base, other).weights.changed
    assert changed.num_different == 32 * 32
    assert sum(read) == 2 * 32 * 32 * 4


def test_graph_changes(base: Artifact, tmp_path: Path) -> None:
    def change(proto: onnx.ModelProto) -> None:
        proto.graph.node[2].op_type = "Sub"
        relu = onnx.helper.make_node("Relu", ["b"], ["c"], name="new")
        proto.graph.node.insert(3, relu)
        proto.graph.node[4].input[0] = "c"
        proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "b"
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "b"

    result = found(base, build(tmp_path / "b", change))
    assert result.graph == GraphDiff(
        nodes_added=("new",),
        nodes_changed=(NodeChange(name="node2", fields=("op_type",)), NodeChange(name="node3", fields=("input",))),
        inputs=Names(changed=("input_ids",)),
        outputs=Names(changed=("y",)),
    )
    assert result.weights == WeightsDiff()
    assert result.files.changed == ("program.onnx", "source.onnx")


def test_graphs_by_themselves() -> None:
    one = model("float[4] x", "float[4] y", "a = Relu(x) b = Neg(x) y = Add(a, b)", {})
    assert compare_graphs(one, one) == GraphDiff()
    other = onnx.ModelProto()
    other.CopyFrom(one)
    nodes = [other.graph.node[i] for i in (1, 0, 2)]
    other.graph.ClearField("node")
    other.graph.node.extend(nodes)
    other.opset_import[0].version -= 1
    other.graph.doc_string = "new"
    assert compare_graphs(one, other) == GraphDiff(other=("opset_import", "graph.doc_string", "order of nodes"))
    other.graph.node[0].output[0] = "c"
    assert compare_graphs(one, other).nodes_removed == ("Neg b",), "without a name: op and first output"
    assert compare_graphs(one, other).nodes_added == ("Neg c",)


def test_nodes_of_one_name_are_told_apart() -> None:
    one = model("float[4] x", "float[4] y", "a = Relu(x) b = Neg(x) y = Add(a, b)", {})
    for node in one.graph.node:
        node.name = "same"
    other = onnx.ModelProto()
    other.CopyFrom(one)
    other.graph.node[0].op_type = "Abs"
    assert compare_graphs(one, one) == GraphDiff()
    assert compare_graphs(one, other) == GraphDiff(nodes_added=("Abs a",), nodes_removed=("Relu a",))


@pytest.mark.parametrize("name", ["tiny-qwen2-14-2-optimum", "tiny-phi3-optimum"])
def test_other_sizes_have_the_same_weights(name: str, built: Built) -> None:
    result = found(built(name, 4)[1], built(name, 8)[1])
    assert result.weights == WeightsDiff()
    assert result.graph == GraphDiff()
    assert result.plan.mesh == Change(path="mesh", a=[2, 2], b=[2, 2, 2])
    assert [change.path for change in result.provenance] == ["options.tensor_parallel_size"]
    assert result.files == Names(changed=("program.onnx",))
    entries = {entry.name: entry for entry in built(name, 4)[1].manifest.initializers}
    assert result.plan.layouts
    for layout in result.plan.layouts:
        assert entries[layout.path].stored
        assert layout.a != layout.b


def test_types_shapes_and_other_names(base: Artifact, tmp_path: Path) -> None:
    def change(proto: onnx.ModelProto) -> None:
        initializer(proto, "v").name = "renamed"
        proto.graph.node[3].input[1] = "renamed"
        small = initializer(proto, "small")
        small.CopyFrom(onnx.numpy_helper.from_array(np.ones(32, dtype=np.float32), "small"))

    result = found(base, build(tmp_path / "b", change))
    assert (result.weights.added, result.weights.removed) == (("renamed",), ("v",))
    assert result.weights.changed == (
        Difference(
            name="small",
            dtype=("FLOAT", "FLOAT"),
            shape=((1,), (32,)),
            num_different=None,
            greatest=None,
            relative=None,
        ),
    )


def test_files_and_model(zoo: Path, tmp_path: Path) -> None:
    sides = []
    for name in ("a", "b"):
        shutil.copytree(zoo / "tiny-llama-optimum", tmp_path / name)
        if name == "b":
            (tmp_path / name / "tokenizer_config.json").write_text("{}")
            (tmp_path / name / "chat_template.jinja").unlink()
        builder = ArtifactBuilder(tmp_path / name / "model.onnx", f"name {name}")
        builder.build(tmp_path / f"{name}.artifact")
        sides.append(open_artifact(tmp_path / f"{name}.artifact"))
    result = found(*sides)
    assert result.files == Names(removed=("chat_template.jinja",), changed=("tokenizer_config.json",))
    assert result.model == (Change(path="name", a="name a", b="name b"),)
    assert (result.graph, result.weights, result.manifest) == (GraphDiff(), WeightsDiff(), ())


def test_a_tensor_of_the_builder_s_own(tmp_path: Path) -> None:
    """One that is of no original, with other bytes in both artifacts."""
    original = Original.random("w", "FLOAT", (6, 4))
    artifact = write(tmp_path / "a", Mesh((2,)), [original], {"w": Shards("w", (Leaf(6, (0,)), Leaf(4)))})
    own = dataclasses.replace(artifact.tensors["w"], name="own", origin=None, layout=None)
    sides = []
    for digest, axes in (("0" * 64, (0,)), ("1" * 64, (0,)), ("2" * 64, ())):
        folder = tmp_path / digest
        shutil.copytree(artifact.folder, folder)
        tensors = (*artifact.manifest.tensors, dataclasses.replace(own, sha256=digest, shard_axes=axes))
        manifest = dataclasses.replace(artifact.manifest, tensors=tensors)
        (folder / "manifest.json").write_bytes(manifest.to_bytes())
        by_name = {tensor.name: tensor for tensor in tensors}
        sides.append(dataclasses.replace(artifact, folder=folder, manifest=manifest, tensors=by_name))
    assert diff(sides[0], sides[1]).weights == WeightsDiff(made=("own",))
    assert diff(sides[0], sides[2]).weights == WeightsDiff(), "cut otherwise"


# -- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [8, 2**22])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_figures_of_every_type(dtype: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """37 elements of 0 and one in each that differ: 1 at one place, and -1 or 2 at another."""
    monkeypatch.setattr("furiosa_llm.runtime.artifact.tools.differences._CHUNK_NBYTES", chunk * 8)
    kind = DTYPES[dtype]
    a, b = np.zeros(37, dtype=kind.numpy), np.zeros(37, dtype=kind.numpy)
    a[3], b[36] = 1, 1
    if dtype != "BOOL":
        a[36] = np.asarray(
            -1 if dtype not in ("UINT8", "UINT16", "UINT32", "UINT64", "UINT4", "UINT2") else 2, kind.numpy
        )
    ours, theirs = (memoryview(packed(side.reshape(-1, 1).view(np.uint8), kind.bits)) for side in (a, b))
    result = difference("w", (dtype, (37,)), ours, theirs)
    greatest = 1.0 if dtype == "BOOL" or dtype.startswith("UINT") else 2.0
    magnitude = 2.0 if dtype.startswith("UINT") else 1.0
    assert (result.num_different, result.greatest, result.relative) == (2, greatest, greatest / magnitude)
    assert difference("w", (dtype, (37,)), theirs, ours) == result


def test_infinities_and_signs_of_zero() -> None:
    a = np.array([np.inf, np.nan, 0.0, 1.0, 4.0, np.inf], dtype=np.float32)
    b = np.array([1.0, np.nan, -0.0, np.inf, 3.0, np.inf], dtype=np.float32)
    result = difference("w", ("FLOAT", (6,)), memoryview(a.tobytes()), memoryview(b.tobytes()))
    assert (result.num_different, result.greatest, result.relative) == (4, 1.0, 0.25)


def test_text_has_no_figures() -> None:
    result = difference("w", ("STRING", (1,)), memoryview(b"a"), memoryview(b"b"))
    assert (result.num_different, result.greatest, result.relative) == (None, None, None)


# -- data in source.onnx ---------------------------------------------------------------------------------------------


def test_typed_fields_are_raw_data() -> None:
    array = np.arange(3, dtype=np.float32)
    typed = onnx.TensorProto(data_type=onnx.TensorProto.FLOAT, dims=[3], float_data=array)
    assert not typed.raw_data
    assert inline_bytes(typed) == array.tobytes() == inline_bytes(onnx.numpy_helper.from_array(array))
    nibbles = onnx.TensorProto(data_type=onnx.TensorProto.INT4, dims=[3], int32_data=[0x21, 0x3])
    assert inline_bytes(nibbles) == b"\x21\x03"
    text = onnx.TensorProto.STRING
    one, other = (onnx.TensorProto(data_type=text, string_data=pair) for pair in ([b"a", b"bc"], [b"ab", b"c"]))
    assert inline_bytes(one) != inline_bytes(other)


def test_data_that_is_elsewhere_or_too_short(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"1234")
    external = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1])
    external.data_location = onnx.TensorProto.EXTERNAL
    external.external_data.add(key="location", value=str(tmp_path / "secret"))
    with pytest.raises(ArtifactError, match=r"'w' has no data, expected what manifest\.json does not store"):
        inline_bytes(external)
    short = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[2], raw_data=b"1234")
    with pytest.raises(ArtifactError, match="'w' has data that is not of its type and shape"):
        inline_bytes(short)


def test_a_source_that_is_another_by_now(base: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(base.folder, folder)
    proto = onnx.load(folder / "source.onnx", load_external_data=False)
    kept = [i for i in proto.graph.initializer if i.name != "small"]
    proto.graph.ClearField("initializer")
    proto.graph.initializer.extend(kept)
    (folder / "source.onnx").write_bytes(proto.SerializeToString())
    (folder / "manifest.json").write_bytes(dataclasses.replace(base.manifest, blocks=()).to_bytes())
    with pytest.raises(ArtifactError, match=r"source\.onnx: found \d+ bytes, expected \d+; it is being written to"):
        diff(base, dataclasses.replace(base, folder=folder, files=Folder(folder)))
