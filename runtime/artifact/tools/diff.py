"""`diff`: in what two artifacts differ, and by how much.

Originals are compared by their digests, so that artifacts of one model for different meshes have the same weights; only
those that differ are read.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import onnx

from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.json_reader import REBUILD
from furiosa_llm.runtime.artifact.layout import to_json
from furiosa_llm.runtime.artifact.manifest import (
    MANIFEST_NAME,
    SOURCE_NAME,
    OriginalInitializer,
    StoredTensor,
    manifest_digest,
)
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.artifact.source import inline_bytes, read_source
from furiosa_llm.runtime.artifact.tools.differences import Difference, Kind, difference, unlike
from furiosa_llm.runtime.artifact.tools.graph_diff import GraphDiff, Names, compare_graphs, compare_named
from furiosa_llm.runtime.artifact.tools.originals import read_original

_WEIGHTS_SUFFIX = ".safetensors"
_COMPARED = frozenset({"provenance", "model", "mesh", "files", "initializers", "collectives"})
"""Members of the manifest that have a place of their own in a diff."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One value that differs: its JSON path, and what it is on either side (None: it is not there)."""

    path: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDiff:
    """How the plans differ: meshes and counts of collectives where they do, and layouts of originals that both have."""

    mesh: Change | None = None
    collectives: tuple[Change, ...] = ()
    layouts: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsDiff:
    """Originals by name: in one artifact only, and in both with different bytes.

    `made` are stored tensors of no original (the builder's own, and constants of the graph) that are in both artifacts,
    cut alike, with different bytes.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[Difference, ...] = ()
    made: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """In what artifact `b` differs from artifact `a`. `added` is in b only, `removed` in a only.

    `digests` are the manifests'; equal ones mean equal artifacts, and nothing else was looked at. `files` are all but
    the manifest and the weights, by name. `manifest` are members of the manifest that differ and have no place above.
    """

    digests: tuple[str, str]
    model: tuple[Change, ...] = ()
    provenance: tuple[Change, ...] = ()
    graph: GraphDiff = field(default_factory=GraphDiff)
    plan: PlanDiff = field(default_factory=PlanDiff)
    weights: WeightsDiff = field(default_factory=WeightsDiff)
    files: Names = field(default_factory=Names)
    manifest: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether the artifacts are the same, byte for byte."""
        return self.digests[0] == self.digests[1]

    def to_json(self) -> dict[str, Any]:
        """The diff as plain JSON values: `same`, and the fields by their names."""
        return {"same": self.same, **asdict(self)}


def diff(a: Artifact, b: Artifact) -> Diff:
    """Compare two artifacts; memory is twice the largest original that differs.

    What the manifests say of the weights is taken to be true: open the artifacts in full, or verify them, where that is
    not known. Raises ArtifactError for a source.onnx that is no model, and stored tensors that make up no original.
    """
    digests = (_digest(a), _digest(b))
    if digests[0] == digests[1]:
        return Diff(digests=digests)
    ours, theirs = a.manifest.to_json(), b.manifest.to_json()
    files = [
        {entry.path: entry.sha256 for entry in side.manifest.files if not entry.path.endswith(_WEIGHTS_SUFFIX)}
        for side in (a, b)
    ]
    sources = (read_source(a), read_source(b))
    return Diff(
        digests=digests,
        model=tuple(_changes(ours["model"], theirs["model"])),
        provenance=tuple(_changes(ours["provenance"], theirs["provenance"])),
        graph=compare_graphs(*sources),
        plan=_plan(a, b),
        weights=_weights(a, b, sources),
        files=compare_named(*files),
        manifest=tuple(key for key in ours if key not in _COMPARED and ours[key] != theirs[key]),
    )


def _digest(artifact: Artifact) -> str:
    return manifest_digest((artifact.folder / MANIFEST_NAME).read_bytes())


