"""`inspect_artifact`: what an artifact holds, taken from its manifest and program without reading a weight."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from onnx import ModelProto

from furiosa_llm.runtime.artifact.compute import Float32Memory, float32_memory
from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.graphs import used_names
from furiosa_llm.runtime.artifact.layout import Dim, Mesh, global_size, to_json
from furiosa_llm.runtime.artifact.manifest import (
    Collective,
    InputInfo,
    Manifest,
    ModelInfo,
    OriginalInitializer,
    OutputInfo,
    Provenance,
    State,
    StoredTensor,
)
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.artifact.tools.record_summary import VerificationSummary, verification_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSummary:
    """A block of the program: `nodes` and `collectives` it has, and the bytes of the weights it reads on each PE."""

    name: str
    nodes: int
    collectives: int
    weight_nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMemory:
    """Bytes of stored weights. Each PE reads `split_nbytes` and `replicated_nbytes`, which are `pe_nbytes` together.

    In the files, all PEs together: `stored_nbytes`, of which `padding_nbytes` are zeros that no element of the original
    stands for; and `original_nbytes` of the original's initializers, whether stored or not, aliases once.
    """

    pe_nbytes: int
    split_nbytes: int
    replicated_nbytes: int
    stored_nbytes: int
    padding_nbytes: int
    original_nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StateMemory:
    """Bytes of all states of one sequence on each PE.

    `nbytes_per_token` are a position's, `nbytes_at_limit` a sequence's as long as the model allows; None
    if that is not known.
    """

    nbytes_per_token: int
    nbytes_at_limit: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveSummary:
    """The collectives of one kind over the same mesh axes: how many, and the bytes a PE receives for a decoded token.

    A dynamic dimension counts as 1, which batch and sequence are when one sequence decodes.
    """

    kind: str
    axes: tuple[int, ...]
    count: int
    nbytes_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How one part of the model is split, by the manifest's plan: `count` dimensions of `size` over `parts` PEs."""

    role: str
    size: int
    padded_size: int
    parts: int
    axes: tuple[int, ...]
    count: int
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicatedTensor:
    """A stored tensor that every PE holds whole, its bytes, and the types of the ops that read it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    readers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A split that the planner did not take: of `size` over the mesh `axes` ([]: leaving it whole), where, and why."""

    size: int
    where: str
    axes: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """How many attentions became one op, and a line for each that was left as it was."""

    fused: int
    left: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSummary:
    """A file of the artifact and its bytes."""

    path: str
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """An artifact at a glance. `mesh` is the grid of PEs, `num_nodes` are the program's, `digest` the manifest's.

    `splits`, `refused`, `notes` and `attention` are what the build wrote down in the manifest's plan, as far as it is
    of the form that this version writes.
    """

    digest: str
    model: ModelInfo
    mesh: tuple[int, ...]
    num_nodes: int
    weights: WeightMemory
    state: StateMemory
    float32: Float32Memory | None
    """What computing in float32 converts and takes; None if nothing is narrower."""
    collectives: tuple[CollectiveSummary, ...]
    splits: tuple[Split, ...]
    replicated: tuple[ReplicatedTensor, ...]
    refused: tuple[Refusal, ...]
    notes: tuple[str, ...]
    attention: Attention | None
    blocks: tuple[BlockSummary, ...]
    inputs: tuple[InputInfo, ...]
    outputs: tuple[OutputInfo, ...]
    states: tuple[State, ...]
    files: tuple[FileSummary, ...]
    provenance: Provenance
    verification: VerificationSummary

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values: the fields' names as keys, layouts as in the manifest."""
        plain = _plain(self)
        assert isinstance(plain, dict)
        return plain


