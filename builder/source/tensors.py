"""Read tensors from a model's files into their own memory: never mapped, because mapped pages count as memory used."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from furiosa_llm.builder.errors import ModelLoadError
from furiosa_llm.runtime.artifact.dtypes import DTYPES

_PIECE_NBYTES = 4 * 2**20
_BLOCK_NBYTES = 4096
"""The alignment of direct reads: a multiple of any disk's block."""
_CONSTANT_NBYTES = 1024
"""A constant of more bytes is a weight."""
STREAMED_NBYTES = 2**20
"""The most bytes of a piece that is passed on at once."""


class SourceTensor(ir.ExternalTensor):
    """A tensor that lies in a file of the model (the .onnx file itself or another) and is read anew at each access."""

    def numpy(self) -> npt.NDArray[Any]:
        """The elements. Raises FileNotFoundError if the file is absent, and ModelLoadError if it cannot be read."""
        dtype, shape = self.dtype, self.shape.numpy()
        packed = _read(self)
        if dtype.bitwidth < 8:
            return np.asarray(ir.PackedTensor(packed, dtype, shape=shape).numpy())
        return packed.view(np.dtype(dtype.numpy()).newbyteorder("<")).reshape(shape)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.asarray(self.numpy(), dtype=dtype)

    def tobytes(self) -> bytes:
        """The elements as ONNX packs them."""
        return read_packed(self).tobytes()


def weights_of(model: ir.Model) -> list[ir.TensorProtocol]:
    """Every initializer's tensor of a model once, and every tensor of a Constant node that is as large as a weight."""
    found = {id(v.const_value): v.const_value for v in model.graph.initializers.values() if v.const_value is not None}
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            value = node.attributes.get("value") if node.op_type == "Constant" else None
            tensor = None if value is None or value.type is not ir.AttributeType.TENSOR else value.as_tensor()
            if tensor is not None and tensor.nbytes > _CONSTANT_NBYTES:
                found[id(tensor)] = tensor
    return list(found.values())


class DeferredTensor(ir.LazyTensor):
    """A tensor with the type and shape of another, whose bytes are put together anew at each access."""

    def __init__(self, like: ir.TensorProtocol, packed: Callable[[], npt.NDArray[np.uint8]]) -> None:
        """`packed` returns the bytes as ONNX packs them, `[n]`."""
        self.packed = packed
        shape = ir.Shape(like.shape.numpy())
        super().__init__(self._read, dtype=like.dtype, shape=shape, name=like.name)

    def _read(self) -> ir.TensorProtocol:
        return tensor_of(self, self.packed().tobytes())


def tensor_of(like: ir.TensorProtocol, data: bytes) -> ir.TensorProtocol:
    """A tensor in memory with the name, type and shape of another, and `data` as ONNX packs it."""
    dims = [int(size) for size in like.shape.numpy()]
    return ir.serde.deserialize_tensor(
        onnx.TensorProto(name=like.name, data_type=int(like.dtype), dims=dims, raw_data=data)
    )


def read_packed(
    tensor: ir.TensorProtocol, seen: Callable[[npt.NDArray[np.uint8]], None] = lambda _: None
) -> npt.NDArray[np.uint8]:
    """The bytes of a tensor as ONNX packs them, little-endian: one dimension, at most this one copy in memory.

    `seen` is given the bytes piece by piece, in order, while they are still in the cache. Raises ModelLoadError if the
    file that holds them is gone, is too short or cannot be read.
    """
    if isinstance(tensor, ir.ExternalTensor):
        try:
            return _read(tensor, seen)
        except FileNotFoundError as error:
            raise _missing(tensor) from error
    content = tensor.packed() if isinstance(tensor, DeferredTensor) else np.frombuffer(tensor.tobytes(), dtype=np.uint8)
    for start in range(0, len(content), _PIECE_NBYTES):
        seen(content[start : start + _PIECE_NBYTES])
    return content


def read_pieces(tensor: ir.ExternalTensor) -> Iterator[npt.NDArray[np.uint8]]:
    """The same bytes in pieces of at most `STREAMED_NBYTES`, without keeping any; raises as `read_packed` does."""
    total = DTYPES[tensor.dtype.name].nbytes(tensor.shape.numpy())
    try:
        with _opened(tensor) as fill:
            for start in range(0, total, STREAMED_NBYTES):
                piece = np.empty(min(STREAMED_NBYTES, total - start), dtype=np.uint8)
                fill(piece, start)
                yield piece
    except FileNotFoundError as error:
        raise _missing(tensor) from error


