"""External data: where it may lie, what is refused by name, how it is read, and what becomes of files that change."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from furiosa_llm.builder import ArtifactBuilder, ModelLoadError, plan_model
from furiosa_llm.builder.source import tensors as tensor_reading
from furiosa_llm.builder.source.load import check_external_data, load
from furiosa_llm.builder.source.tensors import SourceTensor, load_in_place, read_packed
from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.reader import open_artifact
from tests.support.builder.graphs import Array, model, random

EMBEDDING, HEAD = random(64, 32), random(32, 64)
NBYTES = 64 * 32 * 4
"""Of each of the two."""


def tensor(name: str, array: Array, **external: object) -> onnx.TensorProto:
    """A tensor of the array's type and shape whose data is elsewhere."""
    proto = numpy_helper.from_array(array, name)
    proto.ClearField("raw_data")
    proto.data_location = TensorProto.EXTERNAL
    for key, value in external.items():
        proto.external_data.add(key=key, value=str(value))
    return proto


def proto(**external: object) -> onnx.ModelProto:
    """A model whose embedding is where it says, and whose output projection lies behind it in model.data."""
    made = model("int64[batch, sequence] ids", "float[batch, sequence, 64] y", "x = Gather(e, ids) y = MatMul(x, w)")
    place = {"location": "model.data", "offset": 0, "length": NBYTES, **external}
    made.graph.initializer.append(tensor("e", EMBEDDING, **{k: v for k, v in place.items() if v is not None}))
    made.graph.initializer.append(tensor("w", HEAD, location="model.data", offset=NBYTES, length=NBYTES))
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with good data."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.data").write_bytes(EMBEDDING.tobytes() + HEAD.tobytes())
    return folder


def save(folder: Path, made: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(made.SerializeToString())
    return path


def refuse(folder: Path, made: onnx.ModelProto, *parts: str) -> None:
    """A build must be refused in one line that says every part, and leave nothing behind."""
    path = save(folder, made)
    before = sorted(folder.parent.iterdir())
    with pytest.raises(ModelLoadError) as caught:
        ArtifactBuilder(path).build(folder.parent / "artifact")
    message = str(caught.value)
    for part in parts:
        assert part in message
    assert "\n" not in message
    assert sorted(folder.parent.iterdir()) == before


# -- where a file may be -------------------------------------------------------------------------------------------


def test_good_data_is_read(folder: Path) -> None:
    source = load(save(folder, proto()))
    check_external_data(source)
    for name, expected in (("e", EMBEDDING), ("w", HEAD)):
        found = source.model.graph.initializers[name].const_value
        assert isinstance(found, SourceTensor)
        np.testing.assert_array_equal(found.numpy(), expected)
        np.testing.assert_array_equal(np.asarray(found), expected)
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("location", ["../model/model.data", "sub/../model.data", "/etc/hostname", "..", "sub/.."])
def test_a_path_that_leads_out(location: str, folder: Path) -> None:
    refuse(folder, proto(location=location), 'initializer "e" of model.onnx', f'"{location}"', "outside the model's")
    with pytest.raises(ModelLoadError, match="outside the model's folder"):
        plan_model(folder / "model.onnx")


def test_an_absolute_path_to_the_right_place(folder: Path) -> None:
    refuse(folder, proto(location=folder / "model.data"), 'initializer "e"', "no absolute path")


@pytest.mark.parametrize("location", ["C:\\weights.bin", "c:weights.bin", "..\\weights.bin", "sub\\weights.bin"])
def test_a_path_as_windows_writes_it(location: str, folder: Path) -> None:
    refuse(folder, proto(location=location), 'initializer "e"', f'"{location}"', "as Windows writes it", "forward")


@pytest.mark.parametrize("location", ["a\nb", "a\0b", "\x1b[31m", "a\u2028b"])
def test_a_name_with_control_characters(location: str, folder: Path) -> None:
    refuse(folder, proto(location=location), 'initializer "e"', repr(location), "control characters")


@pytest.mark.parametrize("location", ["x" * 256, "\N{SNOWMAN}" * 90, "x/" * 3000])
def test_a_name_that_no_file_has(location: str, folder: Path) -> None:
    refuse(folder, proto(location=location), 'initializer "e"', "no file can have")


@pytest.mark.parametrize("location", ["model.onnx", "./model.onnx", "again.onnx", "hard.onnx"])
def test_the_model_file_itself(location: str, folder: Path) -> None:
    path = save(folder, proto())
    (folder / "again.onnx").symlink_to("model.onnx")
    (folder / "hard.onnx").hardlink_to(path)
    refuse(folder, proto(location=location), 'initializer "e"', f'"{location}"', "which is the model's file itself")


def folder_in_its_place(path: Path) -> None:
    path.mkdir()


def socket_in_its_place(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (folder_in_its_place, "which is a folder"),
        (os.mkfifo, "pipe, socket or device"),
        (socket_in_its_place, "pipe, socket or device"),
    ],
)
def test_what_is_no_file(
    make: Callable[[Path], None], kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)  # the name of a socket must be short
    make(Path("odd"))
    refuse(folder, proto(location="odd"), 'initializer "e"', '"odd"', kind, "regular file")


