"""Makes the sessions of a program, one for each (segment, lane), in several threads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from onnx import ModelProto, TensorProto

from furiosa_llm.runtime.artifact.compute import narrow_types
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.errors import ExecutionError
from furiosa_llm.runtime.execution.ort import ORT_ERRORS, Session, SessionSettings, load_error
from furiosa_llm.runtime.program.lanes import Lanes, LaneSegment
from furiosa_llm.runtime.program.segments import program_part

_INLINE_NBYTES = 1024
"""Tensors up to this size go into the model itself: onnxruntime can then fold them."""

SectionSessions = tuple[Session | None, ...]
"""The sessions of one section, by lane; None where a lane has nothing to compute, or is not this process's."""


def create_sessions(
    artifact: Artifact,
    lanes: Lanes,
    settings: SessionSettings,
    *,
    threads: int,
    own: Collection[int] | None = None,
) -> tuple[SectionSessions, ...]:
    """For each section of the lanes' program the sessions of the lanes `own` (None: all).

    `threads` sessions are made at a time. Raises ExecutionError, naming segment and ranks, if onnxruntime refuses one.
    """
    loader = SegmentLoader(artifact, lanes, settings)
    with ThreadPoolExecutor(threads, thread_name_prefix="furiosa-load") as pool:
        rows: list[list[Future[Session] | None]] = [
            [
                pool.submit(loader.load, segment, f"segment {index} of {ranks_text(lanes.ranks[lane])}")
                if segment is not None and (own is None or lane in own)
                else None
                for lane, segment in enumerate(section.segments)
            ]
            for index, section in enumerate(lanes.sections)
        ]
        try:
            return tuple(tuple(made if made is None else made.result() for made in row) for row in rows)
        except ExecutionError:
            pool.shutdown(cancel_futures=True)
            raise


def lane_model(lanes: Lanes, segment: LaneSegment, flexible: Mapping[str, int]) -> ModelProto:
    """`segment` as a model of its own, whose initializers are still the program's.

    `flexible` names values of the program whose given dimension is left open, because a buffer longer than the program
    says may be bound to them. A value that crosses no section has no type: onnxruntime infers it.
    """
    model = program_part(lanes.program, segment.nodes)
    for names, values in ((segment.inputs, model.graph.input), (segment.outputs, model.graph.output)):
        for name in names:
            value = values.add(name=name)
            kind, open_dim = lanes.types.get(name), flexible.get(name.partition("/")[2])
            if kind is None:
                continue
            value.type.tensor_type.elem_type = TensorProto.DataType.Value(kind.dtype)
            if kind.shape is None:
                continue
            shape = value.type.tensor_type.shape
            for position, size in enumerate(kind.shape):
                dim = shape.dim.add()
                if position == open_dim:
                    continue
                if isinstance(size, int):
                    dim.dim_value = size
                else:
                    dim.dim_param = size
    return model


class SegmentLoader:
    """Makes the sessions of one program's segments, or of parts of them."""

    def __init__(self, artifact: Artifact, lanes: Lanes, settings: SessionSettings) -> None:
        self._artifact = artifact
        self._lanes = lanes
        self._settings = settings
        self._flexible = {
            name: state.grown_dim
            for state in artifact.manifest.states
            if state.mode == "in_place"
            for name in (state.input, state.output)
        }
        self._stored = {tensor.name: tensor for tensor in lanes.program.model.graph.initializer}

    def load(self, segment: LaneSegment, what: str = "a part of a segment") -> Session:
        """The session of `segment`; raises ExecutionError, naming it by `what`, if onnxruntime refuses it.

        It is a KernelError if onnxruntime has no kernel for it.
        """
        model = lane_model(self._lanes, segment, self._flexible)
        for name, (original, rank) in segment.initializers.items():
            own = model.graph.initializer.add()
            own.CopyFrom(self._stored[original])
            own.name = name
            _point_at_window(own, self._artifact, original, rank)
        try:
            return Session(model.SerializeToString(), self._artifact.folder, self._settings)
        except ORT_ERRORS as error:
            where = f"{what} of {self._artifact.folder}"
            raise load_error(where, error, narrow_types(self._lanes.program.model)) from error


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 3` or `ranks 0 to 3`, for messages."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def _point_at_window(initializer: TensorProto, artifact: Artifact, name: str, rank: int) -> None:
    """Gives a stored tensor the data of `rank`: inline if it is small, else the place of its window."""
    if name not in artifact.tensors:
        return
    window = artifact.window(name, rank)
    if window.nbytes <= _INLINE_NBYTES:
        initializer.ClearField("external_data")
        initializer.data_location = TensorProto.DEFAULT
        initializer.raw_data = artifact.read_window(window).tobytes()
        return
    for entry in initializer.external_data:
        if entry.key == "offset":
            entry.value = str(window.offset)
