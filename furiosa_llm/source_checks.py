"""Whether program and manifest are what this release makes of source.onnx, and source.onnx the model given.

`check_lowering`: source.onnx is rewritten and lowered again, with the options and the plan that the artifact records;
weights are not written, and only those are read that the rewriting asks for. What the artifact has besides, has not, or
has otherwise is named: a node that comes from no node of the source and from nothing that the lowering adds, a constant
of other bits, a state that is another's, a limit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import onnx
import onnx_ir as ir

from furiosa_llm.builder.errors import BuildError, ModelLoadError
from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.program_builder import ShardedTensor
from furiosa_llm.builder.lower.program_shapes import program_shapes
from furiosa_llm.builder.options import recorded_options
from furiosa_llm.builder.pipeline import Assembly
from furiosa_llm.builder.source.companions import COMPANIONS, companions
from furiosa_llm.builder.source.from_artifact import load_with_weights, source_of
from furiosa_llm.builder.source.identity import check_identity
from furiosa_llm.builder.source.load import Source, root_cause
from furiosa_llm.builder.source.validate import validate
from furiosa_llm.builder.write.artifact import model_info, tool
from furiosa_llm.builder.write.manifest import manifest_of
from furiosa_llm.builder.write.onnx_files import program_proto, source_proto
from furiosa_llm.builder.write.report import plan_json
from furiosa_llm.builder.write.shards import cut_shard, num_shards
from furiosa_llm.builder.write.streaming import FilePosition, WrittenWeights
from furiosa_llm.runtime.artifact.composite_manifest import CompositeManifest
from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.graphs import attribute_graphs
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.manifest import SOURCE_NAME, Manifest, adapted_modules, fixed_inputs
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.artifact.source import read_source
from furiosa_llm.runtime.artifact.tools.record import Check

_NONE = "nothing"
_SHOWN = 120
_MOST_FAULTS = 50


def check_lowering(artifact: Artifact) -> Check:
    """Lowers source.onnx again and compares; a source that cannot be lowered is a fault, too."""
    checked = len(artifact.program.graph.node)
    try:
        build = _lowered(artifact)
    except (ArtifactError, BuildError) as error:
        line = " ".join(str(error).split()).replace(f"{artifact.folder}/", "")
        return Check(name="lowering", checked=checked, faults=(f"{SOURCE_NAME} cannot be lowered again: {line}",))
    options = recorded_options(artifact.manifest.provenance.options)
    weights = _weights(artifact, build)
    shapes = program_shapes(build)
    program = program_proto(build.lowered.graph, weights.placements, shapes, build.ir_version)
    manifest = manifest_of(
        build,
        info=model_info(build, artifact.manifest.model.name, options.max_seq_len_to_capture),
        provenance=artifact.manifest.provenance,
        weights=weights,
        shapes=shapes,
        files=artifact.manifest.files,
        plan=_plan(artifact.manifest.plan, build),
    )
    faults = [*_program_faults(artifact.program, program), *manifest_faults(artifact.manifest, manifest)]
    made, ours = artifact.manifest.provenance.tool, tool()
    if faults and made != ours:
        faults.insert(0, f"made by {made!r:.{_SHOWN}}, not by {ours}, which may lower otherwise; verify it with that")
    if len(faults) > _MOST_FAULTS:
        faults[_MOST_FAULTS:] = [f"and {len(faults) - _MOST_FAULTS} more"]
    return Check(name="lowering", checked=checked, faults=tuple(faults))


def _lowered(artifact: Artifact) -> Build:
    assembly = Assembly(
        options=recorded_options(artifact.manifest.provenance.options),
        name=artifact.manifest.model.name,
        load=lambda: _validated(artifact),
        check=lambda *_: None,
        plan=artifact.manifest.plan,
    )
    return assembly.lowered()


def _validated(artifact: Artifact) -> Source:
    """The source, its graph checked as that of a model file is before anything is made of it."""
    validate(read_source(artifact), SOURCE_NAME, {})
    try:
        return source_of(artifact)
    except ir.serde.SerdeError as error:
        raise ModelLoadError(f"it is not a valid graph: {root_cause(error)}") from error


def _plan(recorded: Mapping[str, Any], build: Build) -> Mapping[str, Any]:
    """What a manifest says of the plan that was followed; what was refused, and the order of choices, a search says."""
    made = json.loads(json.dumps(plan_json(build)))
    made["refused"] = recorded.get("refused")
    choices = recorded.get("choices")
    if isinstance(choices, list) and sorted(map(json.dumps, choices)) == sorted(map(json.dumps, made["choices"])):
        made["choices"] = choices
    return cast(Mapping[str, Any], made)


def _weights(artifact: Artifact, build: Build) -> WrittenWeights:
    """The weights as if they had been written: in the artifact's places, those that the builder makes with own digests.

    A tensor of an original has the artifact's digest: `check_originals` says whether its shards are the original's.
    """
    placements = {}
    for tensor in build.tensors():
        known = artifact.tensors.get(tensor.name)
        placements[tensor.name] = FilePosition(
            file=_NONE if known is None else known.file,
            offset=artifact.offsets.get(tensor.name, 0),
            nbytes=DTYPES[tensor.dtype.name].nbytes(tensor.local_shape),
            sha256=_NONE if known is None else known.sha256,
        )
        if tensor.source is None and known is not None:
            placements[tensor.name] = _made(placements[tensor.name], tensor, build.plan.mesh)
    digests = {entry.name: entry.sha256 or _NONE for entry in artifact.manifest.initializers}
    originals = build.source.model.graph.initializers.items()
    return WrittenWeights(
        placements=placements,
        files=(),
        source_digests={id(value.const_value): digests.get(name, _NONE) for name, value in originals},
    )


def _made(placement: FilePosition, tensor: ShardedTensor, mesh: Mesh) -> FilePosition:
    digest = hashlib.sha256()
    for position in range(num_shards(tensor, mesh)):
        for piece in cut_shard(tensor, None, mesh, position):
            digest.update(piece.tobytes())
    return FilePosition(placement.file, placement.offset, placement.nbytes, digest.hexdigest())


def check_given(artifact: Artifact, model: str | os.PathLike[str]) -> Check:
    """`check_identity`, that source.onnx has the graph of the ONNX file `model`, and the files beside that.

    Raises ModelLoadError if the file is not a model, or its weights are not where it says.
    """
    identity = check_identity(artifact, model)
    stored = {entry.name for entry in artifact.manifest.initializers if entry.stored}
    manifest = artifact.manifest
    source = load_with_weights(Path(model), fixed_inputs(manifest), adapted_modules(manifest))
    given, ours = source_proto(source, stored), read_source(artifact)
    found = (*_given_faults(ours, given), *_companion_faults(manifest, Path(model)))
    return dataclasses.replace(identity, faults=(*identity.faults, *found))


def _given_faults(found: onnx.ModelProto, expected: onnx.ModelProto) -> Iterator[str]:
    pairs = itertools.zip_longest(found.graph.node, expected.graph.node)
    different = [(one, other) for one, other in pairs if one != other]
    if different:
        ours, theirs = (_NONE if node is None else _shown(node) for node in different[0])
        yield f"{len(different)} nodes of {SOURCE_NAME} are not the model's; the first is {ours}, in the model {theirs}"
    for what in ("functions", "opset_import"):
        if getattr(found, what) != getattr(expected, what):
            yield f"{SOURCE_NAME} has other {what} than the model"
    for what in ("input", "output", "sparse_initializer"):
        if getattr(found.graph, what) != getattr(expected.graph, what):
            yield f"the graph of {SOURCE_NAME} has another {what} than the model's"


def _companion_faults(manifest: Manifest, model: Path) -> Iterator[str]:
    """Whether tokenizer, chat template and configuration, which say how the model is asked, are those beside it.

    Beside a file that lies alone there is nothing to compare with.
    """
    listed = {entry.path: entry.sha256 for entry in manifest.files}
    beside = {path.name: path for path in companions(model)}
    for name in sorted(listed.keys() & set(COMPANIONS) - beside.keys()) if beside else ():
        yield f"{name} is in the artifact, and there is none beside the model"
    for path in beside.values():
        try:
            with path.open("rb") as file:
                expected = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ModelLoadError(f"{path} cannot be read: {error.strerror}; it goes with the model.") from error
        if (found := listed.get(path.name)) != expected:
            is_there = "is not the one" if found else "is not there, and one is"
            yield f"{path.name} {is_there} beside the model"


# -- the program ---------------------------------------------------------------------------------------------------


def _program_faults(found: onnx.ModelProto, expected: onnx.ModelProto) -> Iterator[str]:
    yield from _Trace(found, expected).faults()
    for what in ("initializer", "input", "output", "value_info"):
        yield from _entry_faults(what, getattr(found.graph, what), getattr(expected.graph, what))
    rest, wanted = _rest(found), _rest(expected)
    for field in sorted({f.name for f, _ in (*rest.ListFields(), *wanted.ListFields())}):
        if getattr(rest, field) != getattr(wanted, field):
            yield f"program.onnx has another {field} than the lowering of {SOURCE_NAME}"


class _Trace:
    """Finds for each node of a program the node of the expected one that computes the same, whatever it is called.

    `_image` maps what was traced to the expected program's values. What a foreign node writes stands for the value of
    that name, so that those behind it are traced all the same.
    """

    def __init__(self, found: onnx.ModelProto, expected: onnx.ModelProto) -> None:
        self._found = found.graph
        self._expected = expected.graph
        self._image: dict[str, str] = {}
        self._places: dict[bytes, list[int]] = {}
        for place, node in enumerate(expected.graph.node):
            self._places.setdefault(_key(node, {}), []).append(place)
        self._named = {name: place for place, node in enumerate(expected.graph.node) for name in node.output if name}

    def faults(self) -> Iterator[str]:
        """Nodes that are foreign, then those that are missing, then outputs that are another value."""
        traced: dict[int, None] = {}
        replaced: set[int] = set()
        for node in self._found.node:
            places = self._places.get(_key(node, self._image), [])
            place = next((one for one in places if one not in traced), places[0] if places else None)
            if place is None:
                instead = self._named.get(next((name for name in node.output if name), ""))
                yield self._foreign(node, instead)
                replaced.update(() if instead is None else (instead,))
                self._image.update({name: name for name in node.output if name})
            else:
                traced[place] = None
                self._image.update(zip(node.output, self._expected.node[place].output, strict=True))
        for place, node in enumerate(self._expected.node):
            if place not in replaced and place not in traced:
                yield f"{_shown(node)} of the lowered {SOURCE_NAME} is not there"
        for output in self._expected.output:
            if self._image.get(output.name) != output.name:
                value = self._image.get(output.name, _NONE)
                yield f"output {output.name!r:.{_SHOWN}} is the value {value!r:.{_SHOWN}} of the lowered {SOURCE_NAME}"
        if not replaced and list(traced) != sorted(traced):
            yield f"the nodes are in another order than in the lowering of {SOURCE_NAME}"

    def _foreign(self, node: onnx.NodeProto, instead: int | None) -> str:
        if instead is not None and self._expected.node[instead].op_type == node.op_type:
            read = [self._image.get(name, name) for name in node.input]
            difference = _node_difference(node, read, self._expected.node[instead])
            if difference is not None:
                return f"{_shown(node)} {difference}"
        return f"{_shown(node)} comes from no node of {SOURCE_NAME}, and the lowering adds none like it"


def _key(node: onnx.NodeProto, image: Mapping[str, str]) -> bytes:
    """What a node computes, of values that are called as in `image`: everything but its name and its outputs' names."""
    plain = onnx.NodeProto()
    plain.CopyFrom(node)
    for field in ("name", "doc_string", "metadata_props"):
        plain.ClearField(field)
    plain.output[:] = ["x" if name else "" for name in node.output]
    _rename(plain, image, frozenset())
    return bytes(plain.SerializeToString(deterministic=True))


