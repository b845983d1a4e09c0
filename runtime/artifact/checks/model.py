"""What an ONNX model in an artifact must be, whatever it computes: names are text, data is inline and whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, ValueInfoProto

from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.json_reader import REBUILD
from furiosa_llm.runtime.artifact.layout import MAX_SIZE

_FIELDS: Mapping[str, tuple[str, int]] = {
    "FLOAT": ("float_data", 1),
    "DOUBLE": ("double_data", 1),
    "INT64": ("int64_data", 1),
    "UINT32": ("uint64_data", 1),
    "UINT64": ("uint64_data", 1),
    "COMPLEX64": ("float_data", 2),
    "COMPLEX128": ("double_data", 2),
    "STRING": ("string_data", 1),
}
"""Where elements lie that are not in raw_data, and how many numbers make one; all other types lie in int32_data."""
_DTYPE_NAMES: Mapping[int, str] = {code: name for name, code in TensorProto.DataType.items()}
_WIDE_BITS = {"COMPLEX64": 64, "COMPLEX128": 128}

VALUE_FIELDS = {
    AttributeProto.FLOAT: "f",
    AttributeProto.INT: "i",
    AttributeProto.STRING: "s",
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
    AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    AttributeProto.TYPE_PROTO: "tp",
    AttributeProto.FLOATS: "floats",
    AttributeProto.INTS: "ints",
    AttributeProto.STRINGS: "strings",
    AttributeProto.TENSORS: "tensors",
    AttributeProto.GRAPHS: "graphs",
    AttributeProto.SPARSE_TENSORS: "sparse_tensors",
    AttributeProto.TYPE_PROTOS: "type_protos",
}
"""An attribute's type -> the field that has its value."""
_PLAIN_TYPES = frozenset(
    (
        *(AttributeProto.FLOAT, AttributeProto.INT, AttributeProto.STRING),
        *(AttributeProto.FLOATS, AttributeProto.INTS, AttributeProto.STRINGS),
    )
)
"""Attributes that have no tensors or graphs."""
_ALL_VALUE_FIELDS = frozenset(VALUE_FIELDS.values())


def parse_model(data: bytes, document: str) -> ModelProto:
    """The ONNX model in `data`; raises ArtifactError if it is no model."""
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ArtifactError(f"{document} is not an ONNX model: {error}; {REBUILD}") from error
    return model


def refuse(document: str, found: str, expected: str) -> NoReturn:
    """Raises ArtifactError."""
    raise ArtifactError(f"{document}: {found}, expected {expected}; {REBUILD}")


def dtype_name(code: int) -> str:
    """ONNX's name of an element type."""
    return _DTYPE_NAMES.get(code) or f"of the unknown type {code}"


def check_model(model: ModelProto, document: str) -> None:
    """Raises ArtifactError for the first node, value or tensor, in graphs within graphs too, that cannot be.

    The graph's own initializers are left to the caller, because some are elsewhere.
    """
    _check_values(document, (*model.graph.input, *model.graph.output, *model.graph.value_info))
    bodies: list[GraphProto] = []
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        _check_node(document, node, bodies)
    while bodies:
        graph = bodies.pop()
        _check_values(document, (*graph.input, *graph.output, *graph.value_info))
        for tensor in (*graph.initializer, *(part for s in graph.sparse_initializer for part in (s.values, s.indices))):
            check_inline(document, f"initializer {tensor.name!r:.80} of a graph in a node", tensor)
        for node in graph.node:
            _check_node(document, node, bodies)


def check_inline(document: str, what: str, tensor: TensorProto) -> None:
    """Raises ArtifactError unless `tensor` has its data with it, as much as its type and its dimensions take."""
    if tensor.data_location == TensorProto.EXTERNAL:
        refuse(document, f"{what} has external data", "inline data")
    dtype = dtype_name(tensor.data_type)
    bits = _WIDE_BITS.get(dtype) or (DTYPES[dtype].bits if dtype in DTYPES else 0)
    if not bits and dtype != "STRING":
        refuse(document, f"{what} is {dtype}", f"one of {', '.join(DTYPES)}")
    elements = math.prod(tensor.dims) if len(tensor.dims) <= 64 else -1
    if elements < 0 or any(not 0 <= dim < MAX_SIZE for dim in tensor.dims):
        refuse(document, f"{what} has the dimensions {list(tensor.dims)!r:.200}", "at most 64 from 0 to 2**48")
    field, width = _FIELDS.get(dtype, ("int32_data", 1))
    if tensor.HasField("raw_data") and dtype != "STRING":
        found, expected, unit = len(tensor.raw_data), -(-elements * bits // 8), "bytes"
    else:
        found, expected, unit = len(getattr(tensor, field)), elements * width, f"entries of {field}"
        if 0 < bits < 8:
            expected = -(-elements * bits // 8)
    if found != expected:
        refuse(document, f"{what} has {found} {unit}", f"{expected} for {dtype} {list(tensor.dims)!r:.200}")


def _check_values(document: str, values: Sequence[ValueInfoProto]) -> None:
    for value in values:
        _check_text(document, "a value", (value.name,))
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_value") and not 0 <= dim.dim_value < MAX_SIZE:
                refuse(document, f"value {value.name!r:.80} has a dimension of {dim.dim_value}", "0 to 2**48")
            _check_text(document, f"a dimension of {value.name!r:.80}", (dim.dim_param,))


def _check_node(document: str, node: NodeProto, bodies: list[GraphProto]) -> None:
    """Appends the graphs in the node to `bodies`."""
    _check_text(document, "a node", (node.name, node.op_type, node.domain, *node.input, *node.output))
    what = f"node {node.name!r:.80} has an attribute"
    names: set[str] = set()
    for attribute in node.attribute:
        _check_text(document, what, (attribute.name, attribute.ref_attr_name))
        if attribute.name in names:
            refuse(document, f"{what} {attribute.name!r:.80} twice", "it once")
        names.add(attribute.name)
        filled = {field.name for field, _ in attribute.ListFields()} & _ALL_VALUE_FIELDS
        if not filled <= {VALUE_FIELDS.get(attribute.type)}:
            refuse(document, f"{what} {attribute.name!r:.80} with {sorted(filled)}", "only what its type says")
        if attribute.type in _PLAIN_TYPES:
            continue
        for tensor in _tensors(attribute):
            if tensor.data_location == TensorProto.EXTERNAL:
                refuse(document, f"{what} with external data", "inline data")
            check_inline(document, f"attribute {attribute.name!r:.80} of node {node.name!r:.80}", tensor)
        bodies += [attribute.g] if attribute.HasField("g") else []
        bodies += attribute.graphs


def _tensors(attribute: AttributeProto) -> Iterator[TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    sparse: list[SparseTensorProto] = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
    for tensor in (*sparse, *attribute.sparse_tensors):
        yield from (tensor.values, tensor.indices)


def _check_text(document: str, what: str, texts: Sequence[object]) -> None:
    # protobuf gives bytes for what is not UTF-8, which do not join.
    try:
        "".join(texts)  # type: ignore[arg-type]  # bytes among them are what is looked for
    except TypeError:
        odd = next(text for text in texts if not isinstance(text, str))
        refuse(document, f"{what} with the name {odd!r:.80}", "names in UTF-8")
