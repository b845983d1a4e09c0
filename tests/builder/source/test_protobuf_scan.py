"""Model files read without their large tensors: the rest as protobuf reads it, and the tensors where they lie."""

from __future__ import annotations

import hashlib
import os
import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from furiosa_llm.builder import ModelLoadError
from furiosa_llm.builder.source import protobuf_scan
from furiosa_llm.builder.source.load import load
from furiosa_llm.builder.source.protobuf_scan import LEFT_OUT_NBYTES, Lean, read_lean
from tests.support.builder.graphs import model
from tests.support.builder.wire import END_GROUP, START_GROUP, field, tensor, varint

ROWS, COLUMNS = 64, 32
"""Of a float weight that is left out: 8192 bytes."""
WEIGHT = np.arange(ROWS * COLUMNS, dtype=np.float32).reshape(ROWS, COLUMNS)
DATA = WEIGHT.tobytes()


def graph(*initializers: bytes, extra: bytes = b"") -> bytes:
    """A GraphProto that multiplies by the initializer w."""
    proto = model("float[n, 64] x", "float[n, 32] y", "y = MatMul(x, w)").graph
    return b"".join([proto.SerializeToString(), *(field(5, one) for one in initializers), extra])


def file_of(*graphs: bytes, extra: bytes = b"") -> bytes:
    """A ModelProto of some graph fields, which protobuf merges."""
    proto = model("float[n, 64] x", "float[n, 32] y", "y = MatMul(x, w)")
    proto.ClearField("graph")
    return b"".join([*(field(7, one) for one in graphs), proto.SerializeToString(), extra])


