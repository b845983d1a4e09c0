"""Read an ONNX model lazily: the graph is read into memory, the weights stay where they are."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from furiosa_llm.builder.errors import ModelLoadError
from furiosa_llm.builder.source.external_data import bind_external_data, check_regions
from furiosa_llm.builder.source.fixed_inputs import fix_inputs
from furiosa_llm.builder.source.folder import find_model
from furiosa_llm.builder.source.guard import SourceGuard
from furiosa_llm.builder.source.protobuf_scan import Lean, read_lean
from furiosa_llm.builder.source.validate import drop_fallbacks, validate
from furiosa_llm.runtime.artifact.adapters.graph import add_adapter_inputs

_MOST_DIGITS = 18
"""Of a size that 64 bits hold."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model file as it was read."""

    path: Path
    """The file itself; its folder is where external data, the tokenizer and the configuration are looked for."""
    model: ir.Model
    """The graph. Tensors with external data, and large ones in the file itself, are `SourceTensor`s, read at access."""
    proto: onnx.ModelProto
    """The file's content; large initializers refer to their bytes in the file as external data. Not to be changed."""
    sha256: str = ""
    """Digest of the bytes of the file that were read: of the whole file if all its large initializers are external,
    else without their data. Empty for a model that comes from no file."""
    guard: SourceGuard = dataclasses.field(default_factory=SourceGuard)
    """Remembers the model's files as they were."""


def load(
    path: str | os.PathLike[str],
    fixed: Mapping[str, int] = MappingProxyType({}),
    lora_modules: Sequence[str] = (),
) -> Source:
    """The model at `path`, or in the folder `path`, without its weights; raises ModelLoadError for anything else.

    The inputs that `fixed` names become initializers of the given values, and `lora_modules` get inputs for adapters;
    raises AdapterError if one of them has no product of its own.
    """
    file = find_model(Path(path))
    if not file.exists():
        raise ModelLoadError(f"{file} does not exist; give the path of an .onnx file.")
    if not file.is_file():
        raise ModelLoadError(f"{file} is a pipe, socket or device, expected an ONNX file; save the model as a file.")
    guard = SourceGuard()
    guard.remember([file])
    lean = _read(file)
    drop_fallbacks(lean.proto)
    _read_sizes(lean.proto)
    validate(lean.proto, file.name, lean.left_out)
    fix_inputs(lean.proto, fixed, file.name)
    add_adapter_inputs(lean.proto, lora_modules)
    try:
        model = ir.from_proto(lean.proto)
    except ir.serde.SerdeError as error:
        raise ModelLoadError(
            f"{file.name} is not a valid graph: {root_cause(error)}; the file is damaged, export the model again."
        ) from error
    left_out = {lean.proto.graph.initializer[index].name for index in lean.left_out}
    guard.remember(bind_external_data(model, file, left_out))
    return Source(path=file, model=model, proto=lean.proto, sha256=lean.sha256, guard=guard)


def _read(file: Path) -> Lean:
    try:
        lean = read_lean(file)
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read: {error.strerror}; check the rights of the file.") from error
    except (DecodeError, ValueError) as error:
        raise ModelLoadError(
            f"{file} is not an ONNX model: {error}. Expected the protobuf file that an exporter writes; "
            "if it was downloaded, check that the download is complete and not a pointer to large-file storage."
        ) from error
    if not lean.proto.graph.node and not lean.proto.graph.output:
        raise ModelLoadError(
            f"{file} is not an ONNX model: it has no nodes and no outputs ({file.stat().st_size} bytes); "
            "check that the download is complete and not a pointer to large-file storage."
        )
    return lean


def _read_sizes(model: onnx.ModelProto) -> None:
    """A dimension whose symbol is a number has that size: exporters write "2" for a size that came with a symbol."""
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param.isdecimal() and len(dim.dim_param) <= _MOST_DIGITS:
                dim.dim_value = int(dim.dim_param)


def root_cause(error: BaseException) -> str:
    """The first line of the error at the end of the chain of causes, without a full stop."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(".")


def check_external_data(source: Source) -> None:
    """Raise ModelLoadError unless every external tensor lies inside a file that exists; see `check_regions`."""
    check_regions(source.model, source.path)
