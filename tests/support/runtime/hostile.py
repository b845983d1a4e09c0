"""Hostile artifacts: each kind says what it does to a copy of an artifact's folder, and what the reader says of it.

The kinds are in the modules `hostile_*` in this folder. Where a kind alters a file, sizes and digests are made to
agree again, as somebody who knows the format would, unless the digest is the point.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from furiosa_llm.runtime.artifact.manifest import seal
from tests.support.runtime.spmd import WEIGHTS, file_entry

Json = Any
PROGRAM, SOURCE, MANIFEST = "program.onnx", "source.onnx", "manifest.json"


@dataclass(frozen=True, slots=True)
class Edit:
    """A change of manifest.json as JSON, with a name for it."""

    name: str
    apply: Callable[[Json], object]


def put(value: Json, *path: str | int) -> Edit:
    """Another value at `path`."""

    def apply(root: Json) -> None:
        _at(root, path[:-1])[path[-1]] = value

    return Edit(f"{_shown(path)} = {json.dumps(value):.150}", apply)


def drop(*path: str | int) -> Edit:
    """Nothing at `path`."""

    def apply(root: Json) -> None:
        del _at(root, path[:-1])[path[-1]]

    return Edit(f"no {_shown(path)}", apply)


def copy_first(section: str) -> Edit:
    """The first entry of a section once more, behind the others."""
    return Edit(f"{section} with an entry twice", lambda root: root[section].append(root[section][0]))


def _at(root: Json, path: Sequence[str | int]) -> Json:
    for key in path:
        root = root[key]
    return root


def _shown(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))


class Copy:
    """A copy of an artifact, to be damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> Json:
        """The manifest as JSON."""
        return json.loads((self.folder / MANIFEST).read_bytes())

    def edit(self, change: Callable[[Json], object]) -> None:
        """Change the manifest, and give it the digest that it then has."""
        root = self.read()
        change(root)
        (self.folder / MANIFEST).write_bytes(seal(root))

    def refresh(self) -> None:
        """Make the manifest's sizes and digests those of the files."""

        def change(root: Json) -> None:
            entries = [file_entry(self.folder / entry["path"]) for entry in root["files"]]
            root["files"] = [{"path": e.path, "nbytes": e.nbytes, "sha256": e.sha256} for e in entries]

        self.edit(change)

    def model(self, name: str, change: Callable[[onnx.ModelProto], object]) -> None:
        """Change program.onnx or source.onnx."""
        model = onnx.load_model(self.folder / name, load_external_data=False)
        change(model)
        self.write(name, model.SerializeToString())

    def write(self, name: str, content: bytes) -> None:
        """Another content for a file."""
        (self.folder / name).write_bytes(content)
        self.refresh()

    def flip(self, name: str, position: int) -> None:
        """Flip one bit of a file, and leave its digest as it was."""
        content = bytearray((self.folder / name).read_bytes())
        content[position] ^= 1
        (self.folder / name).write_bytes(content)

    def header(self, change: Callable[[Json], object]) -> None:
        """Change the header of the weights."""
        header, data = self.weights()
        change(header)
        self.write(WEIGHTS, with_header(json.dumps(header).encode(), data))

    def weights(self) -> tuple[Json, bytes]:
        """The header of the weights file and what follows it."""
        content = (self.folder / WEIGHTS).read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header: bytes, data: bytes, size: int | None = None) -> bytes:
    """A safetensors file of these parts; `size` is what it says of its header's length."""
    return struct.pack("<Q", len(header) if size is None else size) + header + data


@dataclass(frozen=True, slots=True, kw_only=True)
class Hostile:
    """A kind of hostile artifact.

    `apply` damages a copy of the artifact `base`; `message` is a regular expression for what must be said. `full`: only
    the digests of the weights tell, so that the reader finds nothing without them.
    """

    name: str
    base: str
    apply: Callable[[Copy], object]
    message: str
    full: bool = False


def manifest_kind(base: str, edit: Edit, message: str) -> Hostile:
    """A manifest that is changed and has the digest that it then should have."""
    return Hostile(
        name=f"{base} manifest: {edit.name}", base=base, apply=lambda copy: copy.edit(edit.apply), message=message
    )


def model_kind(base: str, file: str, name: str, change: Callable[[onnx.ModelProto], object], message: str) -> Hostile:
    """A program.onnx or source.onnx that is changed, with sizes and digests to match."""
    return Hostile(
        name=f"{base} {file}: {name}", base=base, apply=lambda copy: copy.model(file, change), message=message
    )
