"""Parts of a program that are run by themselves before it is loaded: what they give says how the program may be run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from furiosa_llm.runtime.artifact.dimensions import parse_dimension
from furiosa_llm.runtime.artifact.dtypes import DTYPES, Array
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN, used_names
from furiosa_llm.runtime.artifact.manifest import InputInfo
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.errors import ExecutionError, StepTimeoutError
from furiosa_llm.runtime.execution.ort import (
    ORT_ERRORS,
    Session,
    SessionSettings,
    limit_memory,
    load_error,
    unwrap,
    wrap,
)
from furiosa_llm.runtime.program.limits import folded_nbytes, load_seconds, step_nbytes, step_seconds
from furiosa_llm.runtime.program.serving_graph import ServingGraph


def rows_are_alone(serving: ServingGraph, artifact: Artifact, *, longest: int) -> bool:
    """Whether rows of unequal lengths add to their scores, each, what the row would add alone.

    The part of the graph that makes these values is run as rank 0 has it, for rows of up to `longest` positions: this
    detects a window that is counted from the end of the longest row if it is shorter than `longest`. What it cannot
    make for so many, no step makes either (it has a table of fewer): then the rows are half as long, and so on.
    """
    if not serving.biases:
        return True
    part = part_of_graph(serving.model, artifact, serving.biases)
    if part is None:
        return False
    infos = [info for info in artifact.manifest.inputs if info.name in part.inputs]

    def biases(lengths: list[int]) -> list[Array]:
        return list(part.run({info.name: _feed(info, lengths) for info in infos}).values())

    while longest > 1:
        try:
            biases([longest - 1])
            break
        except StepTimeoutError:
            raise
        except ExecutionError:
            longest //= 2
    lengths = sorted({0, 1, 2, longest // 3, longest // 2, longest - 2, longest - 1} & set(range(longest)))
    together = biases(lengths)
    for row, length in enumerate(lengths):
        for ours, alone in zip(together, biases([length]), strict=True):
            own = ours[min(row, ours.shape[0] - 1)]
            if not np.array_equal(own[..., : length + 1], alone[0]):
                return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class PartOfGraph:
    """The part of a program that makes some values from its inputs, as rank 0 has it, ready to run.

    `inputs` are their types by name, and `what` is the part in messages.
    """

    session: Session
    inputs: Mapping[str, str]
    outputs: tuple[str, ...]
    what: str

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The values by name; `feeds` has all of `inputs`, and may have more.

        Raises ExecutionError if they do not fit, and StepTimeoutError if it takes too long.
        """
        fed = {name: wrap(np.asarray(feeds[name], order="C"), dtype) for name, dtype in self.inputs.items()}
        try:
            made = self.session.run({name: tensor.raw for name, tensor in fed.items()}, self.outputs)
        except ORT_ERRORS as error:
            raise ExecutionError(f"onnxruntime cannot run {self.what}: {error}") from error
        types = {name: TensorProto.DataType.Name(raw.element_type()) for name, raw in made.items()}
        return {name: unwrap(raw, types[name]).array for name, raw in made.items()}


def part_of_graph(source: ModelProto, artifact: Artifact, names: Sequence[str]) -> PartOfGraph | None:
    """The part of the program `source` that makes the values `names`; None if they wait for a collective.

    Raises ExecutionError if onnxruntime refuses it.
    """
    live = set(names)
    nodes: list[NodeProto] = []
    for node in reversed(source.graph.node):
        if live.intersection(node.output):
            if node.domain == COLLECTIVE_DOMAIN:
                return None
            nodes.append(node)
            live.update(used_names(node))
    graph = GraphProto(name="part", node=reversed(nodes))
    graph.initializer.extend(_inline(tensor, artifact) for tensor in source.graph.initializer if tensor.name in live)
    graph.input.extend(value for value in source.graph.input if value.name in live)
    graph.output.extend(ValueInfoProto(name=name) for name in names)
    model = ModelProto(ir_version=source.ir_version, graph=graph, functions=source.functions)
    model.opset_import.extend(source.opset_import)
    what = f"the part before the first collective that makes {names[0]!r:.80} in {artifact.folder}"
    return PartOfGraph(
        session=_session(model, artifact, what),
        inputs={v.name: TensorProto.DataType.Name(v.type.tensor_type.elem_type) for v in graph.input},
        outputs=tuple(names),
        what=what,
    )


def _session(model: ModelProto, artifact: Artifact, what: str) -> Session:
    """A session of a part, within the limits of the program."""
    manifest = artifact.manifest
    settings = SessionSettings(
        load_seconds=load_seconds(manifest, len(model.graph.node)),
        folded_nbytes=folded_nbytes(manifest),
        run_seconds=step_seconds(manifest, 1),
        arena=True,
    )
    limit_memory(step_nbytes(manifest))
    try:
        return Session(model, Path(tempfile.gettempdir()), settings)
    except ORT_ERRORS as error:
        raise load_error(what, error, model) from error


def _inline(tensor: TensorProto, artifact: Artifact) -> TensorProto:
    """`tensor` with the data of rank 0 in it."""
    if tensor.name not in artifact.tensors:
        return tensor
    data = artifact.read_window(artifact.window(tensor.name, 0)).tobytes()
    return TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=data)


def _feed(info: InputInfo, lengths: list[int]) -> Array:
    """What a decode step feeds to the input: one new token for rows that already have `lengths` tokens."""
    sizes = {"batch": len(lengths), "sequence": 1, "past": max(lengths), "total": max(lengths) + 1}
    shape = tuple(dim if isinstance(dim, int) else parse_dimension(dim).value(sizes) for dim in info.shape)
    array = np.zeros(shape, dtype=DTYPES[info.dtype].numpy)
    if info.role == "attention_mask":
        array[...] = np.arange(shape[-1]) <= np.array(lengths).reshape(-1, *[1] * (len(shape) - 1))
    elif info.role == "position_ids":
        array[...] = np.array(lengths)[:, None]
    return array
