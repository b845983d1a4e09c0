"""Stream weights from the source through the index maps into safetensors files: read, cut, hash and write at once.

Every byte of a source is read once, and never more of it is in memory than its largest tensor. What each thread does
is in the order of the bytes, so that the files do not depend on how many there are.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from furiosa_llm.builder.program import ShardedTensor
from furiosa_llm.builder.tensor_reading import read_packed
from furiosa_llm.builder.weights import cut_shard, is_in_order, num_shards
from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.manifest import FileEntry

MAX_WEIGHTS_FILE_NBYTES = 4 * 2**30
"""A weights file is closed before it grows beyond this; a single larger tensor has a file of its own."""

MAX_WORKERS = 4
"""One thread each for what is written, its digest, the tensors' digests, and reading ahead."""

_ALIGNMENT = 64
_READ_AHEAD_NBYTES = 64 * 2**20
"""Two tensors are in memory at once if they are no larger than this together, or than the largest alone."""
_QUEUE_LENGTH = 16
"""Pieces that may wait for a thread that hashes."""

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int], None]
"""Called with the number of bytes written since the last call."""


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """Where a tensor lies: its file, and the byte where shard 0 begins."""

    file: str
    offset: int
    nbytes: int
    """Of one shard."""
    sha256: str
    """Of all shards."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WrittenWeights:
    """What was written: each stored tensor's place, the files, and the digest of each source by its `id`."""

    placements: Mapping[str, Placement]
    files: Sequence[FileEntry]
    source_digests: Mapping[int, str]


def write_weights(
    folder: Path, tensors: Sequence[ShardedTensor], mesh: Mesh, progress: Progress, *, workers: int
) -> WrittenWeights:
    """Write all tensors into as many safetensors files as it takes, in their order.

    Args:
        folder: Where the files are written.
        tensors: What to write; those of one source follow each other, so that it is read once.
        mesh: The ranks.
        progress: Told of every piece.
        workers: Threads to use, from 1 to `MAX_WORKERS`.

    Raises:
        ModelLoadError: The source cannot be read, or not any more.
        OSError: A file cannot be written.
    """
    parts = enumerate(_files(tensors, mesh), start=1)
    files = [_File(folder / f"weights-{number:05d}.safetensors", part, mesh) for number, part in parts]
    with contextlib.ExitStack() as stack:
        files_hasher = stack.enter_context(_Hasher(threaded=workers > 1))
        tensors_hasher = stack.enter_context(_Hasher(threaded=workers > 2))
        sources = _Sources(tensors, stack.enter_context(_reader(ahead=workers > 3)))
        digests: dict[str, str] = {}
        for file in files:
            with file.path.open("wb") as stream:
                output = _Stream(stream, files_hasher)
                output.write(np.frombuffer(file.header, dtype=np.uint8))
                for tensor in file.tensors:
                    digests[tensor.name] = _write_tensor(output, tensor, sources, mesh, tensors_hasher, progress)
                file.sha256 = output.finish()
    placements = {t.name: file.placement(t, digests[t.name]) for file in files for t in file.tensors}
    entries = [FileEntry(path=file.path.name, nbytes=file.nbytes, sha256=file.sha256) for file in files]
    return WrittenWeights(placements=placements, files=entries, source_digests=sources.digests)


def _write_tensor(
    output: _Stream, tensor: ShardedTensor, sources: _Sources, mesh: Mesh, hasher: _Hasher, progress: Progress
) -> str:
    """Write all shards of a tensor and give their digest."""
    data = sources.data(tensor)
    own = None if is_in_order(tensor, mesh) else hasher.digest()
    for position in range(num_shards(tensor, mesh)):
        for piece in cut_shard(tensor, data, mesh, position):
            if own is not None:
                own.update(piece)
            output.write(piece)
            progress(len(piece))
    return sources.digest(tensor) if own is None else own.hexdigest()


# -- files -----------------------------------------------------------------------------------------------------------


class _File:
    """One safetensors file (https://github.com/huggingface/safetensors#format): its header, and where tensors lie."""

    def __init__(self, path: Path, tensors: Sequence[ShardedTensor], mesh: Mesh) -> None:
        self.path = path
        self.tensors = tensors
        self.sha256 = ""
        self._offsets: dict[str, int] = {}
        entries: dict[str, Any] = {}
        position = 0
        for tensor in tensors:
            count = num_shards(tensor, mesh)
            dtype = DTYPES[tensor.dtype.name]
            shape = [count, tensor.local_nbytes] if dtype.bits < 8 else [count, *tensor.local_shape]
            end = position + count * tensor.local_nbytes
            entries[tensor.name] = {"dtype": dtype.safetensors, "shape": shape, "data_offsets": [position, end]}
            self._offsets[tensor.name] = position
            position = end
        body = json.dumps(entries, separators=(",", ":")).encode()
        body += b" " * (-(len(body) + 8) % _ALIGNMENT)
        self.header = len(body).to_bytes(8, "little") + body
        self.nbytes = len(self.header) + position

    def placement(self, tensor: ShardedTensor, sha256: str) -> Placement:
        """Where a tensor of this file lies in it."""
        offset = len(self.header) + self._offsets[tensor.name]
        return Placement(self.path.name, offset, tensor.local_nbytes, sha256)


