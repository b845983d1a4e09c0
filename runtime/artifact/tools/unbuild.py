"""`unbuild`: an artifact back into the ONNX model that it was built from."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx

from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.errors import ArtifactError, OutputFileError
from furiosa_llm.runtime.artifact.files import sync
from furiosa_llm.runtime.artifact.json_reader import REBUILD
from furiosa_llm.runtime.artifact.manifest import OriginalInitializer
from furiosa_llm.runtime.artifact.progress import tell
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.artifact.source import read_source
from furiosa_llm.runtime.artifact.temporary import temporary_folder
from furiosa_llm.runtime.artifact.tools.originals import Bytes, read_original

DATA_SUFFIX = ".data"
_ALIGNMENT = 4096
"""Of tensors in the data file: pages, so that it can be mapped into memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unbuilt:
    """What `unbuild` wrote.

    `data` is the file of the weights, None if source.onnx had all of them; `num_initializers` are all of the model's,
    `num_rebuilt` the ones put together from shards, and `nbytes` the bytes of these, aliases counted once.
    """

    model: Path
    data: Path | None
    num_initializers: int
    num_rebuilt: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Region:
    """A run of bytes of the data file, and their digest."""

    offset: int
    nbytes: int
    sha256: str


def unbuild(artifact: Artifact, out: Path, *, force: bool = False) -> Unbuilt:
    """Write the model that `artifact` was built from to `out`, and its weights to `out` + `.data`.

    The graph is the original's. Every initializer has the original's type, shape and bits; those that the artifact
    stores become external data, so that what was in a typed field (`float_data`) is raw data now, and initializers that
    shared their data share it again. It takes the memory of the largest initializer.

    Both files are written under other names and renamed at the end. Raises ArtifactError if an initializer is not, bit
    for bit, what the manifest says the original was, and OutputFileError if `out` exists and `force` is not given, lies
    in the artifact, or cannot be written; nothing is left behind then.
    """
    _check_output(artifact, out, force=force)
    data = _data_of(out)
    model = read_source(artifact)
    stored = [entry for entry in artifact.manifest.initializers if entry.stored]
    with _temporary_folder(out) as folder:
        regions = _write_data(artifact, stored, folder / data.name)
        for initializer in model.graph.initializer:
            if initializer.name in regions:
                _refer(initializer, data.name, regions[initializer.name])
        (folder / out.name).write_bytes(model.SerializeToString(deterministic=True))
        _move(folder, out, data, has_data=bool(stored))
    return Unbuilt(
        model=out,
        data=data if stored else None,
        num_initializers=len(model.graph.initializer),
        num_rebuilt=len(stored),
        nbytes=sum({region.offset: region.nbytes for region in regions.values()}.values()),
    )


def _data_of(out: Path) -> Path:
    return out.with_name(out.name + DATA_SUFFIX)


def _check_output(artifact: Artifact, out: Path, *, force: bool) -> None:
    if out.is_dir():
        raise OutputFileError(f"{out} is a folder; give the name of an .onnx file to write.")
    if out.parent.resolve() == artifact.folder.resolve():
        raise OutputFileError(f"{out} lies in the artifact itself; give an output outside of it.")
    for file in (out, _data_of(out)):
        if file.is_dir():
            raise OutputFileError(f"{file} is a folder, where the weights go; give another output.")
        if file.exists() and not force:
            raise OutputFileError(f"{file} exists already; give another output, or --force (force=True) to replace it.")


def _write_data(artifact: Artifact, stored: Sequence[OriginalInitializer], path: Path) -> dict[str, _Region]:
    """Write every stored initializer once; gives the place of each."""
    distinct = {entry.stored: DTYPES[entry.dtype].nbytes(entry.shape) for entry in stored}
    total, done = sum(distinct.values()), 0
    regions: dict[tuple[str, ...], _Region] = {}
    with path.open("wb") as file:
        for entry in stored:
            region = regions.get(entry.stored)
            if region is None:
                region = regions[entry.stored] = _write(file, read_original(artifact, entry.name))
                done += region.nbytes
                tell("write", done, total)
            if region.sha256 != entry.sha256:
                raise ArtifactError(
                    f"initializer {entry.name!r:.80} is not what it was: its shards make up sha256 "
                    f"{region.sha256[:16]}..., expected {str(entry.sha256)[:16]}...; copy the artifact again or "
                    f"{REBUILD}"
                )
    return {entry.name: regions[entry.stored] for entry in stored}


def _write(file: BinaryIO, data: Bytes) -> _Region:
    offset = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
    file.seek(offset)
    file.write(data.data)
    return _Region(offset=offset, nbytes=data.nbytes, sha256=hashlib.sha256(data.data).hexdigest())


def _refer(initializer: onnx.TensorProto, location: str, region: _Region) -> None:
    del initializer.external_data[:]
    if not region.nbytes:  # a length of 0 means the rest of the file to some readers
        initializer.ClearField("data_location")
        initializer.raw_data = b""
        return
    place = {"location": location, "offset": region.offset, "length": region.nbytes}
    for key, value in place.items():
        initializer.external_data.add(key=key, value=str(value))


@contextlib.contextmanager
def _temporary_folder(out: Path) -> Iterator[Path]:
    """A folder next to `out` that is gone when the block ends."""
    with contextlib.ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(temporary_folder(out.parent, f".{out.name}.writing-"))
        except OSError as error:
            raise OutputFileError(
                f"cannot write to {out.parent}: {error.strerror}; give an output in a folder that can be written."
            ) from error
        try:
            yield folder
        except OSError as error:
            raise OutputFileError(
                f"writing {out} failed: {error.strerror or error}; nothing was left behind. "
                "Check the free space and the rights of that folder."
            ) from error


def _move(folder: Path, out: Path, data: Path, *, has_data: bool) -> None:
    """Put both files in their places: there is never a model next to another's weights."""
    for file in folder.iterdir():
        sync(file)
    out.unlink(missing_ok=True)
    if has_data:
        (folder / data.name).replace(data)
    else:
        data.unlink(missing_ok=True)
    (folder / out.name).replace(out)