@pytest.mark.parametrize("target", ["../elsewhere", "/dev/zero", "../model2/model.data"])
def test_a_link_that_leads_out(target: str, folder: Path) -> None:
    for name in ("elsewhere", "model2/model.data"):
        (folder.parent / name).parent.mkdir(exist_ok=True)
        (folder.parent / name).write_bytes(bytes(NBYTES))
    (folder / "link").symlink_to(target)
    refuse(folder, proto(location="link"), 'initializer "e"', '"link"', "a link that leads outside the model's folder")


@pytest.mark.parametrize("target", ["nowhere", "link"])
def test_a_link_that_leads_nowhere(target: str, folder: Path) -> None:
    (folder / "link").symlink_to(target)
    refuse(folder, proto(location="link"), 'initializer "e"', '"link"')


def test_a_path_through_a_file(folder: Path) -> None:
    refuse(folder, proto(location="model.data/more"), 'initializer "e"', "which is missing")


def test_a_folder_that_may_not_be_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, stat = save(folder, proto(location="closed/data")), Path.stat

    def refused(self: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if self.parent.name == "closed":
            raise PermissionError(13, "Permission denied")
        return stat(self, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", refused)
    with pytest.raises(ModelLoadError, match=r'"closed/data", which cannot be looked at: Permission denied'):
        load(path)


def test_data_in_a_folder_below_and_links_inside(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "model.data").rename(folder / "sub" / "real")
    (folder / "model.data").symlink_to("sub/real")
    ArtifactBuilder(save(folder, proto(location="./sub/real"))).build(folder / "artifact")
    assert open_artifact(folder / "artifact", full=True).manifest.tensors


def test_a_branch_of_a_function(folder: Path) -> None:
    """After inlining it is a weight like any other."""
    made = proto()
    value = helper.make_tensor_value_info("secret", TensorProto.FLOAT, [32, 64])
    secret = helper.make_graph([], "g", [], [value], [tensor("secret", HEAD, location="../secret")])
    node = helper.make_node("If", ["c"], ["r"], then_branch=secret, else_branch=secret)
    opsets = [helper.make_opsetid("", 21)]
    made.functions.append(helper.make_function("own", "f", ["c"], ["r"], [node], opsets))
    made.opset_import.append(helper.make_opsetid("own", 1))
    refuse(folder, made, 'initializer "secret" of model.onnx', "outside the model's folder")


# -- a cache of links ----------------------------------------------------------------------------------------------


def linked(folder: Path, made: onnx.ModelProto, below: str = "") -> Path:
    """The folder's files as Hugging Face's cache has them: blobs, and links to them in a snapshot."""
    save(folder, made)
    (folder / "config.json").write_text('{"max_position_embeddings": 77}')
    cache = folder.parent / "cache"
    snapshot = cache / "snapshots" / "0123" / below
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(cache / "blobs" / f"blob{number}")
        depth = "../" * (3 if below else 2)
        (snapshot / file.name).symlink_to(f"{depth}blobs/blob{number}")
    return snapshot / "model.onnx"


@pytest.mark.parametrize("below", ["", "onnx"])
def test_a_cache_of_links(below: str, folder: Path) -> None:
    ArtifactBuilder(save(folder, proto())).build(folder.parent / "plain")
    path = linked(folder, proto(), below)
    ArtifactBuilder(path).build(folder.parent / "artifact")
    found = open_artifact(folder.parent / "artifact", full=True)
    assert found.manifest.model.max_sequence_length == 77
    expected = open_artifact(folder.parent / "plain", full=True)
    assert found.manifest.tensors == expected.manifest.tensors
    assert [e.sha256 for e in found.manifest.initializers] == [e.sha256 for e in expected.manifest.initializers]


def test_a_link_out_of_a_cache(folder: Path) -> None:
    path = linked(folder, proto())
    (path.parent / "model.data").unlink()
    (path.parent / "model.data").symlink_to(folder.parent / "secret")
    (folder.parent / "secret").write_bytes(bytes(2 * NBYTES))
    with pytest.raises(ModelLoadError, match=r'"model\.data", a link that leads outside the model\'s folder'):
        load(path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_configuration_from_elsewhere(name: str, folder: Path) -> None:
    """It would go into the artifact, which is given to others."""
    (folder.parent / "secret").write_text("{}")
    (folder / name).symlink_to("../secret")
    refuse(folder, proto(), f"{folder / name} goes with the model", "a link that leads outside the model's folder")
    if name == "config.json":
        with pytest.raises(ModelLoadError, match=r"config\.json goes with the model, a link"):
            plan_model(folder / "model.onnx")


def test_a_configuration_that_is_nested_too_deeply(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)
    refuse(folder, proto(), "config.json is not JSON", "mend it or remove it")


# -- where in a file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [("offset", -1), ("length", -1), ("offset", 2**62), ("length", "9" * 30), ("offset", "0x10"), ("offset", "1e3"),
     ("length", " 8192"), ("offset", "\N{ARABIC-INDIC DIGIT ONE}"), ("length", "")],
)  # fmt: skip
def test_what_is_no_place_in_a_file(key: str, value: object, folder: Path) -> None:
    refuse(
        folder, proto(**{key: value}), f'model.onnx: initializer "e" has the {key} {str(value)!r}', "number of bytes"
    )


@pytest.mark.parametrize("offset", [NBYTES + 1, 2 * NBYTES, 10**18])
def test_data_past_the_end(offset: int, folder: Path) -> None:
    end = f'ends at byte {offset + NBYTES} of "model.data", which has {2 * NBYTES} bytes'
    refuse(folder, proto(offset=offset), 'initializer "e" of model.onnx', end, "incomplete")


@pytest.mark.parametrize("length", [0, 1, NBYTES - 4, NBYTES + 4, 10**18])
def test_a_length_that_is_not_the_shapes(length: int, folder: Path) -> None:
    says = f"says its data is {length} bytes long, but FLOAT [64, 32] takes {NBYTES}"
    refuse(folder, proto(length=length), 'initializer "e" of model.onnx', says)


def test_the_same_key_twice(folder: Path) -> None:
    made = proto()
    made.graph.initializer[0].external_data.add(key="offset", value="4")
    refuse(folder, made, 'initializer "e"', "'offset' twice")


@pytest.mark.parametrize("offset", [4, NBYTES - 4, NBYTES + 4])
def test_regions_that_overlap_in_part(offset: int, folder: Path) -> None:
    (folder / "model.data").write_bytes(bytes(3 * NBYTES))
    refuse(folder, proto(offset=offset), 'initializer "e"', 'initializer "w"', f"bytes {NBYTES} to {2 * NBYTES}",
           f"bytes {offset} to {offset + NBYTES}", "overlaps")  # fmt: skip


def test_a_region_inside_of_another(folder: Path) -> None:
    made = proto()
    made.graph.initializer.append(tensor("part", HEAD[:2], location="model.data", offset=NBYTES, length=512))
    refuse(folder, made, 'the data of initializer "w"', 'overlaps that of initializer "part"')


def test_regions_that_overlap_under_two_names_of_a_file(folder: Path) -> None:
    (folder / "again").symlink_to("model.data")
    (folder / "hard").hardlink_to(folder / "model.data")
    for name in ("again", "hard"):
        refuse(folder, proto(location=name, offset=NBYTES - 4), "overlaps")


def test_regions_that_are_the_same_are_aliases(folder: Path) -> None:
    made = proto(offset=NBYTES)  # [64, 32] and [32, 64]
    made.graph.initializer.append(tensor("codes", HEAD.view(np.uint8), location="model.data", offset=NBYTES))
    made.graph.initializer.append(tensor("none", HEAD[:0], location="model.data", offset=NBYTES + 4))
    ArtifactBuilder(save(folder, made)).build(folder / "artifact")
    digests = {e.name: e.sha256 for e in open_artifact(folder / "artifact", full=True).manifest.initializers}
    assert digests["e"] == digests["w"]


# -- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 8)])
def test_elements_of_every_type(name: str, shape: tuple[int, ...], folder: Path) -> None:
    dtype = ir.DataType[name]
    codes = np.random.default_rng(0).integers(0, 256, DTYPES[name].nbytes(shape), dtype=np.uint8)
    if name == "BOOL":
        codes &= 1
    elif (used := int(np.prod(shape)) * dtype.bitwidth % 8) > 0:
        codes[-1] &= 2**used - 1  # what lies behind the last element is 0
    (folder / "codes").write_bytes(b"padding" + codes.tobytes())
    made = onnx.TensorProto(name="t", data_type=int(dtype), dims=shape, raw_data=codes.tobytes())
    inline = ir.serde.deserialize_tensor(made)
    lying = SourceTensor("codes", 7, len(codes), dtype, shape=ir.Shape(shape), name="t", base_dir=folder)
    assert lying.numpy().shape == shape
    assert lying.numpy().dtype == inline.numpy().dtype
    assert lying.numpy().tobytes() == inline.numpy().tobytes()
    for one in (lying, inline, ir.Tensor(inline.numpy(), dtype=dtype)):
        packed = read_packed(one)
        assert packed.dtype == np.uint8
        assert packed.tobytes() == codes.tobytes()


def test_data_is_read_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_reading, "_PIECE_NBYTES", 1000)
    sizes: list[int] = []
    preadv = os.preadv

    def some(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        sizes.append(len(buffers[0]))
        return preadv(descriptor, [buffers[0][:700]], offset)  # the system may give less than it was asked for

    monkeypatch.setattr(os, "preadv", some)
    lying = SourceTensor("model.data", NBYTES, None, ir.DataType.FLOAT, shape=ir.Shape((32, 64)), name="w",
                         base_dir=folder)  # fmt: skip
    np.testing.assert_array_equal(lying.numpy(), HEAD)
    assert max(sizes) == 1000


def test_an_attribute_with_external_data(folder: Path) -> None:
    """It is small, and goes into the program."""
    nodes = "x = Gather(e, ids) z = MatMul(x, w) s = Shape(z) f = ConstantOfShape(s) y = Add(z, f)"
    made = model("int64[batch, sequence] ids", "float[batch, sequence, 64] y", nodes)
    made.graph.initializer.extend(proto().graph.initializer)
    fill = tensor("fill", np.array([2.5], np.float32), location="fill", offset=4)
    made.graph.node[3].attribute.append(helper.make_attribute("value", fill))
    (folder / "fill").write_bytes(bytes(4) + np.array([2.5], np.float32).tobytes())
    ArtifactBuilder(save(folder, made)).build(folder / "artifact")
    written = (
        open_artifact(folder / "artifact").program,
        onnx.load(folder / "artifact" / "source.onnx", load_external_data=False),
    )
    for program in written:
        node = next(node for node in program.graph.node if node.op_type == "ConstantOfShape")
        np.testing.assert_array_equal(numpy_helper.to_array(node.attribute[0].t), [2.5])
    (folder / "fill").unlink()
    with pytest.raises(ModelLoadError, match=r'fill, which holds the data of "fill", is missing'):
        plan_model(folder / "model.onnx")


def test_external_data_is_put_into_a_tensor(folder: Path) -> None:
    made = tensor("w", HEAD, location="model.data", offset=NBYTES)
    load_in_place(made, folder)
    assert made == numpy_helper.from_array(HEAD, "w")


def test_reading_what_is_gone_or_short(folder: Path) -> None:
    source = load(save(folder, proto()))
    found = source.model.graph.initializers["w"].const_value
    assert isinstance(found, SourceTensor)
    (folder / "model.data").write_bytes(bytes(NBYTES + 8))
    for read in (lambda: read_packed(found), found.numpy, found.tobytes):
        with pytest.raises(ModelLoadError, match=rf'model\.data ends at byte {NBYTES + 8}, but the data of "w"'):
            read()
    (folder / "model.data").unlink()
    with pytest.raises(ModelLoadError, match=r'model\.data, which holds the data of "w", is missing; put the file'):
        read_packed(found)
    with pytest.raises(FileNotFoundError):
        found.numpy()
    os.mkfifo(folder / "model.data")
    with pytest.raises(ModelLoadError, match=r"model\.data is no regular file"):
        found.numpy()
    (folder / "model.data").unlink()
    (folder / "model.data").symlink_to("model.data")
    with pytest.raises(ModelLoadError, match=r"model\.data cannot be read: Too many levels"):
        found.numpy()


# -- files that change ---------------------------------------------------------------------------------------------


def appended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def rewritten(path: Path) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.write(bytes(8))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def replaced(path: Path) -> None:
    status = path.stat()
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.rename(path)


@pytest.mark.parametrize("name", ["model.onnx", "model.data"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (appended, r"it had \d+ bytes, and has \d+ bytes since"),
        (rewritten, "and was written to since"),
        (replaced, "and was replaced since"),
        (Path.unlink, "and is gone since"),
    ],
)
def test_a_file_that_changes(change: Callable[[Path], None], said: str, name: str, folder: Path) -> None:
    source = load(save(folder, proto()))
    source.guard.check_unchanged()
    assert sorted(path.name for path in source.guard.paths) == ["model.data", "model.onnx"]
    change(folder / name)
    with pytest.raises(ModelLoadError, match=rf"{name} was changed while the build was reading it \(.*{said}"):
        source.guard.check_unchanged()


def test_a_link_that_is_turned(folder: Path) -> None:
    path = linked(folder, proto())
    source = load(path)
    other = folder.parent / "cache" / "blobs" / "other"
    other.write_bytes(EMBEDDING.tobytes() + HEAD.tobytes())
    (path.parent / "model.data").unlink()
    (path.parent / "model.data").symlink_to("../../blobs/other")
    with pytest.raises(ModelLoadError, match=r"model\.data was changed"):
        source.guard.check_unchanged()


def test_a_model_that_is_no_file(folder: Path) -> None:
    os.mkfifo(folder / "pipe.onnx")
    with pytest.raises(ModelLoadError, match=r"pipe\.onnx is a pipe, socket or device, expected an ONNX file"):
        load(folder / "pipe.onnx")