def written(content: bytes, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(content)
    return path


def restored(found: Lean, content: bytes) -> onnx.ModelProto:
    """The lean model with everything put back that was left out."""
    proto = onnx.ModelProto()
    proto.CopyFrom(found.proto)
    for index, left_out in found.left_out.items():
        initializer = proto.graph.initializer[index]
        entries = {entry.key: entry.value for entry in initializer.external_data}
        assert entries == {"location": "model.onnx", "offset": str(left_out.offset), "length": str(left_out.nbytes)}
        assert initializer.data_location == TensorProto.EXTERNAL
        initializer.ClearField("data_location")
        del initializer.external_data[:]
        data = content[left_out.offset : left_out.offset + left_out.nbytes]
        if left_out.field == "raw_data":
            initializer.raw_data = data
        else:
            dtype = np.float32 if left_out.field == "float_data" else np.float64
            getattr(initializer, left_out.field).extend(np.frombuffer(data, dtype))
    return proto


def check(content: bytes, folder: Path, num_left_out: int) -> Lean:
    """Read a file, compare it with what protobuf reads, and the digest with that of what was not left out."""
    found = read_lean(written(content, folder))
    expected = onnx.ModelProto.FromString(content)
    for initializer in expected.graph.initializer:
        if not initializer.data_location:
            initializer.ClearField("data_location")
    assert restored(found, content) == expected
    assert len(found.left_out) == num_left_out
    rest = bytearray(content)
    for left_out in sorted(found.left_out.values(), key=lambda one: -one.offset):
        del rest[left_out.offset : left_out.offset + left_out.nbytes]
    assert found.sha256 == hashlib.sha256(rest).hexdigest()
    return found


# -- what is left out ----------------------------------------------------------------------------------------------

RAW = tensor(field(9, DATA), dims=(ROWS, COLUMNS))
PACKED = tensor(field(4, DATA), dims=(ROWS, COLUMNS))
DOUBLES = tensor(field(10, DATA), dims=(ROWS, COLUMNS // 2), data_type=TensorProto.DOUBLE)


@pytest.mark.parametrize(
    "initializer",
    [
        RAW,
        PACKED,
        DOUBLES,
        field(9, DATA) + tensor(dims=(ROWS, COLUMNS)),
        RAW + field(14, 0) + field(12, b"a text about it"),
        field(1, ROWS) + tensor(field(9, DATA, width=5), dims=(COLUMNS,)) + field(99, b"unknown"),
        tensor(field(9, DATA), dims=(ROWS, COLUMNS), data_type=TensorProto.UNDEFINED) + field(2, TensorProto.FLOAT),
        tensor(field(9, DATA), dims=(ROWS, 8, COLUMNS), data_type=TensorProto.INT4),
    ],
    ids=["raw", "floats", "doubles", "data first", "default location", "odd encoding", "type again", "below a byte"],
)
def test_large_data_is_left_out(initializer: bytes, tmp_path: Path) -> None:
    check(file_of(graph(initializer)), tmp_path, 1)


@pytest.mark.parametrize(
    "initializer",
    [
        tensor(field(9, DATA[:LEFT_OUT_NBYTES]), dims=(LEFT_OUT_NBYTES // 4,)),
        RAW + field(9, DATA[::-1]),
        RAW + field(9, b""),
        PACKED + field(4, DATA),
        PACKED + varint(4 << 3 | 5) + DATA[:4],
        RAW + field(4, DATA),
        RAW + field(5, 7),
        RAW + field(3, b""),
        RAW + field(14, 1),
        RAW + field(13, field(1, b"location") + field(2, b"model.onnx")),
        tensor(field(4, DATA), dims=(ROWS, COLUMNS), data_type=TensorProto.COMPLEX64),
        tensor(field(9, DATA), dims=(ROWS, COLUMNS), data_type=TensorProto.STRING),
        tensor(field(9, DATA), dims=(ROWS, COLUMNS), data_type=1000),
        tensor(field(7, b"\x05" * 8192), dims=(8192,), data_type=TensorProto.INT64),
        b"".join([tensor(dims=(ROWS * COLUMNS,)), *(varint(4 << 3 | 5) + DATA[i : i + 4] for i in range(0, 8192, 4))]),
    ],
    ids=["small", "twice", "emptied", "in two", "one more", "raw and floats", "raw and integers", "segment",
         "external and raw", "external data", "complex", "text", "unknown type", "integers", "one by one"],
)  # fmt: skip
def test_what_is_not_plain_data_stays(initializer: bytes, tmp_path: Path) -> None:
    check(file_of(graph(initializer)), tmp_path, 0)


def test_several_graphs_are_merged(tmp_path: Path) -> None:
    small = tensor(field(9, DATA[:16]), dims=(4,), name=b"small")
    second = b"".join(field(5, tensor(field(9, DATA), dims=(ROWS, COLUMNS), name=name)) for name in (b"a", b"b"))
    content = file_of(graph(small, RAW), b"", second + field(2, b"another name"))
    assert sorted(check(content, tmp_path, 3).left_out) == [1, 2, 3]


def test_a_field_of_another_type_is_no_graph(tmp_path: Path) -> None:
    check(file_of(graph(RAW, extra=field(5, 3)), extra=field(7, 3)), tmp_path, 1)


def test_groups_are_read_by_protobuf(tmp_path: Path) -> None:
    group = varint(200 << 3 | START_GROUP) + field(5, RAW) + varint(200 << 3 | END_GROUP)
    check(file_of(graph(RAW), extra=group), tmp_path, 0)
    check(file_of(graph(RAW, extra=group)), tmp_path, 0)


def test_too_many_fields_are_read_by_protobuf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protobuf_scan, "MAX_FIELDS", 20)
    check(file_of(graph(RAW, extra=field(99, 1) * 20)), tmp_path, 0)


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.onnx"))
    path.write_bytes(file_of(graph(RAW)))
    assert read_lean(path).left_out == {}


def test_inner_graphs_keep_their_data(tmp_path: Path) -> None:
    inner = helper.make_graph([], "inner", [], [], [numpy_helper.from_array(WEIGHT, "inner_w")])
    proto = onnx.ModelProto.FromString(file_of(graph(RAW)))
    proto.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner))
    constant = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(WEIGHT, "k"))
    proto.functions.add(name="f", node=[constant])
    check(proto.SerializeToString(), tmp_path, 1)


def test_the_zoo_as_protobuf_reads_it(zoo: Path, tmp_path: Path) -> None:
    left_out = 0
    for path in sorted(zoo.glob("*/*.onnx")):
        content = path.read_bytes()
        found = read_lean(written(content, tmp_path))
        left_out += len(check(content, tmp_path, len(found.left_out)).left_out)
    assert left_out > 300


def test_the_elements_are_the_same(tmp_path: Path) -> None:
    source = load(written(file_of(graph(RAW)), tmp_path))
    tensor_read = source.model.graph.initializers["w"].const_value
    assert tensor_read is not None
    np.testing.assert_array_equal(tensor_read.numpy(), WEIGHT)
    assert source.proto.graph.initializer[0].data_location == TensorProto.EXTERNAL


# -- what is read --------------------------------------------------------------------------------------------------


class Reads:
    """Counts what is read of files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nbytes = 0
        pread = os.pread

        def counted(descriptor: int, nbytes: int, offset: int) -> bytes:
            data = pread(descriptor, nbytes, offset)
            self.nbytes += len(data)
            return data

        monkeypatch.setattr(os, "pread", counted)


def weights(count: int, nbytes: int) -> Sequence[bytes]:
    return [tensor(field(9, bytes(nbytes)), dims=(nbytes // 4,), name=f"weight{i}".encode()) for i in range(count)]


def test_large_data_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(file_of(graph(*weights(50, 2**20))), tmp_path)
    reads = Reads(monkeypatch)
    tracemalloc.start()
    assert len(read_lean(path).left_out) == 50
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reads.nbytes < 0.003 * path.stat().st_size
    assert peak < 2**20


def test_small_data_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(file_of(graph(*weights(500, 2048))), tmp_path)
    reads = Reads(monkeypatch)
    assert read_lean(path).left_out == {}
    assert reads.nbytes == path.stat().st_size


# -- damage --------------------------------------------------------------------------------------------------------

WHOLE = file_of(graph(RAW))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (WHOLE[:-3], "left"),
        (file_of(graph(RAW) + b"\xff"), "does not end"),
        (file_of(graph(RAW), extra=b"\xff" * 11), "does not end"),
        (file_of(graph(RAW), extra=b"\x00"), "there is no field"),
        (file_of(graph(RAW), extra=varint(99 << 3 | 6)), "there is no field"),
        (file_of(graph(RAW), extra=varint(2**40)), "there is no field"),
        (file_of(graph(RAW), extra=varint(99 << 3 | 5) + b"123"), "are left"),
        (file_of(graph(RAW), extra=varint(99 << 3 | 2) + varint(2**62)), "are left"),
        (file_of(graph(RAW), extra=varint(99 << 3 | 0) + b"\x80" * 10 + b"\1"), "does not end"),
        (file_of(graph(tensor(field(4, DATA[:-1]), dims=(ROWS, COLUMNS)))), "no whole numbers"),
        (file_of(graph(RAW + b"\x08")), "does not end"),
        (file_of(graph(RAW + field(13, b"\xff"))), "parsing"),
        (file_of(graph(RAW), extra=field(8, b"\xff")), "parsing"),
    ],
)
def test_damage(content: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DecodeError):
        onnx.ModelProto.FromString(content)
    path = written(content, tmp_path)
    with pytest.raises((DecodeError, ValueError), match=reason):
        read_lean(path)
    with pytest.raises(ModelLoadError, match=r"model\.onnx is not an ONNX model: .*check that the download"):
        load(path)


def test_random_damage_is_read_as_protobuf_reads_it(tmp_path: Path) -> None:
    """Whatever is done to the file: both refuse it, or both read the same."""
    small = tensor(field(4, DATA[:64]), dims=(16,), name=b"small")
    whole = file_of(graph(small, RAW, PACKED), extra=field(14, field(1, b"k") + field(2, b"v")))
    places = [i for i in range(len(whole)) if not 100 < i % (len(DATA) + 200) < len(DATA)]
    rng = random.Random(0)
    refused = 0
    for _ in range(1500):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 4])):
            content[rng.choice(places)] ^= 1 << rng.randrange(8)
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        try:
            expected = onnx.ModelProto.FromString(bytes(content))
        except DecodeError:
            refused += 1
            with pytest.raises((DecodeError, ValueError)):
                read_lean(written(bytes(content), tmp_path))
            continue
        check(bytes(content), tmp_path, len(read_lean(written(bytes(content), tmp_path)).left_out))
        assert expected
    assert 200 < refused < 1300


def test_what_is_read_ahead_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that the first read holds whole is not read again behind what is left out."""
    path = written(WHOLE, tmp_path)
    reads = Reads(monkeypatch)
    assert len(read_lean(path).left_out) == 1
    assert reads.nbytes == len(WHOLE)


def test_a_field_beyond_protobufs_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protobuf_scan, "MAX_MESSAGE_NBYTES", len(DATA) - 1)
    with pytest.raises(ModelLoadError, match=r"the field at byte 0 has \d+ bytes, expected at most 8191"):
        load(written(WHOLE, tmp_path))


