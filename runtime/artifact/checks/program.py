"""What program.onnx must be, given the manifest: its interface, its collectives, and where its weights lie."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NoReturn

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, ValueInfoProto

from furiosa_llm.runtime.artifact.checks.functions import check_functions
from furiosa_llm.runtime.artifact.checks.model import check_inline, check_model, dtype_name, refuse
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN, all_graphs, all_nodes, used_names
from furiosa_llm.runtime.artifact.layout import Mesh, local_size
from furiosa_llm.runtime.artifact.manifest import (
    PROGRAM_NAME,
    Collective,
    InputInfo,
    Manifest,
    OutputInfo,
    StoredTensor,
)

_LEAST_IR_VERSION = 3
_LATEST_OPSET = 1000
"""Of domains other than the standard operators': more than any has had."""
_EXTERNAL_KEYS = {"location", "offset", "length"}


def check_program(program: ModelProto, manifest: Manifest, offsets: Mapping[str, int]) -> None:
    """Raises ArtifactError for the first thing in which `program` is not what `manifest` says.

    `offsets` gives the byte of its weights file where shard 0 of each stored tensor begins.
    """
    graph = program.graph
    if not graph.output:
        _fail("found no graph", "a graph with outputs")
    check_model(program, PROGRAM_NAME)
    check_functions(program, PROGRAM_NAME)
    _check_opsets(program)
    _check_interface("input", graph.input, manifest.inputs, manifest.mesh)
    _check_interface("output", graph.output, manifest.outputs, manifest.mesh)
    _check_initializers(graph, {tensor.name: tensor for tensor in manifest.tensors}, offsets)
    _check_order(graph)
    _check_collectives(graph, manifest.collectives)
    _check_blocks(graph, manifest)


def _check_opsets(program: ModelProto) -> None:
    versions: dict[str, int] = {}
    if not _LEAST_IR_VERSION <= program.ir_version <= onnx.IR_VERSION:
        _fail(f"found the ir_version {program.ir_version}", f"{_LEAST_IR_VERSION} to {onnx.IR_VERSION}")
    for entry in program.opset_import:
        domain = _domain(entry.domain)
        if domain in versions:
            _fail(f"found two opsets for the domain {entry.domain!r:.80}", "one")
        versions[domain] = entry.version
        latest = onnx.defs.onnx_opset_version() if domain == "" else _LATEST_OPSET
        if not 1 <= entry.version <= latest:
            _fail(f"found version {entry.version} of the opset {entry.domain!r:.80}", f"1 to {latest}")
    if versions.get(COLLECTIVE_DOMAIN, 1) != 1:
        _fail(f"found version {versions[COLLECTIVE_DOMAIN]} of the opset {COLLECTIVE_DOMAIN!r}", "version 1")
    for function in program.functions:
        if function.domain == COLLECTIVE_DOMAIN or any(node.domain == COLLECTIVE_DOMAIN for node in function.node):
            _fail(f"function {function.name!r:.80} has a collective", "collectives at the top level only")
    for node in program.graph.node:
        for used in all_nodes([node]):
            if _domain(used.domain) not in versions:
                _fail(f"node {used.name!r:.80} is of the domain {used.domain!r:.80}", "one that opset_import has")


def _domain(domain: str) -> str:
    """A domain under one name: the standard operators' has two."""
    return "" if domain == "ai.onnx" else domain


def _check_interface(
    what: str, values: Sequence[ValueInfoProto], expected: Sequence[InputInfo | OutputInfo], mesh: Mesh
) -> None:
    found_names, names = [value.name for value in values], [info.name for info in expected]
    if found_names != names:
        _fail(f"found the {what}s {found_names!r:.200}", f"{names!r:.200}, as manifest.json says")
    for value, info in zip(values, expected, strict=True):
        tensor = value.type.tensor_type
        dtype = dtype_name(tensor.elem_type)
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
    names: set[str] = set()
    for initializer in graph.initializer:
        if initializer.name in names:
            _fail(f"found the initializer {initializer.name!r:.80} twice", "it once")
        names.add(initializer.name)
        if initializer.data_location != TensorProto.EXTERNAL:
            check_inline(PROGRAM_NAME, f"initializer {initializer.name!r:.80}", initializer)
            continue
        tensor = tensors.get(initializer.name)
        if tensor is None:
            _fail(f"initializer {initializer.name!r:.80} is external", "an entry of $.tensors for it")
        _check_external(initializer, tensor, offsets[tensor.name])
        external.add(tensor.name)
    for name in tensors:
        if name not in external:
            _fail(f"found no external initializer {name!r:.80}", "one, because $.tensors has an entry for it")


