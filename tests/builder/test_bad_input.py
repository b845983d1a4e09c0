"""Models and options that are refused: which error, and what its message tells.

tests/test_bad_models.py has the damage that happens to an exported model on its way; here is what is wrong with the
graph itself, what lies outside of its main graph, and what goes wrong while an artifact is written.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from furiosa_llm.builder import (
    ArtifactBuilder,
    BuildError,
    ModelLoadError,
    OptionError,
    OutputError,
    ShapeError,
    UnsupportedModelError,
)
from furiosa_llm.builder.plan.mesh import check_tensor_parallel_size
from furiosa_llm.builder.write import artifact as writing
from tests.support.builder.graphs import model

IDS, LOGITS = "int64[batch, sequence] input_ids", "float[batch, sequence, 32] logits"
NODES = "x = Gather(e, input_ids) logits = MatMul(x, w)"
WEIGHTS = {"e": (32, 8), "w": (8, 32)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the model; the artifact would lie beside it."""
    path = tmp_path / "model"
    path.mkdir()
    return path


def good() -> onnx.ModelProto:
    return model(IDS, LOGITS, NODES, WEIGHTS)


def refuse(kind: type[BuildError], folder: Path, proto: onnx.ModelProto | bytes, *parts: str) -> None:
    """Building must fail with `kind`, name the file and say every part, and leave nothing behind."""
    path = folder / "broken.onnx"
    path.write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
    with pytest.raises(kind) as caught:
        ArtifactBuilder(path).build(folder.parent / "artifact")
    message = str(caught.value)
    for part in parts:
        assert part in message
    assert type(caught.value) is kind
    assert "\n" not in message
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]


# -- the file ------------------------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"<!DOCTYPE html>", POINTER, good().SerializeToString()[:-50]],
    ids=["empty", "zero", "a page", "pointer", "cut short"],
)  # fmt: skip
def test_not_onnx(content: bytes, folder: Path) -> None:
    refuse(ModelLoadError, folder, content, "broken.onnx", "is not an ONNX model", "download is complete", "pointer")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"nothing\.onnx does not exist; give the path of an \.onnx file"):
        ArtifactBuilder(tmp_path / "nothing.onnx").build(tmp_path / "artifact")


def test_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelLoadError, match=r"empty is a folder, expected an ONNX file; it holds no \.onnx file"):
        ArtifactBuilder(tmp_path / "empty").build(tmp_path / "artifact")


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_configuration_that_is_not_json(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content, encoding="latin-1")
    refuse(ModelLoadError, folder, good(), "config.json", "mend it or remove it")


# -- external data outside of the main graph's initializers --------------------------------------------------------


def external(location: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="secret", data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_constant_whose_data_lies_outside(folder: Path) -> None:
    (folder.parent / "model" / "inside").write_bytes(b"\0" * 8)
    proto = good()
    proto.graph.node.append(helper.make_node("Constant", [], ["secret"], value=external("../../etc/passwd"), name="c"))
    refuse(
        ModelLoadError, folder, proto, 'attribute value of node "c"', "../../etc/passwd", "outside the model's folder"
    )


def test_branch_whose_data_is_missing(folder: Path) -> None:
    output = helper.make_tensor_value_info("secret", TensorProto.FLOAT, [2])
    given = helper.make_tensor_value_info("a", TensorProto.FLOAT, [2])
    negate = helper.make_node("Neg", ["secret"], ["a"])
    then = helper.make_graph([negate], "then", [], [given], [external("gone.data")])
    node = helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=then)
    proto = good()
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    proto.graph.node.append(node)
    proto.graph.output.append(helper.make_tensor_value_info("y", output.type.tensor_type.elem_type, [2]))
    refuse(ModelLoadError, folder, proto, 'initializer "secret"', "gone.data", "missing")


# -- the graph -----------------------------------------------------------------------------------------------------


def renamed_input(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].input[1] = "nobody"


