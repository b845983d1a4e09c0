"""Artifacts changed by someone who also makes the digests right again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.manifest import seal
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.artifact.tools.originals import read_original


def alter_tensor(folder: Path, name: str, change: Callable[[bytearray], None]) -> None:
    """Changes the bytes of all shards of a stored tensor, and no digest."""
    artifact = open_artifact(folder, full=False)
    tensor = artifact.tensors[name]
    nbytes = DTYPES[tensor.dtype].nbytes(tensor.local_shape) * artifact.manifest.mesh.parts(tensor.shard_axes)
    with (folder / tensor.file).open("r+b") as file:
        file.seek(artifact.offsets[name])
        data = bytearray(file.read(nbytes))
        before = bytes(data)
        change(data)
        assert len(data) == nbytes
        assert data != before
        file.seek(artifact.offsets[name])
        file.write(data)


def flip_bit(data: bytearray) -> None:
    """Changes the lowest bit of one byte in the middle."""
    data[len(data) // 2] ^= 1


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest, whose own digest is made right again."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_bytes(seal(manifest))


def reseal(folder: Path, *, originals: bool = False) -> None:
    """Makes the digests of files and stored tensors those of what is there now, with `originals` theirs, too."""

    def files(manifest: dict[str, Any]) -> None:
        for entry in manifest["files"]:
            data = (folder / entry["path"]).read_bytes()
            entry |= {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def tensors(manifest: dict[str, Any]) -> None:
        artifact = open_artifact(folder, full=False)
        for entry in manifest["tensors"]:
            tensor = artifact.tensors[entry["name"]]
            nbytes = DTYPES[tensor.dtype].nbytes(tensor.local_shape) * artifact.manifest.mesh.parts(tensor.shard_axes)
            data = (folder / tensor.file).read_bytes()[artifact.offsets[tensor.name] :][:nbytes]
            entry["sha256"] = hashlib.sha256(data).hexdigest()
        for entry in manifest["initializers"] if originals else []:
            if entry["stored"]:
                entry["sha256"] = hashlib.sha256(read_original(artifact, entry["name"]).data).hexdigest()

    edit_manifest(folder, files)
    edit_manifest(folder, tensors)
