"""Write the files of an artifact besides the weights: the program, the source's graph, the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from furiosa_llm.builder.errors import OutputError
from furiosa_llm.builder.source.load import Source
from furiosa_llm.builder.source.tensors import load_in_place, read_packed
from furiosa_llm.builder.write.closures import open_closures
from furiosa_llm.builder.write.streaming import FilePosition
from furiosa_llm.runtime.artifact.files import sync
from furiosa_llm.runtime.artifact.graphs import all_tensors
from furiosa_llm.runtime.artifact.manifest import MANIFEST_NAME, MAX_MANIFEST_NBYTES, FileEntry, Manifest
from furiosa_llm.runtime.artifact.units import nbytes as shown

_DATA_FIELDS = (
    *("raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data", "external_data"),
    "data_location",
)
"""The fields of TensorProto that may hold its elements."""


def write_bytes(folder: Path, name: str, data: bytes) -> FileEntry:
    """Write one small file."""
    (folder / name).write_bytes(data)
    return FileEntry(path=name, nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, the last file; everything is on disk when this returns."""
    data = manifest.to_bytes()
    if len(data) > MAX_MANIFEST_NBYTES:
        raise OutputError(
            f"the manifest would take {shown(len(data))}, expected at most {shown(MAX_MANIFEST_NBYTES)}: the model has "
            f"{len(manifest.initializers)} initializers; export it with fewer, larger ones."
        )
    (folder / MANIFEST_NAME).write_bytes(data)
    for file in (*folder.iterdir(), folder):
        sync(file)


def program_proto(
    graph: ir.Graph,
    placements: Mapping[str, FilePosition],
    shapes: Mapping[str, tuple[ir.DataType, tuple[int | str | None, ...]]],
    ir_version: int,
) -> onnx.ModelProto:
    """program.onnx: external initializers at the windows of shard 0, `shapes` on inputs, outputs and in value_info."""
    proto = ir.to_proto(ir.Model(graph, ir_version=ir_version))
    open_closures(proto)
    for initializer in proto.graph.initializer:
        placement = placements.get(initializer.name)
        if placement is None:
            continue
        initializer.ClearField("raw_data")
        initializer.data_location = onnx.TensorProto.EXTERNAL
        del initializer.external_data[:]
        _add_external(initializer, location=placement.file, offset=placement.offset, length=placement.nbytes)
    for value in (*proto.graph.input, *proto.graph.output):
        value.CopyFrom(_value_info(value.name, *shapes[value.name]))
    interface = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(_value_info(n, *s) for n, s in shapes.items() if n not in interface)
    return proto


def _add_external(proto: onnx.TensorProto, **entries: object) -> None:
    for key, value in entries.items():
        proto.external_data.add(key=key, value=str(value))


def _value_info(name: str, dtype: ir.DataType, shape: Sequence[int | str | None]) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, int(dtype), list(shape))


def source_proto(source: Source, stored: Container[str]) -> onnx.ModelProto:
    """source.onnx: the original model; `stored` initializers have no data, all others have theirs as `raw_data`.

    How the source held an initializer (inline or external, in which field) makes no difference to the result.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(source.proto)
    originals = source.model.graph.initializers
    for initializer in proto.graph.initializer:
        if initializer.name in stored:
            _clear_data(initializer)
            initializer.data_location = onnx.TensorProto.EXTERNAL
            _add_external(initializer, location="artifact")
        elif initializer.data_type != onnx.TensorProto.STRING:
            original = originals[initializer.name].const_value
            assert original is not None
            _clear_data(initializer)
            initializer.raw_data = read_packed(original).tobytes()
    for tensor in all_tensors([*proto.graph.node, *(node for f in proto.functions for node in f.node)]):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            load_in_place(tensor, source.path.parent)
    return proto


def _clear_data(tensor: onnx.TensorProto) -> None:
    for field in _DATA_FIELDS:
        tensor.ClearField(field)
