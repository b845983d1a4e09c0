"""Makes the sessions of a program, one for each (rank, segment), in several threads."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from onnx import ModelProto, TensorProto

from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.errors import ExecutionError
from furiosa_llm.runtime.ort import ORT_ERRORS, Session, SessionSettings
from furiosa_llm.runtime.program import Program, segment_model

_INLINE_NBYTES = 1024
"""Tensors up to this size go into the model itself: onnxruntime can then fold them."""

RankSessions = tuple[Session, ...]
"""The sessions of one segment, by rank. Ranks whose windows are the same share one."""


def create_sessions(
    artifact: Artifact, program: Program, settings: SessionSettings, *, threads: int
) -> tuple[RankSessions | None, ...]:
    """For each step of `program` the sessions of its segment, None if it has none.

    `threads` sessions are made at a time. Raises ExecutionError, naming segment and rank, if onnxruntime refuses one.
    """
    flexible = {
        name: state.sequence_dim
        for state in artifact.manifest.states
        if state.mode == "in_place"
        for name in (state.input, state.output)
    }
    ranks = range(artifact.manifest.mesh.size)
    with ThreadPoolExecutor(threads, thread_name_prefix="furiosa-load") as pool:
        rows: list[list[Future[Session]] | None] = []
        for index, step in enumerate(program.steps):
            if step.segment is None:
                rows.append(None)
                continue
            model = segment_model(program, step.segment, flexible)
            made: dict[tuple[int, ...], Future[Session]] = {}
            row: list[Future[Session]] = []
            for rank in ranks:
                key = _patch(model, artifact, rank)
                if key not in made:
                    made[key] = pool.submit(_load, model.SerializeToString(), artifact, settings, index, rank)
                row.append(made[key])
            rows.append(row)
        try:
            return tuple(row if row is None else tuple(future.result() for future in row) for row in rows)
        except ExecutionError:
            pool.shutdown(cancel_futures=True)
            raise


def _load(model: bytes, artifact: Artifact, settings: SessionSettings, segment: int, rank: int) -> Session:
    try:
        return Session(model, artifact.folder, settings)
    except ORT_ERRORS as error:
        raise ExecutionError(
            f"onnxruntime cannot load segment {segment} of rank {rank} of {artifact.folder}: {error}"
        ) from error


def _patch(model: ModelProto, artifact: Artifact, rank: int) -> tuple[int, ...]:
    """Points the stored tensors of `model` at the windows of `rank`; returns the shard of each."""
    mesh = artifact.manifest.mesh
    key: list[int] = []
    for initializer in model.graph.initializer:
        tensor = artifact.tensors.get(initializer.name)
        if tensor is None:
            continue
        key.append(mesh.position(rank, tensor.shard_axes))
        window = artifact.window(tensor.name, rank)
        if window.nbytes <= _INLINE_NBYTES:
            initializer.ClearField("external_data")
            initializer.data_location = TensorProto.DEFAULT
            initializer.raw_data = artifact.read_window(window).tobytes()
            continue
        for entry in initializer.external_data:
            if entry.key == "offset":
                entry.value = str(window.offset)
    return tuple(key)
