"""Read a model file without the large tensors in it: their bytes are passed over, and the tensors refer to them.

A model file is one protobuf message (https://protobuf.dev/programming-guides/encoding/), and parsing it whole keeps its
weights in memory twice. So the scanner goes through the file field by field: model, graph, initializers. What is left
out of an initializer becomes external data whose file is the model file itself; everything else is parsed as usual,
which also checks it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from onnx import ModelProto, TensorProto

from furiosa_llm.runtime.artifact.dtypes import DTYPES

LEFT_OUT_NBYTES = 4096
"""Payloads above this size are left out; nothing that shapes are computed from is as large."""
MAX_FIELDS = 2_000_000
"""A file with more fields is parsed whole: a scan here would cost more time than it saves memory."""
MAX_MESSAGE_NBYTES = 2**31 - 1
"""The largest message, and the largest field in a message: protobuf's own limit."""

_VARINT, _FIXED64, _LEN, _START_GROUP, _END_GROUP, _FIXED32 = range(6)
_GRAPH = ModelProto.DESCRIPTOR.fields_by_name["graph"].number
_INITIALIZER = ModelProto.DESCRIPTOR.fields_by_name["graph"].message_type.fields_by_name["initializer"].number
_TYPES = {"float_data": TensorProto.FLOAT, "double_data": TensorProto.DOUBLE}
_WIDTHS = {"raw_data": 1, "float_data": 4, "double_data": 8}
_PAYLOADS = {TensorProto.DESCRIPTOR.fields_by_name[name].number: name for name in _WIDTHS}
"""Fields whose bytes are the elements as ONNX packs them; the float fields are such fields if they are packed."""
_ELSEWHERE = ("double_data", "external_data", "float_data", "int32_data", "int64_data", "string_data", "uint64_data")
"""Other fields that may hold a tensor's elements; protobuf would merge them, or let the last one count."""
_FIRST_READ, _LONGEST_READ = 256, 65536
"""Bytes of one read: few after a payload, because the next may follow soon, then twice as many each time."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """What was left out of an initializer: a run of bytes of the model file."""

    field: str
    """`raw_data`, `float_data` or `double_data`."""
    offset: int
    nbytes: int

    @property
    def entries(self) -> int:
        """The number of entries of the field: bytes in raw_data, numbers in the others."""
        return self.nbytes // _WIDTHS[self.field]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lean:
    """A model file that was read without its large initializers."""

    proto: ModelProto
    left_out: Mapping[int, LeftOut]
    """Position of an initializer in the graph -> what was left out of it."""
    sha256: str
    """Digest of the bytes that were read, in their order: of the whole file, if nothing was left out."""


class _OddError(Exception):
    """The file may be right, but only protobuf knows how to read it."""


def read_lean(file: Path) -> Lean:
    """The model in `file`; raises ValueError or protobuf's DecodeError if the file is not a model, and OSError."""
    with file.open("rb", buffering=0) as opened:
        size = os.fstat(opened.fileno()).st_size
        try:
            return _Scanner(_Bytes(opened.fileno(), size), file.name).lean()
        except _OddError:
            if size > MAX_MESSAGE_NBYTES:
                raise ValueError(f"it has {size} bytes, and a protobuf message at most {MAX_MESSAGE_NBYTES}") from None
        opened.seek(0)
        data = opened.readall()
    return Lean(proto=ModelProto.FromString(data), left_out={}, sha256=hashlib.sha256(data).hexdigest())


