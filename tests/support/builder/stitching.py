"""Stitched models of programs that were lowered but not written, and sessions that run any model as it is."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort

from furiosa_llm.builder.lower.emit import Lowered
from furiosa_llm.builder.source.tensors import read_packed
from furiosa_llm.builder.write.closures import open_closures
from furiosa_llm.builder.write.shards import cut_shard
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.verification.stitching import SplitModel, stitch

__all__ = ["Array", "SplitModel", "of_lowered", "session", "stitch"]


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


def session(model: onnx.ModelProto, folder: Path | None = None) -> ort.InferenceSession:
    """A session that runs a model as it is written, on one thread; its external data lies in `folder`."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(model.SerializeToString(), options)
