"""Runs that a kernel takes one sequence at a time: the batch taken apart and its results put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from onnx import ModelProto

from furiosa_llm.runtime.artifact.dimensions import Shape, parse_dimension
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.manifest import InputInfo, OutputInfo

_BATCH = "batch"


def takes_chunks_singly(program: ModelProto) -> bool:
    """Whether the program takes several tokens after a past in a batch of one only: GroupQueryAttention does."""
    return any(node.op_type == "GroupQueryAttention" for node in program.graph.node)


def is_chunk_of_many(sizes: Mapping[str, int]) -> bool:
    """Whether a step of these sizes has several sequences with several new tokens after a past."""
    batch, sequence = sizes.get(_BATCH, 0), sizes.get("sequence", 0)
    return batch > 1 and sequence > 1 and sizes.get("past", sizes.get("total", sequence) - sequence) > 0


def run_singly(
    run: Callable[[Mapping[str, Array]], Mapping[str, Array]],
    inputs: Mapping[str, Array],
    *,
    infos: Sequence[InputInfo],
    outputs: Sequence[OutputInfo],
    batch: int,
) -> dict[str, Array]:
    """The outputs of `run` for a batch, run sequence by sequence; what has no dimension of the batch is the first's."""
    shapes = {info.name: info.shape for info in infos} | {info.name: info.shape for info in outputs}
    dims = {name: d for name, shape in shapes.items() if (d := batch_dim(shape)) is not None}
    parts = {name: np.split(array, batch, axis=dims[name]) for name, array in inputs.items() if name in dims}
    rows = [run({**inputs, **{name: part[row] for name, part in parts.items()}}) for row in range(batch)]
    return {
        info.name: np.concatenate([found[info.name] for found in rows], axis=dims[info.name])
        if info.name in dims
        else rows[0][info.name]
        for info in outputs
    }


def batch_dim(shape: Shape) -> int | None:
    """The dimension that has the sequences, or what there is of each of them side by side."""
    names = [() if isinstance(dim, int) else parse_dimension(dim).names[:1] for dim in shape]
    return next((d for d, first in enumerate(names) if first == (_BATCH,)), None)
