"""Runs a split program without the runtime: the graphs of all ranks side by side in one onnxruntime session.

Every node, initializer and value of rank r is there under the prefix `r<r>/`; AllReduce is a Sum and AllGather a Concat
over the ranks of a group. What comes out is compared with the unsplit model, rank by rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import helper

from furiosa_llm.builder.control_flow import open_closures
from furiosa_llm.builder.lower import Lowered
from furiosa_llm.builder.program import COLLECTIVE_DOMAIN
from furiosa_llm.builder.tensor_reading import read_packed
from furiosa_llm.builder.weights import cut_shard
from furiosa_llm.runtime.artifact.layout import Dim, Mesh, axes_of, index_map
from furiosa_llm.runtime.artifact.program_checks import attribute_graphs
from furiosa_llm.runtime.artifact.reader import Artifact

Array = npt.NDArray[Any]
Layout = tuple[Dim | None, ...]
"""A layout per dimension; None (a dynamic dimension of a manifest) is whole."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitModel:
    """A program with what it takes to run it on all ranks of its mesh."""

    program: onnx.ModelProto
    mesh: Mesh
    inputs: Mapping[str, Layout]
    outputs: Mapping[str, Layout]
    initializer: Callable[[onnx.TensorProto, int], onnx.TensorProto]
    """The program's initializer as a rank sees it."""

    @staticmethod
    def of_lowered(lowered: Lowered, mesh: Mesh, ir_version: int = 10) -> SplitModel:
        """A program that was lowered but not written."""

        def initializer(proto: onnx.TensorProto, rank: int) -> onnx.TensorProto:
            tensor = lowered.tensors.get(proto.name)
            if tensor is None:
                return proto
            data = None if tensor.source is None else read_packed(tensor.source)
            pieces = cut_shard(tensor, data, mesh, mesh.position(rank, tensor.shard_axes))
            raw = b"".join(piece.tobytes() for piece in pieces)
            return onnx.TensorProto(name=proto.name, data_type=int(tensor.dtype), dims=tensor.local_shape, raw_data=raw)

        program = ir.to_proto(ir.Model(lowered.graph, ir_version=max(ir_version, 10)))
        open_closures(program)
        return SplitModel(
            program=program,
            mesh=mesh,
            inputs=lowered.input_layouts,
            outputs=lowered.output_layouts,
            initializer=initializer,
        )

    @staticmethod
    def of_artifact(artifact: Artifact) -> SplitModel:
        """The program of an artifact, with the weights that lie beside it."""

        def initializer(proto: onnx.TensorProto, rank: int) -> onnx.TensorProto:
            if proto.name not in artifact.tensors:
                return proto
            data = artifact.read_window(artifact.window(proto.name, rank)).tobytes()
            return onnx.TensorProto(name=proto.name, data_type=proto.data_type, dims=proto.dims, raw_data=data)

        manifest = artifact.manifest
        return SplitModel(
            program=artifact.program,
            mesh=manifest.mesh,
            inputs={info.name: info.layout for info in manifest.inputs},
            outputs={info.name: info.layout for info in manifest.outputs},
            initializer=initializer,
        )

    def session(self) -> ort.InferenceSession:
        """One session in which all ranks run."""
        return session(stitch(self))

    def run(
        self, stitched: ort.InferenceSession, feeds: Mapping[str, Array], padding: float = 0.0
    ) -> dict[str, list[Array]]:
        """The outputs of every rank for global `feeds`, by output name; `padding` is what split inputs have there."""
        wanted = {value.name for value in stitched.get_inputs()}
        local_feeds = self.local_feeds(feeds, padding)
        names = [value.name for value in stitched.get_outputs()]
        results = stitched.run(names, {n: a for n, a in local_feeds.items() if n in wanted})
        by_name = dict(zip(names, results, strict=True))
        return {name: [by_name[f"r{rank}/{name}"] for rank in range(self.mesh.size)] for name in self.outputs}

    def local_feeds(self, feeds: Mapping[str, Array], padding: float = 0.0) -> dict[str, Array]:
        """The inputs of the stitched model."""
        return {
            f"r{rank}/{name}": local(array, self.inputs[name], self.mesh, rank, padding)
            for name, array in feeds.items()
            for rank in self._ranks()
        }

    def greatest_error(self, found: Mapping[str, Sequence[Array]], expected: Mapping[str, Array]) -> dict[str, float]:
        """For each output the greatest error over all ranks, relative to the output's greatest value.

        Every rank's part is compared, padding left out; a wrong shape, an element that no rank has, or one that is not
        finite is an infinite error.
        """
        return {
            name: max(
                _error(found[name], expected[name], [self._indices(name, expected[name], r) for r in self._ranks()]),
            )
            for name in self.outputs
        }

    def _ranks(self) -> range:
        return range(self.mesh.size)

    def _indices(self, name: str, whole: Array, rank: int) -> list[npt.NDArray[np.int64]]:
        return [
            np.arange(size) if dim is None or not axes_of(dim) else index_map(dim, self.mesh, rank)
            for dim, size in zip(self.outputs[name], whole.shape, strict=True)
        ]