def _files(tensors: Sequence[ShardedTensor], mesh: Mesh) -> Iterator[list[ShardedTensor]]:
    part: list[ShardedTensor] = []
    total = 0
    for tensor in tensors:
        nbytes = tensor.local_nbytes * num_shards(tensor, mesh)
        if part and total + nbytes > MAX_WEIGHTS_FILE_NBYTES:
            yield part
            part, total = [], 0
        part.append(tensor)
        total += nbytes
    if part:
        yield part


class _Stream:
    """A file that is hashed as it is written."""

    def __init__(self, stream: BinaryIO, hasher: _Hasher) -> None:
        self._stream = stream
        self._digest = hasher.digest()

    def write(self, piece: Bytes) -> None:
        self._digest.update(piece)
        self._stream.write(piece.data)

    def finish(self) -> str:
        """The digest, once everything is on disk."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return self._digest.hexdigest()


# -- sources ---------------------------------------------------------------------------------------------------------


class _Sources:
    """The sources of the tensors, each read when its first tensor is written, or one ahead of that."""

    def __init__(self, tensors: Sequence[ShardedTensor], read: _Read) -> None:
        self._read = read
        self._order = list({id(t.source): t.source for t in tensors if t.source is not None}.values())
        self._budget = max([_READ_AHEAD_NBYTES, *(source.nbytes for source in self._order)])
        self._next = 0
        self._current: ir.TensorProtocol | None = None
        self._data: Bytes | None = None
        self._ahead: concurrent.futures.Future[tuple[Bytes, str]] | None = None
        self.digests: dict[int, str] = {}

    def data(self, tensor: ShardedTensor) -> Bytes | None:
        """All bytes of the tensor's source, packed; None if the builder made it."""
        source = tensor.source
        if source is None or source is self._current:
            return self._data if source is not None else None
        assert source is self._order[self._next], "tensors of one source follow each other"
        self._data = None
        pending = self._ahead or self._read(source)
        self._data, self.digests[id(source)] = pending.result()
        self._current, self._ahead = source, None
        self._next += 1
        if self._next < len(self._order):
            following = self._order[self._next]
            if following.nbytes + source.nbytes <= self._budget:
                self._ahead = self._read(following)
        return self._data

    def digest(self, tensor: ShardedTensor) -> str:
        """The digest of the tensor's source, which has been read."""
        return self.digests[id(tensor.source)]


class _Read(Protocol):
    def __call__(self, source: ir.TensorProtocol) -> concurrent.futures.Future[tuple[Bytes, str]]: ...


@contextlib.contextmanager
def _reader(*, ahead: bool) -> Iterator[_Read]:
    """Reads a tensor and takes its digest, in a thread of its own or when it is asked to."""
    if not ahead:
        yield _read_now
        return
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="read-weights") as pool:
        yield lambda source: pool.submit(_read_hashed, source)


def _read_now(source: ir.TensorProtocol) -> concurrent.futures.Future[tuple[Bytes, str]]:
    found: concurrent.futures.Future[tuple[Bytes, str]] = concurrent.futures.Future()
    found.set_result(_read_hashed(source))
    return found


def _read_hashed(source: ir.TensorProtocol) -> tuple[Bytes, str]:
    data = read_packed(source)
    return data, hashlib.sha256(data.data).hexdigest()


# -- digests ---------------------------------------------------------------------------------------------------------


class _Hasher:
    """Takes digests, in a thread of its own if `threaded`."""

    def __init__(self, *, threaded: bool) -> None:
        self._queue: queue.Queue[Callable[[], None] | None] | None = None
        if threaded:
            self._queue = queue.Queue(_QUEUE_LENGTH)
            self._thread = threading.Thread(target=self._work, name="hash-weights", daemon=True)
            self._thread.start()

    def __enter__(self) -> _Hasher:
        return self

    def __exit__(self, *_: object) -> None:
        if self._queue is not None:
            self._queue.put(None)
            self._thread.join()

    def digest(self) -> _Digest:
        """A digest of bytes to come."""
        return _Digest(self)

    def run(self, work: Callable[[], None]) -> None:
        """Do `work` now, or after all that was given before."""
        if self._queue is None:
            work()
        else:
            self._queue.put(work)

    def _work(self) -> None:
        assert self._queue is not None
        while (work := self._queue.get()) is not None:
            work()
            del work


class _Digest:
    """One SHA-256, taken by a hasher."""

    def __init__(self, hasher: _Hasher) -> None:
        self._hasher = hasher
        self._sha256 = hashlib.sha256()

    def update(self, piece: Bytes) -> None:
        self._hasher.run(lambda: self._sha256.update(piece.data))

    def hexdigest(self) -> str:
        """The digest of everything so far, once it is taken."""
        done = threading.Event()
        self._hasher.run(done.set)
        done.wait()
        return self._sha256.hexdigest()
