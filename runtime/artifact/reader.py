"""Opens an artifact: the manifest, then every other file compared with it, then the program and the source.

Each file is opened once and stays open, and what is compared, hashed, parsed and later used is what was opened. Weights
are read only for their digests; otherwise their headers are all that is looked at.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import BufferedReader, BytesIO, TextIOWrapper
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from furiosa_llm.runtime.artifact.checks.model import parse_model
from furiosa_llm.runtime.artifact.checks.program import check_program
from furiosa_llm.runtime.artifact.checks.source import check_source
from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.files import Folder, size_of
from furiosa_llm.runtime.artifact.json_reader import MAX_COMPANION_NBYTES, REBUILD
from furiosa_llm.runtime.artifact.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_NBYTES,
    PROGRAM_NAME,
    SOURCE_NAME,
    FileEntry,
    Manifest,
    StoredTensor,
    manifest_digest,
)
from furiosa_llm.runtime.artifact.parse import parse_manifest
from furiosa_llm.runtime.artifact.progress import tell
from furiosa_llm.runtime.artifact.safetensors_header import StoredArray, parse_header

FULL_BELOW_NBYTES = 10**9
"""Weights that are fewer bytes altogether are compared with their digests unless it is asked not to."""
MAX_MODEL_NBYTES = 2**31 - 1
"""The longest message that protobuf can hold."""

_WEIGHTS_SUFFIX = ".safetensors"
_HEADER_SLACK_NBYTES = 2**16
_MAX_HASHING_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A run of bytes of a weights file: `nbytes` from `offset` on, in the file named `file` of the folder."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitModel:
    """A split model, whether its weights are written or only planned."""

    manifest: Manifest
    program: onnx.ModelProto
    """Rank 0's, as stored."""
    tensors: Mapping[str, StoredTensor]
    """The manifest's, by name."""
    compute: str | None = None
    """The type that program and states compute in; None: their own types. See `computing`."""
    declared: Mapping[str, str] = field(default_factory=dict)
    """Inputs and outputs that are float32 here -> the model's own type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact(SplitModel):
    """An open artifact."""

    folder: Path
    files: Folder
    """The folder's files, which stay open."""
    digest: str
    """The manifest's, which names the artifact."""
    offsets: Mapping[str, int]
    """Stored tensor -> the byte of its file where shard 0 begins."""

    def window(self, name: str, rank: int, shards: int = 1) -> Window:
        """The bytes of the stored tensor `name` that `rank` sees, with those of the next `shards` - 1."""
        tensor = self.tensors[name]
        nbytes = tensor.local_nbytes
        shard = self.manifest.mesh.position(rank, tensor.shard_axes)
        return Window(file=tensor.file, offset=self.offsets[name] + shard * nbytes, nbytes=nbytes * shards)

    def read_window(self, window: Window) -> npt.NDArray[np.uint8]:
        """The bytes of `window`, uint8 `[window.nbytes]`, of a file that has not changed or of a tensor that has not.

        Raises ArtifactError if the file was cut short or altered since the artifact was opened.
        """
        data = self.files.read(window.file, window.offset, window.nbytes)
        return self._compared(window) if self.files.changed(window.file) else data

    def check_tensor(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of all shards of the stored tensor `name`; raises ArtifactError if they have not its digest."""
        tensor = self.tensors[name]
        whole = self.files.read(tensor.file, self.offsets[name], self.manifest.stored_nbytes(tensor))
        if hashlib.sha256(whole.data).hexdigest() != tensor.sha256:
            raise ArtifactError(
                f"{tensor.file} was altered in the tensor {name!r:.80}; copy the artifact again or {REBUILD}"
            )
        return whole

    def _compared(self, window: Window) -> npt.NDArray[np.uint8]:
        """The bytes of `window`, once those of the tensor that it belongs to have its digest."""
        for tensor in self.manifest.tensors:
            start = self.offsets[tensor.name]
            stop = start + self.manifest.stored_nbytes(tensor)
            if tensor.file == window.file and start <= window.offset < stop:
                return self.check_tensor(tensor.name)[window.offset - start :][: window.nbytes]
        return self.files.read(window.file, window.offset, window.nbytes)

    def copy_file(self, name: str, target: Path) -> None:
        """Copies the listed file `name`; raises ArtifactError if it has not its digest (any more), and OSError."""
        digest = hashlib.sha256()
        with self.files.stream(name) as source, target.open("xb") as copy:
            while chunk := source.read(2**20):
                digest.update(chunk)
                copy.write(chunk)
        _check_digest(self.folder, self._entry(name), digest.hexdigest())

    def _entry(self, name: str) -> FileEntry:
        return next(entry for entry in self.manifest.files if entry.path == name)

    def companion(self, name: str) -> Companion | None:
        """The file `name` that came with the model; None if the manifest does not list one.

        What lies in the folder without being listed is no part of the artifact.
        """
        entry = next((entry for entry in self.manifest.files if entry.path == name), None)
        return None if entry is None else Companion(self.files, entry)


@dataclass(frozen=True, slots=True)
class Companion:
    """A file that the manifest lists, to be read as the path that it had would be.

    Every method raises ArtifactError if the file was altered since the artifact was opened.
    """

    files: Folder
    entry: FileEntry

    def __str__(self) -> str:
        return str(self.files.path / self.entry.path)

    def read_bytes(self) -> bytes:
        """The bytes."""
        return listed_bytes(self.files, self.entry)

    def read_text(self, encoding: str) -> str:
        """The text, its ends of lines as Python has them."""
        return TextIOWrapper(BytesIO(self.read_bytes()), encoding).read()


def open_artifact(path: str | os.PathLike[str], *, full: bool | None = None, files: Folder | None = None) -> Artifact:
    """The artifact in the folder `path`, with every field of every file checked.

    The digests of all files but the weights are compared with the manifest; `full` compares the digests of the weights
    too (about a second per gigabyte), and None does if they are below FULL_BELOW_NBYTES altogether. `files` are the
    folder's that another process has opened and compared. Raises ArtifactError that says what was found, what was
    expected and what to do.
    """
    folder = Path(path)
    stamped = files is not None
    if files is None:
        _check_folder(folder)
        files = Folder(folder)
    data = _manifest_in(files)
    manifest = parse_manifest(data)
    if full is None:
        full = sum(entry.nbytes for entry in manifest.files if _is_weights(entry)) < FULL_BELOW_NBYTES
    try:
        models, offsets = _checked_files(files, manifest, full=full, stamped=stamped)
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be read: {error.strerror}; check the disk and copy it again") from error
    program = parse_model(models[PROGRAM_NAME], str(folder / PROGRAM_NAME))
    check_program(program, manifest, offsets)
    check_source(parse_model(models[SOURCE_NAME], str(folder / SOURCE_NAME)), manifest)
    return Artifact(
        folder=folder,
        files=files,
        digest=manifest_digest(data),
        manifest=manifest,
        program=program,
        tensors={tensor.name: tensor for tensor in manifest.tensors},
        offsets=offsets,
    )


def manifest_bytes(folder: Path) -> bytes:
    """The bytes of manifest.json in `folder`; raises ArtifactError if there is none, or none of a fitting size."""
    _check_folder(folder)
    return _manifest_in(Folder(folder))


def listed_bytes(files: Folder, entry: FileEntry) -> bytes:
    """The bytes of a file that the manifest lists; raises ArtifactError if they have not its digest."""
    _check_nbytes(files.path, entry)
    with files.stream(entry.path) as stream:
        data = _read(files.path / entry.path, stream, entry.nbytes)
    _check_digest(files.path, entry, hashlib.sha256(data).hexdigest())
    return data


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise ArtifactError(
            f"no artifact at {folder}: found {found}, expected the folder that `furiosa-llm build` wrote"
        )
    if not os.path.lexists(folder / MANIFEST_NAME):
        raise ArtifactError(
            f"{folder} is not an artifact: it has no {MANIFEST_NAME}; give the folder that `furiosa-llm build` wrote, "
            f"or {REBUILD}"
        )


def _manifest_in(files: Folder) -> bytes:
    path = files.path / MANIFEST_NAME
    with files.stream(MANIFEST_NAME) as stream:
        nbytes = size_of(stream)
        if nbytes > MAX_MANIFEST_NBYTES:
            raise ArtifactError(f"{path} is {nbytes} bytes long, expected at most {MAX_MANIFEST_NBYTES}; {REBUILD}")
        return _read(path, stream, nbytes)


def _is_weights(entry: FileEntry) -> bool:
    return entry.path.endswith(_WEIGHTS_SUFFIX)


def _checked_files(
    files: Folder, manifest: Manifest, *, full: bool, stamped: bool
) -> tuple[dict[str, bytes], dict[str, int]]:
    """The bytes of program.onnx and source.onnx, and where stored tensors begin; every listed file is as it should.

    `stamped`: what the files were when their weights were compared is known already.
    """
    models: dict[str, bytes] = {}
    weights = [entry for entry in manifest.files if _is_weights(entry)]
    with ExitStack() as stack:
        streams = {entry.path: stack.enter_context(_open_listed(files, entry)) for entry in manifest.files}
        if not stamped:
            files.stamp()
        for entry in manifest.files:
            if entry.path in (PROGRAM_NAME, SOURCE_NAME):
                models[entry.path] = listed_bytes(files, entry)
            elif not _is_weights(entry):
                _check_digest(files.path, entry, hashlib.file_digest(streams[entry.path], "sha256").hexdigest())
        offsets = _weight_offsets({entry.path: streams[entry.path] for entry in weights}, manifest)
        if full:
            _check_weights(files.path, weights, streams, manifest.tensors, offsets)
    return models, offsets


def _check_nbytes(folder: Path, entry: FileEntry) -> None:
    """Raises ArtifactError for what is longer than anything that is read as a whole: a disk may say so for nothing."""
    most = MAX_MODEL_NBYTES if entry.path in (PROGRAM_NAME, SOURCE_NAME) else MAX_COMPANION_NBYTES
    if entry.nbytes > most:
        raise ArtifactError(f"{folder / entry.path} is {entry.nbytes} bytes long, expected at most {most}; {REBUILD}")


def _open_listed(files: Folder, entry: FileEntry) -> BufferedReader:
    if not _is_weights(entry):
        _check_nbytes(files.path, entry)
    stream = files.stream(entry.path)
    found = size_of(stream)
    if found != entry.nbytes:
        stream.close()
        raise ArtifactError(
            f"{files.path / entry.path}: found {found} bytes, expected {entry.nbytes}; copy the artifact again or "
            f"{REBUILD}"
        )
    return stream


def _read(path: Path, stream: BufferedReader, nbytes: int) -> bytes:
    data = stream.read(nbytes)
    if len(data) != nbytes:
        raise ArtifactError(
            f"{path}: found {len(data)} bytes, expected {nbytes}; it is being written to, wait for that"
        )
    return data


def _check_digest(folder: Path, entry: FileEntry, found: str, what: str = "") -> None:
    if found != entry.sha256:
        raise ArtifactError(
            f"{folder / entry.path} was altered{what}: found sha256 {found[:16]}..., expected {entry.sha256[:16]}...; "
            f"copy the artifact again or {REBUILD}"
        )


def _check_weights(
    folder: Path,
    weights: Sequence[FileEntry],
    streams: Mapping[str, BufferedReader],
    tensors: Sequence[StoredTensor],
    offsets: Mapping[str, int],
) -> None:
    """Compares the digests of the weights files, several at a time: hashing lets other threads run."""

    def digest(entry: FileEntry) -> str:
        streams[entry.path].seek(0)
        return hashlib.file_digest(streams[entry.path], "sha256").hexdigest()

    if not weights:
        return
    threads = min(len(weights), len(os.sched_getaffinity(0)), _MAX_HASHING_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        for number, (entry, found) in enumerate(zip(weights, pool.map(digest, weights), strict=True), start=1):
            tell("checking the weights files", number, len(weights))
            if found != entry.sha256:
                inside = sorted(
                    (tensor for tensor in tensors if tensor.file == entry.path), key=lambda t: offsets[t.name]
                )
                _check_digest(folder, entry, found, _altered(streams[entry.path], inside, offsets))


def _altered(stream: BufferedReader, tensors: Sequence[StoredTensor], offsets: Mapping[str, int]) -> str:
    """Where an altered weights file was altered; `tensors` are those in it as they lie."""
    ends = [*(offsets[tensor.name] for tensor in tensors[1:]), size_of(stream)]
    for tensor, end in zip(tensors, ends, strict=True):
        stream.seek(offsets[tensor.name])
        digest, left = hashlib.sha256(), end - offsets[tensor.name]
        while left and (chunk := stream.read(min(left, 2**20))):
            digest.update(chunk)
            left -= len(chunk)
        if digest.hexdigest() != tensor.sha256:
            return f" in the tensor {tensor.name!r:.80}"
    return " in its header"


def _weight_offsets(streams: Mapping[str, BufferedReader], manifest: Manifest) -> dict[str, int]:
    """The byte of its file where shard 0 of each stored tensor begins."""
    most = dict.fromkeys(streams, _HEADER_SLACK_NBYTES)
    for tensor in manifest.tensors:
        # JSON takes up to twelve bytes for a character, and some twenty for a number.
        most[tensor.file] += 12 * len(tensor.name) + 24 * len(tensor.local_shape) + 300
    headers = {file: parse_header(stream, file, max_nbytes=most[file]) for file, stream in streams.items()}
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
    window_nbytes = tensor.local_nbytes
    shape = (shards, *tensor.local_shape) if dtype.bits >= 8 else (shards, window_nbytes)
    expected = (dtype.safetensors, shape, shards * window_nbytes)
    found = (stored.dtype, stored.shape, stored.nbytes)
    if found != expected:
        raise ArtifactError(
            f"{tensor.file}: tensor {tensor.name!r:.80} is {found[0]} {list(found[1])} of {found[2]} bytes, expected "
            f"{expected[0]} {list(expected[1])} of {expected[2]} bytes; {REBUILD}"
        )
