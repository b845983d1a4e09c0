"""`compute="float32"`: a program in types that have no kernel here, or slow ones, made to compute in float32.

Weights stay stored as they are. Nodes that convert them stand in front of those that read them, so that onnxruntime
does it once, as it loads them. Float8 and float4 weights keep their scales: they are dequantised by the same op.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeVar

import ml_dtypes
import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper

from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.errors import ComputeError
from furiosa_llm.runtime.artifact.graphs import all_graphs, all_nodes, all_tensors, rename, used_names
from furiosa_llm.runtime.artifact.manifest import InputInfo, Manifest, OutputInfo, StoredTensor
from furiosa_llm.runtime.artifact.options import COMPUTE, FLOAT32
from furiosa_llm.runtime.artifact.reader import SplitModel
from furiosa_llm.runtime.artifact.units import counted, nbytes

NARROW = frozenset({"FLOAT16", "BFLOAT16"})
"""Types of values that become FLOAT."""
QUANTISED = frozenset({"FLOAT8E4M3FN", "FLOAT8E5M2", "FLOAT4E2M1"})
"""Types of weights that are dequantised to FLOAT as they are loaded."""

_NARROW = frozenset(map(TensorProto.DataType.Value, NARROW))
_QUANTISED = frozenset(map(TensorProto.DataType.Value, QUANTISED))
_TYPE_ATTRIBUTES = frozenset(
    {"to", "dtype", "output_dtype", "output_datatype", "softmax_precision", "stash_type", "precision"}
)
"""Attributes that name a type."""
_INLINE_NBYTES = 1024
"""Tensors of the model itself up to this size are converted here."""
_FLOAT4_VALUES = "furiosa_llm.float4"

Model = TypeVar("Model", bound=SplitModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """A model that computes in float32; its inputs and outputs are float32, too."""

    model: ModelProto
    positions: tuple[int, ...]
    """For each node of the original the first of the nodes that stand for it."""


def computing(model: Model, compute: str | None) -> Model:
    """`model` as it computes in `compute`, None for its own types: program, states, collectives, inputs and outputs.

    Raises ComputeError for another type than float32.
    """
    if compute is None:
        return model
    COMPUTE.check("compute", compute, ComputeError)
    converted, manifest = in_float32(model.program), model.manifest
    declared = {info.name: info.dtype for info in manifest.inputs} | {o.name: o.dtype for o in manifest.outputs}
    return replace(
        model,
        compute=compute,
        declared={name: dtype for name, dtype in declared.items() if dtype in NARROW},
        program=converted.model,
        manifest=replace(
            manifest,
            inputs=tuple(map(_info, manifest.inputs)),
            outputs=tuple(map(_info, manifest.outputs)),
            collectives=tuple(replace(one, dtype=_dtype(one.dtype)) for one in manifest.collectives),
            blocks=tuple(replace(one, first_node=converted.positions[one.first_node]) for one in manifest.blocks),
        ),
    )


def narrow_types(model: ModelProto) -> tuple[str, ...]:
    """The types in `model` that `compute="float32"` converts."""
    graph = model.graph
    codes = {tensor.data_type for tensor in graph.initializer}
    codes |= {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    return tuple(sorted(TensorProto.DataType.Name(code) for code in codes & (_NARROW | _QUANTISED)))


def loaded_nbytes(tensor: StoredTensor, compute: str | None) -> int:
    """The bytes of a shard in memory, if the program computes in `compute`."""
    wide = compute is not None and tensor.dtype in NARROW | QUANTISED
    return DTYPES["FLOAT"].nbytes(tensor.local_shape) if wide else tensor.local_nbytes


def dequantises(model: SplitModel) -> bool:
    """Whether sessions are to dequantise weights as they load them: they would do it in every run, to fuse it."""
    return model.compute is not None and any(tensor.dtype in QUANTISED for tensor in model.manifest.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Float32Memory:
    """What `compute="float32"` converts of an artifact, and what each PE then holds."""

    tensors: Mapping[str, int]
    """Type -> how many stored tensors are converted from it."""
    weight_nbytes: int
    state_nbytes_per_token: int

    def __str__(self) -> str:
        converted = ", ".join(counted(count, f"{dtype} tensor") for dtype, count in self.tensors.items()) or "no tensor"
        state = f", {nbytes(self.state_nbytes_per_token)} of state per token" if self.state_nbytes_per_token else ""
        return f"{converted} converted: {nbytes(self.weight_nbytes)} of weights per PE{state}"


def float32_memory(manifest: Manifest, read: Collection[str]) -> Float32Memory | None:
    """What computing in float32 takes, if the program reads the tensors `read`; None if nothing is narrower."""
    wide = replace(manifest, inputs=tuple(map(_info, manifest.inputs)))
    tensors = Counter(one.dtype for one in manifest.tensors if one.dtype in NARROW | QUANTISED)
    if not tensors and wide == manifest:
        return None
    return Float32Memory(
        tensors=tensors,
        weight_nbytes=sum(loaded_nbytes(one, FLOAT32) for one in manifest.tensors if one.name in read),
        state_nbytes_per_token=sum(wide.state_nbytes.values()),
    )


def in_float32(model: ModelProto) -> Converted:
    """A copy of `model` that computes in float32; a default of an input that is converted is left out."""
    return _Conversion(model).run()


def widen(node: NodeProto) -> None:
    """Makes the attributes of `node`, and all that is in its graphs, speak of float32 instead of narrower types."""
    for one in all_nodes([node]):
        for attribute in one.attribute:
            if attribute.name in _TYPE_ATTRIBUTES and attribute.type == AttributeProto.INT and attribute.i in _NARROW:
                attribute.i = TensorProto.FLOAT
    for tensor in all_tensors([node]):
        if tensor.data_type in _NARROW:
            tensor.CopyFrom(_in_float32(tensor))
    for graph in all_graphs([node]):
        _widen_types(graph)


_Info = TypeVar("_Info", InputInfo, OutputInfo)


def _info(info: _Info) -> _Info:
    return replace(info, dtype=_dtype(info.dtype))


def _dtype(dtype: str) -> str:
    return "FLOAT" if dtype in NARROW else dtype


def _in_float32(tensor: TensorProto) -> TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


def _widen_types(graph: GraphProto, also: Mapping[str, int] = MappingProxyType({})) -> None:
    """Declares the values of `graph` as float32 that are narrower, and the values `also`."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        for kind in _tensor_types(value.type):
            if kind.elem_type in _NARROW or value.name in also:
                kind.elem_type = TensorProto.FLOAT


