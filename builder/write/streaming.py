"""Stream weights from the source through the index maps into safetensors files: read, cut, hash and write at once.

Every byte of a source is read once, and never more than its largest tensor is in memory. Each thread works in the order
of the bytes, so that the files do not depend on the number of threads.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from furiosa_llm.builder.lower.program_builder import ShardedTensor
from furiosa_llm.builder.source.tensors import SourceTensor
from furiosa_llm.builder.write.hashing import Digest, Hasher
from furiosa_llm.builder.write.read_ahead import SourceReader
from furiosa_llm.builder.write.shards import cut_shard, is_in_order, num_shards
from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.manifest import FileEntry

MAX_WEIGHTS_FILE_NBYTES = 4 * 2**30
"""A weights file is closed before it grows beyond this; a single larger tensor has a file of its own."""

_HELPERS = ("files", "tensors", "reading", "originals")
"""The tasks that get a thread of their own, the one that relieves the writing thread most first: digests of files (and
waiting for the disk), digests of stored tensors, reading, digests of originals."""
MAX_WORKERS = 1 + len(_HELPERS)

_ALIGNMENT = 64
_SYNCED_NBYTES = 128 * 2**20
"""After every so many bytes the disk starts to write them, so that it is not idle until the end."""
Bytes = npt.NDArray[np.uint8]
BytesWritten = Callable[[int], None]
"""Called with the number of bytes written since the last call."""


@dataclasses.dataclass(frozen=True, slots=True)
class FilePosition:
    """Where a tensor lies: its file, and the byte where shard 0 begins."""

    file: str
    offset: int
    nbytes: int
    """Bytes of one shard."""
    sha256: str
    """The digest of all shards."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WrittenWeights:
    """What was written: each stored tensor's place, the files, and the digest of each source by its `id`."""

    placements: Mapping[str, FilePosition]
    files: Sequence[FileEntry]
    source_digests: Mapping[int, str]


def write_weights(
    folder: Path, tensors: Sequence[ShardedTensor], mesh: Mesh, progress: BytesWritten, *, workers: int
) -> WrittenWeights:
    """Write all tensors into as many safetensors files as it takes, in their order.

    Args:
        folder: Where the files are written.
        tensors: The tensors to write; tensors of one source follow each other, so that it is read once.
        mesh: The ranks.
        progress: Called for every piece.
        workers: Threads to use, from 1 to `MAX_WORKERS`.

    Raises:
        ModelLoadError: The source cannot be read, or no longer.
        OSError: A file cannot be written.
    """
    parts = enumerate(_files(tensors, mesh), start=1)
    files = [_File(folder / f"weights-{number:05d}.safetensors", part, mesh) for number, part in parts]
    sources = _Sources(tensors, mesh)
    helpers = _HELPERS[: workers - 1]
    with contextlib.ExitStack() as stack:
        files_hasher = stack.enter_context(Hasher(threaded="files" in helpers))
        tensors_hasher = stack.enter_context(Hasher(threaded="tensors" in helpers))
        syncing = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1, "sync")) if "files" in helpers else None
        sources_hasher = stack.enter_context(Hasher(threaded="originals" in helpers))
        reader = SourceReader(sources.order, sources.streamed, sources_hasher, ahead="reading" in helpers)
        stack.enter_context(reader)
        digests: dict[str, str] = {}
        for file in files:
            with file.path.open("wb") as stream:
                output = _Output(stream, files_hasher, syncing, progress)
                output.write_header(file.header)
                for tensor in file.tensors:
                    digests[tensor.name] = _write_tensor(output, tensor, sources, reader, tensors_hasher)
                file.sha256 = output.finish()
    placements = {t.name: file.placement(t, digests[t.name]) for file in files for t in file.tensors}
    entries = [FileEntry(path=file.path.name, nbytes=file.nbytes, sha256=file.sha256) for file in files]
    return WrittenWeights(placements=placements, files=entries, source_digests=sources.digests)