def _rename(node: onnx.NodeProto, image: Mapping[str, str], inner: frozenset[str]) -> None:
    """Calls what a node reads, itself or in the graphs within it, as `image` does; `inner` values keep their names."""
    node.input[:] = [name if name in inner else image.get(name, name) for name in node.input]
    for graph in attribute_graphs(node):
        own = {value.name for value in (*graph.input, *graph.initializer)}
        own |= {name for one in graph.node for name in one.output}
        for one in graph.node:
            _rename(one, image, inner | own)


def _shown(node: onnx.NodeProto) -> str:
    return f'{node.op_type} "{node.name or next(iter(node.output), "")}"'[:_SHOWN]


def _node_difference(found: onnx.NodeProto, read: list[str], expected: onnx.NodeProto) -> str | None:
    """In what a node that reads `read` differs from the one that is expected; None if that is hard to say."""
    for one, other in zip(read, expected.input, strict=False):
        if one != other:
            return f"reads {one!r:.{_SHOWN}}, expected {other!r:.{_SHOWN}}"
    attributes, wanted = ({a.name: a for a in node.attribute} for node in (found, expected))
    for name in sorted(attributes.keys() | wanted.keys()):
        one, other = (_attribute_text(side.get(name)) for side in (attributes, wanted))
        if attributes.get(name) != wanted.get(name):
            return f"has {name} = {one:.{_SHOWN}}, expected {other:.{_SHOWN}}"
    return None


