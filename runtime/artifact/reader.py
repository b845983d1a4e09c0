"""Opens an artifact: the manifest, then every other file compared with it, then the program.

Weights are never read here (unless `full` asks for their digests): only their headers are.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.json_reader import REBUILD
from furiosa_llm.runtime.artifact.manifest import MANIFEST_NAME, PROGRAM_NAME, FileEntry, Manifest, StoredTensor
from furiosa_llm.runtime.artifact.parse import parse_manifest
from furiosa_llm.runtime.artifact.program_checks import check_program
from furiosa_llm.runtime.artifact.safetensors_header import StoredArray, read_header

_WEIGHTS_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A run of bytes of a weights file: `nbytes` from `offset` on, in the file named `file` of the folder."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """An open artifact: `folder`, its `manifest`, its `program` (rank 0's as stored), and the stored tensors' places.

    `tensors` are the manifest's by name, and `offsets` the byte of the file where shard 0 of each begins.
    """

    folder: Path
    manifest: Manifest
    program: onnx.ModelProto
    tensors: Mapping[str, StoredTensor]
    offsets: Mapping[str, int]

    def window(self, name: str, rank: int) -> Window:
        """The bytes of the stored tensor `name` that `rank` sees."""
        tensor = self.tensors[name]
        nbytes = DTYPES[tensor.dtype].nbytes(tensor.local_shape)
        shard = self.manifest.mesh.position(rank, tensor.shard_axes)
        return Window(file=tensor.file, offset=self.offsets[name] + shard * nbytes, nbytes=nbytes)

    def read_window(self, window: Window) -> npt.NDArray[np.uint8]:
        """The bytes of `window`, uint8 `[window.nbytes]`."""
        data = np.fromfile(self.folder / window.file, dtype=np.uint8, count=window.nbytes, offset=window.offset)
        if data.size != window.nbytes:
            raise ArtifactError(f"{window.file} was cut short while the artifact was open; {REBUILD}")
        return data


def open_artifact(path: str | os.PathLike[str], *, full: bool = False) -> Artifact:
    """The artifact in the folder `path`, with every field of every file checked.

    The digests of all files but the weights are compared with the manifest; `full` compares those of the weights too
    (about a second per gigabyte). Raises ArtifactError that says what was found, what was expected and what to do.
    """
    folder = Path(path)
    manifest = parse_manifest(_manifest_bytes(folder))
    for entry in manifest.files:
        _check_file(folder, entry, digest=full or not entry.path.endswith(_WEIGHTS_SUFFIX))
    tensors = {tensor.name: tensor for tensor in manifest.tensors}
    offsets = _weight_offsets(folder, manifest)
    program = _parse_program(folder / PROGRAM_NAME)
    check_program(program, manifest, offsets)
    return Artifact(folder=folder, manifest=manifest, program=program, tensors=tensors, offsets=offsets)


def _manifest_bytes(folder: Path) -> bytes:
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise ArtifactError(
            f"no artifact at {folder}: found {found}, expected the folder that `furiosa-llm build` wrote"
        )
    try:
        return (folder / MANIFEST_NAME).read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{folder} is not an artifact: it has no {MANIFEST_NAME}; give the folder that `furiosa-llm build` wrote, "
            f"or {REBUILD}"
        ) from error
    except OSError as error:
        raise ArtifactError(f"{folder / MANIFEST_NAME} cannot be read: {error.strerror}") from error


def _check_file(folder: Path, entry: FileEntry, *, digest: bool) -> None:
    path = folder / entry.path
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError(f"{path} is not a regular file; copy the artifact with its links followed (`cp -rL`)")
        if status.st_size != entry.nbytes:
            raise ArtifactError(
                f"{path}: found {status.st_size} bytes, expected {entry.nbytes}; copy the artifact again or {REBUILD}"
            )
        if digest:
            _check_digest(path, entry.sha256)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing; copy the artifact again or {REBUILD}") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error


def _check_digest(path: Path, expected: str) -> None:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise ArtifactError(
            f"{path} was altered: found sha256 {found[:16]}..., expected {expected[:16]}...; copy the artifact again "
            f"or {REBUILD}"
        )


def _weight_offsets(folder: Path, manifest: Manifest) -> dict[str, int]:
    headers = {
        entry.path: read_header(folder / entry.path) for entry in manifest.files if entry.path.endswith(_WEIGHTS_SUFFIX)
    }
    for tensor in manifest.tensors:
        stored = headers[tensor.file].get(tensor.name)
        if stored is None:
            raise ArtifactError(
                f"{tensor.file} has no tensor {tensor.name!r:.80}, which manifest.json names; {REBUILD}"
            )
        _check_stored(tensor, stored, manifest.mesh.parts(tensor.shard_axes))
    known = {tensor.name for tensor in manifest.tensors}
    for file, arrays in headers.items():
        for name in arrays:
            if name not in known:
                raise ArtifactError(f"{file} has a tensor {name!r:.80} that manifest.json does not name; {REBUILD}")
    return {tensor.name: headers[tensor.file][tensor.name].offset for tensor in manifest.tensors}


def _check_stored(tensor: StoredTensor, stored: StoredArray, shards: int) -> None:
    dtype = DTYPES[tensor.dtype]
    window_nbytes = dtype.nbytes(tensor.local_shape)
    shape = (shards, *tensor.local_shape) if dtype.bits >= 8 else (shards, window_nbytes)
    expected = (dtype.safetensors, shape, shards * window_nbytes)
    found = (stored.dtype, stored.shape, stored.nbytes)
    if found != expected:
        raise ArtifactError(
            f"{tensor.file}: tensor {tensor.name!r:.80} is {found[0]} {list(found[1])} of {found[2]} bytes, expected "
            f"{expected[0]} {list(expected[1])} of {expected[2]} bytes; {REBUILD}"
        )


def _parse_program(path: Path) -> onnx.ModelProto:
    program = onnx.ModelProto()
    try:
        program.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ArtifactError(f"{path} is not an ONNX model: {error}; {REBUILD}") from error
    return program
