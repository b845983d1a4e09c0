"""All ranks of a split program side by side in one onnxruntime session: its results without our executor.

Every node and value of rank r has the prefix `r<r>/`; what is the same on all ranks is there once, under `all/`.
AllReduce is a chain of additions, and AllGather a Concat, over the ranks of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN, attribute_graphs
from furiosa_llm.runtime.artifact.layout import Dim, Mesh, axes_of, index_map
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.execution.ort import Session, SessionSettings, let_allocate, limited, unwrap, wrap
from furiosa_llm.runtime.program.limits import WorkLimits

Layout = tuple[Dim | None, ...]
"""A layout per dimension; None (a dynamic dimension of a manifest) is whole."""

_INLINE_NBYTES = 1024
"""Tensors up to this size go into the model itself, where onnxruntime can see the sizes and positions in them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitModel:
    """A program with all that is needed to run it on all ranks of its mesh."""

    program: ModelProto
    mesh: Mesh
    inputs: Mapping[str, Layout]
    """The layouts of the global inputs."""
    outputs: Mapping[str, Layout]
    """The layouts of the global outputs."""
    initializer: Callable[[TensorProto, int], TensorProto]
    """Returns an initializer of the program as a rank sees it: inline, or external in a file of `folder`."""
    shared: frozenset[str] = frozenset()
    """The names of the initializers that are equal on all ranks."""
    folder: Path = Path()

    @staticmethod
    def of_artifact(artifact: Artifact) -> SplitModel:
        """The program of an artifact; its weights stay in their files, of which onnxruntime maps the windows."""

        def initializer(proto: TensorProto, rank: int) -> TensorProto:
            if proto.name not in artifact.tensors:
                return proto
            window = artifact.window(proto.name, rank)
            own = TensorProto(name=proto.name, data_type=proto.data_type, dims=proto.dims)
            if window.nbytes <= _INLINE_NBYTES:
                own.raw_data = artifact.read_window(window).tobytes()
                return own
            own.data_location = TensorProto.EXTERNAL
            for key, value in (("location", window.file), ("offset", window.offset), ("length", window.nbytes)):
                own.external_data.add(key=key, value=str(value))
            return own

        manifest = artifact.manifest
        return SplitModel(
            program=artifact.program,
            mesh=manifest.mesh,
            inputs={info.name: info.layout for info in manifest.inputs},
            outputs={info.name: info.layout for info in manifest.outputs},
            initializer=initializer,
            shared=frozenset(
                proto.name
                for proto in artifact.program.graph.initializer
                if proto.name not in artifact.tensors or not artifact.tensors[proto.name].shard_axes
            ),
            folder=artifact.files.address,
        )

    def session(self, threads: int = 1, limits: WorkLimits | None = None) -> Session:
        """One session that runs all ranks as the program is written, without rewriting it; raises one of ORT_ERRORS.

        `threads` are onnxruntime's intra-op threads.
        """
        settings = SessionSettings(intra_op_threads=threads, prepack=False, exact=True, optimize=False)
        return Session(stitch(self), self.folder, limited(settings, limits))

    def run(self, session: Session, feeds: Mapping[str, Array], padding: float = 0.0) -> dict[str, list[Array]]:
        """The outputs of every rank for global `feeds`, by output name; `padding` is what split inputs have there.

        Raises one of ORT_ERRORS if a node fails, and StepTimeoutError if it takes longer than it may.
        """
        binding = session.binding()
        inputs = {value.name: _dtype(value) for value in self.program.graph.input}
        outputs = {value.name: _dtype(value) for value in self.program.graph.output}
        local = self.local_feeds({name: feeds[name] for name in inputs}, padding)
        tensors = {
            name: wrap(np.asarray(array, order="C"), inputs[name.partition("/")[2]]) for name, array in local.items()
        }
        for name, tensor in tensors.items():
            binding.bind_ortvalue_input(name, tensor.raw)
        names = [(rank, name) for name in outputs for rank in self._ranks()]
        for rank, name in names:
            let_allocate(binding, _own(rank, name))
        session.run_in_time(binding)
        found: dict[str, list[Array]] = {name: [] for name in outputs}
        for (_, name), raw in zip(names, binding.get_outputs(), strict=True):
            found[name].append(unwrap(raw, outputs[name]).array.copy())
        return found

    def local_feeds(self, feeds: Mapping[str, Array], padding: float = 0.0) -> dict[str, Array]:
        """The inputs of the stitched model."""
        return {
            _own(rank, name): _local(array, self.inputs[name], self.mesh, rank, padding)
            for name, array in feeds.items()
            for rank in self._ranks()
        }

    def parts(self, name: str, found: Sequence[Array], whole: Array) -> list[tuple[Array, Array]] | None:
        """Each rank's part of the output `name`, padding left out, paired with the same part of `whole`.

        None if a rank's shape or type differs from its part's, or if an element of `whole` is in no rank's part.
        """
        covered = np.zeros(whole.shape, dtype=np.bool_)
        pairs = []
        for rank, part in enumerate(found):
            indices = self._indices(name, whole.shape, rank)
            if part.shape != tuple(len(i) for i in indices) or part.dtype != whole.dtype:
                return None
            valid = [np.flatnonzero(i >= 0) for i in indices]
            place = np.ix_(*[i[v] for i, v in zip(indices, valid, strict=True)])
            covered[place] = True
            pairs.append((part[np.ix_(*valid)], whole[place]))
        return pairs if covered.all() else None

    def greatest_error(self, found: Mapping[str, Sequence[Array]], expected: Mapping[str, Array]) -> dict[str, float]:
        """For each output the greatest error over all ranks, relative to the output's greatest magnitude.

        Infinite for parts of another shape or type, for an element that no rank has, and for one that is not finite.
        """
        return {name: _error(self.parts(name, found[name], expected[name]), expected[name]) for name in self.outputs}

    def _ranks(self) -> range:
        return range(self.mesh.size)

    def _indices(self, name: str, shape: Sequence[int], rank: int) -> list[npt.NDArray[np.int64]]:
        return [
            np.arange(size) if dim is None or not axes_of(dim) else index_map(dim, self.mesh, rank)
            for dim, size in zip(self.outputs[name], shape, strict=True)
        ]


