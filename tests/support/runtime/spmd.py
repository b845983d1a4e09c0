"""Writes an artifact folder from a small SPMD program, so that the runtime is tested without a builder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from safetensors.numpy import save_file

from furiosa_llm.runtime.artifact.layout import Dim, Leaf, Mesh, axes_of, global_size, index_map, local_size
from furiosa_llm.runtime.artifact.manifest import (
    MANIFEST_NAME,
    PROGRAM_NAME,
    SOURCE_NAME,
    Collective,
    FileEntry,
    InputInfo,
    InputRole,
    Manifest,
    ModelInfo,
    OriginalInitializer,
    OutputInfo,
    OutputRole,
    Provenance,
    State,
    StateMode,
    StoredTensor,
    Task,
)
from furiosa_llm.runtime.artifact.safetensors_header import read_header

Array = npt.NDArray[Any]
WEIGHTS = "weights-00001.safetensors"
OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("furiosa_llm", 1)]


@dataclass
class Weight:
    """A stored tensor: the global array, and how each of its dimensions lies over the ranks."""

    array: Array
    layout: tuple[Dim, ...]

    @property
    def axes(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(axis for dim in self.layout for axis in axes_of(dim)))

    def local(self, mesh: Mesh, rank: int) -> Array:
        local = self.array
        for dim, layout in enumerate(self.layout):
            indices = index_map(layout, mesh, rank)
            local = np.take(local, np.maximum(indices, 0), axis=dim)
            local[(slice(None),) * dim + (indices < 0,)] = 0
        return np.ascontiguousarray(local)


@dataclass
class Spmd:
    """A program under construction; `mesh` (1,) with every collective left out gives the unsplit model."""

    mesh: Mesh
    nodes: list[NodeProto] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    constants: dict[str, Array] = field(default_factory=dict)
    values: dict[str, ValueInfoProto] = field(default_factory=dict)
    inputs: list[InputInfo] = field(default_factory=list)
    outputs: list[OutputInfo] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    task: Task = "other"
    max_sequence_length: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    files: dict[str, bytes] = field(default_factory=dict)

    def node(self, op: str, inputs: Sequence[str], output: str | Sequence[str], **attributes: Any) -> str:
        outputs = [output] if isinstance(output, str) else list(output)
        self.nodes.append(helper.make_node(op, list(inputs), outputs, name=f"n{len(self.nodes)}", **attributes))
        return outputs[0]

    def weight(self, name: str, array: Array, *layout: Dim | int) -> str:
        dims = tuple(Leaf(dim) if isinstance(dim, int) else dim for dim in layout)
        self.weights[name] = Weight(array, dims or tuple(Leaf(size) for size in array.shape))
        return name

    def constant(self, name: str, array: Array) -> str:
        self.constants[name] = array
        return name

    def declare(self, name: str, shape: Sequence[int | str] | None, dtype: str = "FLOAT") -> str:
        self.values[name] = helper.make_tensor_value_info(name, TensorProto.DataType.Value(dtype), shape)
        return name

    def input(
        self, name: str, shape: Sequence[Dim | str | int], role: InputRole = "other", dtype: str = "FLOAT"
    ) -> str:
        self.inputs.append(InputInfo(name=name, dtype=dtype, role=role, **self._interface(name, shape, dtype)))
        return name

    def output(
        self, name: str, shape: Sequence[Dim | str | int], role: OutputRole = "other", dtype: str = "FLOAT"
    ) -> None:
        self.outputs.append(OutputInfo(name=name, dtype=dtype, role=role, **self._interface(name, shape, dtype)))

    def state(self, past: str, present: str, sequence_dim: int, mode: StateMode) -> None:
        self.states.append(State(input=past, output=present, sequence_dim=sequence_dim, mode=mode))

    def all_reduce(self, value: str, output: str, axes: Sequence[int], shape: Sequence[int | str]) -> str:
        return self._collective("AllReduce", value, output, axes, None, shape, shape)

    def all_gather(self, value: str, output: str, axes: Sequence[int], dim: int, shape: Sequence[int | str]) -> str:
        whole = list(shape)
        size = whole[dim]
        whole[dim] = size * self.mesh.parts(axes) if isinstance(size, int) else f"{size}*{self.mesh.parts(axes)}"
        return self._collective("AllGather", value, output, axes, dim, shape, whole)

    def model(self, rank: int = 0) -> ModelProto:
        """The program of `rank` as one model with all weights inside (a whole model on a mesh of one rank)."""
        graph = helper.make_graph(self.nodes, "program", *self._interfaces(), value_info=list(self.values.values()))
        arrays = {name: weight.local(self.mesh, rank) for name, weight in self.weights.items()} | self.constants
        graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
        return helper.make_model(graph, opset_imports=OPSETS, ir_version=10)

    def write(self, folder: Path) -> Path:
        """Writes the artifact and returns its folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self._write_weights(folder)
        program = self._external(self.model(), folder)
        files = {
            PROGRAM_NAME: program.SerializeToString(),
            SOURCE_NAME: self._source().SerializeToString(),
            **self.files,
        }
        for name, content in files.items():
            (folder / name).write_bytes(content)
        (folder / MANIFEST_NAME).write_bytes(self.manifest(folder).to_bytes())
        return folder

    def manifest(self, folder: Path) -> Manifest:
        names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST_NAME)
        tensors = [self._stored(name, weight) for name, weight in self.weights.items()]
        arrays: Mapping[str, Array] = {**{n: w.array for n, w in self.weights.items()}, **self.constants}
        return Manifest(
            provenance=Provenance(tool="test 0", libraries={}, options={}, source_sha256="0" * 64),
            model=ModelInfo(
                name="test",
                task=self.task,
                max_sequence_length=self.max_sequence_length,
                vocab_size=None,
                eos_token_ids=self.eos_token_ids,
            ),
            mesh=self.mesh,
            files=tuple(file_entry(folder / name) for name in names),
            tensors=tuple(tensors),
            initializers=tuple(
                OriginalInitializer(
                    name=name,
                    dtype=dtype_name(array),
                    shape=array.shape,
                    stored=(name,) if name in self.weights else (),
                    sha256=hashlib.sha256(array.tobytes()).hexdigest() if name in self.weights else None,
                )
                for name, array in arrays.items()
            ),
            inputs=tuple(self.inputs),
            outputs=tuple(self.outputs),
            states=tuple(self.states),
            collectives=tuple(self.collectives),
            blocks=(),
            plan={},
        )

    def _source(self) -> ModelProto:
        """Only the initializers of the unsplit model, those that are stored without their data."""
        graph = helper.make_graph([], "source", [], [])
        for name, weight in self.weights.items():
            tensor = TensorProto(
                name=name, dims=weight.array.shape, data_type=helper.np_dtype_to_tensor_dtype(weight.array.dtype)
            )
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="artifact")
            graph.initializer.append(tensor)
        graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in self.constants.items())
        return helper.make_model(graph, opset_imports=OPSETS, ir_version=10)

    def _interface(self, name: str, shape: Sequence[Dim | str | int], dtype: str) -> dict[str, Any]:
        layout = [None if isinstance(d, str) else Leaf(d) if isinstance(d, int) else d for d in shape]
        local = [d if layout[i] is None else local_size(layout[i], self.mesh) for i, d in enumerate(shape)]  # type: ignore[arg-type]
        self.declare(name, local, dtype)  # type: ignore[arg-type]
        sizes = [d if isinstance(d, str) else global_size(Leaf(d) if isinstance(d, int) else d) for d in shape]
        return {"shape": tuple(sizes), "layout": tuple(layout)}

    def _interfaces(self) -> tuple[list[ValueInfoProto], list[ValueInfoProto]]:
        return [self.values[i.name] for i in self.inputs], [self.values[o.name] for o in self.outputs]

    def _collective(
        self,
        kind: Any,
        value: str,
        output: str,
        axes: Sequence[int],
        dim: int | None,
        shape: Sequence[int | str],
        whole: Sequence[int | str],
    ) -> str:
        if self.mesh.size == 1:
            return self.node("Identity", [value], output)
        name = f"collective{len(self.collectives)}"
        attributes: dict[str, Any] = {"axes": list(axes)} | ({} if dim is None else {"dim": dim})
        self.nodes.append(helper.make_node(kind, [value], [output], name=name, domain="furiosa_llm", **attributes))
        self.collectives.append(
            Collective(id=name, kind=kind, axes=tuple(axes), dim=dim, dtype="FLOAT", shape=tuple(shape))
        )
        self.declare(value, shape)
        self.declare(output, whole)
        return output

    def _write_weights(self, folder: Path) -> None:
        save_file({name: _stacked(weight, self.mesh) for name, weight in self.weights.items()}, folder / WEIGHTS)

    def _external(self, model: ModelProto, folder: Path) -> ModelProto:
        header = read_header(folder / WEIGHTS)
        for initializer in model.graph.initializer:
            weight = self.weights.get(initializer.name)
            if weight is None:
                continue
            nbytes = weight.local(self.mesh, 0).nbytes
            place = {"location": WEIGHTS, "offset": header[initializer.name].offset, "length": nbytes}
            initializer.ClearField("raw_data")
            initializer.data_location = TensorProto.EXTERNAL
            for key, value in place.items():
                initializer.external_data.add(key=key, value=str(value))
        return model

    def _stored(self, name: str, weight: Weight) -> StoredTensor:
        return StoredTensor(
            name=name,
            file=WEIGHTS,
            dtype=dtype_name(weight.array),
            local_shape=tuple(local_size(dim, self.mesh) for dim in weight.layout),
            shard_axes=weight.axes,
            layout=weight.layout,
            part=None,
            origin=name,
            sha256=hashlib.sha256(_stacked(weight, self.mesh).tobytes()).hexdigest(),
        )


def _stacked(weight: Weight, mesh: Mesh) -> Array:
    """All shards of a weight, `[number of shards, *local shape]`."""
    shards: dict[int, Array] = {}
    for rank in range(mesh.size):
        shards.setdefault(mesh.position(rank, weight.axes), weight.local(mesh, rank))
    return np.stack([shards[position] for position in sorted(shards)])


def dtype_name(array: Array) -> str:
    """ONNX's name of an array's type."""
    return str(TensorProto.DataType.Name(helper.np_dtype_to_tensor_dtype(array.dtype)))


def file_entry(path: Path) -> FileEntry:
    """The manifest's entry of a file."""
    content = path.read_bytes()
    return FileEntry(path=path.name, nbytes=len(content), sha256=hashlib.sha256(content).hexdigest())