def _changes(a: Any, b: Any, path: str = "") -> Iterable[Change]:
    """Every leaf in which two JSON values differ."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted(a.keys() | b.keys()):
            yield from _changes(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif a != b:
        yield Change(path=path, a=a, b=b)


def _plan(a: Artifact, b: Artifact) -> PlanDiff:
    meshes = [list(side.manifest.mesh.shape) for side in (a, b)]
    counts = [Counter(collective.kind for collective in side.manifest.collectives) for side in (a, b)]
    kinds = [kind for kind in sorted(counts[0].keys() | counts[1].keys()) if counts[0][kind] != counts[1][kind]]
    layouts = [_layouts(side) for side in (a, b)]
    return PlanDiff(
        mesh=None if meshes[0] == meshes[1] else Change(path="mesh", a=meshes[0], b=meshes[1]),
        collectives=tuple(
            Change(path=k, a=counts[0][k], b=counts[1][k]) for k in kinds if counts[0][k] != counts[1][k]
        ),
        layouts=tuple(
            Change(path=name, a=layouts[0][name], b=layouts[1][name])
            for name in layouts[0]
            if name in layouts[1] and layouts[0][name] != layouts[1][name]
        ),
    )


def _layouts(artifact: Artifact) -> dict[str, list[dict[str, Any]]]:
    """How every original is stored: a list, sorted by where parts begin, of its tensors in all of their layouts."""
    found: dict[str, list[dict[str, Any]]] = {entry.name: [] for entry in artifact.manifest.initializers}
    for tensor in artifact.manifest.tensors:
        if tensor.origin is not None and tensor.layout is not None:
            part = None if tensor.part is None else [tensor.part.dim, tensor.part.start, tensor.part.stop]
            found[tensor.origin].append({"part": part, "layout": [to_json(dim) for dim in tensor.layout]})
    for entry in artifact.manifest.initializers:  # an alias is laid out as the tensors that it names
        if entry.stored:
            origin = artifact.tensors[entry.stored[0]].origin
            found[entry.name] = found[origin or entry.name]
    return {name: sorted(tensors, key=_place) for name, tensors in found.items()}


def _place(tensor: Mapping[str, Any]) -> tuple[list[int], str]:
    return tensor["part"] or [], str(tensor["layout"])


def _weights(a: Artifact, b: Artifact, sources: tuple[onnx.ModelProto, onnx.ModelProto]) -> WeightsDiff:
    one, other = _Originals.of(a, sources[0]), _Originals.of(b, sources[1])
    changed = []
    for name in (name for name in one.entries if name in other.entries):
        kinds = one.kind(name), other.kind(name)
        if kinds[0] != kinds[1]:
            changed.append(unlike(name, *kinds))
        elif one.digest(name) != other.digest(name):
            changed.append(difference(name, kinds[0], one.data(name), other.data(name)))
    return WeightsDiff(
        added=tuple(name for name in other.entries if name not in one.entries),
        removed=tuple(name for name in one.entries if name not in other.entries),
        changed=tuple(changed),
        made=_made(a, b),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Originals:
    """The original initializers of an artifact, stored or in source.onnx."""

    artifact: Artifact
    entries: Mapping[str, OriginalInitializer]
    inline: Mapping[str, onnx.TensorProto]

    @staticmethod
    def of(artifact: Artifact, source: onnx.ModelProto) -> _Originals:
        return _Originals(
            artifact=artifact,
            entries={entry.name: entry for entry in artifact.manifest.initializers},
            inline={proto.name: proto for proto in source.graph.initializer},
        )

    def kind(self, name: str) -> Kind:
        """Type and shape."""
        return self.entries[name].dtype, self.entries[name].shape

    def digest(self, name: str) -> str:
        """SHA-256 of the bytes."""
        return self.entries[name].sha256 or hashlib.sha256(self.data(name)).hexdigest()

    def data(self, name: str) -> memoryview:
        """The bytes, packed."""
        if self.entries[name].stored:
            return read_original(self.artifact, name).data
        if name not in self.inline:
            raise ArtifactError(
                f"{SOURCE_NAME}: found no initializer {name!r:.80}, expected one, because manifest.json has an entry "
                f"for it and does not store it; {REBUILD}"
            )
        return memoryview(inline_bytes(self.inline[name]))


def _made(a: Artifact, b: Artifact) -> tuple[str, ...]:
    if a.manifest.mesh != b.manifest.mesh:
        return ()

    def cut(tensor: StoredTensor) -> tuple[object, ...]:
        return tensor.dtype, tensor.local_shape, tensor.shard_axes, tensor.layout, tensor.origin

    return tuple(
        name
        for name, tensor in a.tensors.items()
        if tensor.origin is None
        and name in b.tensors
        and cut(b.tensors[name]) == cut(tensor)
        and b.tensors[name].sha256 != tensor.sha256
    )
