"""manifest.json, format 2: one frozen dataclass per object, `to_json` for writers and `parse_manifest` for readers.

docs/artifact-format.md is the specification. `parse_manifest` refuses whatever a well-formed manifest cannot hold;
`reader.py` then compares the manifest with the other files of the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from furiosa_llm.runtime.artifact.dimensions import Shape, parse_dimension, shape_of
from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.layout import Cat, Dim, Leaf, Mesh, Prefix, Prod, local_size, to_json

FORMAT_NAME = "furiosa-llm-onnx"
FORMAT_VERSION = 2
COMPOSITE_FORMAT_NAME = "furiosa-llm-onnx-composite"
"""Of a folder whose parts are artifacts; see `composite.py`."""
MANIFEST_NAME = "manifest.json"
PROGRAM_NAME = "program.onnx"
SOURCE_NAME = "source.onnx"
RECORD_NAME = "verification.json"
"""What a verification found; no part of the artifact, so no name for a file of it."""
SIGNATURE_NAME = "manifest.sig"
MAX_MANIFEST_NBYTES = 64 * 2**20
"""A longer manifest is refused unread: parsed JSON takes some twenty times its length in memory."""

DIGEST_PREFIX = b'{\n "digest": "'
"""How manifest.json begins; its own digest follows, in 64 hexadecimal digits."""
_DIGEST_LENGTH = 64

Task = Literal["decoder", "encoder", "other"]
LENGTH_ROLES = {"past_length": "past", "sequence_length": "sequence", "total_length": "total"}
"""Roles of inputs that hold a number of positions, for each sequence or for all, and the name of that number."""
InputRole = Literal[
    "token_ids",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "past_length",
    "sequence_length",
    "total_length",
    "state",
    "other",
]
SINGLE_ROLES = ("token_ids", "attention_mask", "position_ids", "token_type_ids", "logits")
"""Roles that no two inputs, or outputs, of a manifest have."""
OutputRole = Literal["logits", "state", "other"]
StateMode = Literal["append", "in_place", "replace"]
CollectiveKind = Literal["AllReduce", "AllGather"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What made the artifact: no time, host or path, so that equal builds are equal bytes.

    `tool` is `name version`; `libraries` maps a library to its version; `options` are the build's options, any JSON;
    `source_sha256` is the lower-case hexadecimal digest of the model file without its external data and without the
    data of initializers above 4 KiB in it; those have digests of their own.
    """

    tool: str
    libraries: Mapping[str, str]
    options: Mapping[str, Any]
    source_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What the model is for.

    `max_sequence_length` is in tokens, prompt and completion together; `vocab_size` in tokens; None where the source
    does not say. A token of `eos_token_ids` ends a generation.
    """

    name: str
    task: Task
    max_sequence_length: int | None
    vocab_size: int | None
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of the folder: a plain name, its size in bytes, and the lower-case hexadecimal digest of its bytes."""

    path: str
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The indices [start, stop) of dimension `dim` of an original initializer."""

    dim: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One initializer of program.onnx whose data lies in the weights file `file`, as `[shards, *local_shape]`.

    `dtype` is ONNX's name. `shard_axes` are the mesh axes along which shards differ, the first most significant.
    `layout` has a layout for each dimension of the global tensor; `origin` is the original initializer's name, and
    `part` which part of it this is, None for all of it. All three are None for a tensor that the builder made; a tensor
    that the source had as a constant, not as an initializer, has a layout but no origin. `sha256` is of all shards'
    bytes as they follow each other in the file.
    """

    name: str
    file: str
    dtype: str
    local_shape: tuple[int, ...]
    shard_axes: tuple[int, ...]
    layout: tuple[Dim, ...] | None
    part: Part | None
    origin: str | None
    sha256: str

    @property
    def local_nbytes(self) -> int:
        """The bytes of one shard, which is what one rank holds."""
        return DTYPES[self.dtype].nbytes(self.local_shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class OriginalInitializer:
    """One initializer of the original graph; `stored` names the tensors that make it up, none if source.onnx has it.

    `sha256` is of the original's bytes, little-endian and packed as ONNX packs them; None if source.onnx has them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: tuple[str, ...]
    sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class InputInfo:
    """One input of the program. `shape` is global; `layout` is None at a dynamic dimension."""

    name: str
    dtype: str
    shape: Shape
    layout: tuple[Dim | None, ...]
    role: InputRole


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputInfo:
    """One output of the program. `shape` is global; `layout` is None at a dynamic dimension."""

    name: str
    dtype: str
    shape: Shape
    layout: tuple[Dim | None, ...]
    role: OutputRole


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """An input and the output that replaces it in the next step.

    `append`: the output is the input with the new positions appended along `sequence_dim`. `in_place`: one buffer of a
    fixed capacity may be bound to both, and the attention mask says where the new positions go. `replace`: the output
    is of the input's size, all of it new; `sequence_dim` is None.
    """

    input: str
    output: str
    sequence_dim: int | None
    mode: StateMode
    batch_dim: int | None = None
    """The dimension that runs over the sequences, where their number is fixed; None where the shape names it."""

    @property
    def grown_dim(self) -> int:
        """The dimension that a state grows in; for those that do."""
        assert self.sequence_dim is not None, "a state of a fixed size"
        return self.sequence_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """One collective node of the program; `shape` is the local shape of its input; `dim` is None for AllReduce."""

    id: str
    kind: CollectiveKind
    axes: tuple[int, ...]
    dim: int | None
    dtype: str
    shape: Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A run of nodes that starts at position `first_node` of program.onnx, where a pipeline stage may start.

    `collectives` is how many it has; `weight_nbytes` is per rank; `crossing` are the values from earlier blocks.
    """

    name: str
    first_node: int
    collectives: int
    weight_nbytes: int
    crossing: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """manifest.json. `plan` is for people and for `inspect`: any JSON object."""

    provenance: Provenance
    model: ModelInfo
    mesh: Mesh
    files: tuple[FileEntry, ...]
    tensors: tuple[StoredTensor, ...]
    initializers: tuple[OriginalInitializer, ...]
    inputs: tuple[InputInfo, ...]
    outputs: tuple[OutputInfo, ...]
    states: tuple[State, ...]
    collectives: tuple[Collective, ...]
    blocks: tuple[Block, ...]
    plan: Mapping[str, Any]

    @property
    def state_nbytes(self) -> dict[str, int]:
        """State input -> the bytes that one rank keeps of it for one position of one sequence.

        What an encoder gave, which the decoder reads and nothing replaces, is among them.
        """
        fixed = {state.input for state in self.states if state.mode == "replace"}
        states = [info for info in self.inputs if info.role == "state" and info.name not in fixed]
        return {info.name: self._position_nbytes(info) for info in states}

    def stored_nbytes(self, tensor: StoredTensor) -> int:
        """The bytes of all shards of `tensor`."""
        return tensor.local_nbytes * self.mesh.parts(tensor.shard_axes)

    def payload_nbytes(self, collective: Collective) -> int:
        """The bytes that `collective` gives each rank for a decoded token: every dynamic dimension is 1."""
        parts = self.mesh.parts(collective.axes) if collective.kind == "AllGather" else 1
        local = [size if isinstance(size, int) else 1 for size in collective.shape]
        return DTYPES[collective.dtype].nbytes(local) * parts

    def _position_nbytes(self, info: InputInfo) -> int:
        sizes = {name: 1 for dim in info.shape if isinstance(dim, str) for name in parse_dimension(dim).names}
        local = [
            size if layout is None else local_size(layout, self.mesh)
            for size, layout in zip(info.shape, info.layout, strict=True)
        ]
        return DTYPES[info.dtype].nbytes(shape_of(local, sizes))

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON values, keys in the order of the specification."""
        return {"format": {"name": FORMAT_NAME, "version": FORMAT_VERSION}, **_plain(self)}

    def to_bytes(self) -> bytes:
        """The bytes of manifest.json: equal manifests give equal bytes."""
        return seal(self.to_json())


def seal(document: Mapping[str, Any]) -> bytes:
    """The bytes of manifest.json for its members but the digest, which is put first."""
    whole = {"digest": "0" * _DIGEST_LENGTH, **document}
    data = (json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    start = len(DIGEST_PREFIX)
    return data[:start] + manifest_digest(data).encode() + data[start + _DIGEST_LENGTH :]


def fixed_inputs(manifest: Manifest) -> dict[str, int]:
    """The inputs of the model that the build made constants, with their values."""
    found = manifest.provenance.options.get("fixed")
    return {k: int(v) for k, v in found.items() if isinstance(v, int)} if isinstance(found, dict) else {}


def adapted_modules(manifest: Manifest) -> list[str]:
    """The modules that the build gave inputs for adapters."""
    found = manifest.provenance.options.get("lora_modules")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def manifest_digest(data: bytes) -> str:
    """What the digest in the manifest `data` must be: SHA-256 of its bytes with zeros for the digest's digits."""
    start = len(DIGEST_PREFIX)
    zeroed = hashlib.sha256(data[:start])
    zeroed.update(b"0" * _DIGEST_LENGTH)
    zeroed.update(data[start + _DIGEST_LENGTH :])
    return zeroed.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Leaf | Prod | Cat | Prefix):
        return to_json(value)
    if is_dataclass(value):
        members = ((field, getattr(value, field.name)) for field in fields(value))
        return {field.name: _plain(own) for field, own in members if own is not None or field.default is not None}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
