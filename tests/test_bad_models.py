"""Models that cannot be built and places that cannot be written: a typed error that says what to do, nothing left."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from furiosa_llm import ArtifactBuilder, FuriosaLLMError
from furiosa_llm.builder import ModelLoadError, OptionError, OutputError, UnsupportedModelError

Edit = Callable[[onnx.ModelProto], None]


def refusal(kind: type[FuriosaLLMError], model: Path, output: Path) -> str:
    """The message of a build that must fail with `kind` and leave nothing behind."""
    before = {entry.name for entry in output.parent.iterdir()} if output.parent.is_dir() else set()
    with pytest.raises(kind) as caught:
        ArtifactBuilder(model, tensor_parallel_size=4).build(output)
    after = {entry.name for entry in output.parent.iterdir()} if output.parent.is_dir() else set()
    assert after == before
    return str(caught.value)


@pytest.fixture
def model(zoo: Path, tmp_path: Path) -> Path:
    """A model whose weights are external data, in a folder that a test may damage."""
    shutil.copytree(zoo / "tiny-llama-genai-fp32", tmp_path / "model")
    return tmp_path / "model" / "model.onnx"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "output"
    folder.mkdir()
    return folder / "artifact"


def edit(path: Path, change: Edit) -> None:
    proto = onnx.load(path, load_external_data=False)
    change(proto)
    path.write_bytes(proto.SerializeToString())


def first_external(proto: onnx.ModelProto) -> onnx.TensorProto:
    found: list[onnx.TensorProto] = [t for t in proto.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    return found[0]


def set_external(key: str, value: str) -> Edit:
    def change(proto: onnx.ModelProto) -> None:
        tensor = first_external(proto)
        kept = [(e.key, e.value) for e in tensor.external_data if e.key != key]
        del tensor.external_data[:]
        for name, content in [*kept, (key, value)]:
            tensor.external_data.add(key=name, value=content)

    return change


def test_external_data_that_is_missing(model: Path, output: Path) -> None:
    (model.parent / "model.onnx.data").unlink()
    message = refusal(ModelLoadError, model, output)
    assert "model.onnx.data" in message
    assert "missing" in message


def test_external_data_that_is_cut_short(model: Path, output: Path) -> None:
    data = model.parent / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:1000])
    message = refusal(ModelLoadError, model, output)
    assert "has 1000 bytes" in message
    assert "incomplete" in message


@pytest.mark.parametrize("location", ["../secret.data", "/etc/hostname", "a/../../secret.data"])
def test_external_data_outside_the_folder(location: str, model: Path, output: Path) -> None:
    (model.parent.parent / "secret.data").write_bytes(b"\0" * 10**6)
    edit(model, set_external("location", location))
    message = refusal(ModelLoadError, model, output)
    assert location in message
    assert "outside the model's folder" in message


@pytest.mark.parametrize("location", ["x" * 300, "x/" * 3000])
def test_external_data_under_a_name_that_no_file_has(location: str, model: Path, output: Path) -> None:
    edit(model, set_external("location", location))
    assert "no file can have" in refusal(ModelLoadError, model, output)


def test_external_data_behind_a_link_that_leaves_the_folder(model: Path, output: Path) -> None:
    data = model.parent / "model.onnx.data"
    data.rename(model.parent.parent / "elsewhere.data")
    data.symlink_to(model.parent.parent / "elsewhere.data")
    assert "outside the model's folder" in refusal(ModelLoadError, model, output)


def test_external_data_of_the_wrong_length(model: Path, output: Path) -> None:
    edit(model, set_external("length", "12"))
    assert "12 bytes long" in refusal(ModelLoadError, model, output)


def test_a_value_that_comes_from_nowhere(model: Path, output: Path) -> None:
    def change(proto: onnx.ModelProto) -> None:
        next(node for node in proto.graph.node if node.op_type == "MatMul").input[0] = "nowhere"

    edit(model, change)
    assert '"nowhere"' in refusal(ModelLoadError, model, output)


def test_a_cycle(model: Path, output: Path) -> None:
    def change(proto: onnx.ModelProto) -> None:
        norms = [n for n in proto.graph.node if n.op_type == "SkipSimplifiedLayerNormalization"]
        norms[0].input[1] = norms[-1].output[0]

    edit(model, change)
    assert "cycle" in refusal(ModelLoadError, model, output)


def test_an_if_whose_branches_differ(tmp_path: Path, output: Path) -> None:
    path = tmp_path / "branching.onnx"
    proto = branching_model()
    branch = proto.graph.node[0].attribute[0].g
    branch.node.add(op_type="Transpose", input=[branch.output[0].name], output=["turned"])
    branch.output[0].CopyFrom(helper.make_tensor_value_info("turned", TensorProto.FLOAT, [8, "n"]))
    onnx.save(proto, path)
    message = refusal(UnsupportedModelError, path, output)
    assert "its branches give" in message
    assert "export the branches as separate models" in message


def test_an_if_that_depends_on_the_input(tmp_path: Path, output: Path) -> None:
    path = tmp_path / "branching.onnx"
    onnx.save(branching_model(), path)
    report = ArtifactBuilder(path, tensor_parallel_size=4).build(output)
    assert report.notes == ()


def test_an_if_with_a_constant_condition_is_inlined(tmp_path: Path, output: Path) -> None:
    path = tmp_path / "constant.onnx"
    onnx.save(branching_model(constant=True), path)
    report = ArtifactBuilder(path, tensor_parallel_size=4).build(output)
    assert report.num_nodes >= 1


def branching_model(*, constant: bool = False) -> onnx.ModelProto:
    def branch(name: str, op_type: str) -> onnx.GraphProto:
        result = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8])
        return helper.make_graph([helper.make_node(op_type, ["x"], [name])], name, [], [result])

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])
    condition = helper.make_tensor_value_info("condition", TensorProto.BOOL, [])
    node = helper.make_node("If", ["condition"], ["y"], then_branch=branch("t", "Relu"), else_branch=branch("e", "Neg"))
    graph = helper.make_graph([node], "branching", [x] if constant else [x, condition], [y])
    if constant:
        graph.initializer.append(helper.make_tensor("condition", TensorProto.BOOL, [], [True]))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 100, b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_that_is_not_onnx(content: bytes, tmp_path: Path, output: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    assert "is not an ONNX model" in refusal(ModelLoadError, path, output)


def test_a_folder_instead_of_a_file(model: Path, output: Path) -> None:
    """One that holds several models of no usual name."""
    shutil.copy(model, model.with_name("b.onnx"))
    model.rename(model.with_name("a.onnx"))
    assert "a.onnx, b.onnx: give the path of one of them" in refusal(ModelLoadError, model.parent, output)


def test_an_output_below_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write" in refusal(OutputError, model, tmp_path / "file" / "artifact")


def test_an_output_that_is_something_else(model: Path, output: Path) -> None:
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not an artifact"):
        ArtifactBuilder(model).build(output, force=True)
    assert (output / "thesis.tex").read_text() == "years of work"


def test_a_dimension_that_the_model_does_not_have(model: Path, output: Path) -> None:
    with pytest.raises(OptionError, match="hieght"):
        ArtifactBuilder(model, dims={"hieght": 224}).build(output)
    assert list(output.parent.iterdir()) == []


def test_options_out_of_range(model: Path) -> None:
    with pytest.raises(OptionError, match="max_padding"):
        ArtifactBuilder(model, max_padding=0.5)
    with pytest.raises(OptionError, match="max_seq_len_to_capture"):
        ArtifactBuilder(model, max_seq_len_to_capture=0)