def _attribute_text(attribute: onnx.AttributeProto | None) -> str:
    return _NONE if attribute is None else str(onnx.helper.printable_attribute(attribute))


def _entry_faults(
    what: str,
    found: Sequence[onnx.TensorProto | onnx.ValueInfoProto],
    expected: Sequence[onnx.TensorProto | onnx.ValueInfoProto],
) -> Iterator[str]:
    entries, wanted = ({entry.name: entry for entry in side} for side in (found, expected))
    for name in sorted(entries.keys() - wanted.keys()):
        yield f"{what} {name!r:.{_SHOWN}} is in no lowering of {SOURCE_NAME}"
    for name, other in wanted.items():
        if name not in entries:
            yield f"{what} {name!r:.{_SHOWN}} of the lowered {SOURCE_NAME} is not there"
        elif entries[name] != other:
            yield f"{what} {name!r:.{_SHOWN}} has other contents than in the lowering of {SOURCE_NAME}"


def _rest(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model without what is compared entry by entry."""
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    for what in ("node", "initializer", "input", "output", "value_info"):
        rest.graph.ClearField(what)
    return rest


# -- the manifest --------------------------------------------------------------------------------------------------


def manifest_faults(found: Manifest | CompositeManifest, expected: Manifest | CompositeManifest) -> Iterator[str]:
    """Every member of a manifest that is not as expected."""
    for path, one, other in _differences("$", found.to_json(), expected.to_json()):
        if path != "$.digest":
            yield f"manifest.json {path} is {one!s:.{_SHOWN}}, expected {other!s:.{_SHOWN}}"


def _differences(path: str, found: object, expected: object) -> Iterator[tuple[str, object, object]]:
    """Where two JSON values differ, as deep as both have the same members."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping) and found.keys() == expected.keys():
        for key in found:
            yield from _differences(f"{path}.{key}", found[key], expected[key])
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            yield from _differences(f"{path}[{number}]", one, other)
    elif found != expected:
        yield path, found, expected
