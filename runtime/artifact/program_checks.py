"""What program.onnx must be, given the manifest: its interface, its collectives, and where its weights lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.json_reader import REBUILD
from furiosa_llm.runtime.artifact.layout import Mesh, local_size
from furiosa_llm.runtime.artifact.manifest import (
    PROGRAM_NAME,
    Collective,
    InputInfo,
    Manifest,
    OutputInfo,
    StoredTensor,
)

COLLECTIVE_DOMAIN = "furiosa_llm"

_EXTERNAL_KEYS = {"location", "offset", "length"}


def check_program(program: ModelProto, manifest: Manifest, offsets: Mapping[str, int]) -> None:
    """Raises ArtifactError for the first thing in which `program` is not what `manifest` says.

    `offsets` gives the byte of its weights file where shard 0 of each stored tensor begins.
    """
    graph = program.graph
    if not graph.output:
        _fail("found no graph", "a graph with outputs")
    _check_interface("input", graph.input, manifest.inputs, manifest.mesh)
    _check_interface("output", graph.output, manifest.outputs, manifest.mesh)
    _check_initializers(graph, {tensor.name: tensor for tensor in manifest.tensors}, offsets)
    _check_order(graph)
    _check_collectives(graph, manifest.collectives)
    _check_blocks(graph, manifest)


def attribute_graphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs that are attributes of `node` (If, Loop, Scan), themselves only."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def used_names(node: NodeProto) -> Iterator[str]:
    """The names that `node` reads, those that its graphs capture from outside included."""
    yield from (name for name in node.input if name)
    for graph in attribute_graphs(node):
        own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        for inner in graph.node:
            yield from (name for name in used_names(inner) if name not in own)
            own.update(inner.output)
        yield from (value.name for value in graph.output if value.name not in own)


def _check_interface(
    what: str, values: Sequence[ValueInfoProto], expected: Sequence[InputInfo | OutputInfo], mesh: Mesh
) -> None:
    found_names, names = [value.name for value in values], [info.name for info in expected]
    if found_names != names:
        _fail(f"found the {what}s {found_names!r:.200}", f"{names!r:.200}, as manifest.json says")
    for value, info in zip(values, expected, strict=True):
        tensor = value.type.tensor_type
        dtype = _dtype_name(tensor.elem_type)
        if dtype != info.dtype:
            _fail(f"{what} {info.name!r:.80} is {dtype}", info.dtype)
        if not tensor.HasField("shape"):
            continue
        local: list[int | str] = [
            size if dim is None else local_size(dim, mesh) for size, dim in zip(info.shape, info.layout, strict=True)
        ]
        dims = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in tensor.shape.dim]
        agree = len(dims) == len(local) and all(
            dim == size if isinstance(size, int) else isinstance(dim, str)
            for dim, size in zip(dims, local, strict=False)
        )
        if not agree:
            _fail(f"{what} {info.name!r:.80} has the local shape {dims}", f"{local}")


def _check_initializers(graph: GraphProto, tensors: Mapping[str, StoredTensor], offsets: Mapping[str, int]) -> None:
    if graph.sparse_initializer:
        _fail("found sparse initializers", "dense ones only")
    external: set[str] = set()
    for initializer in graph.initializer:
        if initializer.data_location != TensorProto.EXTERNAL:
            continue
        tensor = tensors.get(initializer.name)
        if tensor is None:
            _fail(f"initializer {initializer.name!r:.80} is external", "an entry of $.tensors for it")
        _check_external(initializer, tensor, offsets[tensor.name])
        external.add(tensor.name)
    for name in tensors:
        if name not in external:
            _fail(f"found no external initializer {name!r:.80}", "one, because $.tensors has an entry for it")
    for node in graph.node:
        owned = (tensor for inner in (node, *_inner_nodes(node)) for tensor in _attribute_tensors(inner))
        if any(tensor.data_location == TensorProto.EXTERNAL for tensor in owned):
            _fail(f"node {node.name!r:.80} has an attribute with external data", "inline data")


def _check_external(initializer: TensorProto, tensor: StoredTensor, offset: int) -> None:
    dtype = DTYPES[tensor.dtype]
    found_type = _dtype_name(initializer.data_type)
    if (found_type, tuple(initializer.dims)) != (tensor.dtype, tensor.local_shape):
        _fail(
            f"initializer {tensor.name!r:.80} is {found_type} {list(initializer.dims)}",
            f"{tensor.dtype} {list(tensor.local_shape)}",
        )
    found = {entry.key: entry.value for entry in initializer.external_data}
    expected = {"location": tensor.file, "offset": str(offset), "length": str(dtype.nbytes(tensor.local_shape))}
    if found != expected or len(initializer.external_data) != len(_EXTERNAL_KEYS):
        _fail(f"initializer {tensor.name!r:.80} lies at {found}", f"{expected}")


def _attribute_tensors(node: NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            yield attribute.t
        yield from attribute.tensors
    for graph in attribute_graphs(node):
        yield from graph.initializer


def _check_order(graph: GraphProto) -> None:
    known = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    for position, node in enumerate(graph.node):
        for name in used_names(node):
            if name not in known:
                _fail(f"{_shown(position, node)} reads {name!r:.80}", "a value known before it")
        for name in node.output:
            if name and name in known:
                _fail(f"{_shown(position, node)} writes {name!r:.80} again", "a new value")
            known.add(name)
    written = {name for node in graph.node for name in node.output}
    for value in graph.output:
        if value.name not in written:
            _fail(f"no node writes the output {value.name!r:.80}", "one that does")


def _check_collectives(graph: GraphProto, expected: Sequence[Collective]) -> None:
    nodes = [node for node in graph.node if node.domain == COLLECTIVE_DOMAIN]
    found_names, names = [node.name for node in nodes], [collective.id for collective in expected]
    if found_names != names:
        difference = next((pair for pair in zip(found_names, names, strict=False) if pair[0] != pair[1]), None)
        shown = f", first {difference[0]!r:.80} for {difference[1]!r:.80}" if difference else ""
        _fail(f"found {len(nodes)} collective nodes{shown}", f"the {len(names)} of $.collectives in their order")
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    for node, collective in zip(nodes, expected, strict=True):
        attributes = {attribute.name: _integers(attribute) for attribute in node.attribute}
        wanted: dict[str, list[int] | int | None] = {"axes": list(collective.axes)}
        if collective.dim is not None:
            wanted["dim"] = collective.dim
        if (node.op_type, attributes) != (collective.kind, wanted):
            _fail(f"collective {node.name!r:.80} is {node.op_type} {attributes}", f"{collective.kind} {wanted}")
        if len(node.input) != 1 or len(node.output) != 1:
            _fail(f"collective {node.name!r:.80} has {len(node.input)} inputs, {len(node.output)} outputs", "one each")
        dtype = _dtype_name(types.get(node.input[0], TensorProto.UNDEFINED))
        if dtype != collective.dtype:
            _fail(f"the input {node.input[0]!r:.80} of collective {node.name!r:.80} is {dtype}", collective.dtype)
        if collective.kind == "AllReduce" and collective.dtype == "BOOL":
            _fail(f"AllReduce {node.name!r:.80} is of BOOL", "a type that can be summed")
    for node in graph.node:
        if any(inner.domain == COLLECTIVE_DOMAIN for inner in _inner_nodes(node)):
            _fail(f"a graph inside node {node.name!r:.80} has a collective", "collectives at the top level only")


def _check_blocks(graph: GraphProto, manifest: Manifest) -> None:
    known = {name for node in graph.node for name in node.output}
    for block in manifest.blocks:
        if block.first_node >= len(graph.node):
            _fail(f"{len(graph.node)} nodes", f"more than {block.first_node}, where block {block.name!r:.80} starts")
        for name in block.crossing:
            if name not in known:
                _fail(f"no node writes {name!r:.80}", f"one, because it crosses into block {block.name!r:.80}")


def _integers(attribute: AttributeProto) -> list[int] | int | None:
    if attribute.type == AttributeProto.INTS:
        return list(attribute.ints)
    return attribute.i if attribute.type == AttributeProto.INT else None


def _dtype_name(code: int) -> str:
    known = code in TensorProto.DataType.values()
    return TensorProto.DataType.Name(code) if known else f"of the unknown type {code}"


def _inner_nodes(node: NodeProto) -> Iterator[NodeProto]:
    for graph in attribute_graphs(node):
        for inner in graph.node:
            yield inner
            yield from _inner_nodes(inner)


def _shown(position: int, node: NodeProto) -> str:
    return f"node {position} ({node.op_type} {node.name!r:.80})"


def _fail(found: str, expected: str) -> NoReturn:
    raise ArtifactError(f"{PROGRAM_NAME}: {found}, expected {expected}; {REBUILD}")
