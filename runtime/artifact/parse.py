"""The strict reader of manifest.json: types, ranges and names first, then what must agree within the manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

from furiosa_llm.runtime.artifact.checks.coverage import check_coverage, fault_of
from furiosa_llm.runtime.artifact.checks.parse import check_references
from furiosa_llm.runtime.artifact.dimensions import Shape, parse_dimension
from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.errors import ArtifactError, LayoutError
from furiosa_llm.runtime.artifact.json_reader import REBUILD, Field, check_unique, parse_json
from furiosa_llm.runtime.artifact.layout import Dim, Mesh, axes_of, from_json, global_size, local_size
from furiosa_llm.runtime.artifact.manifest import (
    COMPOSITE_FORMAT_NAME,
    DIGEST_PREFIX,
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    MAX_MANIFEST_NBYTES,
    RECORD_NAME,
    SIGNATURE_NAME,
    Block,
    Collective,
    CollectiveKind,
    FileEntry,
    InputInfo,
    InputRole,
    Manifest,
    ModelInfo,
    OriginalInitializer,
    OutputInfo,
    OutputRole,
    Part,
    Provenance,
    State,
    StateMode,
    StoredTensor,
    Task,
    manifest_digest,
)

_SECTIONS = (
    *("digest", "format", "provenance", "model", "mesh", "files", "tensors", "initializers"),
    *("inputs", "outputs", "states", "collectives", "blocks", "plan"),
)
_RESERVED = (MANIFEST_NAME, RECORD_NAME, SIGNATURE_NAME)
_MAX_RANKS = 4096
MAX_EOS_TOKENS = 1024
_MAX_MESH_AXES = 12
_MAX_DIMS = 64
"""numpy's limit."""
_MAX_NBYTES = 2**62
_HEX_DIGITS = frozenset("0123456789abcdef")


def parse_manifest(data: bytes) -> Manifest:
    """The manifest in `data`, the bytes of manifest.json.

    Raises ArtifactError, naming the JSON path, what was found and what was expected, for another format or version,
    unknown, missing or repeated keys, wrong types, numbers out of range, repeated names, paths that leave the folder,
    and references to what is not there.
    """
    if len(data) > MAX_MANIFEST_NBYTES:
        raise ArtifactError(
            f"{MANIFEST_NAME} is {len(data)} bytes long, expected at most {MAX_MANIFEST_NBYTES}; {REBUILD}"
        )
    root = parse_json(data, MANIFEST_NAME)
    _check_format(root)
    section = root.members(_SECTIONS)
    check_digest(section["digest"], data)
    mesh = _mesh(section["mesh"])
    manifest = Manifest(
        provenance=_provenance(section["provenance"]),
        model=_model(section["model"]),
        mesh=mesh,
        files=section["files"].items(_file),
        tensors=section["tensors"].items(lambda field: _tensor(field, mesh)),
        initializers=section["initializers"].items(_initializer),
        inputs=section["inputs"].items(lambda field: InputInfo(**_value(field, mesh, get_args(InputRole)))),
        outputs=section["outputs"].items(lambda field: OutputInfo(**_value(field, mesh, get_args(OutputRole)))),
        states=section["states"].items(_state),
        collectives=section["collectives"].items(lambda field: _collective(field, mesh)),
        blocks=section["blocks"].items(_block),
        plan=section["plan"].mapping(),
    )
    _check_names(section, manifest)
    check_references(section, manifest)
    check_coverage(section, manifest)
    return manifest


def _check_format(root: Field) -> None:
    if not isinstance(root.value, dict) or "format" not in root.value:
        root.fail(f"an object with the key 'format' (this is how a {FORMAT_NAME} artifact says what it is)")
    members = root.child("format").members(("name", "version"))
    name, version = members["name"].text(), members["version"].integer()
    if name == COMPOSITE_FORMAT_NAME:
        raise ArtifactError(
            "this is a composite artifact, an encoder with its decoder, where one of a single model is expected; give "
            "the folder of one of its parts, `encoder` or `decoder`: each is an artifact of its own"
        )
    if name != FORMAT_NAME or version != FORMAT_VERSION:
        raise ArtifactError(
            f"manifest.json is of format {name!r:.80} version {version}; this release reads {FORMAT_NAME!r} version "
            f"{FORMAT_VERSION}; {REBUILD} of this release, or install the release that made it"
        )


def check_digest(field: Field, data: bytes) -> None:
    """Raises ArtifactError unless `field`, a manifest's first member, is the digest of its bytes `data`."""
    declared, expected = digest_of(field), manifest_digest(data)
    if not data.startswith(DIGEST_PREFIX + declared.encode()):
        field.fail("the digest as the first member, as docs/artifact-format.md spells it", "it elsewhere")
    if declared != expected:
        raise ArtifactError(
            f"{MANIFEST_NAME} was altered: its digest is {expected[:16]}..., it says {declared[:16]}...; copy the "
            f"artifact again or {REBUILD}"
        )