def _write_tensor(
    output: _Output, tensor: ShardedTensor, sources: _Sources, reader: SourceReader, hasher: Hasher
) -> str:
    """Write all shards of a tensor and return their digest."""
    own = hasher.digest()
    if sources.is_streamed(tensor):
        for piece in reader.pieces(tensor.source.nbytes if tensor.source is not None else 0):
            own.update(piece)
            output.write(piece)
        sources.digests[id(tensor.source)] = own.hexdigest()
        return sources.digests[id(tensor.source)]
    data = sources.whole(tensor, reader)
    in_order = is_in_order(tensor, sources.mesh)
    for position in range(num_shards(tensor, sources.mesh)):
        for piece in cut_shard(tensor, data, sources.mesh, position):
            if not in_order:
                own.update(piece)
            output.write(piece)
    whole_digest = sources.digest(tensor) if tensor.source is not None else None
    return whole_digest if in_order and whole_digest is not None else own.hexdigest()


class _Sources:
    """The sources that the tensors are cut from, in the order in which they are read."""

    def __init__(self, tensors: Sequence[ShardedTensor], mesh: Mesh) -> None:
        self.mesh = mesh
        readers = Counter(id(tensor.source) for tensor in tensors)
        found = {id(tensor.source): tensor for tensor in tensors if tensor.source is not None}
        self._streamed = {
            key: isinstance(tensor.source, SourceTensor) and readers[key] == 1 and is_in_order(tensor, mesh)
            for key, tensor in found.items()
        }
        self.order = [tensor.source for tensor in found.values() if tensor.source is not None]
        self.streamed = list(self._streamed.values())
        self.digests: dict[int, str] = {}
        self._current: tuple[int, Bytes] | None = None
        self._digest: Digest

    def is_streamed(self, tensor: ShardedTensor) -> bool:
        """Whether the tensor has its source's bytes in their order, so that they are not needed all at once."""
        return self._streamed.get(id(tensor.source), False)

    def whole(self, tensor: ShardedTensor, reader: SourceReader) -> Bytes | None:
        """All bytes of the tensor's source; None if the builder made it."""
        if tensor.source is None:
            return None
        key = id(tensor.source)
        if self._current is None or self._current[0] != key:
            self._current = None
            read = reader.whole()
            self._current, self._digest = (key, read.data), read.digest
        return self._current[1]

    def digest(self, tensor: ShardedTensor) -> str:
        """The digest of the tensor's source, which has been read whole."""
        key = id(tensor.source)
        if key not in self.digests:
            self.digests[key] = self._digest.hexdigest()
        return self.digests[key]


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

    def placement(self, tensor: ShardedTensor, sha256: str) -> FilePosition:
        """Where a tensor of this file lies in it."""
        offset = len(self.header) + self._offsets[tensor.name]
        return FilePosition(self.path.name, offset, tensor.local_nbytes, sha256)


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


class _Output:
    """A file that is hashed as it is written, and brought to disk while the rest is being written."""

    def __init__(
        self,
        stream: BinaryIO,
        hasher: Hasher,
        syncing: concurrent.futures.ThreadPoolExecutor | None,
        progress: BytesWritten,
    ) -> None:
        self._stream = stream
        self._digest = hasher.digest()
        self._syncing = syncing
        self._progress = progress
        self._unsynced = 0
        self._sync: concurrent.futures.Future[None] | None = None

    def write_header(self, header: bytes) -> None:
        """Write the header, which does not count as progress."""
        self._write(np.frombuffer(header, dtype=np.uint8))

    def write(self, piece: Bytes) -> None:
        """Write a piece of the weights."""
        self._write(piece)
        self._progress(len(piece))

    def finish(self) -> str:
        """Wait until everything is on disk, and return the digest."""
        self._stream.flush()
        if self._sync is not None:
            self._sync.result()
        os.fsync(self._stream.fileno())
        return self._digest.hexdigest()

    def _write(self, piece: Bytes) -> None:
        self._digest.update(piece)
        self._stream.write(piece.data)
        self._unsynced += len(piece)
        idle = self._sync is None or self._sync.done()
        if self._syncing is not None and self._unsynced >= _SYNCED_NBYTES and idle:
            if self._sync is not None:
                self._sync.result()
            self._sync = self._syncing.submit(os.fdatasync, self._stream.fileno())
            self._unsynced = 0