def test_a_file_beyond_protobufs_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protobuf_scan, "MAX_MESSAGE_NBYTES", len(WHOLE) - 1)
    monkeypatch.setattr(protobuf_scan, "MAX_FIELDS", 1)
    with pytest.raises(ModelLoadError, match=rf"it has {len(WHOLE)} bytes, and a protobuf message at most"):
        load(written(WHOLE, tmp_path))


def test_the_file_is_cut_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(WHOLE, tmp_path)
    monkeypatch.setattr(os, "pread", lambda *_: b"")
    with pytest.raises(ModelLoadError, match=r"it ended at byte 0 while it was read"):
        load(path)


@pytest.mark.parametrize(
    ("initializer", "message"),
    [
        (tensor(field(9, DATA), dims=(ROWS, 31)), r'"w" has 8192 bytes for FLOAT \[64, 31\], expected 7936'),
        (tensor(field(4, DATA), dims=(ROWS, 31)), r"2048 entries of float_data for FLOAT \[64, 31\], expected 1984"),
        (tensor(field(9, DATA), dims=(2**63, 2)), r"has the dimensions"),
        (tensor(field(9, DATA), dims=(2**40, 2)), r"at most 1099511627776 elements"),
    ],
)
def test_data_of_the_wrong_length(initializer: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=message):
        load(written(file_of(graph(initializer)), tmp_path))