def _check_external(initializer: TensorProto, tensor: StoredTensor, offset: int) -> None:
    found_type = dtype_name(initializer.data_type)
    if (found_type, tuple(initializer.dims)) != (tensor.dtype, tensor.local_shape):
        _fail(
            f"initializer {tensor.name!r:.80} is {found_type} {list(initializer.dims)}",
            f"{tensor.dtype} {list(tensor.local_shape)}",
        )
    entries = {entry.key: entry.value for entry in initializer.external_data}
    expected = {"location": tensor.file, "offset": str(offset), "length": str(tensor.local_nbytes)}
    if entries != expected or len(initializer.external_data) != len(_EXTERNAL_KEYS):
        _fail(f"initializer {tensor.name!r:.80} lies at {entries!r:.400}", f"{expected}")
    if initializer.HasField("raw_data"):
        _fail(f"initializer {tensor.name!r:.80} has data of its own", "none, because it is external")


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
    types = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.input, *graph.output)}
    for node, collective in zip(nodes, expected, strict=True):
        attributes = {attribute.name: _integers(attribute) for attribute in node.attribute}
        wanted: dict[str, list[int] | int | None] = {"axes": list(collective.axes)}
        if collective.dim is not None:
            wanted["dim"] = collective.dim
        if (node.op_type, attributes) != (collective.kind, wanted):
            _fail(f"collective {node.name!r:.80} is {node.op_type} {attributes}", f"{collective.kind} {wanted}")
        if len(node.input) != 1 or len(node.output) != 1:
            _fail(f"collective {node.name!r:.80} has {len(node.input)} inputs, {len(node.output)} outputs", "one each")
        declared = types.get(node.input[0], TypeProto.Tensor())
        dtype = dtype_name(declared.elem_type)
        if dtype != collective.dtype:
            _fail(f"the input {node.input[0]!r:.80} of collective {node.name!r:.80} is {dtype}", collective.dtype)
        if collective.kind == "AllReduce" and collective.dtype == "BOOL":
            _fail(f"AllReduce {node.name!r:.80} is of BOOL", "a type that can be summed")
        _check_collective_shape(node, collective, declared)
    for node in graph.node:
        if any(inner.domain == COLLECTIVE_DOMAIN for graph in all_graphs([node]) for inner in graph.node):
            _fail(f"a graph inside node {node.name!r:.80} has a collective", "collectives at the top level only")


def _check_collective_shape(node: NodeProto, collective: Collective, declared: TypeProto.Tensor) -> None:
    """A dimension without an expression may have any name in the manifest."""
    if not declared.HasField("shape"):
        return
    dims = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in declared.shape.dim]
    agree = len(dims) == len(collective.shape) and all(
        dim == size or (dim == "" and isinstance(size, str)) for dim, size in zip(dims, collective.shape, strict=True)
    )
    if not agree:
        _fail(f"the input {node.input[0]!r:.80} of collective {node.name!r:.80} is {dims}", f"{list(collective.shape)}")


def _check_blocks(graph: GraphProto, manifest: Manifest) -> None:
    known = {name for node in graph.node for name in node.output}
    collectives = [position for position, node in enumerate(graph.node) if node.domain == COLLECTIVE_DOMAIN]
    stops = [*(block.first_node for block in manifest.blocks[1:]), len(graph.node)]
    for block, stop in zip(manifest.blocks, stops, strict=True) if manifest.blocks else ():
        if block.first_node >= len(graph.node):
            _fail(f"{len(graph.node)} nodes", f"more than {block.first_node}, where block {block.name!r:.80} starts")
        count = bisect_left(collectives, stop) - bisect_left(collectives, block.first_node)
        if count != block.collectives:
            _fail(f"block {block.name!r:.80} has {count} collectives", f"{block.collectives}")
        for name in block.crossing:
            if name not in known:
                _fail(f"no node writes {name!r:.80}", f"one, because it crosses into block {block.name!r:.80}")


def _integers(attribute: AttributeProto) -> list[int] | int | None:
    if attribute.type == AttributeProto.INTS:
        return list(attribute.ints)
    return attribute.i if attribute.type == AttributeProto.INT else None


def _shown(position: int, node: NodeProto) -> str:
    return f"node {position} ({node.op_type} {node.name!r:.80})"


def _fail(found: str, expected: str) -> NoReturn:
    refuse(PROGRAM_NAME, found, expected)