def _missing(tensor: ir.ExternalTensor) -> ModelLoadError:
    return ModelLoadError(
        f'{tensor.path}, which holds the data of "{tensor.name}", is missing; put the file there and try again.'
    )


def load_in_place(tensor: onnx.TensorProto, folder: Path) -> None:
    """Make an external tensor of a model in `folder` hold its data itself; raises ModelLoadError as `read_packed` does.

    The caller must have checked where the data lies.
    """
    external = ir.serde.deserialize_tensor(tensor)
    assert isinstance(external, ir.ExternalTensor)
    external.base_dir = folder
    tensor.ClearField("data_location")
    del tensor.external_data[:]
    tensor.raw_data = read_packed(external).tobytes()


def _read(
    tensor: ir.ExternalTensor, seen: Callable[[npt.NDArray[np.uint8]], None] = lambda _: None
) -> npt.NDArray[np.uint8]:
    content = np.empty(DTYPES[tensor.dtype.name].nbytes(tensor.shape.numpy()), dtype=np.uint8)
    with _opened(tensor) as fill:
        for start in range(0, len(content), _PIECE_NBYTES):
            piece = content[start : start + _PIECE_NBYTES]
            fill(piece, start)
            seen(piece)
    return content


@contextlib.contextmanager
def _opened(tensor: ir.ExternalTensor) -> Iterator[Callable[[npt.NDArray[np.uint8], int], None]]:
    """Gives a function that fills a buffer with the tensor's bytes, starting at a given byte."""
    path, offset = Path(tensor.path), tensor.offset or 0

    def fill(buffer: npt.NDArray[np.uint8], start: int) -> None:
        done = 0
        while done < len(buffer):
            read = _read_some(descriptor, direct, buffer[done:], offset + start + done)
            if not read:
                end = offset + DTYPES[tensor.dtype.name].nbytes(tensor.shape.numpy())
                raise ModelLoadError(
                    f'{path} ends at byte {os.fstat(descriptor).st_size}, but the data of "{tensor.name}" at byte '
                    f"{end}: it is incomplete, or was changed while it was read; "
                    "copy it again, and leave it alone during the build."
                )
            done += read

    try:
        # A pipe that has taken the file's place must not make the build wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ModelLoadError(f"{path} is no regular file, expected the data of a model; put the file there.")
            with _DirectFile(path) as direct:
                yield fill
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}; check the file and its rights.") from error


def _read_some(descriptor: int, direct: _DirectFile, buffer: npt.NDArray[np.uint8], offset: int) -> int:
    """Fill the beginning of a buffer with the bytes of a file at `offset`; returns their number, 0 at the end.

    Bytes in the page cache are copied from there. All others are read past it where the file system allows: that saves
    one copy, and leaves the page cache to the artifact that is being written.
    """
    if not direct.is_open:
        return os.preadv(descriptor, [buffer.data], offset)
    try:
        return os.preadv(descriptor, [buffer.data], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return direct.read(buffer, offset)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return os.preadv(descriptor, [buffer.data], offset)


class _DirectFile:
    """A file read past the page cache, if its file system can do that: whole blocks are read, then cut to size."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def __enter__(self) -> _DirectFile:
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_DIRECT)
        except OSError:  # a file system without direct reads; the file itself is open already
            return self
        self._blocks = mmap.mmap(-1, _PIECE_NBYTES + 2 * _BLOCK_NBYTES)  # at the beginning of a page
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._blocks.close()

    @property
    def is_open(self) -> bool:
        """Whether the file system can read past the page cache."""
        return self._descriptor is not None

    def read(self, buffer: npt.NDArray[np.uint8], offset: int) -> int:
        """Like `os.preadv` with one buffer."""
        assert self._descriptor is not None
        first = offset // _BLOCK_NBYTES * _BLOCK_NBYTES
        wanted = min(len(buffer), _PIECE_NBYTES)
        nbytes = -(-(offset + wanted - first) // _BLOCK_NBYTES) * _BLOCK_NBYTES
        with memoryview(self._blocks) as blocks, blocks[:nbytes] as target:
            found = os.preadv(self._descriptor, [target], first) - (offset - first)
            found = max(0, min(found, wanted))
            buffer[:found] = np.frombuffer(target, dtype=np.uint8, count=found, offset=offset - first) if found else 0
        return found
