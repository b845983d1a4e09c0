"""Write an artifact: weights streamed shard by shard into a temporary folder, which is renamed as the last act."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from furiosa_llm.builder.control_flow import open_closures, tensors_in_nodes
from furiosa_llm.builder.errors import OutputError
from furiosa_llm.builder.load import Source
from furiosa_llm.builder.program import ShardedTensor
from furiosa_llm.builder.tensor_reading import load_in_place
from furiosa_llm.builder.weights import num_shards, shard
from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.manifest import MANIFEST_NAME, FileEntry, Manifest

MAX_WEIGHTS_FILE_NBYTES = 4 * 2**30
"""A weights file is closed before it grows beyond this; a single larger tensor has a file of its own."""

_ALIGNMENT = 64
_CHUNK_NBYTES = 16 * 2**20

Progress = Callable[[int], None]
"""Called with the number of bytes written since the last call."""


@contextlib.contextmanager
def output_folder(destination: Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder beside `destination` that takes its place when the block ends well, and vanishes otherwise.

    Raises OutputError if the destination exists and `force` is not given, is not an artifact, or cannot be written.
    """
    _check_destination(destination, force=force)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.building-", dir=destination.parent))
    except OSError as error:
        raise OutputError(
            f"cannot write to {destination.parent}: {error.strerror}; give an output folder that can be written."
        ) from error
    try:
        yield temporary
        temporary.chmod(0o755)
        if destination.exists():
            shutil.rmtree(destination)
        temporary.rename(destination)
    except OSError as error:
        raise OutputError(
            f"writing {destination} failed: {error.strerror or error}; nothing was left behind. "
            "Check the free space and the rights of that folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_destination(destination: Path, *, force: bool) -> None:
    if not destination.exists():
        return
    if not force:
        raise OutputError(f"{destination} exists already; give another output, or --force to replace it.")
    if not destination.is_dir() or not ((destination / MANIFEST_NAME).is_file() or not any(destination.iterdir())):
        raise OutputError(
            f"{destination} exists and is not an artifact (it has no {MANIFEST_NAME}), so --force does not replace it; "
            "give another output or remove it yourself."
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """Where a tensor lies: its file, and the byte where shard 0 begins."""

    file: str
    offset: int
    nbytes: int
    """Of one shard."""
    sha256: str
    """Of all shards."""


def write_weights(
    folder: Path, tensors: Sequence[ShardedTensor], mesh: Mesh, progress: Progress
) -> tuple[dict[str, Placement], list[FileEntry]]:
    """Write all tensors into as many safetensors files as it takes."""
    placements: dict[str, Placement] = {}
    files: list[FileEntry] = []
    for number, part in enumerate(_files(tensors, mesh), start=1):
        name = f"weights-{number:05d}.safetensors"
        header, offsets = _header(part, mesh)
        digests: dict[str, str] = {}
        with (folder / name).open("wb") as file:
            digest = _write_hashed(file, _contents(header, part, mesh, progress, digests))
            size = file.tell()
        for tensor in part:
            offset = len(header) + offsets[tensor.name]
            placements[tensor.name] = Placement(name, offset, tensor.local_nbytes, digests[tensor.name])
        files.append(FileEntry(path=name, nbytes=size, sha256=digest))
    return placements, files


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


def _header(tensors: Sequence[ShardedTensor], mesh: Mesh) -> tuple[bytes, dict[str, int]]:
    """The safetensors header (https://github.com/huggingface/safetensors#format) and each tensor's offset behind it."""
    entries: dict[str, Any] = {}
    offsets: dict[str, int] = {}
    position = 0
    for tensor in tensors:
        count = num_shards(tensor, mesh)
        dtype = DTYPES[tensor.dtype.name]
        shape = [count, tensor.local_nbytes] if dtype.bits < 8 else [count, *tensor.local_shape]
        end = position + count * tensor.local_nbytes
        entries[tensor.name] = {"dtype": dtype.safetensors, "shape": shape, "data_offsets": [position, end]}
        offsets[tensor.name] = position
        position = end
    body = json.dumps(entries, separators=(",", ":")).encode()
    body += b" " * (-(len(body) + 8) % _ALIGNMENT)
    return len(body).to_bytes(8, "little") + body, offsets


def _contents(
    header: bytes, tensors: Sequence[ShardedTensor], mesh: Mesh, progress: Progress, digests: dict[str, str]
) -> Iterator[bytes | memoryview]:
    yield header
    for tensor in tensors:
        digest = hashlib.sha256()
        for position in range(num_shards(tensor, mesh)):
            data = _bytes(shard(tensor, mesh, position), tensor.dtype)
            for start in range(0, len(data), _CHUNK_NBYTES):
                yield data[start : start + _CHUNK_NBYTES]
            digest.update(data)
            progress(len(data))
        digests[tensor.name] = digest.hexdigest()


def _bytes(array: npt.NDArray[Any], dtype: ir.DataType) -> memoryview:
    if dtype.bitwidth < 8:
        return _packed(array.reshape(-1), dtype.bitwidth).data
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _packed(elements: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """Elements below one byte, the first in the lowest bits, as ONNX packs them."""
    per_byte = 8 // bits
    codes = elements.view(np.uint8) & (2**bits - 1)
    padded = np.zeros(-(-len(codes) // per_byte) * per_byte, dtype=np.uint8)
    padded[: len(codes)] = codes
    shifts = np.arange(per_byte, dtype=np.uint8) * bits
    return np.asarray(np.bitwise_or.reduce(padded.reshape(-1, per_byte) << shifts, axis=1), dtype=np.uint8)


def _write_hashed(file: BinaryIO, chunks: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        file.write(chunk)
    return digest.hexdigest()


def write_bytes(folder: Path, name: str, data: bytes) -> FileEntry:
    """Write one small file."""
    (folder / name).write_bytes(data)
    return FileEntry(path=name, nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, the last file; everything is on disk when this returns."""
    path = folder / MANIFEST_NAME
    path.write_bytes(manifest.to_bytes())
    for file in (*folder.iterdir(), folder):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def program_proto(
    graph: ir.Graph,
    placements: Mapping[str, Placement],
    shapes: Mapping[str, tuple[ir.DataType, tuple[int | str | None, ...]]],
    ir_version: int,
) -> onnx.ModelProto:
    """program.onnx: external initializers at the windows of shard 0, `shapes` as inputs', outputs' and value_info."""
    proto = ir.to_proto(ir.Model(graph, ir_version=ir_version))
    open_closures(proto)
    for initializer in proto.graph.initializer:
        placement = placements.get(initializer.name)
        if placement is None:
            continue
        initializer.ClearField("raw_data")
        initializer.data_location = onnx.TensorProto.EXTERNAL
        del initializer.external_data[:]
        _add_external(initializer, location=placement.file, offset=placement.offset, length=placement.nbytes)
    for value in (*proto.graph.input, *proto.graph.output):
        value.CopyFrom(_value_info(value.name, *shapes[value.name]))
    interface = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(_value_info(n, *s) for n, s in shapes.items() if n not in interface)
    return proto


def _add_external(proto: onnx.TensorProto, **entries: object) -> None:
    for key, value in entries.items():
        proto.external_data.add(key=key, value=str(value))


def _value_info(name: str, dtype: ir.DataType, shape: Sequence[int | str | None]) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, int(dtype), list(shape))


def source_proto(source: Source, stored: Mapping[str, tuple[str, ...]]) -> onnx.ModelProto:
    """source.onnx: the original model, its stored initializers without data, its small external ones and those in
    branches with it.
    """
    proto = onnx.load(source.path, load_external_data=False)
    originals = source.model.graph.initializers
    for initializer in proto.graph.initializer:
        if initializer.name in stored:
            empty = onnx.TensorProto(name=initializer.name, data_type=initializer.data_type, dims=initializer.dims)
            empty.data_location = onnx.TensorProto.EXTERNAL
            _add_external(empty, location="artifact", tensor=stored[initializer.name][0])
            initializer.CopyFrom(empty)
        elif initializer.data_location == onnx.TensorProto.EXTERNAL:
            original = originals[initializer.name].const_value
            assert original is not None
            inline = ir.Tensor(original.numpy(), dtype=original.dtype, name=initializer.name)
            initializer.CopyFrom(ir.to_proto(inline))
    for tensor in tensors_in_nodes([*proto.graph.node, *(node for f in proto.functions for node in f.node)]):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            load_in_place(tensor, source.path.parent)
    return proto