def _provenance(field: Field) -> Provenance:
    member = field.members(("tool", "libraries", "options", "source_sha256"))
    libraries = member["libraries"].mapping()
    return Provenance(
        tool=member["tool"].text(),
        libraries={name: member["libraries"].child(name).text() for name in libraries},
        options=member["options"].mapping(),
        source_sha256=digest_of(member["source_sha256"]),
    )


def _model(field: Field) -> ModelInfo:
    member = field.members(("name", "task", "max_sequence_length", "vocab_size", "eos_token_ids"))
    task: Task = member["task"].choice(get_args(Task))  # type: ignore[assignment]  # `choice` gives one of them
    return ModelInfo(
        name=member["name"].text(),
        task=task,
        max_sequence_length=member["max_sequence_length"].optional(_positive),
        vocab_size=member["vocab_size"].optional(_positive),
        eos_token_ids=member["eos_token_ids"].items(Field.integer, most=MAX_EOS_TOKENS),
    )


def _mesh(field: Field) -> Mesh:
    shape = field.members(("shape",))["shape"]
    mesh = Mesh(shape.items(_positive, most=_MAX_MESH_AXES))
    if not mesh.shape or mesh.size > _MAX_RANKS:
        shape.fail(f"a list of at least one length whose product is at most {_MAX_RANKS}", f"{list(mesh.shape)}")
    return mesh


def _file(field: Field) -> FileEntry:
    member = field.members(("path", "nbytes", "sha256"))
    path = member["path"].text()
    if path in ("", ".", "..", *_RESERVED) or any(separator in path for separator in "/\\\0:"):
        member["path"].fail(f"a plain file name other than {', '.join(_RESERVED)}, without separators")
    return FileEntry(path=path, nbytes=member["nbytes"].integer(), sha256=digest_of(member["sha256"]))


def _tensor(field: Field, mesh: Mesh) -> StoredTensor:
    member = field.members(("name", "file", "dtype", "local_shape", "shard_axes", "layout", "part", "origin", "sha256"))
    tensor = StoredTensor(
        name=member["name"].name(),
        file=member["file"].text(),
        dtype=member["dtype"].choice(tuple(DTYPES)),
        local_shape=member["local_shape"].items(Field.integer, most=_MAX_DIMS),
        shard_axes=_axes(member["shard_axes"], mesh),
        layout=member["layout"].optional(lambda dims: dims.items(lambda dim: _dim(dim, mesh), most=_MAX_DIMS)),
        part=member["part"].optional(_part),
        origin=member["origin"].optional(Field.name),
        sha256=digest_of(member["sha256"]),
    )
    if tensor.local_nbytes * mesh.parts(tensor.shard_axes) >= _MAX_NBYTES:
        member["local_shape"].fail("a shape of fewer than 2**62 bytes", f"{list(tensor.local_shape)}")
    if tensor.part is not None and tensor.origin is None:
        member["part"].fail("null, because the tensor has no origin")
    if tensor.layout is None:
        if tensor.origin is not None:
            member["layout"].fail("a layout for each dimension, because the tensor has an origin")
        return tensor
    local_shape = tuple(local_size(dim, mesh) for dim in tensor.layout)
    if local_shape != tensor.local_shape:
        member["local_shape"].fail(f"{list(local_shape)}, the local shape of its layout", f"{list(tensor.local_shape)}")
    return tensor


def _part(field: Field) -> Part:
    member = field.members(("dim", "start", "stop"))
    part = Part(dim=member["dim"].integer(), start=member["start"].integer(), stop=member["stop"].integer())
    if part.start >= part.stop:
        member["stop"].fail(f"more than start, {part.start}", f"{part.stop}")
    return part


def _initializer(field: Field) -> OriginalInitializer:
    member = field.members(("name", "dtype", "shape", "stored", "sha256"))
    original = OriginalInitializer(
        name=member["name"].name(),
        dtype=member["dtype"].choice((*DTYPES, "STRING", "COMPLEX64", "COMPLEX128")),
        shape=member["shape"].items(Field.integer, most=_MAX_DIMS),
        stored=member["stored"].items(Field.name),
        sha256=member["sha256"].optional(digest_of),
    )
    if (original.sha256 is None) != (not original.stored):
        member["sha256"].fail("a digest if $.stored names tensors, null if it names none")
    return original