def _tensor_types(kind: TypeProto) -> Iterator[TypeProto.Tensor]:
    match kind.WhichOneof("value"):
        case "tensor_type":
            yield kind.tensor_type
        case "sequence_type":
            yield from _tensor_types(kind.sequence_type.elem_type)
        case "optional_type":
            yield from _tensor_types(kind.optional_type.elem_type)


class _Conversion:
    """The conversion of one model.

    `_stored` are the initializers that are converted where they are read. `_quantised` are values that hold in float32
    what float8 or float4 weights hold, with the float8 type that takes them again.
    """

    def __init__(self, model: ModelProto) -> None:
        self._model = ModelProto()
        self._model.CopyFrom(model)
        self._stored: dict[str, TensorProto] = {}
        self._quantised: dict[str, int] = {}
        self._made = 0

    def run(self) -> Converted:
        """See `in_float32`."""
        graph = self._model.graph
        given = {value.name for value in graph.input}
        tensors = list(graph.initializer)
        del graph.initializer[:]
        for tensor in tensors:
            if tensor.name not in given or tensor.data_type not in _NARROW:
                self._keep(tensor)
        nodes: list[NodeProto] = []
        positions: list[int] = []
        for node in list(graph.node):
            positions.append(len(nodes))
            nodes.extend(self._converted(node))
        del graph.node[:]
        graph.node.extend(nodes)
        _widen_types(graph, self._quantised)
        for function in self._model.functions:
            for node in function.node:
                widen(node)
        return Converted(model=self._model, positions=tuple(positions))

    def _keep(self, tensor: TensorProto) -> None:
        """Adds an initializer; float4 numbers as the integers of the same bits, which there are kernels for."""
        small = tensor.data_location != TensorProto.EXTERNAL and tensor.ByteSize() <= _INLINE_NBYTES
        if tensor.data_type in _NARROW and small:
            tensor = _in_float32(tensor)
        own = self._model.graph.initializer.add()
        own.CopyFrom(tensor)
        if tensor.data_type in _NARROW | _QUANTISED:
            self._stored[tensor.name] = tensor
        if tensor.data_type == TensorProto.FLOAT4E2M1:
            own.data_type = TensorProto.UINT4

    def _converted(self, node: NodeProto) -> Iterator[NodeProto]:
        """The nodes that stand for `node`."""
        own = NodeProto()
        own.CopyFrom(node)
        if own.op_type == "Constant" and own.attribute[0].type == AttributeProto.TENSOR:
            tensor = own.attribute[0].t
            tensor.name = own.output[0]
            self._keep(tensor)
            return
        names: dict[str, str] = {}
        for name in dict.fromkeys(used_names(own)):
            if name in self._stored and self._is_converted(own, name):
                names[name] = self._unique(name)
                yield from self._loaded(self._stored[name], names[name])
        rename(own, names)
        widen(own)
        yield from self._requantised(own)
        yield own

    def _is_converted(self, node: NodeProto, name: str) -> bool:
        """Whether `node` reads the initializer `name` in float32: float8 weights may go to their op as they are."""
        if self._stored[name].data_type in _NARROW:
            return True
        if node.op_type == "DequantizeLinear":
            return self._stored[name].data_type == TensorProto.FLOAT4E2M1
        return node.op_type != "QuantizeLinear"

    def _loaded(self, tensor: TensorProto, name: str) -> Iterator[NodeProto]:
        """Nodes that make `name` of `tensor`, float32."""
        if tensor.data_type in _QUANTISED:
            self._quantised[name] = tensor.data_type
        if tensor.data_type != TensorProto.FLOAT4E2M1:
            yield helper.make_node("Cast", [tensor.name], [name], name=name, to=TensorProto.FLOAT)
            return
        self._quantised[name] = TensorProto.FLOAT8E4M3FN  # which has every number of float4
        codes = f"{name}/codes"
        yield helper.make_node("Cast", [tensor.name], [codes], name=codes, to=TensorProto.INT32)
        yield helper.make_node("Gather", [self._float4_values(), codes], [name], name=name)

    def _requantised(self, node: NodeProto) -> Iterator[NodeProto]:
        """Nodes in front of `node`, if it dequantises a value in float32; other ops move its elements, or cast it."""
        found = next((self._quantised[name] for name in node.input if name in self._quantised), None)
        if found is None or node.op_type == "Cast":
            return
        if node.op_type != "DequantizeLinear":
            self._quantised.update(dict.fromkeys(node.output, found))
            return
        for position, given in enumerate(node.input):
            if given in self._quantised:
                node.input[position] = name = self._unique(given)
                yield helper.make_node("Cast", [given], [name], name=name, to=self._quantised[given])

    def _float4_values(self) -> str:
        """The initializer of all float4 numbers, by their bits."""
        graph = self._model.graph
        if all(tensor.name != _FLOAT4_VALUES for tensor in graph.initializer):
            values = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(values, _FLOAT4_VALUES))
        return _FLOAT4_VALUES

    def _unique(self, name: str) -> str:
        self._made += 1
        return f"furiosa_llm.float32/{self._made}/{name}"