class _Bytes:
    """Reads a file from front to back; bytes that are passed over are kept for `take`, unless they are left out."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.position = 0
        self.size = size
        self._descriptor = descriptor
        self._buffer = bytearray()
        self._start = 0
        """The position in the file at which the buffer begins."""
        self._next_read = _LONGEST_READ

    def varint(self, end: int) -> int:
        """The number at the position, in a message that ends at `end`."""
        stop = min(self.position + 10, end)
        self._fill(stop)
        value = shift = 0
        for index in range(self.position - self._start, stop - self._start):
            byte = self._buffer[index]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                self.position = self._start + index + 1
                return value
            shift += 7
        raise ValueError(f"a number at byte {self.position} does not end")

    def skip(self, nbytes: int) -> None:
        """Pass over bytes that a later `take` returns."""
        self.position += nbytes

    def take(self) -> bytes:
        """All bytes since the last call, up to the position."""
        self._fill(self.position)
        taken = bytes(self._buffer[: self.position - self._start])
        del self._buffer[: len(taken)]
        self._start = self.position
        return taken

    def leave_out(self, nbytes: int) -> None:
        """Pass over bytes without reading them; all bytes before them must have been taken."""
        self.position += nbytes
        del self._buffer[:nbytes]
        self._start = self.position
        self._next_read = _FIRST_READ

    def rewind(self, position: int) -> None:
        """Go back to a position up to which all bytes were taken."""
        self.position = self._start = position
        self._buffer.clear()

    def _fill(self, stop: int) -> None:
        end = self._start + len(self._buffer)
        if stop <= end:
            return
        wanted = min(max(stop, end + self._next_read), self.size)
        self._next_read = min(2 * self._next_read, _LONGEST_READ)
        while end < wanted:
            data = os.pread(self._descriptor, wanted - end, end)
            if not data:
                raise ValueError(f"it ended at byte {end} while it was read, and had {self.size} bytes before")
            self._buffer += data
            end += len(data)


class _Scanner:
    """Goes through one model file."""

    def __init__(self, data: _Bytes, location: str) -> None:
        self._data = data
        self._location = location
        self._digest = hashlib.sha256()
        self._left_out: dict[int, LeftOut] = {}
        self._num_initializers = 0
        self._num_fields = 0

    def lean(self) -> Lean:
        """The model."""
        content = b"".join(self._message(self._data.size, _GRAPH, self._graph))
        return Lean(proto=ModelProto.FromString(content), left_out=self._left_out, sha256=self._digest.hexdigest())

    def _graph(self, end: int) -> list[bytes]:
        return self._message(end, _INITIALIZER, self._initializer)

    def _message(self, end: int, number: int, rewritten: Callable[[int], list[bytes]]) -> list[bytes]:
        """A message up to `end`, in pieces; `rewritten` gives the new content of its fields `number`."""
        pieces: list[bytes] = []
        while self._data.position < end:
            start = self._data.position
            found, wire, length = self._field(end)
            if (found, wire) != (number, _LEN):
                self._data.skip(length)
                continue
            header = self._data.position - start
            before = self._take()
            body = rewritten(self._data.position + length)
            pieces += [before[: len(before) - header], _varint(number << 3 | _LEN), _varint(sum(map(len, body))), *body]
        return [*pieces, self._take()]

    def _initializer(self, end: int) -> list[bytes]:
        start, digest = self._data.position, self._digest.copy()
        index, self._num_initializers = self._num_initializers, self._num_initializers + 1
        if end - start > LEFT_OUT_NBYTES:
            pieces, left_out = self._without_payload(end)
            if left_out is not None and _is_all_data(left_out, TensorProto.FromString(b"".join(pieces))):
                self._left_out[index] = left_out
                return [*pieces, _reference(self._location, left_out)]
            self._data.rewind(start)
            self._digest = digest
        self._data.skip(end - start)
        return [self._take()]

    def _without_payload(self, end: int) -> tuple[list[bytes], LeftOut | None]:
        """A tensor up to `end`, in pieces, without its first large payload, and that payload's place."""
        pieces: list[bytes] = []
        left_out: LeftOut | None = None
        while self._data.position < end:
            start = self._data.position
            number, wire, length = self._field(end)
            field = _PAYLOADS.get(number)
            if left_out is not None or field is None or wire != _LEN or length <= LEFT_OUT_NBYTES:
                self._data.skip(length)
                continue
            if length % _WIDTHS[field]:
                raise ValueError(f"the {field} at byte {start} has {length} bytes, which are no whole numbers")
            header = self._data.position - start
            before = self._take()
            pieces.append(before[: len(before) - header])
            left_out = LeftOut(field=field, offset=self._data.position, nbytes=length)
            self._data.leave_out(length)
        return [*pieces, self._take()], left_out

    def _take(self) -> bytes:
        taken = self._data.take()
        self._digest.update(taken)
        return taken

    def _field(self, end: int) -> tuple[int, int, int]:
        """The number and the wire type of the field at the position, and how many bytes are left of it."""
        self._num_fields += 1
        if self._num_fields > MAX_FIELDS:
            raise _OddError
        start = self._data.position
        tag = self._data.varint(end)
        number, wire = tag >> 3, tag & 7
        if wire in (_START_GROUP, _END_GROUP):
            raise _OddError
        if not number or wire > _FIXED32 or tag >= 2**32:
            raise ValueError(f"at byte {start} there is no field")
        length = {_FIXED64: 8, _FIXED32: 4}.get(wire, 0)
        if wire == _VARINT:
            self._data.varint(end)
        elif wire == _LEN:
            length = self._data.varint(end)
        left = end - self._data.position
        if length > left:
            raise ValueError(f"the field at byte {start} has {length} bytes, and {left} are left")
        if length > MAX_MESSAGE_NBYTES:
            raise ValueError(f"the field at byte {start} has {length} bytes, expected at most {MAX_MESSAGE_NBYTES}")
        return number, wire, length


def _is_all_data(left_out: LeftOut, rest: TensorProto) -> bool:
    """Whether a payload is all the data of its tensor, and its bytes are elements of the tensor's type."""
    if rest.data_location != TensorProto.DEFAULT or rest.HasField("segment") or rest.HasField("raw_data"):
        return False
    if any(len(getattr(rest, field)) for field in _ELSEWHERE):
        return False
    if left_out.field == "raw_data":
        return rest.data_type in TensorProto.DataType.values() and TensorProto.DataType.Name(rest.data_type) in DTYPES
    return bool(rest.data_type == _TYPES[left_out.field])


def _reference(location: str, left_out: LeftOut) -> bytes:
    """The fields that make a tensor external, to be appended to its other fields."""
    try:
        tensor = TensorProto(data_location=TensorProto.EXTERNAL)
        for key, value in (("location", location), ("offset", left_out.offset), ("length", left_out.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
    except UnicodeEncodeError:  # a file's name need not be text
        raise _OddError from None
    data: bytes = tensor.SerializeToString()
    return data


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*encoded, number))
