"""External data of a model: find its files, and check that they may be read and that its tensors lie inside them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import onnx_ir as ir

from furiosa_llm.builder.errors import ModelLoadError
from furiosa_llm.builder.source.beside import find_beside
from furiosa_llm.builder.source.tensors import SourceTensor
from furiosa_llm.runtime.artifact.dtypes import DTYPES

_LONGEST_LOCATION, _LONGEST_NAME = 4000, 255
"""The longest path, and the longest name in a path, in bytes, on the file systems in use."""
_DRIVE = re.compile(r"[A-Za-z]:")
_SMALL_NBYTES = 65536
"""Attributes up to this size go into the program as they are."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where a model holds a tensor."""

    what: str
    """The place, for messages."""
    tensor: ir.TensorProtocol
    replace: Callable[[ir.TensorProtocol], None]
    is_attribute: bool = False


def bind_external_data(model: ir.Model, path: Path, left_out: Collection[str] = ()) -> list[Path]:
    """Bind the external tensors of `model`, which was read from `path`, to their files, and return these files.

    `left_out` are the initializers of the main graph whose data is in the model's file itself. Raises ModelLoadError
    for a file that may not be read; absent files are not returned.
    """
    files: dict[Path, None] = {}
    found: dict[str, Path | None] = {}
    own = {id(value.const_value) for name in left_out if (value := model.graph.initializers.get(name)) is not None}
    for place in _places(model):
        tensor = place.tensor
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location = str(tensor.location)
        if id(tensor) not in own:
            if location not in found:
                found[location] = _file_of(f"{place.what} of {path.name}", location, path)
            if (file := found[location]) is not None:
                files[file] = None
        bound = _bound(tensor, path.parent)
        is_value = place.is_attribute and bound.nbytes <= _SMALL_NBYTES and bound.dtype.name in DTYPES
        is_value = is_value and Path(bound.path).is_file()
        place.replace(ir.Tensor(bound.numpy(), dtype=bound.dtype, name=bound.name) if is_value else bound)
    return list(files)


def _bound(tensor: ir.ExternalTensor, folder: Path) -> SourceTensor:
    return SourceTensor(
        str(Path(tensor.location)),
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=str(tensor.name or ""),
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
        base_dir=folder,
    )


def _places(model: ir.Model) -> Iterator[_Place]:
    """Every tensor of the model, also in branches and functions."""
    roots: list[ir.Graph] = [model.graph, *(function.graph for function in model.functions.values())]
    for graph in itertools.chain.from_iterable((root, *root.subgraphs()) for root in roots):
        for value in graph.initializers.values():
            if value.const_value is not None:
                replace = functools.partial(setattr, value, "const_value")
                yield _Place(f'initializer "{value.name}"', value.const_value, replace)
        for node in graph:
            for attribute in list(node.attributes.values()):
                if attribute.type is ir.AttributeType.TENSOR and not attribute.is_ref():
                    what = f'attribute {attribute.name} of node "{node.name}"'
                    put = functools.partial(_put_attribute, node, attribute.name)
                    yield _Place(what, attribute.as_tensor(), put, is_attribute=True)


def _put_attribute(node: ir.Node, name: str, tensor: ir.TensorProtocol) -> None:
    node.attributes[name] = ir.AttrTensor(name, tensor)


# -- where a file may be -------------------------------------------------------------------------------------------


def _file_of(what: str, location: str, model: Path) -> Path | None:
    """The file of a location that the model states; None if the file is absent."""
    parts = Path(location).parts
    name_lengths = [len(os.fsencode(part)) for part in parts]
    if len(os.fsencode(location)) > _LONGEST_LOCATION or any(length > _LONGEST_NAME for length in name_lengths):
        raise ModelLoadError(
            f'{what} has its data in "{location:.40}...", a name that no file can have; export the model again.'
        )
    has = f'{what} has its data in "{location}"'
    if "\\" in location or _DRIVE.match(location):
        raise ModelLoadError(
            f"{has}, a path as Windows writes it, expected one relative to the model with forward slashes; "
            "export the model again, or correct its external data."
        )
    if Path(location).is_absolute() or ".." in parts:
        raise ModelLoadError(
            f'{has}, expected no absolute path and no "..", as they lead outside the model\'s folder; '
            "external data must lie in the folder of the .onnx file or below it: move the file there and export again."
        )
    file = find_beside(model, location, has)
    if file is not None and model.is_file() and file.samefile(model):
        raise ModelLoadError(
            f"{has}, which is the model's file itself, expected a file that holds only data; export the model again."
        )
    return file


# -- where in a file -----------------------------------------------------------------------------------------------


def check_regions(model: ir.Model, path: Path) -> None:
    """Raise ModelLoadError unless every external tensor lies in a file and shares all or none of its bytes with others.

    Tensors of the same bytes, whatever their shapes, are one weight under several names; any other overlap cannot be
    intended.
    """
    regions: dict[tuple[int, int], list[tuple[int, int, str]]] = {}
    sizes: dict[str, tuple[int, tuple[int, int]]] = {}
    for place in _places(model):
        if isinstance(place.tensor, SourceTensor):
            what, location = f"{place.what} of {path.name}", str(place.tensor.location)
            if location not in sizes:
                sizes[location] = _size_of(what, location, path)
            size, identity = sizes[location]
            start, stop = _region(what, place.tensor, size)
            if stop > start:
                regions.setdefault(identity, []).append((start, stop, place.what))
    for found in regions.values():
        _check_overlaps(found, path.name)


def _size_of(what: str, location: str, model: Path) -> tuple[int, tuple[int, int]]:
    """The number of bytes of a file, and what identifies the file under any name."""
    file = find_beside(model, location, f'{what} has its data in "{location}"')
    if file is None:
        raise ModelLoadError(
            f'{what} has its data in "{location}", which is missing; put that file into {model.parent} '
            "(exporters write it next to the model, it must be copied along)."
        )
    status = file.stat()
    return status.st_size, (status.st_dev, status.st_ino)


def _region(what: str, tensor: SourceTensor, size: int) -> tuple[int, int]:
    expected = DTYPES[tensor.dtype.name].nbytes(tensor.shape.numpy())
    length = tensor.length if tensor.length is not None else expected
    if length != expected:
        raise ModelLoadError(
            f"{what} says its data is {length} bytes long, but {tensor.dtype} {list(tensor.shape)} takes {expected}; "
            "the model is damaged, export it again."
        )
    start = tensor.offset or 0
    if start + expected > size:
        raise ModelLoadError(
            f'{what} ends at byte {start + expected} of "{tensor.location}", which has {size} bytes; '
            "the file is incomplete, copy it again."
        )
    return start, start + expected


def _check_overlaps(regions: list[tuple[int, int, str]], name: str) -> None:
    """Refuse regions of one file that share some bytes, but not all."""
    ordered = sorted(regions)
    for (start, stop, what), (next_start, next_stop, other) in itertools.pairwise(ordered):
        if next_start < stop and (next_start, next_stop) != (start, stop):
            raise ModelLoadError(
                f"{name}: the data of {other}, bytes {next_start} to {next_stop}, overlaps that of {what}, "
                f"bytes {start} to {stop}; expected bytes of its own, or all of them shared: export the model again."
            )