def _error(parts: Sequence[Array], whole: Array, maps: Sequence[Sequence[npt.NDArray[np.int64]]]) -> list[float]:
    scale = float(np.abs(whole.astype(np.float64)).max(initial=0.0)) or 1.0
    covered = np.zeros(whole.shape, dtype=np.bool_)
    errors = []
    for part, indices in zip(parts, maps, strict=True):
        if part.shape != tuple(len(i) for i in indices) or part.dtype != whole.dtype:
            return [float("inf")]
        valid = [np.flatnonzero(i >= 0) for i in indices]
        place = np.ix_(*[i[v] for i, v in zip(indices, valid, strict=True)])
        covered[place] = True
        difference = np.abs(part[np.ix_(*valid)].astype(np.float64) - whole[place].astype(np.float64))
        errors.append(float(difference.max(initial=0.0)) / scale)
    if not covered.all():
        return [float("inf")]
    return [e if np.isfinite(e) else float("inf") for e in errors]


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    """A session that runs a model as it is written, on one thread."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options)


def local(array: Array, layout: Layout, mesh: Mesh, rank: int, padding: float = 0.0) -> Array:
    """What a rank sees of an input: its part of every dimension."""
    for d, dim in enumerate(layout):
        if dim is not None and axes_of(dim):
            indices = index_map(dim, mesh, rank)
            array = np.take(array, np.maximum(indices, 0), axis=d)
            array[(slice(None),) * d + (indices < 0,)] = padding
    return array


def stitch(split: SplitModel) -> onnx.ModelProto:
    """The model of all ranks."""
    graph, ranks = split.program.graph, range(split.mesh.size)
    initializers = []
    for proto in graph.initializer:
        for rank in ranks:
            own = onnx.TensorProto()
            own.CopyFrom(split.initializer(proto, rank))
            own.name = f"r{rank}/{proto.name}"
            initializers.append(own)
    nodes = []
    for node in graph.node:
        if node.domain == COLLECTIVE_DOMAIN:
            nodes += _collective(node, split.mesh)
        else:
            nodes += [_copy(node, rank) for rank in ranks]
    inputs = [_untyped(value, rank) for value in graph.input for rank in ranks]
    outputs = [_untyped(value, rank) for value in graph.output for rank in ranks]
    stitched = helper.make_graph(nodes, "stitched", inputs, outputs, initializers)
    opsets = [entry for entry in split.program.opset_import if entry.domain != COLLECTIVE_DOMAIN]
    return helper.make_model(stitched, opset_imports=opsets, ir_version=split.program.ir_version)


def _copy(node: onnx.NodeProto, rank: int) -> onnx.NodeProto:
    own = onnx.NodeProto()
    own.CopyFrom(node)
    own.name = f"r{rank}/{node.name}" if node.name else ""
    for names in (own.input, own.output):
        renamed = [f"r{rank}/{name}" if name else "" for name in names]
        del names[:]
        names.extend(renamed)
    for graph in attribute_graphs(own):
        copies = [_copy(inner, rank) for inner in graph.node]
        del graph.node[:], graph.value_info[:]
        graph.node.extend(copies)
        for value in (*graph.input, *graph.output, *graph.initializer):
            value.name = f"r{rank}/{value.name}"
    return own


def _collective(node: onnx.NodeProto, mesh: Mesh) -> list[onnx.NodeProto]:
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    nodes = []
    for group in mesh.groups(attributes["axes"]):
        sources = [f"r{rank}/{node.input[0]}" for rank in group]
        for rank in group:
            target = [f"r{rank}/{node.output[0]}"]
            if node.op_type == "AllReduce":  # by Add: onnxruntime's Sum knows no integers
                sums = [f"{target[0]}/sum{i}" for i in range(len(sources) - 2)] + target
                for left, right, total in zip([sources[0], *sums], sources[1:], sums, strict=False):
                    nodes.append(helper.make_node("Add", [left, right], [total]))
            else:
                nodes.append(helper.make_node("Concat", sources, target, axis=attributes["dim"]))
    return nodes


def _untyped(value: onnx.ValueInfoProto, rank: int) -> onnx.ValueInfoProto:
    own = onnx.ValueInfoProto()
    own.CopyFrom(value)
    own.name = f"r{rank}/{value.name}"
    own.type.tensor_type.ClearField("shape")
    return own