def inspect_artifact(path: str | os.PathLike[str]) -> Inspection:
    """What the artifact in the folder `path` holds, its structure checked but its weights unread.

    Raises ArtifactError if it is no artifact; whatever lies there as verification.json is described, never raised.
    """
    artifact = open_artifact(Path(path), full=False)
    manifest = artifact.manifest
    plan = manifest.plan
    return Inspection(
        digest=artifact.digest,
        model=manifest.model,
        mesh=manifest.mesh.shape,
        num_nodes=len(artifact.program.graph.node),
        weights=_weights(artifact),
        state=_state_memory(manifest),
        float32=float32_memory(manifest, {name for node in artifact.program.graph.node for name in used_names(node)}),
        collectives=_collectives(manifest),
        splits=tuple(_records(plan.get("choices"), Split)),
        replicated=_replicated(artifact),
        refused=tuple(_records(plan.get("refused"), Refusal)),
        notes=_texts(plan.get("notes")),
        attention=next(iter(_records([plan.get("attention")], Attention)), None),
        blocks=_blocks(manifest, artifact.program),
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        states=manifest.states,
        files=tuple(FileSummary(path=entry.path, nbytes=entry.nbytes) for entry in manifest.files),
        provenance=manifest.provenance,
        verification=verification_of(artifact.folder, artifact.digest),
    )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, Dim):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Dim):
        return to_json(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


# -- figures -------------------------------------------------------------------------------------------------------


def _weights(artifact: Artifact) -> WeightMemory:
    manifest, mesh = artifact.manifest, artifact.manifest.mesh
    read = {name for node in artifact.program.graph.node for name in used_names(node)}
    split = sum(tensor.local_nbytes for tensor in manifest.tensors if tensor.name in read and tensor.shard_axes)
    replicated = sum(
        tensor.local_nbytes for tensor in manifest.tensors if tensor.name in read and not tensor.shard_axes
    )
    return WeightMemory(
        pe_nbytes=split + replicated,
        split_nbytes=split,
        replicated_nbytes=replicated,
        stored_nbytes=sum(map(manifest.stored_nbytes, manifest.tensors)),
        padding_nbytes=sum(_padding_nbytes(tensor, mesh) for tensor in manifest.tensors),
        original_nbytes=sum(DTYPES[entry.dtype].nbytes(entry.shape) for entry in _distinct(manifest.initializers)),
    )


def _distinct(initializers: Iterable[OriginalInitializer]) -> Iterable[OriginalInitializer]:
    """The originals that are made of the same stored tensors, once."""
    return {entry.stored or entry.name: entry for entry in initializers}.values()


def _padding_nbytes(tensor: StoredTensor, mesh: Mesh) -> int:
    if tensor.layout is None:
        return 0
    elements = math.prod(tensor.local_shape) * mesh.parts(tensor.shard_axes)
    return (elements - math.prod(map(global_size, tensor.layout))) * DTYPES[tensor.dtype].bits // 8


def _state_memory(manifest: Manifest) -> StateMemory:
    per_token = sum(manifest.state_nbytes.values())
    limit = manifest.model.max_sequence_length if per_token else 0
    return StateMemory(nbytes_per_token=per_token, nbytes_at_limit=None if limit is None else per_token * limit)


def _collectives(manifest: Manifest) -> tuple[CollectiveSummary, ...]:
    groups: dict[tuple[str, tuple[int, ...]], list[Collective]] = {}
    for collective in manifest.collectives:
        groups.setdefault((collective.kind, collective.axes), []).append(collective)
    return tuple(
        CollectiveSummary(
            kind=kind,
            axes=axes,
            count=len(group),
            nbytes_per_token=sum(map(manifest.payload_nbytes, group)),
        )
        for (kind, axes), group in groups.items()
    )


def _replicated(artifact: Artifact) -> tuple[ReplicatedTensor, ...]:
    """The largest first."""
    whole = {tensor.name: tensor for tensor in artifact.manifest.tensors if not tensor.shard_axes}
    readers: dict[str, Counter[str]] = {name: Counter() for name in whole}
    for node in artifact.program.graph.node:
        for name in used_names(node):
            if name in whole:
                readers[name][node.op_type] += 1
    return tuple(
        ReplicatedTensor(
            name=tensor.name,
            dtype=tensor.dtype,
            shape=tensor.local_shape,
            nbytes=tensor.local_nbytes,
            readers=tuple(sorted(readers[tensor.name])),
        )
        for tensor in sorted(whole.values(), key=lambda tensor: tensor.local_nbytes, reverse=True)
    )


def _blocks(manifest: Manifest, program: ModelProto) -> tuple[BlockSummary, ...]:
    ends = [*(block.first_node for block in manifest.blocks[1:]), len(program.graph.node)]
    return tuple(
        BlockSummary(
            name=block.name,
            nodes=end - block.first_node,
            collectives=block.collectives,
            weight_nbytes=block.weight_nbytes,
        )
        for block, end in zip(manifest.blocks, ends, strict=False)
    )


# -- the plan, which a reader must accept whatever it is -----------------------------------------------------------


def _records(values: object, kind: type[T]) -> Iterable[T]:
    """The objects of a list that have the fields of `kind`, each of its type; objects of another form are left out."""
    for value in values if isinstance(values, list) else []:
        fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # T is a dataclass, which no bound says
        if isinstance(value, dict) and all(_fits(value.get(field.name), str(field.type)) for field in fields):
            yield kind(**{field.name: _frozen(value[field.name]) for field in fields})


def _fits(value: object, kind: str) -> bool:
    match kind:
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "str":
            return isinstance(value, str)
        case _:
            item = kind.removeprefix("tuple[").removesuffix(", ...]")
            return isinstance(value, list) and all(_fits(one, item) for one in value)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _texts(values: object) -> tuple[str, ...]:
    return tuple(value for value in values if isinstance(value, str)) if isinstance(values, list) else ()


def alike(blocks: Sequence[BlockSummary]) -> list[list[BlockSummary]]:
    """Runs of blocks that differ in nothing but their names."""
    runs: list[list[BlockSummary]] = []
    for block in blocks:
        if runs and dataclasses.replace(runs[-1][-1], name=block.name) == block:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs
