"""Artifacts that were cut short, altered or mixed up: refused, with what is wrong and what to do."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.manifest import seal
from furiosa_llm.runtime.artifact.reader import open_artifact
from tests.runtime.models import mlp
from tests.runtime.spmd import WEIGHTS, Spmd, file_entry

MESH = Mesh((2, 2))
PROGRAM = "program.onnx"


@pytest.fixture(scope="module")
def program() -> Spmd:
    return mlp(MESH)


@pytest.fixture
def folder(program: Spmd, tmp_path: Path) -> Path:
    return program.write(tmp_path / "artifact")


def refresh(folder: Path) -> None:
    """Makes the manifest's sizes and digests those of the files, as a hostile writer would."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"] = [
        {"path": e.path, "nbytes": e.nbytes, "sha256": e.sha256}
        for e in (file_entry(folder / entry["path"]) for entry in manifest["files"])
    ]
    (folder / "manifest.json").write_bytes(seal(manifest))


def test_windows_are_the_ranks_own(program: Spmd, folder: Path) -> None:
    artifact = open_artifact(folder, full=True)
    for name, weight in program.weights.items():
        for rank in range(MESH.size):
            local = weight.local(MESH, rank)
            data = artifact.read_window(artifact.window(name, rank))
            assert np.array_equal(data.view(np.float32).reshape(local.shape), local)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no artifact at .*: found nothing, expected the folder"):
        open_artifact(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="found a file"):
        open_artifact(tmp_path / "file")
    with pytest.raises(ArtifactError, match=r"it has no manifest\.json"):
        open_artifact(tmp_path)


def test_a_missing_file(folder: Path) -> None:
    (folder / "source.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"source\.onnx is missing; copy the artifact again or rebuild"):
        open_artifact(folder)


@pytest.mark.parametrize("name", [PROGRAM, WEIGHTS])
def test_a_truncated_file(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=f"{name}: found {len(content) - 1} bytes, expected {len(content)}"):
        open_artifact(folder)


def test_an_altered_program(folder: Path) -> None:
    content = bytearray((folder / PROGRAM).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / PROGRAM).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"program\.onnx was altered: found sha256 \w+\.\.\., expected \w+"):
        open_artifact(folder)


def test_altered_weights_are_found_by_full_verification(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    open_artifact(folder)
    with pytest.raises(ArtifactError, match=f"{WEIGHTS} was altered"):
        open_artifact(folder, full=True)


def test_a_link_in_place_of_a_file(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / WEIGHTS, tmp_path / "elsewhere")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="is not a regular file; copy the artifact with its links followed"):
        open_artifact(folder)


def rewrite_header(folder: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    content = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    refresh(folder)


def test_a_header_that_ends_beyond_the_file(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 40) + content[8:])
    refresh(folder)
    with pytest.raises(ArtifactError, match="found a safetensors header of 1099511627776 bytes in a file of"):
        open_artifact(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.pop("A"), "begins at byte|where the last tensor ends"),
        (lambda h: h["A"].update(dtype="F16"), r"tensor 'A' is F16 \[4, 8, 6\] of 768 bytes, expected F32"),
        (lambda h: h["A"].update(shape=[4, 6, 8]), r"tensor 'A' is F32 \[4, 6, 8\]"),
        (lambda h: h["A"].update(data_offsets=[8, 0]), r"A\.data_offsets: found \[8, 0\], expected \[begin, end\]"),
        (lambda h: h["A"].update(data_offsets=[0, 8]), "begins at byte"),
        (lambda h: h["A"].update(extra=1), "found the unknown key 'extra'"),
        (lambda h: h.update(C=h.pop("A")), f"{WEIGHTS} has no tensor 'A'"),
    ],
)
def test_a_malformed_header(folder: Path, change: Callable[[object], object], message: str) -> None:
    rewrite_header(folder, change)
    with pytest.raises(ArtifactError, match=message):
        open_artifact(folder)


def test_a_tensor_that_the_manifest_does_not_name(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["tensors"][0], manifest["initializers"][0]
    (folder / "manifest.json").write_bytes(seal(manifest))
    with pytest.raises(ArtifactError, match=r"has a tensor 'A' that manifest\.json does not name"):
        open_artifact(folder)


def set_place(model: onnx.ModelProto, key: str, value: str) -> None:
    for entry in model.graph.initializer[0].external_data:
        if entry.key == key:
            entry.value = value


def give_collective(model: onnx.ModelProto, name: str, value: object) -> None:
    node = next(node for node in model.graph.node if node.domain == "furiosa_llm")
    del node.attribute[:]
    node.attribute.append(onnx.helper.make_attribute(name, value))


def wrap_in_if(model: onnx.ModelProto) -> None:
    inner = onnx.helper.make_node("AllReduce", ["partial"], ["inner"], domain="furiosa_llm", axes=[0])
    graph = onnx.helper.make_graph([inner], "branch", [], [onnx.helper.make_tensor_value_info("inner", 1, None)])
    model.graph.node.append(onnx.helper.make_node("If", ["partial"], ["z"], then_branch=graph, else_branch=graph))


def external_attribute(model: onnx.ModelProto) -> None:
    tensor = onnx.TensorProto(name="t", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["z"], value=tensor))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.ClearField("graph"), "found no graph, expected a graph with outputs"),
        (lambda m: m.graph.input.pop(), r"found the inputs \[\], expected \['x'\], as manifest\.json says"),
        (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 7), "input 'x' is INT64, expected FLOAT"),
        (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 99), "is of the unknown type 99"),
        (lambda m: m.graph.output[0].type.tensor_type.shape.dim.pop(), r"output 'y' has the local shape \['batch'\]"),
        (lambda m: set_place(m, "location", "../weights"), "initializer 'A' lies at .*'location': '../weights'"),
        (lambda m: set_place(m, "offset", "0"), "initializer 'A' lies at .*'offset': '0'"),
        (lambda m: set_place(m, "length", "1"), "initializer 'A' lies at"),
        (lambda m: m.graph.initializer[0].dims.pop(), r"initializer 'A' is FLOAT \[8\], expected FLOAT \[8, 6\]"),
        (lambda m: setattr(m.graph.initializer[0], "name", "Z"), r"initializer 'Z' is external, expected an entry"),
        (lambda m: m.graph.initializer.pop(), "found no external initializer 'B'"),
        (lambda m: m.graph.sparse_initializer.add(), "found sparse initializers"),
        (external_attribute, "has an attribute with external data, expected inline data"),
        (lambda m: m.graph.node.reverse(), "reads 'sum', expected a value known before it"),
        (lambda m: m.graph.node.append(m.graph.node[0]), "writes 'h' again, expected a new value"),
        (lambda m: m.graph.node.pop(), "no node writes the output 'y'"),
        (
            lambda m: setattr(m.graph.node[3], "name", "other"),
            "found 1 collective nodes, first 'other' for 'collective0'",
        ),
        (lambda m: setattr(m.graph.node[3], "op_type", "AllGather"), "collective 'collective0' is AllGather"),
        (lambda m: give_collective(m, "axes", [0]), r"'axes': \[0\]\}, expected AllReduce \{'axes': \[0, 1\]\}"),
        (lambda m: give_collective(m, "axes", "0"), r"'axes': None\}, expected AllReduce"),
        (lambda m: m.graph.node[3].input.append("h"), "has 2 inputs, 1 outputs, expected one each"),
        (lambda m: setattr(m.graph.value_info[2].type.tensor_type, "elem_type", 10), "is FLOAT16, expected FLOAT"),
        (wrap_in_if, "has a collective, expected collectives at the top level only"),
    ],
)
def test_a_program_that_the_manifest_does_not_describe(
    folder: Path, change: Callable[[onnx.ModelProto], object], message: str
) -> None:
    model = onnx.load_model(folder / PROGRAM, load_external_data=False)
    change(model)
    (folder / PROGRAM).write_bytes(model.SerializeToString())
    refresh(folder)
    with pytest.raises(ArtifactError, match=message) as caught:
        open_artifact(folder)
    assert "rebuild the artifact" in str(caught.value)


def test_a_program_that_is_no_model(folder: Path) -> None:
    (folder / PROGRAM).write_bytes(b"\xff" * 64)
    refresh(folder)
    with pytest.raises(ArtifactError, match=r"program\.onnx is not an ONNX model"):
        open_artifact(folder)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"first_node": 99}, "expected more than 99, where block 'b' starts"),
        ({"crossing": ["x"]}, "no node writes 'x'"),
    ],
)
def test_blocks_that_the_program_has_not(folder: Path, block: dict[str, object], message: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["blocks"] = [
        {"name": "b", "first_node": 0, "collectives": 1, "weight_nbytes": 0, "crossing": []} | block,
    ]
    (folder / "manifest.json").write_bytes(seal(manifest))
    with pytest.raises(ArtifactError, match=message):
        open_artifact(folder)
