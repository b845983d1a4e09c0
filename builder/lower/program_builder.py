"""The SPMD program under construction: a new graph, its constants, and its weights.

All ranks run this one graph. What differs between ranks lies in `ShardedTensor`s: weights, and a few small tensors
from which a rank knows its place (whether it is the first of its group, where its part of a table begins).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from furiosa_llm.builder.plan.storage import segments_by_axes
from furiosa_llm.builder.rewrite.control_flow import ORIGINAL_NAME
from furiosa_llm.builder.shapes.names import FreeNames
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN
from furiosa_llm.runtime.artifact.layout import Dim, Leaf, Mesh, axes_of, global_size, local_size
from furiosa_llm.runtime.artifact.manifest import Part

INLINE_NBYTES = 1024
"""Replicated initializers up to this size stay in program.onnx; larger ones go to the weights file."""

Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class ShardedTensor:
    """A tensor of the weights file: `[number of shards, *local shape]`."""

    name: str
    dtype: ir.DataType
    local_shape: tuple[int, ...]
    shard_axes: Axes
    layout: tuple[Dim, ...] | None
    """A layout per dimension of `source`; None for a tensor that the builder made."""
    source: ir.TensorProtocol | None
    """The original weight that the shards are cut from."""
    part: Part | None = None
    """Which part of `source` this is; None for all of it."""
    whole_layout: tuple[Dim, ...] | None = None
    """The layout of all of `source`."""
    made: Callable[[], npt.NDArray[np.generic]] | None = None
    """For a tensor that the builder made: returns all shards, `[number of shards, *local shape]`."""

    @property
    def local_nbytes(self) -> int:
        """Bytes of one shard."""
        return -(-int(np.prod(self.local_shape, dtype=np.int64)) * self.dtype.bitwidth // 8)


class ProgramBuilder:
    """Adds nodes, constants and weights to the program; equal constants and weights are added once."""

    def __init__(self, source: ir.Graph, mesh: Mesh) -> None:
        """An empty program with the interface names and op versions of `source`."""
        self.mesh = mesh
        imports = {**source.opset_imports, COLLECTIVE_DOMAIN: 1}
        self.graph = ir.Graph([], [], nodes=[], opset_imports=imports, name=source.name)
        self.tensors: dict[str, ShardedTensor] = {}
        self.opset = source.opset_imports.get("", 1)
        self._constants: dict[tuple[object, ...], ir.Value] = {}
        self._weights: dict[tuple[int, tuple[Dim, ...]], ir.Value] = {}
        self._names = FreeNames(str(v.name) for v in (*source.inputs, *source.outputs))
        self._node_names = FreeNames()

    # -- nodes ---------------------------------------------------------------------------------------------------

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        name: str,
        outputs: int | Sequence[str] = 1,
        domain: str = "",
        attributes: Mapping[str, object] | None = None,
    ) -> list[ir.Value]:
        """Append a node; its outputs are named after it unless names are given."""
        unique = self._node_names.take(name)
        if isinstance(outputs, int):
            outputs = [unique if outputs == 1 else f"{unique}/{i}" for i in range(outputs)]
        values = [ir.Value(name=self._names.take(o) if o else "") for o in outputs]
        attrs = [
            a if isinstance(a, ir.Attr) else ir.convenience.convert_attribute(k, a)  # type: ignore[arg-type] # it checks
            for k, a in (attributes or {}).items()
        ]
        node = ir.Node(domain, op_type, inputs, attrs, outputs=values, name=unique)
        self.graph.append(node)
        return values

    def one(self, op_type: str, inputs: Sequence[ir.Value | None], *, name: str, **attributes: object) -> ir.Value:
        """Append a standard node with one output."""
        return self.node(op_type, inputs, name=name, attributes=attributes)[0]

    def unsqueeze_last(self, value: ir.Value, *, name: str) -> ir.Value:
        """`value` with a dimension of 1 at the end, in any opset."""
        if self.opset < 13:
            return self.one("Unsqueeze", [value], name=name, axes=[-1])
        return self.one("Unsqueeze", [value, self.constant(np.array([-1], np.int64))], name=name)

    # -- constants -----------------------------------------------------------------------------------------------

    def constant(self, array: npt.NDArray[np.generic], dtype: ir.DataType | None = None) -> ir.Value:
        """A small constant, the same on every rank."""
        kind = dtype or ir.DataType.from_numpy(array.dtype)
        key = (kind, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._names.take(f"constant/{len(self._constants)}")
            self._constants[key] = self._initializer(name, ir.Tensor(array, dtype=kind, name=name))
        return self._constants[key]

    def per_rank(self, key: str, axes: Axes, shards: npt.NDArray[np.generic]) -> ir.Value:
        """A tensor made by the builder that differs along `axes`: `shards` is `[parts, *local shape]`."""
        name = f"rank/{key}/{'.'.join(map(str, axes))}"
        full_key = (name, shards.tobytes())
        if full_key not in self._constants:
            unique = self._names.take(name)
            tensor = ShardedTensor(
                name=unique,
                dtype=ir.DataType.from_numpy(shards.dtype),
                local_shape=shards.shape[1:],
                shard_axes=axes,
                layout=None,
                source=None,
                made=lambda: shards,
            )
            self._constants[full_key] = self._register(tensor)
        return self._constants[full_key]

    def is_first(self, axes: Axes) -> ir.Value:
        """A boolean scalar: whether the rank is the first along `axes`."""
        shards = np.zeros(self.mesh.parts(axes), dtype=np.bool_)
        shards[0] = True
        return self.per_rank("is_first", axes, shards)

    # -- weights -------------------------------------------------------------------------------------------------

    def weight(self, initializer: ir.Value, layout: tuple[Dim, ...]) -> ir.Value:
        """An initializer of the normalised graph under a layout."""
        tensor = initializer.const_value
        assert tensor is not None
        key = (id(tensor), layout)
        if key not in self._weights:
            name = str(initializer.meta.get(ORIGINAL_NAME, initializer.name))
            self._weights[key] = self._add_weight(name, tensor, layout)
        return self._weights[key]

    def _add_weight(self, name: str, tensor: ir.TensorProtocol, layout: tuple[Dim, ...]) -> ir.Value:
        if not any(axes_of(dim) for dim in layout) and tensor.nbytes <= INLINE_NBYTES and _is_here(tensor):
            unique = self._names.take(name)
            return self._initializer(unique, ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=unique))
        for d, dim in enumerate(layout):
            segments = segments_by_axes(dim)
            if len(segments) > 1:
                return self._add_parts(name, tensor, layout, d, segments)
        return self._add_stored(name, tensor, layout, layout, None)

    def _add_parts(
        self, name: str, tensor: ir.TensorProtocol, layout: tuple[Dim, ...], d: int, segments: Sequence[Dim]
    ) -> ir.Value:
        """A weight whose segments are split over different axes, stored apart so that nothing is stored twice."""
        parts: list[ir.Value] = []
        start = 0
        for number, dim in enumerate(segments):
            stop = start + global_size(dim)
            own = (*layout[:d], dim, *layout[d + 1 :])
            part = Part(dim=d, start=start, stop=stop)
            parts.append(self._add_stored(f"{name}/part{number}", tensor, own, layout, part))
            start = stop
        return self.one("Concat", parts, name=f"{name}/joined", axis=d)

    def _add_stored(
        self,
        name: str,
        tensor: ir.TensorProtocol,
        layout: tuple[Dim, ...],
        whole_layout: tuple[Dim, ...],
        part: Part | None,
    ) -> ir.Value:
        return self._register(
            ShardedTensor(
                name=self._names.take(name),
                dtype=tensor.dtype,
                local_shape=tuple(local_size(dim, self.mesh) for dim in layout),
                shard_axes=tuple(dict.fromkeys(axis for dim in layout for axis in axes_of(dim))),
                layout=layout,
                source=tensor,
                part=part,
                whole_layout=whole_layout,
            )
        )

    def store_unused(self, name: str, tensor: ir.TensorProtocol) -> None:
        """Keep an initializer that no node reads, so that the original model can be rebuilt."""
        if tensor.nbytes > INLINE_NBYTES:
            layout = tuple(Leaf(size) for size in tensor.shape.numpy())
            self._add_stored(name, tensor, layout, layout, None)

    def _register(self, tensor: ShardedTensor) -> ir.Value:
        """A program initializer whose data will be in a weights file; it has no data until the file is written."""
        self.tensors[tensor.name] = tensor
        value = ir.Value(name=tensor.name, shape=ir.Shape(tensor.local_shape), type=ir.TensorType(tensor.dtype))
        shape = ir.Shape(tensor.local_shape)
        value.const_value = ir.ExternalTensor("unwritten", 0, 0, tensor.dtype, shape=shape, name=tensor.name)
        self.graph.register_initializer(value)
        return value

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value


def _is_here(tensor: ir.TensorProtocol) -> bool:
    """Whether a tensor's data can be read: plans may be made without the files that hold it."""
    return not isinstance(tensor, ir.ExternalTensor) or Path(tensor.path).is_file()