def _error(pairs: Sequence[tuple[Array, Array]] | None, whole: Array) -> float:
    if pairs is None:
        return float("inf")
    scale = float(np.abs(whole.astype(np.float64)).max(initial=0.0)) or 1.0
    errors = [
        float(np.abs(part.astype(np.float64) - same.astype(np.float64)).max(initial=0.0)) / scale
        for part, same in pairs
    ]
    return max(error if np.isfinite(error) else float("inf") for error in errors)


def _local(array: Array, layout: Layout, mesh: Mesh, rank: int, padding: float) -> Array:
    """What a rank sees of an input: its part of every dimension."""
    for d, dim in enumerate(layout):
        if dim is not None and axes_of(dim):
            indices = index_map(dim, mesh, rank)
            array = np.take(array, np.maximum(indices, 0), axis=d)
            array[(slice(None),) * d + (indices < 0,)] = padding
    return array


def _dtype(value: ValueInfoProto) -> str:
    return str(TensorProto.DataType.Name(value.type.tensor_type.elem_type))


# -- the stitched graph --------------------------------------------------------------------------------------------


def stitch(split: SplitModel) -> ModelProto:
    """The model of all ranks."""
    program, ranks = split.program, range(split.mesh.size)
    graph = GraphProto(name="stitched")
    for proto in program.graph.initializer:
        alike = proto.name in split.shared
        for rank in ranks[:1] if alike else ranks:
            own = graph.initializer.add()
            own.CopyFrom(split.initializer(proto, rank))
            own.name = f"all/{proto.name}" if alike else _own(rank, proto.name)
    for node in program.graph.node:
        if node.domain == COLLECTIVE_DOMAIN:
            graph.node.extend(_collective(node, split.mesh))
        else:
            graph.node.extend(_copy(node, rank, split.shared) for rank in ranks)
    graph.input.extend(_untyped(value, rank) for value in program.graph.input for rank in ranks)
    graph.output.extend(_untyped(value, rank) for value in program.graph.output for rank in ranks)
    stitched = ModelProto(ir_version=program.ir_version, graph=graph, functions=program.functions)
    stitched.opset_import.extend(entry for entry in program.opset_import if entry.domain != COLLECTIVE_DOMAIN)
    return stitched


def _own(rank: int, name: str) -> str:
    """The name of a rank's own `name`."""
    return f"r{rank}/{name}"


def _copy(node: NodeProto, rank: int, shared: frozenset[str]) -> NodeProto:
    own = NodeProto()
    own.CopyFrom(node)
    own.name = _own(rank, node.name) if node.name else ""
    for names in (own.input, own.output):
        renamed = [(f"all/{name}" if name in shared else _own(rank, name)) if name else "" for name in names]
        del names[:]
        names.extend(renamed)
    for graph in attribute_graphs(own):
        copies = [_copy(inner, rank, shared) for inner in graph.node]
        del graph.node[:], graph.value_info[:]
        graph.node.extend(copies)
        for value in (*graph.input, *graph.output, *graph.initializer):
            value.name = f"all/{value.name}" if value.name in shared else _own(rank, value.name)
    return own


def _collective(node: NodeProto, mesh: Mesh) -> list[NodeProto]:
    """What every rank of every group computes for a collective node."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    nodes = []
    for group in mesh.groups(attributes["axes"]):
        sources = [_own(rank, node.input[0]) for rank in group]
        for rank in group:
            target = _own(rank, node.output[0])
            if node.op_type == "AllReduce":  # by Add, because onnxruntime's Sum takes no integers
                sums = [*(f"{target}/sum{i}" for i in range(len(sources) - 2)), target]
                for left, right, total in zip([sources[0], *sums], sources[1:], sums, strict=False):
                    nodes.append(helper.make_node("Add", [left, right], [total]))
            else:
                nodes.append(helper.make_node("Concat", sources, [target], axis=attributes["dim"]))
    return nodes


def _untyped(value: ValueInfoProto, rank: int) -> ValueInfoProto:
    own = ValueInfoProto()
    own.CopyFrom(value)
    own.name = _own(rank, value.name)
    own.type.tensor_type.ClearField("shape")
    return own
