"""Read an ONNX model lazily: the graph into memory, the weights left where they are."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from furiosa_llm.builder.errors import ModelLoadError
from furiosa_llm.builder.validate import validate

_LONGEST_LOCATION, _LONGEST_NAME = 4000, 255
"""Of paths, and of one name in them, on the file systems in use."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model file as it was found."""

    path: Path
    """The file itself; its folder is where external data, the tokenizer and the configuration are looked for."""
    model: ir.Model
    """The graph; initializers with external data are memory maps that nobody has opened yet."""


def load(path: str | os.PathLike[str]) -> Source:
    """The model at `path`, without its weights; raises ModelLoadError for anything that is not an ONNX model."""
    file = Path(path)
    if file.is_dir():
        candidates = sorted(p.name for p in file.glob("*.onnx"))
        hint = f"; it holds {', '.join(candidates)}: name one of them" if candidates else "; it holds no .onnx file"
        raise ModelLoadError(f"{file} is a folder, expected an ONNX file{hint}.")
    if not file.is_file():
        raise ModelLoadError(f"{file} does not exist; give the path of an .onnx file.")
    proto = _read(file)
    validate(proto, file.name)
    try:
        model = ir.from_proto(proto)
    except ir.serde.SerdeError as error:
        raise ModelLoadError(
            f"{file.name} is not a valid graph: {root_cause(error)}; the file is damaged, export the model again."
        ) from error
    ir.external_data.set_base_dir(model.graph, file.parent)
    return Source(path=file, model=model)


def _read(file: Path) -> onnx.ModelProto:
    try:
        proto = onnx.load(file, load_external_data=False)
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read: {error.strerror}; check the rights of the file.") from error
    except (DecodeError, ValueError) as error:
        raise ModelLoadError(
            f"{file} is not an ONNX model: {error}. Expected the protobuf file that an exporter writes; "
            "if it was downloaded, check that the download is complete and not a pointer to large-file storage."
        ) from error
    if not proto.graph.node and not proto.graph.output:
        raise ModelLoadError(
            f"{file} is not an ONNX model: it has no nodes and no outputs ({file.stat().st_size} bytes); "
            "check that the download is complete and not a pointer to large-file storage."
        )
    return proto


def root_cause(error: BaseException) -> str:
    """The first line of the error that others were raised from, without a full stop."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(".")


def check_external_data(source: Source) -> None:
    """Raise ModelLoadError unless every external tensor lies inside a file inside the model's folder."""
    folder = source.path.resolve().parent
    for what, tensor in _tensors(source.model):
        if isinstance(tensor, ir.ExternalTensor):
            _check_external(f"{what} of {source.path.name}", tensor, folder)


def _tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Every tensor of the model, in branches and functions too."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield f'initializer "{value.name}"', value.const_value
    roots: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for root in roots:
        for node in ir.traversal.RecursiveGraphIterator(root):
            for attribute in node.attributes.values():
                if attribute.type is ir.AttributeType.TENSOR:
                    yield f'attribute {attribute.name} of node "{node.name}"', attribute.as_tensor()


def _check_external(what: str, tensor: ir.ExternalTensor, folder: Path) -> None:
    location = Path(tensor.location)
    if len(str(location)) > _LONGEST_LOCATION or any(len(part) > _LONGEST_NAME for part in location.parts):
        raise ModelLoadError(
            f'{what} has its data in "{location!s:.40}...", a name that no file can have; export the model again.'
        )
    target = Path(os.path.normpath(folder / location))
    if location.is_absolute() or not target.is_relative_to(folder) or not target.resolve().is_relative_to(folder):
        raise ModelLoadError(
            f'{what} has its data in "{location}", outside the model\'s folder; '
            "external data must lie in the folder of the .onnx file or below it: move the file there and export again."
        )
    if not target.is_file():
        raise ModelLoadError(
            f'{what} has its data in "{location}", which is missing; put that file into {folder} '
            "(exporters write it next to the model, it must be copied along)."
        )
    expected = tensor.nbytes
    length = tensor.length if tensor.length is not None else expected
    if length != expected:
        raise ModelLoadError(
            f"{what} says its data is {length} bytes long, but {tensor.dtype} {list(tensor.shape)} takes {expected}; "
            "the model is damaged, export it again."
        )
    end = (tensor.offset or 0) + expected
    size = target.stat().st_size
    if end > size:
        raise ModelLoadError(
            f'{what} ends at byte {end} of "{location}", which has {size} bytes; the file is incomplete, copy it again.'
        )