def renamed_output(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].name = "nobody"


def circular(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[1] = "ids"
    proto.graph.node.append(helper.make_node("Cast", ["logits"], ["ids"], to=TensorProto.INT64))


def listed_twice(proto: onnx.ModelProto) -> None:
    proto.graph.output.append(proto.graph.output[0])


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (renamed_input, ("MatMul", '"nobody"', "which no node, input or initializer gives", "export it again")),
        (renamed_output, ('"nobody"', "no node gives the output", "export it again")),
        (circular, ("not a valid graph", "cycle", "export the model again")),
        (listed_twice, ('"logits" twice', "remove one")),
    ],
)
def test_damaged_graph(damage: Callable[[onnx.ModelProto], None], parts: tuple[str, ...], folder: Path) -> None:
    proto = good()
    damage(proto)
    refuse(ModelLoadError, folder, proto, "broken.onnx", *parts)


def test_nodes_out_of_order_are_put_in_order(folder: Path) -> None:
    proto = good()
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))
    (folder / "good.onnx").write_bytes(proto.SerializeToString())
    assert ArtifactBuilder(folder / "good.onnx").build(folder.parent / "artifact").num_nodes > 0


def test_sequences_at_the_boundary(folder: Path) -> None:
    proto = good()
    proto.graph.node.append(helper.make_node("SequenceConstruct", ["logits"], ["all"]))
    proto.graph.output.append(helper.make_tensor_sequence_value_info("all", TensorProto.FLOAT, None))
    refuse(UnsupportedModelError, folder, proto, '"all" has type', "expected a tensor")


def test_unknown_ops(folder: Path) -> None:
    nodes = f"{NODES.replace('logits', 'l')} logits = com.microsoft.NoSuchOp(l)"
    proto = model(IDS, LOGITS, nodes, WEIGHTS)
    refuse(UnsupportedModelError, folder, proto, "com.microsoft::NoSuchOp", "export the model with standard ops")


def test_ops_of_an_unknown_domain(folder: Path) -> None:
    proto = model(IDS, LOGITS, NODES.replace("logits", "l"), WEIGHTS)
    proto.opset_import.append(helper.make_opsetid("org.nowhere", 1))
    proto.graph.node.append(helper.make_node("Magic", ["l"], ["logits"], domain="org.nowhere", name="wand"))
    refuse(UnsupportedModelError, folder, proto, '"wand"', "org.nowhere::Magic")


@pytest.mark.parametrize("op", ["RandomNormalLike", "Bernoulli", "Dropout"])
def test_random_numbers(op: str, folder: Path) -> None:
    arguments = "l, , training" if op == "Dropout" else "l"
    weights = {**WEIGHTS, **({"training": np.array(True)} if op == "Dropout" else {})}
    proto = model(IDS, LOGITS, f"{NODES.replace('logits', 'l')} logits = {op}({arguments})", weights)
    refuse(UnsupportedModelError, folder, proto, op, "random numbers", "inference mode")


def test_dropout_in_inference_mode_is_no_reason(folder: Path) -> None:
    proto = model(IDS, LOGITS, f"{NODES.replace('logits', 'l')} logits = Dropout(l, , training)",
                  {**WEIGHTS, "training": np.array(False)})  # fmt: skip
    (folder / "good.onnx").write_bytes(proto.SerializeToString())
    ArtifactBuilder(folder / "good.onnx").build(folder.parent / "artifact")


def test_ancient_opsets(folder: Path) -> None:
    refuse(UnsupportedModelError, folder, model(IDS, LOGITS, NODES, WEIGHTS, opset=6), "opset 6", "7 or later")


def test_inputs_of_unknown_rank(folder: Path) -> None:
    proto = good()
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    refuse(ShapeError, folder, proto, '"input_ids" has no shape', "dynamic axes")