def _value(field: Field, mesh: Mesh, roles: Sequence[str]) -> dict[str, Any]:
    member = field.members(("name", "dtype", "shape", "layout", "role"))
    shape = member["shape"].items(_shape_dim, most=_MAX_DIMS)
    layout = member["layout"].items(lambda dim: dim.optional(lambda known: _dim(known, mesh)), most=_MAX_DIMS)
    if len(shape) != len(layout):
        member["layout"].fail(f"{len(shape)} layouts, one for each dimension", f"{len(layout)} of them")
    role = member["role"].choice(roles)
    for index, (size, dim) in enumerate(zip(shape, layout, strict=True)):
        where = member["layout"].child(index)
        if (dim is None) != isinstance(size, str):
            where.fail("null for a dynamic dimension and a layout for every other")
        if dim is not None and global_size(dim) != size:
            where.fail(f"a layout of {size} indices", f"one of {global_size(dim)}")
        fault = None if dim is None else fault_of(dim, once=False)
        if fault is not None:
            where.fail("a layout with each index on some rank", f"one in which {fault}")
        if dim is not None and axes_of(dim) and role != "state":
            where.fail("a layout that is not split, because only states may be split")
    dtype = member["dtype"].choice(tuple(DTYPES))
    return {"name": member["name"].name(), "dtype": dtype, "shape": shape, "layout": layout, "role": role}


def _state(field: Field) -> State:
    member = field.members(("input", "output", "sequence_dim", "mode"), ("batch_dim",))
    mode: StateMode = member["mode"].choice(get_args(StateMode))  # type: ignore[assignment]  # `choice` gives one of them
    return State(
        input=member["input"].name(),
        output=member["output"].name(),
        sequence_dim=member["sequence_dim"].optional(lambda f: f.integer()),
        mode=mode,
        batch_dim=member["batch_dim"].optional(lambda f: f.integer()),
    )


def _collective(field: Field, mesh: Mesh) -> Collective:
    member = field.members(("id", "kind", "axes", "dim", "dtype", "shape"))
    kind: CollectiveKind = member["kind"].choice(get_args(CollectiveKind))  # type: ignore[assignment]
    shape: Shape = member["shape"].items(_shape_dim, most=_MAX_DIMS)
    axes = _axes(member["axes"], mesh)
    if not axes:
        member["axes"].fail("at least one mesh axis")
    dim = member["dim"].optional(Field.integer)
    if kind == "AllReduce" and dim is not None:
        member["dim"].fail("null, because an AllReduce has no dimension")
    if kind == "AllGather" and (dim is None or dim >= len(shape)):
        member["dim"].fail(f"a dimension below {len(shape)}")
    dtype = member["dtype"].choice(tuple(DTYPES))
    return Collective(id=member["id"].name(), kind=kind, axes=axes, dim=dim, dtype=dtype, shape=shape)


def _block(field: Field) -> Block:
    member = field.members(("name", "first_node", "collectives", "weight_nbytes", "crossing"))
    return Block(
        name=member["name"].text(),
        first_node=member["first_node"].integer(),
        collectives=member["collectives"].integer(),
        weight_nbytes=member["weight_nbytes"].integer(),
        crossing=member["crossing"].items(Field.name),
    )


def _dim(field: Field, mesh: Mesh) -> Dim:
    try:
        return from_json(field.value, mesh)
    except LayoutError as error:
        raise ArtifactError(f"{field.path}: {error}; {REBUILD}") from error


def _axes(field: Field, mesh: Mesh) -> tuple[int, ...]:
    axes = field.items(Field.integer)
    if len(set(axes)) != len(axes) or any(axis >= len(mesh.shape) for axis in axes):
        field.fail(f"distinct mesh axes below {len(mesh.shape)}", f"{list(axes)}")
    return axes


def _shape_dim(field: Field) -> int | str:
    if not isinstance(field.value, str):
        return field.integer()
    try:
        parse_dimension(field.value)
    except ArtifactError as error:
        raise ArtifactError(f"{field.path}: {error}; {REBUILD}") from error
    return field.value


def _positive(field: Field) -> int:
    return field.integer(minimum=1)


def digest_of(field: Field) -> str:
    """The 64 lower-case hexadecimal digits of a digest."""
    digest = field.text()
    if len(digest) != 64 or not _HEX_DIGITS.issuperset(digest):
        field.fail("64 lower-case hexadecimal digits")
    return digest


def _check_names(section: dict[str, Field], manifest: Manifest) -> None:
    unique: tuple[tuple[str, Sequence[Any], Callable[[Any], str], str], ...] = (
        ("files", manifest.files, lambda entry: entry.path, "a path"),
        ("tensors", manifest.tensors, lambda entry: entry.name, "a name"),
        ("initializers", manifest.initializers, lambda entry: entry.name, "a name"),
        ("inputs", manifest.inputs, lambda entry: entry.name, "a name"),
        ("outputs", manifest.outputs, lambda entry: entry.name, "a name"),
        ("states", manifest.states, lambda entry: entry.input, "an input"),
        ("states", manifest.states, lambda entry: entry.output, "an output"),
        ("collectives", manifest.collectives, lambda entry: entry.id, "an id"),
        ("blocks", manifest.blocks, lambda entry: entry.name, "a name"),
    )
    for key, entries, name_of, what in unique:
        check_unique(section[key], [name_of(entry) for entry in entries], what)
    paths = [entry.path for entry in manifest.files]
    if paths != sorted(paths):
        section["files"].fail("the files sorted by path", f"{paths!r:.80}")