def test_shapes_that_contradict_each_other(folder: Path) -> None:
    proto = model(IDS, LOGITS, NODES, {"e": (32, 8), "w": (9, 32)})
    refuse(ShapeError, folder, proto, "MatMul", "[batch, sequence, 8]", "[9, 32]", "does not fit its inputs")


def test_sizes_that_depend_on_values(folder: Path) -> None:
    proto = model(f"{IDS}, float[n] x", "float[m] y", "u = Unique(x) y = Neg(u)")
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "m"
    refuse(ShapeError, folder, proto, "Unique")


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [-1, 0, 3, 5, 32])
def test_sizes_that_no_option_allows(size: int) -> None:
    for experimental in (False, True):
        with pytest.raises(OptionError, match=rf"tensor parallel size {size} is not supported.*use 4 or 8\.$"):
            check_tensor_parallel_size(size, experimental=experimental)
        with pytest.raises(OptionError):
            ArtifactBuilder("model.onnx", tensor_parallel_size=size, experimental_tp=experimental)


@pytest.mark.parametrize("size", [1, 2, 16])
def test_sizes_that_are_experimental(size: int, folder: Path) -> None:
    with pytest.raises(OptionError, match=f"--experimental-tp, experimental_tp=True, to build for {size}") as caught:
        ArtifactBuilder("model.onnx", tensor_parallel_size=size)
    assert caught.value.exit_code == 2
    (folder / "good.onnx").write_bytes(good().SerializeToString())
    builder = ArtifactBuilder(folder / "good.onnx", tensor_parallel_size=size, experimental_tp=True)
    assert builder.build(folder.parent / "artifact").tensor_parallel_size == size


# -- the output ----------------------------------------------------------------------------------------------------


@pytest.fixture
def builder(folder: Path) -> ArtifactBuilder:
    (folder / "good.onnx").write_bytes(good().SerializeToString())
    return ArtifactBuilder(folder / "good.onnx")


def test_existing_artifact_is_replaced_by_force_only(builder: ArtifactBuilder, tmp_path: Path) -> None:
    builder.build(tmp_path / "artifact")
    (tmp_path / "artifact" / "left over").write_text("")
    with pytest.raises(OutputError, match="artifact exists already; give another output, or --force"):
        builder.build(tmp_path / "artifact")
    assert (tmp_path / "artifact" / "left over").exists()
    builder.build(tmp_path / "artifact", force=True)
    assert not (tmp_path / "artifact" / "left over").exists()


def test_empty_folder_is_replaced_by_force_only(builder: ArtifactBuilder, tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        builder.build(tmp_path / "artifact")
    builder.build(tmp_path / "artifact", force=True)


def test_file_is_never_replaced(builder: ArtifactBuilder, tmp_path: Path) -> None:
    (tmp_path / "artifact").write_text("mine")
    with pytest.raises(OutputError, match="is not an artifact"):
        builder.build(tmp_path / "artifact", force=True)
    assert (tmp_path / "artifact").read_text() == "mine"


def test_artifact_is_kept_if_its_replacement_fails(
    builder: ArtifactBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder.build(tmp_path / "artifact")
    before = (tmp_path / "artifact" / "manifest.json").read_bytes()
    monkeypatch.setattr(writing, "write_manifest", full_disk)
    with pytest.raises(OutputError, match="No space left on device; nothing was left behind"):
        builder.build(tmp_path / "artifact", force=True)
    assert (tmp_path / "artifact" / "manifest.json").read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["artifact", "model"]


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["program_proto", "source_proto", "write_bytes", "write_manifest"])
def test_nothing_is_left_of_a_build_that_fails(
    step: str, builder: ArtifactBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, step, full_disk)
    with pytest.raises(OutputError, match=r"writing .*artifact failed: No space left on device"):
        builder.build(tmp_path / "artifact")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_nothing_is_left_of_a_build_that_is_interrupted(
    builder: ArtifactBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "write_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        builder.build(tmp_path / "artifact")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
